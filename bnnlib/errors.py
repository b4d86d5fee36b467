"""What can go wrong, by name; each text says what was found, what was allowed, and what to do."""

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral


class BnnlibError(Exception):
    """Base class of every error that `bnnlib` raises on purpose."""


class InvalidValue(BnnlibError, ValueError):
    """A value outside what the function accepts."""


class DataNotFound(BnnlibError, FileNotFoundError):
    """A data set or a run is not on disk; the message says where it was looked for."""


class DownloadFailed(BnnlibError, OSError):
    """A file could not be fetched whole; nothing of it was kept."""


class DamagedFile(BnnlibError, ValueError):
    """A file is truncated, altered, or not what its name says. It was not used, nor changed."""


class FolderInUse(BnnlibError, FileExistsError):
    """A folder holds something else, or another process is writing to it."""


class CannotWrite(BnnlibError, OSError):
    """A file could not be written; what lay there before still does."""


class NotFinite(BnnlibError, ArithmeticError):
    """A number became NaN or infinite; the message says in which epoch, step and layer."""


class NotInstalled(BnnlibError, ImportError):
    """A package that only some users need is not there; the message says how to get it."""


class NoScheduler(BnnlibError, ConnectionError):
    """No scheduler answers, or no longer; what was finished stays finished."""


class RankLost(BnnlibError, ConnectionError):
    """Another of the processes that train together has ended, or cannot be reached."""


class BnnlibWarning(UserWarning):
    """Something that a user should know, and that was dealt with."""


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has saved its state; the message says how to go on.

    Like any interrupt it passes through `except Exception`.
    """


def shown(value: object) -> str:
    """A value as an error shows it: in one printable line, and not all of what is very long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    try:
        return " ".join(short.repr(value).split())
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number too long to be shown"


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
    said = f"unknown {kind} {shown(value)}{'; ' if hint else ' '}{hint}"
    return InvalidValue(f"{said}(allowed: {', '.join(allowed)})")


def check_name(kind: str, value: object, allowed: Iterable[str]) -> None:
    """Raise `unknown_name` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise unknown_name(kind, value, allowed)


def check_whole(name: str, value: object, low: int = 0) -> int:
    """`value` as an int; raises InvalidValue unless it is a whole number, at least `low`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise InvalidValue(f"{name} must be a whole number, {low} or more, got {shown(value)}")
    return int(value)


def check_fills_batch(images: int, batch_size: int) -> None:
    """Raise InvalidValue where there are fewer images than one batch takes."""
    if images < batch_size:
        raise InvalidValue(
            f"{images} images do not fill one batch of {batch_size}; "
            f"use a batch_size of at most {images}"
        )
