"""An experiment as data: its fields, what each may hold, and which contradict each other."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from numbers import Integral, Real
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np

from bnnlib.errors import InvalidValue, check_name, shown
from bnnlib.names import (
    ACTIVATIONS,
    DATASETS,
    DRAWN,
    DROPOUT_POSITIONS,
    EVALUATION_CLASSES,
    LOSSES,
    NETWORKS,
    NOISE_SHAPES,
    OPTIMIZERS,
    PENALTY_TARGETS,
    PIXEL_ORDERS,
    PROBES,
    QUANTIZERS,
    SCHEDULES,
    SIZES,
    SPLITS,
    STATISTICS,
    WEIGHT_MODES,
    check_dataset,
)

FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # folders are named by `name`
LONGEST_TEXT = 1000  # characters


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; `above` leaves `low` out, `below` leaves `high` out."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:  # NaN lies in no range
        return (self.low < value or (self.low == value and not self.above)) and (
            value < self.high or (self.high == value and not self.below)
        )

    def __str__(self) -> str:
        if not (self.above or self.below):
            return f"{self.low:,} to {self.high:,}"
        low = f"above {self.low:,}" if self.above else f"at least {self.low:,}"
        return f"{low} and {'below' if self.below else 'at most'} {self.high:,}"


# The files of strangers are read into experiments too, so every number has an upper bound: what
# lies above it could only exhaust memory, disk or patience. The last text of a hint is the meaning.
SEEDS = Range(0, 2**63 - 1)
IMAGES = Range(0, 10**8)
FACTORS = Range(0, 10**6)
RATES = Range(0, 100)


@dataclass(frozen=True)
class Experiment:
    """Everything that decides a run. Variants: `dataclasses.replace(experiment, field=...)`.

    NumPy's numbers become Python's, an int a float where the field is one, a list a tuple.
    Raises InvalidValue for a name, type or number outside what the field allows, and for
    fields that contradict each other.
    """

    name: Annotated[str, "the name of its runs' folder"]
    summary: Annotated[str, "one sentence"]
    dataset: Annotated[str, DATASETS, "a data set, or the path of a .npz file"]
    network: Annotated[str, NETWORKS, "what is trained"]
    epochs: Annotated[int, Range(0, 10**5), "passes over the training images"]
    lr_final: Annotated[float, RATES, "learning rate towards which the schedule falls"]
    script: Annotated[str, "the original's file"] = ""
    lr_start: Annotated[float, Range(0, 100, above=True), "learning rate of the first epoch"] = 1e-3
    schedule: Annotated[str, SCHEDULES, "how the rate falls, epoch by epoch"] = "exponential"
    batch_size: Annotated[int, Range(1, 10**6), "images in a training step"] = 50
    loss: Annotated[str, LOSSES, "what is minimized"] = "squared_hinge"
    optimizer: Annotated[str, OPTIMIZERS, "how parameters move"] = "binary_adam"

    width: Annotated[float, Range(0, 64, above=True), "factor on channels and hidden units"] = 1.0
    binary: Annotated[bool, "false: the full-precision twin"] = True
    activation: Annotated[str, ACTIVATIONS, "what follows a layer"] = "binary_tanh"
    weights: Annotated[str, QUANTIZERS, "what is made of W, such as sign(W)"] = "deterministic"
    evaluation_weights: Annotated[str, WEIGHT_MODES, "the same in evaluation"] = "deterministic"
    evaluation_statistics: Annotated[str, STATISTICS, "of normalization in evaluation"] = "running"
    evaluation_classes: Annotated[
        str, EVALUATION_CLASSES, "apart: class errors from batches of one class"
    ] = "mixed"
    evaluation_samples: Annotated[int, Range(1, 10**4), "passes whose scores are averaged"] = 1
    dropout: Annotated[
        tuple[float, ...], Range(0, 1, below=True), "drop rates of dense layers"
    ] = ()
    dropout_position: Annotated[str, DROPOUT_POSITIONS, "where dropout is done"] = "before_norm"
    l2: Annotated[float, FACTORS, "coefficient of the penalty on the dense layers"] = 0.0
    l2_target: Annotated[str, PENALTY_TARGETS, "what it reaches; originally nothing"] = "nothing"

    random_labels: Annotated[float, Range(0, 1), "share of the labels drawn anew"] = 0.0
    random_label_splits: Annotated[tuple[str, ...], SPLITS, "where labels are drawn anew"] = SPLITS
    gaussian_variance: Annotated[float, FACTORS, "of noise in place of images; 0: images"] = 0.0
    gaussian_splits: Annotated[tuple[str, ...], SPLITS, "where noise replaces them"] = ("train",)
    gaussian_matched: Annotated[bool, "true: with the images' own mean and variance"] = False
    gaussian_shape: Annotated[str, NOISE_SHAPES, "images: with the images' covariance"] = "white"
    pixels: Annotated[str, PIXEL_ORDERS, "shuffled: all alike; random: each its own way"] = "kept"

    n_train: Annotated[int | None, Range(1, 10**8), "first training images; none: all"] = None
    n_valid: Annotated[int | None, IMAGES, "validation images; 0: no validation"] = None
    n_test: Annotated[int | None, IMAGES, "test images; 0: no test"] = None
    evaluate_every: Annotated[int, Range(1, 10**6), "epochs between two evaluations"] = 1
    probes: Annotated[tuple[str, ...], PROBES, "more columns for the history"] = ()

    seed: Annotated[int, SEEDS, "of initial weights, batches, dropout, sampled weights"] = 0
    corruption_seed: Annotated[int, SEEDS, "of random labels and Gaussian inputs"] = 0
    data_seed: Annotated[int, SEEDS, "which drawing of a drawn data set"] = 0
    original_seed: Annotated[int | None, SEEDS, "NumPy's, in the original's script"] = None

    evaluates: Annotated[str, "the experiment whose run is scored; nothing: this one trains"] = ""
    evaluation_rows: Annotated[int | None, Range(1, 10**8), "first rows scored; none: all"] = None
    run_folder: Annotated[str, "the run that is scored"] = ""

    def __new__(cls, *values, **named):
        for name in named:
            check_name("field", name, FIELDS)
        return super().__new__(cls)

    def __post_init__(self):
        for name, hint in FIELDS.items():
            object.__setattr__(self, name, as_type(name, getattr(self, name), hint))
        for name, allowed in ALLOWED.items():
            _check_allowed(name, getattr(self, name), allowed)
        _check_texts(self)
        for problem in _contradictions(self):
            raise InvalidValue(problem)

    @property
    def lr_decay(self) -> float | None:
        """Factor on the learning rate after each epoch; None where it is no constant."""
        if self.schedule != "exponential" or self.epochs == 0:
            return None
        return (self.lr_final / self.lr_start) ** (1 / self.epochs)

    @property
    def steps(self) -> int | None:
        """Training steps in all; None where the size of the set is not known yet."""
        n = self.images("train")
        return n and n // self.batch_size * self.epochs

    def images(self, split: str) -> int | None:
        """Images taken from a split; None where only a `.npz` file knows. It may hold fewer."""
        n, whole = getattr(self, f"n_{split}"), SIZES.get(self.dataset, {}).get(split)
        if n is None or (whole is not None and self.dataset not in DRAWN and n > whole):
            return whole
        return n

    def spec(self) -> dict[str, Any]:
        """The fields that decide a run: all but the texts for readers."""
        return {k: v for k, v in vars(self).items() if k not in ("summary", "script")}

    def digest(self) -> str:
        """SHA-256 of the fields that decide a run and differ from their defaults.

        So a field that is added later, with a default, leaves the digests of old runs alone.
        """
        differing = {k: v for k, v in self.spec().items() if v != DEFAULTS[k]}
        return hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()


FIELDS: dict[str, Any] = get_type_hints(Experiment)  # their types
_NOTES = {
    name: get_args(hint)[1:]
    for name, hint in get_type_hints(Experiment, include_extras=True).items()
}
ALLOWED: dict[str, Any] = {name: n[0] for name, n in _NOTES.items() if n[1:]}  # a `Range`, or names
MEANINGS: dict[str, str] = {name: notes[-1] for name, notes in _NOTES.items()}
DEFAULTS = {f.name: f.default for f in fields(Experiment)}


# ------------------------------------------------------------------------- one field at a time


def type_name(hint: Any, several: str = "a tuple, each part {}") -> str:
    """What a field with this type hint takes; `several` says how a tuple is written."""
    if get_origin(hint) is tuple:
        return several.format(type_name(get_args(hint)[0]))
    if NoneType in get_args(hint):
        return f"{type_name(get_args(hint)[0])} or none"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]


def as_type(name: str, value: Any, hint: Any) -> Any:
    """`value` as exactly the type of the field `name`; raises InvalidValue for another kind."""
    try:
        return _as_type(value, hint)
    except OverflowError:  # an int, for a field of floats
        raise InvalidValue(f"{name} is far too large: {shown(value)}") from None
    except TypeError:
        lone = get_origin(hint) is tuple and isinstance(value, str | Real)
        advice = f"; write {shown((value,))}" if lone else ""
        raise InvalidValue(
            f"{name} must be {type_name(hint)}, got {shown(value)}{advice}"
        ) from None


def _as_type(value: Any, hint: Any) -> Any:
    if type(value) is hint:
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(_as_type(part, get_args(hint)[0]) for part in value)
    if NoneType in get_args(hint):
        return None if value is None else _as_type(value, get_args(hint)[0])
    kinds = {bool: (bool, np.bool_), int: Integral, float: Real, str: str}[hint]
    if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
        raise TypeError
    return hint(value)


def _check_allowed(name: str, value: Any, allowed: Any) -> None:
    parts = value if isinstance(value, tuple) else (value,)
    if isinstance(allowed, Range):
        if not all(part is None or part in allowed for part in parts):
            none = "none or " * (NoneType in get_args(FIELDS[name]))
            each = "numbers, each " * (parts is value)
            raise InvalidValue(f"{name} must be {none}{each}{allowed}, got {shown(value)}")
        return
    if name == "dataset":
        check_dataset(name, value)
        return
    for part in parts:
        check_name(f"entry of {name}" if parts is value else name, part, allowed)
    if len(set(parts)) < len(parts):
        raise InvalidValue(f"{name} must name each only once, got {shown(value)}")


def _check_texts(e: Experiment) -> None:
    for name, text in vars(e).items():
        if isinstance(text, str) and not (text.isprintable() and len(text) <= LONGEST_TEXT):
            raise InvalidValue(
                f"{name} must be at most {LONGEST_TEXT:,} printable characters, got {shown(text)}"
            )
    if not FILE_NAME.fullmatch(e.name):
        raise InvalidValue(
            "name must be at most 100 letters, digits, '.', '_' and '-', and begin with neither "
            f"'.' nor '-', got {shown(e.name)}"
        )


# ------------------------------------------------------------------- what no field is to blame for

# A field that differs from its default has no effect unless the other one says something.
NEEDS = {
    "gaussian_matched": "gaussian_variance",
    "gaussian_shape": "gaussian_variance",
    "gaussian_variance": "gaussian_splits",
    "random_labels": "random_label_splits",
    "l2_target": "l2",
    "dropout_position": "dropout",
    "evaluation_rows": "evaluates",
    "run_folder": "evaluates",
}
BINARY_PROBES = {"flips", "saturation", "modes"}  # say nothing about real-valued weights


def _contradictions(e: Experiment) -> Iterator[str]:
    for name, other in NEEDS.items():
        value, needed = getattr(e, name), getattr(e, other)
        if value != DEFAULTS[name] and not needed:
            yield f"{name}={value!r} has no effect with {other}={needed!r}; change one of them"
    if not e.binary and {e.weights, e.evaluation_weights} != {"deterministic"}:
        yield (
            "binary=False has real weights; weights and evaluation_weights must be "
            f"'deterministic', got {e.weights!r} and {e.evaluation_weights!r}"
        )
    if not e.binary and BINARY_PROBES & set(e.probes):
        names = ", ".join(name for name in e.probes if name in BINARY_PROBES)
        yield f"binary=False has no binary weights to watch; leave {names} out of probes"
    if e.evaluation_samples > 1 and e.evaluation_weights != "stochastic":
        yield (
            f"evaluation_samples={e.evaluation_samples} needs "
            f"evaluation_weights='stochastic', got {e.evaluation_weights!r}"
        )
    if e.gaussian_shape == "images" and not e.gaussian_matched:
        yield (
            "gaussian_shape='images' takes mean and covariance from the images, so "
            "gaussian_matched can only be True, got False"
        )
    if e.evaluation_classes == "apart" and e.evaluation_statistics != "batch":
        yield (
            "evaluation_classes='apart' needs evaluation_statistics='batch', "
            f"got {e.evaluation_statistics!r}"
        )
    if e.schedule == "exponential" and e.lr_final == 0:
        yield (
            "schedule='exponential' cannot end at lr_final=0.0; "
            "choose a number above 0, or schedule='linear'"
        )
    places = 3 if e.dropout_position == "before_norm" else 2
    if e.network in NETWORKS.shipped and len(e.dropout) > places:
        yield f"dropout has {places} places {e.dropout_position}, got dropout={e.dropout}"
