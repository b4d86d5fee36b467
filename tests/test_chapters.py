import json
from pathlib import Path

import pytest

from bnnlib.chapters import NUMBERS, TEXTS, check_parameters, check_values, read_parameters
from bnnlib.errors import InvalidValue

NOTEBOOKS = sorted((Path(__file__).parents[1] / "book").glob("*.ipynb"))
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


def test_without_parameters_there_is_nothing_to_check():
    check_parameters(["", "import torch", OWN, "check_parameters(In)"])
    check_parameters(["", "import torch", "check_parameters(In)"])
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


# ------------------------------------------------------------------ the chapters of the book


def sources(path):
    """The code cells of a notebook up to its check of the parameters, as IPython's `In`."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    last = next(i for i, source in enumerate(code) if "check_parameters(In)" in source)
    return ["", *code[: last + 1]]


def with_injected(cells, line):
    return [*cells[:-1], f"# Parameters\n{line}\n", cells[-1]]


def edited_by_hand(cells, line):
    name = line.split(" = ")[0]
    own = [line if x.startswith(f"{name} =") else x for x in cells[-2].splitlines()]
    return [*cells[:-2], "\n".join(own), cells[-1]]


def each_line(values):
    """Every notebook with each of these values of each parameter that it has."""
    cases = [
        pytest.param(path, f"{name} = {value}", id=f"{path.stem}-{name}={value}")
        for path in NOTEBOOKS
        for name in read_parameters(sources(path)[-2])
        for value in values.get(name, ())
    ]
    return pytest.mark.parametrize(("path", "line"), cases)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_of_a_chapter_is_checked_and_its_default_fits(path):
    cells = sources(path)
    assert set(read_parameters(cells[-2])) <= {*NUMBERS, *TEXTS}
    check_parameters(cells)


GOOD = {
    "profile": ["'smoke'", "'full'"],
    "dataset": ["'mine.npz'", "'svhn'"],
    "seed": ["0", "4294967295"],
    "epochs": ["0", "100000"],
    "repeats": ["1"],
    "steps": ["1"],
    "runs_folder": ["'my runs'"],
}
BAD = {
    "profile": ["'quik'", "''", "3"],
    "dataset": ["'cifar'", "'patterns'", "'set.npy'", "None"],
    "seed": ["-1", "4294967296", "float('nan')", "0.0", "True", "None", "[1]"],
    "epochs": ["-1", "1000001", "'many'"],
    "repeats": ["0", "-3", "2.5"],
    "steps": ["0", "-1", "True"],
    "runs_folder": ["3", "None"],
}


@pytest.mark.parametrize("change", [with_injected, edited_by_hand])
@each_line(GOOD)
def test_a_chapter_takes_what_is_in_range(path, line, change):
    check_parameters(change(sources(path), line))


@pytest.mark.parametrize("change", [with_injected, edited_by_hand])
@each_line(BAD)
def test_a_chapter_refuses_other_values_in_the_cell_after_its_parameters(path, line, change):
    with pytest.raises(InvalidValue, match=rf"(parameter '|unknown ){line.split()[0]}") as caught:
        check_parameters(change(sources(path), line))
    assert line.split(" = ")[1] in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_messages_name_parameter_value_and_what_is_allowed():
    def message(line):
        with pytest.raises(InvalidValue) as caught:
            check_parameters(["", 'profile = "quick"\ndataset = ""\nrepeats = 3', line, "check"])
        return str(caught.value)

    assert message("# Parameters\nrepeats = 0") == (
        "parameter 'repeats' must be a whole number, 1 to 1,000; got 0"
    )
    assert message('# Parameters\ndataset = "shape"') == (
        "unknown dataset 'shape'; did you mean 'shapes'? "
        "(allowed: cifar10, svhn, glyphs, shapes, a path ending in .npz)"
    )
    assert message('profile = "quick"\nruns_folder = 3') == (
        "parameter 'runs_folder' must be text; got 3"
    )


EMPTY = 'profile = "quick"\ndataset = ""\nepochs = 0'


def test_a_dataset_may_be_empty_only_where_the_chapter_says_so():
    for own, fits in (('profile = "quick"\ndataset = "svhn"', False), (EMPTY, True)):
        cells = ["", own, '# Parameters\ndataset = ""', "check_parameters(In)"]
        if fits:
            check_parameters(cells)
        else:
            with pytest.raises(InvalidValue, match="unknown dataset ''"):
                check_parameters(cells)


def test_in_a_session_the_parameters_run_last_count():
    first = ["", "import torch", "# mine\n" + EMPTY, "check_parameters(In)", "epochs = -1"]
    check_parameters([*first, "check_parameters(In)"])  # a cell of the reader's own
    mistaken = [*first, EMPTY.replace("0", "-5"), "check_parameters(In)"]
    with pytest.raises(InvalidValue, match="got -5"):
        check_parameters(mistaken)
    check_parameters([*mistaken, EMPTY, "check_parameters(In)"])
    injected = [*mistaken, EMPTY, "# Parameters\nepochs = -7", "check_parameters(In)"]
    with pytest.raises(InvalidValue, match="got -7"):
        check_parameters(injected)
    check_parameters([*injected, "# Parameters\nepochs = 7", "check_parameters(In)"])
    check_parameters([*injected, EMPTY, "check_parameters(In)"])
