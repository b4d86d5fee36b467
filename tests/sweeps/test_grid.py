"""A grid becomes tasks: each combination once, each in the folder of its digest."""

from dataclasses import replace
from itertools import product

import nbformat
import pytest

from bnnlib.errors import DataNotFound, InvalidValue
from bnnlib.experiments.profiles import at_profile, smoke
from bnnlib.experiments.variants import named
from bnnlib.sweeps.grid import read_grid
from bnnlib.sweeps.tasks import DIGITS

TWO = ["svhn-l2", "cifar10-noise-50"]


@pytest.fixture
def tasks(tmp_path):
    """The tasks of a grid with this text, and how many of its points were named again."""

    def read(text, **how):
        (tmp_path / "grid.toml").write_text(text)
        return read_grid(tmp_path / "grid.toml", tmp_path / "runs", **how)

    return read


def test_a_table_is_every_combination_of_what_it_varies(tasks):
    found, twice = tasks(
        """
        profile = "smoke"
        [[runs]]
        experiments = ["svhn-l2", "cifar10-noise-50"]
        seeds = "0-1"
        set = { evaluate_every = 2 }
        product = { width = [0.25, 0.5], batch_size = [10, 20] }
        zip = { n_train = [100, 200], epochs = [4, 2] }
        list = [{ lr_start = 0.01 }, { lr_start = 0.1, loss = "hinge" }]
        """
    )
    rows = [{"lr_start": 0.01}, {"lr_start": 0.1, "loss": "hinge"}]
    sizes = [{"n_train": 100, "epochs": 4}, {"n_train": 200, "epochs": 2}]
    expected = {
        replace(smoke(named(name)), **row, **size, width=w, batch_size=b, **seeds, evaluate_every=2)
        for name, row, size, w, b in product(TWO, rows, sizes, (0.25, 0.5), (10, 20))
        for seeds in ({"seed": s, "corruption_seed": s} for s in (0, 1))
    }
    assert {task.experiment for task in found} == expected
    assert (len(found), twice) == (64, 0)
    assert found[0].label == (
        "svhn-l2 lr_start=0.01 n_train=100 epochs=4 width=0.25 batch_size=10 seed=0"
    )


def test_a_run_is_named_by_its_digest_wherever_it_is_asked_for(tasks, tmp_path):
    text = '[[runs]]\nexperiments = ["svhn-l2"]\nprofile = "quick"\n'
    (one,), _ = tasks(text)
    (other, second), twice = tasks(text + "seeds = [3, 0]\n" + text)
    assert (one.name, one.folder, twice) == (second.name, second.folder, 1)
    digest = at_profile(named("svhn-l2"), "quick").digest()
    assert one.name == f"svhn-l2/{digest[:DIGITS]}"
    assert one.folder == tmp_path / "runs" / one.name
    assert other.experiment.seed == other.experiment.corruption_seed == 3


def test_the_profile_is_the_callers_the_tables_or_the_files(tasks):
    text = 'profile = "smoke"\n[[runs]]\nexperiments = ["svhn-l2"]\n'
    for more, how, expected in (
        ("", {}, "smoke"),
        ('profile = "reduced"', {}, "reduced"),
        ('profile = "reduced"', {"profile": "full"}, "full"),
    ):
        (task,), _ = tasks(text + more, **how)
        assert task.experiment == at_profile(named("svhn-l2"), expected)


def test_what_may_be_nothing_takes_none(tasks):
    text = '[[runs]]\nexperiments = ["svhn-l2"]\nprofile = "full"\nset = { n_train = "none" }'
    assert tasks(text)[0][0].experiment.n_train is None


def test_an_evaluation_comes_after_the_run_that_it_scores(tasks, tmp_path):
    text = '[[runs]]\nexperiments = ["svhn-evaluation"]\nseeds = [1]\nset = { width = 0.25 }\n'
    found, twice = tasks(text + '[[runs]]\nexperiments = ["svhn-random-labels"]\nseeds = [1]')
    scored, evaluation, third = found
    assert (evaluation.needs, scored.needs, twice) == (scored.name, "", 0)
    assert (scored.experiment.name, scored.experiment.width) == ("svhn-random-labels", 0.25)
    assert evaluation.experiment.width == 0.25
    path = (evaluation.folder / evaluation.experiment.run_folder).resolve()
    assert path == scored.folder.resolve()  # from its own folder, so the whole can be moved
    (tmp_path / "grid.toml").write_text(text)
    elsewhere, _ = read_grid(tmp_path / "grid.toml", tmp_path / "other")
    assert [task.name for task in elsewhere] == [scored.name, evaluation.name]
    assert third.experiment.width != 0.25


