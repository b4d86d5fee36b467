import pytest

from bnnlib.chapters import check_parameters, check_values, read_parameters
from bnnlib.errors import InvalidValue

OWN = 'profile = "quick"  # size of the run\nepochs = 60\nlr = 0.5\nscaled = True'
DEFAULTS = {"profile": "quick", "epochs": 60, "lr": 0.5, "scaled": True}


def injected(line):
    return ["", "import torch", OWN, f"# Parameters\n{line}\n", "check_parameters(In)"]


def test_parameters_keep_order_and_type():
    found = read_parameters(OWN)
    assert list(found.items()) == list(DEFAULTS.items())
    assert [type(value) for value in found.values()] == [str, int, float, bool]


def test_negative_numbers_are_literals():
    assert read_parameters("shift = -1\nscale = -0.5") == {"shift": -1, "scale": -0.5}


@pytest.mark.parametrize(
    "source",
    [
        "decay = epochs / 2",
        "widths = [3, 4]",
        "root = None",
        "epochs, seed = 3, 0",
        "epochs = seed = 3",
        "import torch",
        "print(3)",
        "epochs =",
    ],
)
def test_anything_but_literal_scalars_is_refused(source):
    with pytest.raises(InvalidValue):
        read_parameters(source)


def test_message_quotes_the_refused_expression():
    with pytest.raises(InvalidValue, match=r"'decay' must be a literal .*`epochs / 2`"):
        read_parameters("decay = epochs / 2")


@pytest.mark.parametrize("line", ["epochs = 3", "lr = 1", 'profile = "full"', "scaled = False"])
def test_fitting_values_pass(line):
    check_parameters(injected(line))


def test_without_injected_cell_there_is_nothing_to_check():
    check_parameters(["", "import torch", OWN, "check_parameters(In)"])
    check_parameters([])


def test_unknown_name_gets_the_nearest_one():
    with pytest.raises(InvalidValue) as caught:
        check_parameters(injected("epoch = 3"))
    assert "unknown parameter 'epoch'; did you mean 'epochs'?" in str(caught.value)
    assert "profile, epochs, lr, scaled" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('epochs = "abc"', "int"),
        ("epochs = 1.5", "int"),
        ("epochs = True", "int"),
        ('scaled = "false"', "bool"),
        ("lr = True", "int or float"),
        ("profile = 3", "str"),
    ],
)
def test_value_of_another_type_is_refused(line, wanted):
    name, _, value = line.partition(" = ")
    with pytest.raises(InvalidValue) as caught:
        check_parameters(injected(line))
    assert f"{name!r} must be {wanted}, like" in str(caught.value)
    assert str(caught.value).endswith(value.replace('"', "'"))


def test_chapter_without_parameters_takes_none():
    with pytest.raises(InvalidValue, match="unknown parameter 'epochs'"):
        check_parameters(["", "# Parameters\nepochs = 3\n"])


def test_values_are_checked_without_a_notebook():
    check_values({"lr": 2, "profile": "smoke"}, DEFAULTS)
    with pytest.raises(InvalidValue, match="did you mean 'scaled'"):
        check_values({"scale": True}, DEFAULTS)
