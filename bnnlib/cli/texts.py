"""What a person types becomes values, and values become what a person types."""

from types import NoneType
from typing import Any, get_args, get_origin

from bnnlib.errors import InvalidValue, check_name, shown
from bnnlib.experiments.experiment import FIELDS, type_name


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


def as_text(value: Any) -> str:
    """A field's value as `parse_field` reads it."""
    if isinstance(value, tuple):
        return ",".join(map(as_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
