"""Names that stand for callables: shipped ones, one's own, and files that register them."""

import hashlib
import subprocess
import sys
from functools import partial

import pytest

from bnnlib import names
from bnnlib.errors import DataNotFound, InvalidValue
from bnnlib.names import Registry, accepted, check_dataset, use

REGISTRIES = [value for value in vars(names).values() if isinstance(value, Registry)]
EACH = [(registry, name) for registry in REGISTRIES for name in registry.shipped]

each_registry = pytest.mark.parametrize("registry", REGISTRIES, ids=lambda r: r.kind)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Leaves the registries, the list of used files and Python's own as they were."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "data", dict(registry.data))
    monkeypatch.setattr(names, "USED", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith(("bnnlib_uses_", "beside_")):
            del sys.modules[name]


def mine(*values):
    return values


# ------------------------------------------------------------------------------- registries


def test_there_are_six_registries():
    kinds = ["network", "quantizer", "activation", "loss", "optimizer", "data set"]
    assert [registry.kind for registry in REGISTRIES] == kinds


@pytest.mark.parametrize(("registry", "name"), EACH, ids=lambda part: getattr(part, "kind", part))
def test_every_shipped_name_stands_for_a_callable(registry, name):
    assert callable(registry[name])
    assert registry[name] is registry[name]


def test_names_are_read_without_pytorch():
    code = "import sys; from bnnlib.names import *; "
    code += "[list(r) for r in (NETWORKS, LOSSES, QUANTIZERS)]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@each_registry
def test_an_own_name_is_taken_beside_the_shipped_ones_and_can_be_changed(registry):
    shipped = list(registry)
    registry["mine"] = max
    registry["mine"] = mine
    assert registry["mine"] is mine
    assert "mine" in registry
    assert list(registry) == [*shipped, "mine"]


@each_registry
def test_an_unknown_name_is_refused_with_the_nearest(registry):
    name = next(iter(registry))
    registry["my_own"] = mine
    for wrong, right in ((name + "x", name), ("my_onw", "my_own")):
        text = f"unknown {registry.kind} '{wrong}'; did you mean '{right}'.*allowed: .*my_own"
        with pytest.raises(InvalidValue, match=text):
            registry[wrong]


@each_registry
def test_a_shipped_name_never_means_something_else(registry):
    name = next(iter(registry))
    before = registry[name]
    for override in (
        lambda: registry.__setitem__(name, mine),
        lambda: registry.update({name: mine}),
        lambda: registry.__ior__({name: mine}),
    ):
        with pytest.raises(InvalidValue, match=f"{registry.kind} '{name}' is bnnlib's own; choose"):
            override()
    assert registry[name] is before


@each_registry
@pytest.mark.parametrize("value", ["bnnlib.losses:hinge_loss", None, 3, [mine]])
def test_what_cannot_be_called_is_refused(registry, value):
    with pytest.raises(InvalidValue, match=f"{registry.kind} 'mine' must be something to call"):
        registry["mine"] = value
    assert "mine" not in registry


@pytest.mark.parametrize("name", ["", "x" * 101, "a\x1b[2J", 3, None, ["mine"]])
def test_a_name_that_no_file_should_hold_is_refused(name):
    with pytest.raises(InvalidValue, match="name of a loss must be 1 to 100 printable characters"):
        names.LOSSES[name] = mine


def test_a_data_set_has_a_name_or_is_a_file():
    check_dataset("data set", "svhn")
    check_dataset("data set", "/some/where/mine.npz")
    with pytest.raises(InvalidValue, match=r"unknown data set 'mine' \(allowed: .*, a path ending"):
        check_dataset("data set", "mine")
    names.DATASETS["mine"] = mine
    check_dataset("data set", "mine")
    with pytest.raises(InvalidValue, match=r"did you mean 'glyphs'\? \(allowed: glyphs, a path"):
        check_dataset("dataset", "glyph", ["glyphs"])


# --------------------------------------------------------------------------- files of the user's

CODE = """
from bnnlib.names import LOSSES
from beside_{0} import scale

def scaled(scores, labels):
    return scale * scores

LOSSES["scaled"] = scaled
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "beside_mine.py").write_text("scale = 3\n")
    (tmp_path / "mine.py").write_text(CODE.format("mine"))
    return tmp_path / "mine.py"


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_used_file_registers_its_names_and_its_hash(file, kind):
    module = use(kind(file))
    assert names.LOSSES["scaled"](2, None) == 6
    assert names.LOSSES["scaled"] is module.scaled
    assert module.scaled.__module__ in sys.modules
    assert {"mine.py": hashlib.sha256(file.read_bytes()).hexdigest()} == names.USED


def test_a_relative_path_is_taken_from_here(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert use("mine.py").scaled is names.LOSSES["scaled"]


def test_a_file_that_was_changed_is_read_anew(file):
    use(file)
    file.write_text(file.read_text().replace("scale *", "1000 * scale *"))
    use(file)
    assert names.LOSSES["scaled"](2, None) == 6000
    assert {"mine.py": hashlib.sha256(file.read_bytes()).hexdigest()} == names.USED


def test_what_is_no_such_file_is_refused(file, tmp_path):
    with pytest.raises(DataNotFound, match=r"no file .*other\.py to use"):
        use(tmp_path / "other.py")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(DataNotFound, match=r"no file .*folder\.py to use"):
        use(tmp_path / "folder.py")
    for name in ("mine.txt", "mine", "mine.pyc"):
        with pytest.raises(InvalidValue, match=rf"a file to use must end in \.py, got .*{name}"):
            use(tmp_path / name)
    assert names.USED == {}


def test_a_file_that_fails_is_not_taken_for_used(file):
    file.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        use(file)
    assert names.USED == {}
    file.write_text('from bnnlib.names import LOSSES\nLOSSES["hinge"] = max\n')
    with pytest.raises(InvalidValue, match="loss 'hinge' is bnnlib's own"):
        use(file)


# ------------------------------------------------------------------------------- arguments


class Takes:
    def __init__(self, width, *, seed=0):
        pass


@pytest.mark.parametrize(
    ("function", "taken"),
    [
        (lambda: None, ()),
        (lambda width: None, ("width",)),
        (lambda width, *, seed: None, ("width", "seed")),
        (lambda other=1: None, ()),
        (lambda width, **more: None, ("width", "seed", "n")),
        (Takes, ("width", "seed")),
        (partial(lambda split, width, n: None, "train"), ("width", "n")),
        (max, ()),  # of C, without a signature
    ],
)
def test_a_function_is_offered_what_its_signature_takes(function, taken):
    offered = {"width": 1, "seed": 2, "n": 3}
    assert accepted(function, offered) == {name: offered[name] for name in taken}
