"""What is installed elsewhere holds what the book shows of long runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bnnlib.runs.ledger import results

PROJECT = Path(__file__).parents[1]
LOOK = """
import json
from bnnlib.runs import ledger
from bnnlib.studies import claims
print(json.dumps({
    "root": str(ledger.RESULTS),
    "runs": list(ledger.results()["digest"]),
    "reliability": len(claims.reliability()),
    "tables": sorted(path.name for path in (ledger.RESULTS / "tables").iterdir()),
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what setuptools puts into a wheel."""
    pytest.importorskip("setuptools")
    copy, target = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, copy)
    for name in ("bnnlib", "results"):
        shutil.copytree(PROJECT / name, copy / name)
    build = "import setuptools; setuptools.setup()"
    command = [sys.executable, "-c", build, "-q", "build_py", "--build-lib", str(target)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    return target


def test_an_installed_bnnlib_has_the_stored_runs(installed, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(installed)!r})\n{LOOK}"
    found = json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path))
    assert found["root"] == str(installed / "bnnlib" / "stored")
    assert found["runs"] == list(results()["digest"])
    assert found["reliability"] > 0
    tables = ["capacity", "chaos", "images", "perceptron", "recipes"]
    assert found["tables"] == [f"{name}.csv" for name in tables]


def test_every_stored_file_but_a_picture_is_installed(installed):
    there, packed = (
        {path.relative_to(root) for path in root.rglob("*.[!p]*")}
        for root in (PROJECT / "results", installed / "bnnlib" / "stored")
    )
    assert packed == there
