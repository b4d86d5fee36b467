import math
from dataclasses import replace

import pytest

from bnnlib.errors import InvalidValue
from bnnlib.experiments.profiles import quick
from bnnlib.experiments.variants import named
from bnnlib.history import History
from bnnlib.notebook import (
    at_parameters,
    check_parameters,
    outcome,
    read_parameters,
    rounded,
    spread,
)
from bnnlib.runs.result import Run

OWN = """profile = "quick"  # size of the run
dataset = "svhn"
seed = 0
epochs = 60
repeats = 3
steps = 9
runs_folder = "runs"
lr = 0.5
scaled = True"""
CHECK = "check_parameters(In)"


# -------------------------------------------------------------------------- a parameters cell


def test_parameters_keep_order_and_type():
    found = read_parameters(OWN)
    assert list(found) == [line.split()[0] for line in OWN.splitlines()]
    assert list(found.values()) == ["quick", "svhn", 0, 60, 3, 9, "runs", 0.5, True]
    assert [type(found[name]) for name in ("lr", "scaled", "seed")] == [float, bool, int]
    assert read_parameters("shift = -1\nscale = -0.5") == {"shift": -1, "scale": -0.5}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("decay = epochs / 2", "'decay' must be a literal .*`epochs / 2`"),
        ("widths = [3, 4]", "'widths' must be a literal"),
        ("root = None", "'root' must be a literal"),
        ("epochs, seed = 3, 0", "only `name = value` lines"),
        ("epochs = seed = 3", "only `name = value` lines"),
        ("import torch", "only `name = value` lines, not `import torch`"),
        ("epochs =", "plain Python"),
    ],
)
def test_anything_but_literal_scalars_is_refused(source, text):
    with pytest.raises(InvalidValue, match=text):
        read_parameters(source)


# --------------------------------------------------------------------- the cells of a chapter


def injected(line):
    """The cells run up to the check, where papermill has injected a line."""
    return ["", "import torch", OWN, f"# Parameters\n{line}\n", CHECK]


def edited(line):
    """The same where the reader has changed the line in the parameters cell."""
    name = line.split()[0]
    own = [line if old.startswith(f"{name} =") else old for old in OWN.splitlines()]
    return ["", "import torch", "# mine\n" + "\n".join(own), CHECK]


def refusal(cells):
    with pytest.raises(InvalidValue) as caught:
        check_parameters(cells)
    assert str(caught.value).isprintable()
    return str(caught.value)