GOOD = '[[runs]]\nexperiments = ["svhn-l2"]\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("runs = 3", r"must have tables that begin with \[\[runs\]\]"),
        ("[[runs", "is not TOML"),
        ('profil = "smoke"\n' + GOOD, "unknown key in .*'profil'; did you mean 'profile'"),
        (GOOD + "seed = 3", "unknown key in .*table 1.*'seed'; did you mean 'seeds'"),
        (GOOD + GOOD + "seeds = [1, 1]", "table 2 of .*seeds names a seed twice"),
        (GOOD + 'chapter = "x"', "either experiments or a chapter"),
        ("[[runs]]\nseeds = [1]", "either experiments or a chapter"),
        ('[[runs]]\nexperiments = "svhn-l2"', "experiments must be a list of names"),
        ('[[runs]]\nexperiments = ["svhn-12"]', "did you mean 'svhn-l2'"),
        (GOOD + 'profile = "quik"', "unknown profile 'quik'; did you mean 'quick'"),
        (GOOD + "set = { widht = 1 }", "unknown field 'widht'; did you mean 'width'"),
        (GOOD + "set = 3", "set must be a table"),
        (GOOD + "product = { width = 0.5 }", "product: width must be a list of one value or more"),
        (GOOD + "product = { width = [] }", "product: width must be a list of one value or more"),
        (GOOD + "product = { width = [0.5, 99] }", r"table 1.*svhn-l2 width=99: width must be"),
        (GOOD + "zip = { width = [1], epochs = [1, 2] }", "lists must be equally long"),
        (GOOD + "list = [1]", "list must be a list of tables"),
        (GOOD + "set = {width = 1}\nproduct = {width = [1]}", "width given twice, by two of list"),
        (GOOD + "seeds = [1]\nset = { corruption_seed = 1 }", "corruption_seed given twice"),
        (GOOD + "resources = { GPU = 0 }", "resources must be numbers above 0"),
        (GOOD + "set = { n_train = 10 }", "10 images do not fill one batch of 50"),
        (GOOD + "set = { dropout = [0.5, 2.0] }", "dropout must be numbers, each"),
    ],
)
def test_nonsense_is_told_with_its_place(tasks, text, said):
    with pytest.raises(InvalidValue, match=said):
        tasks(text)


def test_a_missing_grid_is_told(tmp_path):
    with pytest.raises(DataNotFound, match=r"no grid .*there is no such file"):
        read_grid(tmp_path / "grid.toml", tmp_path)


# -------------------------------------------------------------------------------- chapters


@pytest.fixture
def chapter(tmp_path):
    """A chapter of two cells."""
    cells = [nbformat.v4.new_code_cell(text) for text in (PARAMETERS, "print(profile, seed)")]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "some.ipynb")
    return tmp_path / "some.ipynb"


PARAMETERS = 'profile = "quick"  # a\nseed = 0  # b\nruns_folder = ""  # c'


def test_a_chapter_gives_a_notebook_with_its_parameters_in_its_name(tasks, chapter, tmp_path):
    found, _ = tasks('[[runs]]\nchapter = "some.ipynb"\nprofile = "smoke"\nseeds = [0, 4]')
    assert [task.out for task in found] == [
        tmp_path / "runs" / "some" / f"some,profile=smoke,seed={seed}.ipynb" for seed in (0, 4)
    ]
    assert found[1].parameters == {
        "profile": "smoke",
        "seed": 4,
        "runs_folder": str(tmp_path / "runs" / "some" / "some,profile=smoke,seed=4"),
    }
    (alone,), _ = tasks('[[runs]]\nchapter = "some.ipynb"')
    assert alone.out.name == "some.ipynb"  # at its own parameters


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("product = { sead = [1] }", InvalidValue, "did you mean 'seed'"),
        ("set = { seed = 1.5 }", InvalidValue, "parameter 'seed' must be int"),
        ('chapter = "no.ipynb"', DataNotFound, "table 1 of .*no chapter no.ipynb, here or in"),
    ],
)
def test_parameters_that_a_chapter_lacks_are_told(tasks, chapter, text, kind, said):
    own = "" if "chapter" in text else 'chapter = "some.ipynb"\n'
    with pytest.raises(kind, match=said):
        tasks(f"[[runs]]\n{own}{text}")
