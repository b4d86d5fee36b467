"""What the chapters share: parameters checked, experiments at these, runs as rows of a table.

papermill only logs a name it does not know and then runs with the default, so every chapter calls
`check_parameters(In)` right after its parameters. No Jupyter import is needed here.
"""

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import copysign, inf
from typing import Any

from bnnlib.errors import InvalidValue, check_name, shown, unknown_name
from bnnlib.experiments.experiment import ALLOWED, Experiment, Range
from bnnlib.experiments.profiles import PROFILES, at_profile
from bnnlib.experiments.variants import named
from bnnlib.history import epochs_to_reach
from bnnlib.names import DATASETS, check_dataset
from bnnlib.runs.result import Run

INJECTED = "# Parameters"  # first line of the cell that papermill inserts
OWN = re.compile(r"(\s|#.*\n)*profile\s*=[^=]")  # how the parameters cell of a chapter begins
SCALARS = (bool, int, float, str)

# What the parameters of the book's chapters may be.
TEXTS = ("profile", "dataset", "runs_folder")
PICTURES = tuple(name for name in DATASETS if name != "patterns")  # those are no pictures
NUMBERS = {
    "seed": Range(0, 2**32 - 1),  # what every random generator takes
    "epochs": ALLOWED["epochs"],
    "repeats": Range(1, 1000),
    "steps": Range(1, 10**6),
}


# --------------------------------------------------------------------------- runs of a chapter


def at_parameters(
    name: str, profile: str, *, seed: int, dataset: str = "", epochs: int = 0, **changes: Any
) -> Experiment:
    """The experiment `name` at the parameters of a chapter, with further `changes` of its fields.

    `seed` is that of the corruption, too; without `dataset` or `epochs` the profile's stay.
    """
    own = {k: v for k, v in (("dataset", dataset), ("epochs", epochs)) if v}
    seeds = {"seed": seed, "corruption_seed": seed}
    return replace(at_profile(named(name), profile), **seeds | own | changes)


def rounded(value: float, digits: int = 1) -> str:
    """A number with so many decimals; halves are rounded away from zero.

    53.15 is kept as the binary number below it, and 100 * 0.5315 need not be the same one. What
    is within 1e-9 of a half is taken as a half, so that all pages show one number alike.

    >>> rounded(53.15)
    '53.2'
    """
    return f"{value + copysign(1e-9, value):z.{digits}f}"


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Numbers in one cell of a table: the mean and, where they differ, the range.

    >>> spread([1, 2, 6])
    '3.0 (1.0 to 6.0)'
    """
    values = list(values)
    three = (sum(values) / len(values), min(values), max(values))
    mean, low, high = (rounded(value, digits) for value in three)
    return mean if low == high else f"{mean} ({low} to {high})"


def in_unit(values: Iterable[float], unit: str) -> list[str]:
    """What a claim measured, with as many decimals as its unit has on all pages."""
    return [rounded(value, 3 if unit == "bits a weight" else 1) for value in values]


def measured(row: Mapping[str, Any]) -> str:
    """Mean and interval of a claim, from its row of `judge`: '0.2 (-0.4 to 0.8) %'."""
    numbers = in_unit((row["estimate"], row["low"], row["high"]), row["unit"])
    return "{} ({} to {})\N{NO-BREAK SPACE}{}".format(*numbers, row["unit"])


def outcome(*runs: Run, limits: Sequence[float] = (0.1, 0.01)) -> dict[str, Any]:
    """What the seeds of one experiment came to, as a row of a table.

    The errors are the last ones, in percent, by `spread`; "to 10 %" is the first epoch with at
    most this training error, from the earliest seed to the latest, "-" where there was none.
    """
    row: dict[str, Any] = {"seeds": len(runs)}
    for split, name in {"train": "training", "test": "test"}.items():
        errors = [100 * r.history.last(f"{split}_error") for r in runs]
        row[f"{name} error (%)"] = spread(errors)
    for limit in limits:
        reached = sorted(epochs_to_reach(r.history, (limit,))[0] or inf for r in runs)
        ends = ["-" if epoch == inf else str(epoch) for epoch in (reached[0], reached[-1])]
        row[f"to {100 * limit:g} %"] = " to ".join(dict.fromkeys(ends))
    return row


# ------------------------------------------------------------------------------ its parameters


def read_parameters(source: str) -> dict[str, object]:
    """Names and values of a parameters cell, in order.

    Each statement must be `name = value` with a literal bool, int, float or str: a computed value
    would keep its old result after papermill has injected a new one. Raises `InvalidValue`.
    """
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise InvalidValue(f"a parameters cell must be plain Python: {error}") from None
    return dict(map(_read_parameter, statements))


def check_values(given: Mapping[str, object], defaults: Mapping[str, object]) -> None:
    """Raise `InvalidValue` unless each given name has a default of the same type.

    An int is accepted where the default is a float; a bool is not a number.
    """
    for name, value in given.items():
        if name not in defaults:
            raise unknown_name("parameter", name, defaults)
        _check_type(name, value, defaults[name])


def check_parameters(cells: Sequence[str]) -> None:
    """Check the parameters of a chapter, changed by hand or by papermill, before any work.

    `cells` are the sources of the cells run so far, in order: IPython's `In`. The injected cell
    comes after the parameters cell, which begins with `profile = `; the ones run last count.
    Raises `InvalidValue` for an unknown name, a value of another type, or one out of range.
    """
    own, given = {}, {}
    for source in cells:
        if source.startswith(INJECTED):
            given = read_parameters(source)
        elif OWN.match(source):
            own, given = read_parameters(source), {}
    check_values(given, own)
    for name, value in (own | given).items():
        _check_value(name, value, may_be_empty=own[name] == "")


def _check_value(name: str, value: object, may_be_empty: bool) -> None:
    if name in NUMBERS and (type(value) is not int or value not in NUMBERS[name]):
        raise InvalidValue(
            f"parameter {name!r} must be a whole number, {NUMBERS[name]}; got {shown(value)}"
        )
    if name in TEXTS and type(value) is not str:
        raise InvalidValue(f"parameter {name!r} must be text; got {shown(value)}")
    if name == "profile":
        check_name("profile", value, PROFILES)
    if name == "dataset" and not (may_be_empty and value == ""):
        check_dataset(name, value, PICTURES)


def _read_parameter(statement: ast.stmt) -> tuple[str, object]:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=expression):
            return name, _literal_scalar(name, expression)
    raise InvalidValue(
        f"a parameters cell may hold only `name = value` lines, not `{ast.unparse(statement)}`"
    )


def _literal_scalar(name: str, expression: ast.expr) -> object:
    try:
        value = ast.literal_eval(expression)
    except ValueError:
        value = None
    if type(value) not in SCALARS:
        raise InvalidValue(
            f"parameter {name!r} must be a literal {_names(SCALARS)}, "
            f"not `{ast.unparse(expression)}`"
        )
    return value


def _check_type(name: str, value: object, default: object) -> None:
    allowed = (int, float) if type(default) is float else (type(default),)
    if type(value) not in allowed:
        raise InvalidValue(
            f"parameter {name!r} must be {_names(allowed)}, like {default!r}; got {value!r}"
        )


def _names(types: Sequence[type]) -> str:
    return " or ".join(kind.__name__ for kind in types)