GOOD = {
    "profile": ["'smoke'", "'full'"],
    "dataset": ["'mine.npz'", "'shapes'"],
    "seed": ["0", "4294967295"],
    "epochs": ["0", "100000"],
    "repeats": ["1"],
    "steps": ["1"],
    "runs_folder": ["'my runs'"],
    "lr": ["0.1", "1"],
    "scaled": ["False"],
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


def lines(values):
    return [f"{name} = {value}" for name, all_of in values.items() for value in all_of]


@pytest.mark.parametrize("cells", [injected, edited])
@pytest.mark.parametrize("line", lines(GOOD))
def test_a_chapter_takes_what_is_in_range(line, cells):
    check_parameters(cells(line))


@pytest.mark.parametrize("cells", [injected, edited])
@pytest.mark.parametrize("line", lines(BAD))
def test_a_chapter_refuses_other_values_by_name(line, cells):
    name, _, value = line.partition(" = ")
    said = refusal(cells(line))
    assert said.startswith((f"parameter '{name}' must be", f"unknown {name} "))
    assert value in said


@pytest.mark.parametrize(
    ("line", "wanted"),
    [("epochs = 1.5", "int"), ("scaled = 'false'", "bool"), ("lr = True", "int or float")],
)
def test_an_injected_value_of_another_type_is_refused(line, wanted):
    name, _, value = line.partition(" = ")
    said = refusal(injected(line))
    assert f"{name!r} must be {wanted}, like" in said
    assert said.endswith(value)


def test_the_messages_name_parameter_value_and_what_is_allowed():
    number = "parameter 'repeats' must be a whole number, 1 to 1,000; got 0"
    assert refusal(injected("repeats = 0")) == number
    assert refusal(injected('dataset = "shape"')) == (
        "unknown dataset 'shape'; did you mean 'shapes'? "
        "(allowed: svhn, cifar10, glyphs, shapes, a path ending in .npz)"
    )
    assert refusal(edited("runs_folder = 3")) == "parameter 'runs_folder' must be text; got 3"
    said = refusal(injected("epoch = 3"))
    assert "unknown parameter 'epoch'; did you mean 'epochs'?" in said
    assert "profile, dataset, seed, epochs" in said


def test_a_chapter_without_parameters_takes_none():
    check_parameters(["", "import torch", CHECK])
    assert "unknown parameter 'epochs'" in refusal(["", "# Parameters\nepochs = 3\n"])


EMPTY = 'profile = "quick"\ndataset = ""\nepochs = 0'


def test_a_dataset_may_be_empty_only_where_the_chapter_says_so():
    check_parameters(["", EMPTY, '# Parameters\ndataset = ""', CHECK])
    assert "unknown dataset ''" in refusal(injected('dataset = ""'))


def test_in_a_session_the_parameters_run_last_count():
    session = ["", "import torch", EMPTY, CHECK, "epochs = -1", CHECK]
    check_parameters(session)  # with a cell of the reader's own
    for cell, epochs in (
        (EMPTY.replace("0", "-5"), -5),
        (EMPTY, 0),
        ("# Parameters\nepochs = -7", -7),
        ("# Parameters\nepochs = 7", 7),
        ("# Parameters\nepochs = -7", -7),
        (EMPTY, 0),
    ):
        session += [cell, CHECK]
        if epochs < 0:
            assert f"got {epochs}" in refusal(session)
        else:
            check_parameters(session)


# ----------------------------------------------------------------------------- runs of a chapter


def test_an_experiment_takes_the_parameters_that_are_given():
    plain = at_parameters("svhn-l2", "quick", seed=3)
    assert plain == replace(quick(named("svhn-l2")), seed=3, corruption_seed=3)
    given = at_parameters("svhn-l2", "quick", seed=3, dataset="glyphs", epochs=7, width=0.5)
    assert given == replace(plain, dataset="glyphs", epochs=7, width=0.5)
    assert at_parameters("svhn-l2", "quick", seed=3, corruption_seed=4).corruption_seed == 4


def test_halves_are_rounded_away_from_zero_however_they_were_computed():
    ways = [53.15, 100 * 0.5315, 53.0 + 0.15, (53.1 + 53.2) / 2, math.nextafter(53.15, 0)]
    assert {rounded(value) for value in ways} == {"53.2"}
    assert rounded(-53.15) == "-53.2"
    assert [rounded(value, 2) for value in (0.125, -0.001, math.nan)] == ["0.13", "0.00", "nan"]
    assert rounded(53.1499) == "53.1"


def test_a_spread_is_a_mean_and_a_range_where_there_is_one():
    assert spread([1, 2, 6]) == "3.0 (1.0 to 6.0)"
    assert spread(iter([2.04, 2.01])) == "2.0"
    assert spread([0.25], digits=2) == "0.25"


def test_the_outcome_of_seeds_is_one_row():
    def ended(train, test, errors):
        rows = [{"epoch": i, "train_error": e} for i, e in enumerate(errors, start=1)]
        rows.append({"epoch": 9, "train_error": train, "test_error": test})
        return Run(named("svhn-l2"), History(rows), {})

    runs = ended(0.0, 0.9, [0.5, 0.1]), ended(0.02, 0.8, [0.09])
    assert outcome(runs[1], limits=(0.1, 0.005))["to 10 %"] == "1"
    assert outcome(runs[1], limits=(0.1, 0.005))["to 0.5 %"] == "-"
    assert outcome(*runs, limits=(0.1, 0.005)) == {
        "seeds": 2,
        "training error (%)": "1.0 (0.0 to 2.0)",
        "test error (%)": "85.0 (80.0 to 90.0)",
        "to 10 %": "1 to 2",
        "to 0.5 %": "9 to -",
    }
