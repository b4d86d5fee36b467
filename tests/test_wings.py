"""A module imports only what stands before it, and the public names are there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bnnlib

PACKAGE = Path(bnnlib.__file__).parent
# The floors, from the ground; a wing has the order of its own modules beside it.
FLOORS = {
    "process": (),
    "errors": (),
    "files": (),
    "tensors": (),
    "names": (),
    "parallel": (),
    "quantizers": (),
    "kernels": (
        *("geometry", "definitions", "compiled", "bits"),
        *("products", "precision", "graphs"),
    ),
    "layers": (),
    "models": (),
    "losses": (),
    "optim": (),
    "data": (
        *("drawn.drawing", "drawn.glyphs", "drawn.shapes", "drawn.patterns", "drawn"),
        *("npz", "published", "images"),
    ),
    "corruption": (),
    "batches": (),
    "packed": ("fold", "steps", "network", "packing"),
    "export": (),
    "history": (),
    "training": (),
    "probes": (),
    "plots": (),
    "interactive": (),
    "experiments": ("experiment", "originals", "variants", "profiles", "scored", "build"),
    "runs": (
        *("interrupts", "record", "result", "checkpoint", "folder"),
        *("ledger", "evaluation", "run"),
    ),
    "studies": ("chaos", "perceptron", "capacity", "claims", "reproduction"),
    "notebook": (),
    "sweeps": (
        *("tasks", "chapters", "grid", "books", "state", "worker"),
        *("client", "clusters", "where", "cost", "plan", "progress", "launch"),
    ),
    "cli": ("shell", "texts", "options", "running", "sweeping", "looking"),
    "__main__": (),
}
ORDER = [
    f"bnnlib.{floor}{part and '.'}{part}"
    for floor, parts in FLOORS.items()
    for part in (*parts, "")
]


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def test_the_order_names_every_module():
    assert set(MODULES) - {"bnnlib"} == set(ORDER)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "bnnlib"])
def test_a_module_imports_only_modules_before_it(module):
    imported = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "bnnlib":
            within = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            imported |= within or {node.module}
    assert imported - {"bnnlib"} <= set(ORDER[: ORDER.index(module)])


def test_the_contents_page_shows_the_floors_from_the_top():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    picture = text.split("```text\n")[1].split("```")[0].splitlines()
    lines = [line.split() for line in picture if not line.startswith("---")]
    shown = [words[words[0].endswith("/") and words[0] != "drawn/"] for words in lines]
    modules = [part for floor, parts in FLOORS.items() for part in parts or (floor,)]
    modules = [name for name in modules if "." not in name and name != "__main__"]
    assert [name.strip("/") for name in reversed(shown)] == modules


def test_every_public_name_is_there_and_an_unknown_one_is_an_attribute_error():
    assert len(bnnlib.__all__) == len(set(bnnlib.__all__))
    assert all(getattr(bnnlib, name) is not None for name in bnnlib.__all__)
    with pytest.raises(AttributeError, match="no name 'binaryConv2d'"):
        bnnlib.binaryConv2d  # noqa: B018


def test_importing_bnnlib_and_its_commands_loads_neither_torch_nor_pandas():
    code = "import sys, bnnlib, bnnlib.cli; before = {'torch', 'pandas'} & {*sys.modules}; "
    code += "bnnlib.sign; sys.exit(bool(before) or 'torch' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
