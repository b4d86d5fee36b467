"""The names that an experiment's settings take: open dictionaries, and closed lists.

A name in an open dictionary stands for a callable. `LOSSES["mine"] = my_loss` adds one, in your own
program, or in a file of your own that a run is told of (`--use my_module.py`, see `use`). The names
below are the shipped ones, each with the place of its callable, which is imported when it is asked
for: reading names, as the command line does, needs no PyTorch.
"""

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from bnnlib.errors import DataNotFound, InvalidValue, shown, unknown_name


class Registry(UserDict):
    """Names of one kind, each with its callable.

    Raises InvalidValue for an unknown name, for a value that cannot be called, and where a shipped
    name would come to mean something else.
    """

    def __init__(self, kind: str, shipped: Mapping[str, str]):
        self.kind, self.shipped = kind, tuple(shipped)
        self.data = dict(shipped)  # `module:attribute` until the name is first asked for

    def __getitem__(self, name: str) -> Callable:
        if name not in self.data:
            raise unknown_name(self.kind, name, self.data)
        value = self.data[name]
        if isinstance(value, str):
            module, _, attribute = value.partition(":")
            value = self.data[name] = getattr(importlib.import_module(module), attribute)
        return value

    def __setitem__(self, name: str, value: Callable) -> None:
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 100:
            raise InvalidValue(
                f"the name of a {self.kind} must be 1 to 100 printable characters, "
                f"got {shown(name)}"
            )
        if name in self.shipped:
            raise InvalidValue(f"{self.kind} {name!r} is bnnlib's own; choose another name")
        if not callable(value):
            raise InvalidValue(f"{self.kind} {name!r} must be something to call, got {value!r}")
        self.data[name] = value

    def __ior__(self, other: Mapping[str, Callable]) -> "Registry":
        self.update(other)  # name by name, as above
        return self


def _places(module: str, names: str) -> dict[str, str]:
    return {name: f"{module}:{name}" for name in names.split()}


# builds a network: see `models.build_network`
NETWORKS = Registry(
    "network",
    _places("bnnlib.models", "cifar10 svhn small linear dense_one dense mlp binary_resnet18")
    | _places("bnnlib.studies.chaos", "frozen frozen_batch"),
)
# latent weight -> weight, or (latent weight, generator) -> weight; or a class of such modules
QUANTIZERS = Registry(
    "quantizer",
    {
        "deterministic": "bnnlib.quantizers:binarize",
        "stochastic": "bnnlib.quantizers:binarize_stochastic",
        "real": "bnnlib.quantizers:real",
        "clipped": "bnnlib.quantizers:binary_tanh",
        "zero_one": "bnnlib.quantizers:binary_sigmoid",
    }
    | _places("bnnlib.quantizers", "approx_sign scaled_sign"),
)
# tensor -> tensor of the same shape, or a class of such modules
ACTIVATIONS = Registry(
    "activation",
    {
        "binary_tanh": "bnnlib.layers:BinaryTanh",
        "binary_sigmoid": "bnnlib.layers:BinarySigmoid",
        "straight_through": "bnnlib.quantizers:binarize",
        "hardtanh": "torch.nn:Hardtanh",
    }
    | _places("bnnlib.quantizers", "approx_sign approx_step"),
)
# (scores (B, C), labels (B,)) -> a scalar tensor
LOSSES = Registry(
    "loss",
    {
        "squared_hinge": "bnnlib.losses:squared_hinge_loss",
        "hinge": "bnnlib.losses:hinge_loss",
        "cross_entropy": "torch.nn.functional:cross_entropy",
    },
)
# (groups of parameters, lr=rate) -> a torch.optim.Optimizer
OPTIMIZERS = Registry(
    "optimizer",
    {"binary_adam": "bnnlib.optim:BinaryAdam", "bop": "bnnlib.optim:Bop"}
    # Without LBFGS, which needs a closure, SparseAdam (sparse gradients) and Muon (matrices).
    | _places(
        "torch.optim",
        "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD",
    ),
)
# what it takes of split, n, seed, root, download -> an ImageSet
DATASETS = Registry(
    "data set", _places("bnnlib.data.images", "svhn cifar10 glyphs shapes patterns")
)

# ------------------------------------------------------------------------------- closed lists

SPLITS = ("train", "valid", "test")
WEIGHT_MODES = ("deterministic", "stochastic", "real")  # of an evaluation
STATISTICS = ("running", "batch")
EVALUATION_CLASSES = ("mixed", "apart")
DROPOUT_POSITIONS = ("before_norm", "after_activation")
PENALTY_TARGETS = ("nothing", "weights", "gamma")
SCHEDULES = ("exponential", "linear")
PIXEL_ORDERS = ("kept", "shuffled", "random")
NOISE_SHAPES = ("white", "blurred", "images")
PROBES = ("flips", "saturation", "parts", "modes", "critical", "bits")
PRECISIONS = ("auto", "float32", "half")
DEVICES = ("auto", "cpu", "cuda", "cuda:N")

DRAWN = ("glyphs", "shapes", "patterns")  # in an order that is part of their seeds
SVHN_SUBSET = "svhn_exact_subset.npz"
# Images in each split. The real ones: `pylearn2/datasets/cifar10.py` and `svhn.py:135-136`.
SIZES = {
    "cifar10": {"train": 45_000, "valid": 5_000, "test": 10_000},
    "svhn": {
        "train": 73_257, "valid": 6_000, "test": 26_032, "extra": 531_131,
        "splitted_train": 598_388, "train_all": 604_388,
    },
} | {name: {"train": 10_000, "valid": 2_000, "test": 2_000} for name in DRAWN}  # fmt: skip

# ------------------------------------------------------------------------- files of the user's

USED: dict[str, str] = {}  # SHA-256 of each file that was imported by `use`, by its name


def use(path: str | Path) -> ModuleType:
    """Import a file of your own, which registers names; a run records its SHA-256.

    Modules beside it can be imported from it. Raises DataNotFound where there is no such file,
    InvalidValue for one that does not end in `.py`.
    """
    path = Path(path).expanduser().absolute()
    if path.suffix != ".py":
        raise InvalidValue(f"a file to use must end in .py, got {path}")
    if not path.is_file():
        raise DataNotFound(f"no file {path} to use")
    name = f"bnnlib_uses_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module  # so that what it defines can be pickled
    spec.loader.exec_module(module)
    USED[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return module


def used_files() -> dict[str, str]:
    """SHA-256 of each file that was imported by `use`, by its absolute path."""
    modules = {name: sys.modules[f"bnnlib_uses_{Path(name).stem}"] for name in USED}
    return {module.__file__: USED[name] for name, module in modules.items()}


def parameters_of(function: Callable) -> Mapping[str, inspect.Parameter]:
    """The parameters in a function's signature; none where it has none, as `torch.tanh`."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return {}


def check_dataset(kind: str, name: str, allowed: Iterable[str] = DATASETS) -> None:
    """Raise InvalidValue unless this is an allowed name of a data set, or the path of a file."""
    if not name.endswith(".npz") and name not in allowed:
        raise unknown_name(kind, name, (*allowed, "a path ending in .npz"))


def check_device(name: object) -> None:
    """Raise InvalidValue unless this is the name of a device, there or not."""
    if not isinstance(name, str) or not re.fullmatch("auto|(cpu|cuda)(:[0-9]+)?", name):
        raise unknown_name("device", name, DEVICES)


def accepted(function: Callable, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the offered arguments that a function takes, by the names in its signature."""
    taken = parameters_of(function)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return dict(offered)
    return {name: value for name, value in offered.items() if name in taken}
