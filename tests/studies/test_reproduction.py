"""Stored runs made again: drawn by lot, equal here, and elsewhere as one more seed would be."""

import json
import shutil
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
from click.testing import CliRunner

from bnnlib.cli import main
from bnnlib.errors import DataNotFound, InvalidValue
from bnnlib.experiments.profiles import reduced, smoke
from bnnlib.experiments.scored import as_scored
from bnnlib.experiments.variants import named
from bnnlib.files import read_json, write_json
from bnnlib.history import History
from bnnlib.runs.ledger import results
from bnnlib.runs.record import HISTORY, RECORD
from bnnlib.runs.run import run
from bnnlib.studies.reproduction import compare, draw
from bnnlib.sweeps.tasks import run_name

E = reduced(named("svhn-l2"))
ERRORS = (0.10, 0.13, 0.19)


def rows(train, seconds=1.0):
    return [{"epoch": 1, "train_error": train, "test_error": 0.9, "seconds": seconds}]


@pytest.fixture
def stored(write_run, tmp_path):
    """A folder with three runs of one experiment and two of another."""
    for name, errors in (("svhn-l2", ERRORS), ("svhn-dropout", (0.3, 0.4))):
        for seed, error in enumerate(errors):
            e = replace(reduced(named(name)), seed=seed)
            write_run(tmp_path / "stored" / name / str(seed), e, rows(error), seconds=1.0)
    return tmp_path / "stored"


# ---------------------------------------------------------------------------------- the lot


def test_a_lot_takes_one_run_of_each_experiment_and_another_lot_others(stored):
    table = results(stored)
    for lot in range(3):
        assert sorted(draw(table, lot)["experiment"]) == ["svhn-dropout", "svhn-l2"]
        assert draw(table, lot).index.equals(draw(table, lot).index)
    assert {run for lot in range(40) for run in draw(table, lot).index} == {*table.index}


def test_an_experiment_or_a_run_is_taken_by_its_name(stored):
    table = results(stored)
    assert draw(table, 0, "svhn-l2")["experiment"].tolist() == ["svhn-l2"]
    assert draw(table, 0, "svhn-l2/2").index.tolist() == ["svhn-l2/2"]
    with pytest.raises(InvalidValue, match="'svhn-l3' is stored; did you mean 'svhn-l2'"):
        draw(table, 0, "svhn-l3")


def test_of_no_runs_none_is_drawn(tmp_path):
    with pytest.raises(DataNotFound, match="no finished run"):
        draw(results(tmp_path), 0)


# ------------------------------------------------------------------------------ the comparison


@pytest.fixture
def again(write_run, tmp_path, stored):
    """Compares the first stored run with one of this last training error and record."""

    def make(train, **record):
        folder = write_run(tmp_path / "again", E, rows(train, 7.0), **({"seconds": 7.0} | record))
        return compare(stored / "svhn-l2/0", folder, results(stored).query("experiment == @E.name"))

    return make


def test_a_run_that_took_another_time_is_equal(again):
    found = again(ERRORS[0])
    assert found.reproduced
    assert found.text == "equal, bit for bit"


def test_made_alike_it_must_be_equal_to_the_last_digit(again):
    found = again(ERRORS[0] + 1e-5)
    assert not found.reproduced
    assert found.text == "not equal, though made alike: train_error"
    assert not again(ERRORS[0], parameter_sha256="0" * 64).reproduced


# The interval of one more seed, by hand: t of 2 degrees of freedom, and one image of 881.
MIDDLE = np.mean(ERRORS)
HALF = 4.302653 * np.std(ERRORS, ddof=1) * sqrt(1 + 1 / 3) + 1 / 881


@pytest.mark.parametrize("elsewhere", [{"device": "another"}, {"threads": 2}])
@pytest.mark.parametrize(
    ("train", "reproduced"),
    [(MIDDLE + 0.999 * HALF, True), (MIDDLE + 1.001 * HALF, False), (MIDDLE, True)],
)
def test_elsewhere_its_errors_must_be_those_of_one_more_seed(again, train, reproduced, elsewhere):
    found = again(train, **elsewhere)
    assert found.reproduced == reproduced
    assert found.text.startswith(f"other {next(iter(elsewhere))}: ")
    assert ("train_error 36.90 %, outside 0.00 to 36.88 %" in found.text) == (not reproduced)


def test_an_error_that_no_run_has_is_not_asked_for(write_run, tmp_path):
    folders = [tmp_path / str(seed) for seed in range(3)]
    for seed, folder in enumerate(folders):
        row = {"epoch": 1, "train_error": ERRORS[seed], "seconds": 1.0}
        write_run(folder, replace(E, seed=seed), [row], seconds=1.0)
    row = {"epoch": 1, "train_error": 0.11, "seconds": 1.0}
    again = write_run(tmp_path / "again", E, [row], seconds=1.0, device="another")
    table = results(tmp_path).drop("again")
    assert compare(folders[0], again, table).reproduced


def test_one_stored_seed_says_nothing_about_another_machine(again, stored):
    for seed in (1, 2):
        shutil.rmtree(stored / "svhn-l2" / str(seed))
    found = again(0.11, device="another")
    assert not found.reproduced
    assert "cannot be judged by the one stored seed" in found.text


def test_other_data_are_no_reproduction(again):
    splits = ("train", "test")
    found = again(ERRORS[0], image_sha256=dict.fromkeys(splits, "1" * 64))
    assert not found.reproduced
    assert "other data: its image_sha256" in found.text


# --------------------------------------------------------------------------------- the command


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A run and an evaluation of it, of which only record and history are stored."""
    monkeypatch.chdir(tmp_path)
    base = replace(smoke(named("svhn-random-labels")), n_train=50, n_test=50)
    scored = replace(smoke(named("svhn-evaluation")), run_folder=f"../../{run_name(base)}")
    scored = as_scored(scored, base, {})
    for e in (base, scored):
        folder = tmp_path / "made" / run_name(e)
        run(e, folder, device="cpu", progress="none")
        shutil.copytree(folder, tmp_path / "kept" / e.name, ignore=lambda *_: ["labels.npz"])
        (tmp_path / "kept" / e.name / "parameters.safetensors").unlink(missing_ok=True)
    return tmp_path / "kept"


def reproduce(*options):
    command = ("reproduce", "--stored", "kept", "--device", "cpu", "--workers", "1", *options)
    return CliRunner().invoke(main, command)


def test_stored_runs_are_made_again_and_compared(kept):
    done = reproduce("--lot", "5")
    assert done.exit_code == 0, done.output
    assert "lot 5: 2 runs of kept" in done.output
    for name in ("svhn-random-labels", "svhn-evaluation"):
        assert f"{name}: equal, bit for bit" in done.output

    history = History.load(kept / "svhn-random-labels" / HISTORY)
    history.rows[-1]["train_error"] += 0.02
    history.save(kept / "svhn-random-labels" / HISTORY)
    path = kept / "svhn-random-labels" / RECORD
    record = read_json(path)
    write_json(path, {k: v for k, v in record.items() if k != "history_sha256"})
    done = reproduce("svhn-random-labels")
    assert done.exit_code == 1
    assert "svhn-random-labels: not equal, though made alike: train_error" in done.output


def test_an_evaluation_of_a_run_that_is_not_stored_says_so(kept):
    shutil.rmtree(kept / "svhn-random-labels")
    done = reproduce("--dry-run")
    assert done.exit_code == 1
    assert "svhn-evaluation scores a run that is not stored" in done.output
    assert json.loads((kept / "svhn-evaluation" / RECORD).read_text())
