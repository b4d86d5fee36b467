"""The texts that every error of the library is made of."""

import doctest

import pytest

from bnnlib import errors
from bnnlib.errors import DataNotFound, InvalidValue, check_name, nearest, shown, unknown_name

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
    error = unknown_name("fruit", 7, iter(FRUIT))
    assert isinstance(error, InvalidValue)
    assert str(error) == "unknown fruit 7 (allowed: apple, Pear, cherry)"
    assert check_name("fruit", "Pear", FRUIT) is None
    with pytest.raises(InvalidValue, match=r"unknown fruit 'pear'; did you mean 'Pear'\? \(all"):
        check_name("fruit", "pear", FRUIT)


def test_the_example_in_the_docstring_holds():
    found = doctest.testmod(errors)
    assert (found.attempted, found.failed) == (1, 0)


def test_a_value_is_shown_in_one_line_of_ordinary_length():
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 10**6)) == 100
    assert shown(10**5000) == "a number too long to be shown"


@pytest.mark.parametrize(
    ("error", "builtin"), [(InvalidValue, ValueError), (DataNotFound, FileNotFoundError)]
)
def test_errors_can_be_caught_as_ours_and_as_pythons(error, builtin):
    assert issubclass(error, errors.BnnlibError)
    assert issubclass(error, builtin)
    assert str(error("what happened")) == "what happened"
