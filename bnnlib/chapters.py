"""The parameters of a notebook chapter: what they are, and whether the given ones fit.

In: the source text of code cells. Out: names and values, or an error that names the mistake.
papermill only logs a name it does not know and then runs with the default, so every chapter calls
`check_parameters(In)` right after its parameters. No Jupyter import is needed here.
Next file: `side_by_side.py`.
"""

import ast
import re
from collections.abc import Mapping, Sequence

from bnnlib.catalogue import PROFILES
from bnnlib.data import DATASETS
from bnnlib.errors import InvalidValue, check_name, shown, unknown_name
from bnnlib.limits import RANGES, Range

INJECTED = "# Parameters"  # first line of the cell that papermill inserts
OWN = re.compile(r"(\s|#.*\n)*profile\s*=[^=]")  # how the parameters cell of a chapter begins
SCALARS = (bool, int, float, str)

# What the parameters of the book's chapters may be.
TEXTS = ("profile", "dataset", "runs_folder")
PICTURES = tuple(name for name in DATASETS if name != "patterns")  # those are no pictures
NUMBERS = {
    "seed": Range(0, 2**32 - 1),  # what every random generator takes
    "epochs": RANGES["epochs"],
    "repeats": Range(1, 1000),
    "steps": Range(1, 10**6),
}


def read_parameters(source: str) -> dict[str, object]:
    """Names and values of a parameters cell, in order.

    Each statement must be `name = value` with a literal bool, int, float or str: a computed value
    would keep its old result after papermill has injected a new one. Raises `InvalidValue`.
    """
    return dict(_read_parameter(statement) for statement in _parse(source).body)


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
    if name == "dataset" and not (value.endswith(".npz") or (may_be_empty and value == "")):
        check_name("dataset", value, PICTURES)


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise InvalidValue(f"a parameters cell must be plain Python: {error}") from None


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
