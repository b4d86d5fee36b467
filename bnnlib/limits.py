"""What the fields of an experiment may hold, and which of them contradict each other.

In: an `Experiment` that is being made. Out: nothing, or an error that names the field, the value
and what is allowed. Next file: `catalogue.py`.
"""

import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args, get_origin

import numpy as np

from bnnlib.data import DATASETS, SIZES
from bnnlib.errors import InvalidValue, check_name, shown
from bnnlib.layers import MODES, STATISTICS
from bnnlib.models import ACTIVATIONS, ARCHITECTURES, DROPOUT_POSITIONS, PENALTY_TARGETS
from bnnlib.patterns import SIDE
from bnnlib.probes import PROBES
from bnnlib.train import SCHEDULES

EVERY_SPLIT = ("train", "valid", "test")
PIXEL_ORDERS = ("kept", "shuffled", "random")
IMAGE_SIZES = dict.fromkeys(SIZES, 32) | {"patterns": SIDE}  # height and width, in pixels


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included unless `above` leaves `low` out."""

    low: float
    high: float
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        if self.above:
            return f"above {self.low:,} and at most {self.high:,}"
        return f"{self.low:,} to {self.high:,}"


# The files of strangers are read into experiments too, so every field has an upper bound: what
# lies above it could only exhaust memory, disk or patience. NaN lies in no range.
LONGEST_TEXT = 1000  # characters
IMAGES, SEEDS = 10**8, Range(0, 2**63 - 1)
RANGES = {
    "epochs": Range(0, 10**5),
    "lr_start": Range(0, 100, above=True),
    "lr_final": Range(0, 100),
    "batch_size": Range(1, 10**6),
    "width": Range(0, 64, above=True),
    "evaluation_samples": Range(1, 10**4),
    "l2": Range(0, 10**6),
    "random_labels": Range(0, 1),
    "gaussian_variance": Range(0, 10**6),
    "n_train": Range(1, IMAGES),
    "n_valid": Range(0, IMAGES),
    "n_test": Range(0, IMAGES),
    "evaluate_every": Range(1, 10**6),
    "seed": SEEDS,
    "corruption_seed": SEEDS,
    "data_seed": SEEDS,
    "original_seed": SEEDS,
    "evaluation_rows": Range(1, IMAGES),
}
NAMES = {
    "network": ARCHITECTURES,
    "schedule": SCHEDULES,
    "activation": ACTIVATIONS,
    "weights": MODES,
    "evaluation_weights": MODES,
    "evaluation_statistics": STATISTICS,
    "dropout_position": DROPOUT_POSITIONS,
    "l2_target": PENALTY_TARGETS,
    "pixels": PIXEL_ORDERS,
}
SEVERAL_NAMES = {
    "random_label_splits": EVERY_SPLIT,
    "gaussian_splits": EVERY_SPLIT,
    "probes": PROBES,
}
# A field that differs from its default has no effect unless the other one says something.
NEEDS = {
    "gaussian_matched": "gaussian_variance",
    "gaussian_variance": "gaussian_splits",
    "random_labels": "random_label_splits",
    "l2_target": "l2",
    "dropout_position": "dropout",
    "evaluation_rows": "evaluates",
    "run_folder": "evaluates",
}
BINARY_PROBES = {"flips", "saturation", "modes"}  # say nothing about real-valued weights
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # folders are named by `name`


def type_in_words(hint: Any, several: str = "a tuple, each part {}") -> str:
    """What a field with this type hint takes; `several` says how a tuple is written."""
    if get_origin(hint) is tuple:
        return several.format(type_in_words(get_args(hint)[0]))
    if NoneType in get_args(hint):
        return f"{type_in_words(get_args(hint)[0])} or none"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]


def _typed(value: Any, hint: Any) -> Any:
    """`value` as exactly the type of the hint; raises TypeError for a value of another kind."""
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(_typed(part, get_args(hint)[0]) for part in value)
    if NoneType in get_args(hint):
        return None if value is None else _typed(value, get_args(hint)[0])
    kinds = {bool: (bool, np.bool_), int: Integral, float: Real, str: str}[hint]
    if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
        raise TypeError
    return hint(value)


def fitting(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type of the field `name`; raises InvalidValue for a value of another kind."""
    try:
        return _typed(value, hint)
    except OverflowError:  # an int, for a field of floats
        raise InvalidValue(f"{name} is far too large: {shown(value)}") from None
    except TypeError:
        words = f"{name} must be {type_in_words(hint)}, got {shown(value)}"
        raise InvalidValue(words + _advice(value, hint)) from None


