"""Every module of bnnlib imports only from modules that a reader has met before it."""

import ast
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import bnnlib

PACKAGE = Path(bnnlib.__file__).parent
ORDER = re.findall(r"\w+", bnnlib.__doc__.split("\n\n")[1])  # stated once, in the docstring


def modules_on_disk():
    return {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}


def imports_from_bnnlib(path):
    """Modules of bnnlib that the file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "bnnlib":
            names = [f"bnnlib.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write imports out in full"
            names = [node.module]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("bnnlib."))


def test_the_order_names_every_module_once():
    assert sorted(ORDER) == sorted(modules_on_disk())


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_modules_before_it(module):
    before = ORDER[: ORDER.index(module)]
    assert set(imports_from_bnnlib(PACKAGE / f"{module}.py")) <= set(before)


@pytest.mark.parametrize(("module", "following"), list(pairwise(ORDER)))
def test_a_module_that_names_the_next_file_names_the_right_one(module, following):
    docstring = ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text()))
    named = re.search(r"Next file:\s+`(\w+)\.py`", docstring)
    assert named, f"{module}.py does not say which file comes next"
    assert named[1] == following


def test_running_experiments_needs_no_notebook_figure_or_torchvision():
    heavy = {"IPython", "ipykernel", "jupyter_core", "matplotlib", "pandas", "scipy", "torchvision"}
    command = f"import sys, bnnlib.experiments; print(*({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
