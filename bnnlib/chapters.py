"""The parameters of a notebook chapter: what they are, and whether the given ones fit.

In: the source text of code cells. Out: names and values, or an error that names the mistake.
papermill only logs a name it does not know and then runs with the default, so every chapter calls
`check_parameters(In)` right after its parameters. No Jupyter import is needed here.
Next file: `__main__.py`.
"""

import ast
from collections.abc import Mapping, Sequence
from itertools import pairwise

from bnnlib.errors import InvalidValue, unknown_name

INJECTED = "# Parameters"  # first line of the cell that papermill inserts
SCALARS = (bool, int, float, str)


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
    """Check what papermill injected against the chapter's own parameters.

    `cells` are the sources of the cells run so far, in order: IPython's `In`. The injected cell
    comes right after the parameters cell; without one there is nothing to check.
    Raises `InvalidValue` for an unknown name or a value of another type.
    """
    for own, given in pairwise(cells):
        if given.startswith(INJECTED):
            return check_values(read_parameters(given), read_parameters(own))


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
