import doctest

import pytest

from bnnlib import errors
from bnnlib.errors import BnnlibError, DataNotFound, InvalidValue, nearest

FRUIT = ["apple", "Pear", "cherry"]


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("aple", "did you mean 'apple'? "),
        ("PEAR", "did you mean 'Pear'? "),
        ("xyzzy", ""),
        (7, ""),
    ],
)
def test_nearest_is_a_name_as_it_is_written_or_nothing(value, hint):
    assert nearest(value, FRUIT) == hint


def test_unknown_name_says_value_nearest_and_allowed():
    error = errors.unknown_name("fruit", "chery", iter(FRUIT))
    assert isinstance(error, InvalidValue)
    assert str(error) == (
        "unknown fruit 'chery'; did you mean 'cherry'? (allowed: apple, Pear, cherry)"
    )


def test_unknown_name_without_a_near_one():
    assert str(errors.unknown_name("fruit", 7, FRUIT)) == (
        "unknown fruit 7; (allowed: apple, Pear, cherry)"
    )


def test_check_name_raises_for_names_outside_only():
    assert errors.check_name("fruit", "Pear", FRUIT) is None
    with pytest.raises(InvalidValue, match="unknown fruit 'pear'; did you mean 'Pear'"):
        errors.check_name("fruit", "pear", FRUIT)


def test_the_example_in_the_docstring_holds():
    found = doctest.testmod(errors)
    assert (found.attempted, found.failed) == (1, 0)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [(InvalidValue, ValueError), (DataNotFound, FileNotFoundError)],
)
def test_errors_can_be_caught_as_ours_and_as_pythons(error, builtin):
    assert issubclass(error, BnnlibError)
    assert issubclass(error, builtin)
    assert str(error("what happened")) == "what happened"