def _advice(value: Any, hint: Any) -> str:
    """How a lone value is written where a field takes a tuple of such values."""
    try:
        return f"; write {shown(_typed([value], hint))}"
    except (TypeError, OverflowError):
        return ""


def check_fields(e: Any) -> None:
    """Raise InvalidValue for a field out of its range, or for two that contradict each other."""
    for check in (_check_texts, _check_names, _check_numbers, _check_together):
        check(e)


def _check_texts(e: Any) -> None:
    for name, value in vars(e).items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and not (text.isprintable() and len(text) <= LONGEST_TEXT):
                raise InvalidValue(
                    f"{name} must be at most {LONGEST_TEXT:,} printable characters, "
                    f"got {shown(text)}"
                )
    if not FILE_NAME.fullmatch(e.name):
        raise InvalidValue(
            "name must be at most 100 letters, digits, '.', '_' and '-', and begin with neither "
            f"'.' nor '-', got {shown(e.name)}"
        )


def _check_names(e: Any) -> None:
    if not e.dataset.endswith(".npz"):
        check_name("dataset", e.dataset, DATASETS)
    for name, allowed in NAMES.items():
        check_name(name, getattr(e, name), allowed)
    for name, allowed in SEVERAL_NAMES.items():
        values = getattr(e, name)
        for value in values:
            check_name(f"entry of {name}", value, allowed)
        if len(set(values)) < len(values):
            raise InvalidValue(f"{name} must name each only once, got {shown(values)}")


def _check_numbers(e: Any) -> None:
    for name, allowed in RANGES.items():
        value = getattr(e, name)
        if value is not None and value not in allowed:
            none = "none or " if defaults_of(e)[name] is None else ""
            raise InvalidValue(f"{name} must be {none}{allowed}, got {shown(value)}")
    if len(e.dropout) > 3 or not all(0 <= p < 1 for p in e.dropout):
        raise InvalidValue(
            f"dropout must be at most three numbers, at least 0 and below 1, got {shown(e.dropout)}"
        )


def _check_together(e: Any) -> None:
    """What no field is to blame for alone."""
    problems = (*_without_effect(e), *_contradicting_weights(e), *_contradicting_sizes(e))
    if problems:
        raise InvalidValue(problems[0])


def _without_effect(e: Any) -> Iterator[str]:
    defaults = defaults_of(e)
    for name, other in NEEDS.items():
        value, needed = getattr(e, name), getattr(e, other)
        if value != defaults[name] and not needed:
            yield f"{name}={value!r} has no effect with {other}={needed!r}; change one of them"


def _contradicting_weights(e: Any) -> Iterator[str]:
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
    if e.schedule == "exponential" and e.lr_final == 0:
        yield (
            "schedule='exponential' cannot end at lr_final=0.0; "
            "choose a number above 0, or schedule='linear'"
        )
    if e.dropout_position == "after_activation" and len(e.dropout) > 2:
        yield f"dropout_position='after_activation' has two places, got dropout={e.dropout}"


def _contradicting_sizes(e: Any) -> Iterator[str]:
    takes, has = ARCHITECTURES[e.network].image_size, IMAGE_SIZES.get(e.dataset)
    if has not in (takes, None):
        yield (
            f"network={e.network!r} takes images of {takes} x {takes} pixels, "
            f"those of dataset={e.dataset!r} are {has} x {has}"
        )
    n = e.images("train")
    if n is not None and n < e.batch_size and not e.evaluates:
        yield (
            f"{n} images do not fill one batch of {e.batch_size}; "
            f"use a larger n_train, or a batch_size of at most {n}"
        )


def defaults_of(e: Any) -> dict[str, Any]:
    """The default of each field of a dataclass, by name."""
    return {f.name: f.default for f in fields(e)}


def refusing_wrong_names(cls: type) -> type:
    """The dataclass `cls`; a field that is unknown or missing is an InvalidValue that names it."""
    generated = cls.__init__

    @wraps(generated)
    def __init__(self, /, *values, **named):
        names = [f.name for f in fields(cls)]
        for name in named:
            check_name("field", name[:100], names)  # a file may hold names of any length
        given = {*names[: len(values)], *named}
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]
        if missing:
            raise InvalidValue(f"an experiment needs {', '.join(missing)} too")
        generated(self, *values, **named)

    cls.__init__ = __init__
    return cls
