"""What a person types becomes values, and values become what a person types."""

import re
from types import NoneType
from typing import Any, get_args, get_origin

from bnnlib.errors import InvalidValue, check_name, shown
from bnnlib.experiments.experiment import FIELDS, type_name

MOST_SEEDS = 1000
SEED_RANGE = re.compile(r" *([0-9]{1,19})(?:-([0-9]{1,19}))? *")


def parse_field(field: str, text: str) -> Any:
    """The value of `text` for a field of `Experiment`, by the field's type.

    "none" is None where the field allows it; a tuple is written with commas, an empty one as
    nothing. Raises InvalidValue for an unknown field or a text that does not fit.
    """
    check_name("field", field, FIELDS)
    hint, text = FIELDS[field], text.strip()
    try:
        if get_origin(hint) is tuple and (text[:1] in ("[", "(") or text.lower() == "none"):
            raise ValueError("this is how Python writes it")
        return _parse(hint, text)
    except ValueError as error:
        several = f"{{}}, or several with commas between them, or nothing: `{field}=`"
        words = type_name(hint, several)
        raise InvalidValue(f"{field} takes {words}, got {shown(text)}") from error


def _parse(hint: Any, text: str) -> Any:
    if get_origin(hint) is tuple:
        return tuple(_parse(get_args(hint)[0], part.strip()) for part in text.split(",") if part)
    if NoneType in get_args(hint):
        return None if text.lower() == "none" else _parse(get_args(hint)[0], text)
    if hint is bool:
        return ("false", "true").index(text.lower()) == 1  # ValueError for any other word
    return hint(text)


def parse_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    """The value of each field in texts `field=value`; raises InvalidValue for a field set twice."""
    changes = {}
    for setting in settings:
        field, equals, text = setting.partition("=")
        field = field.strip()
        if not equals:
            raise InvalidValue(f"--set takes field=value, got {shown(setting)}")
        if field in changes:
            raise InvalidValue(f"--set gives {field} twice, the second time as {shown(text)}")
        changes[field] = parse_field(field, text)
    return changes


def parse_seeds(text: str) -> list[int]:
    """The seeds in a text such as "0,1,2" or "0-2,5", in its order, each once.

    Raises InvalidValue for another form, a range that runs backwards, a seed that occurs twice,
    and more than `MOST_SEEDS`.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = SEED_RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or len(seeds) + last - first >= MOST_SEEDS:
            raise InvalidValue(
                f"--seeds takes at most {MOST_SEEDS:,} whole numbers and rising ranges with commas "
                f"between them, such as 0,1,2 or 0-2,5; got {shown(text)}"
            )
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise InvalidValue(f"--seeds names a seed twice: {shown(text)}")
    return seeds


def as_text(value: Any) -> str:
    """A field's value as `parse_field` reads it."""
    if isinstance(value, tuple):
        return ",".join(map(as_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def as_duration(seconds: float) -> str:
    """A time in the two largest of its units, such as '7 min 58 s'."""
    if not 0 <= seconds < 2**63:  # NaN is not
        return "an unknown time"
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"
    whole, low, high, size = round(seconds), "s", "min", 60
    if whole >= 3600:
        whole, low, high = round(seconds / 60), "min", "h"
    return f"{whole // size:,} {high} {whole % size} {low}"
