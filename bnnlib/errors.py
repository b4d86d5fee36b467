"""Errors a user can cause: each names the value, what was allowed and the nearest valid name.

In: a bad value. Out: an exception whose text is enough to repair it. Next file: `drawing.py`.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class BnnlibError(Exception):
    """Base class of every error that `bnnlib` raises for bad input."""


class InvalidValue(BnnlibError, ValueError):
    """A value outside what the function accepts."""


class DataNotFound(BnnlibError, FileNotFoundError):
    """A data set is not on disk; the message says where it was looked for."""


def nearest(value: object, allowed: Iterable[str]) -> str:
    """The words `did you mean 'x'? ` for the closest allowed name, or '' if none is close."""
    names = {name.lower(): name for name in allowed}
    match = get_close_matches(str(value).lower(), names, n=1, cutoff=0.5)
    return f"did you mean {names[match[0]]!r}? " if match else ""


def unknown_name(kind: str, value: object, allowed: Iterable[str]) -> InvalidValue:
    """The error for a name outside a closed list, to be raised by the caller.

    >>> str(unknown_name("profile", "quik", ["smoke", "quick", "full"]))
    "unknown profile 'quik'; did you mean 'quick'? (allowed: smoke, quick, full)"
    """
    allowed = list(allowed)
    hint = nearest(value, allowed)
    return InvalidValue(f"unknown {kind} {value!r}; {hint}(allowed: {', '.join(allowed)})")


def check_name(kind: str, value: object, allowed: Iterable[str]) -> None:
    """Raise `unknown_name` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise unknown_name(kind, value, allowed)
