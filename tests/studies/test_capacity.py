"""Memorized bits, counted against independent formulas, and the grid that is measured of them."""

import json
from dataclasses import replace
from functools import partial
from math import log2
from unittest.mock import patch

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bnnlib.cli import main
from bnnlib.errors import DamagedFile, DataNotFound, FolderInUse, Interrupted, InvalidValue
from bnnlib.experiments.variants import CAPACITY
from bnnlib.files import locked
from bnnlib.runs.ledger import results
from bnnlib.studies import capacity
from bnnlib.studies.capacity import (
    load_grid,
    make_grid,
    measure_grid,
    measure_point,
    mutual_information,
)

TINY = make_grid(widths=(0.0625,), sizes=(50, 100), seeds=(0,), steps=4)


@pytest.fixture
def measure(tmp_path):
    """Measures the points of a grid into a folder."""
    return lambda points, folder="grid": measure_grid(points, tmp_path / folder, device="cpu")


def entropies(predicted, labels):
    """H(prediction) + H(label) - H(both), an independent way to the plug-in estimate."""

    def entropy(values):
        p = np.unique(values, return_counts=True, axis=0)[1] / len(values)
        return -(p * np.log2(p)).sum()

    pairs = np.stack([predicted, labels], axis=1)
    return entropy(predicted) + entropy(labels) - entropy(pairs)


def test_information_is_the_plug_in_estimate_less_its_bias():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=400)
    predicted = np.where(rng.random(400) < 0.5, labels, rng.integers(4, size=400))
    bias = (16 - 4 - 4 + 1) / (2 * 400 * np.log(2))  # every pair of the four classes occurs
    expected = entropies(predicted, labels) - bias
    found = mutual_information(torch.tensor(predicted), torch.tensor(labels), classes=4)
    assert found == pytest.approx(expected, abs=1e-12)


def test_all_labels_fitted_is_all_bits_and_a_constant_tells_nothing():
    labels = torch.arange(10).repeat(100)
    assert mutual_information(labels, labels) == log2(10)
    assert mutual_information(9 - labels, labels) == log2(10)  # a known mistake tells as much
    assert mutual_information(torch.zeros_like(labels), labels) == 0


def test_points_pair_each_binary_network_with_its_twin_at_equal_steps():
    grid = make_grid((0.5, 1.0), (1000, 250), (3, 4), steps=400)
    assert len(grid) == 16
    assert [e.n_train for e in grid] == [250] * 8 + [1000] * 8
    assert {(e.n_train, e.epochs) for e in grid} == {(250, 80), (1000, 20)}
    assert {(e.seed, e.data_seed) for e in grid} == {(3, 3), (4, 4)}
    assert [e.binary for e in grid].count(False) == 8


def test_a_row_counts_weights_and_bits():
    row = measure_point(TINY[0], device="cpu")
    hidden = 4
    assert row["weights"] == 192 * hidden + hidden**2 + 10 * hidden
    assert row["label_bits"] == 50 * log2(10)
    assert 0 <= row["memorized_bits"] <= row["label_bits"]
    (float_point,) = [e for e in make_grid((1.0,), (50,), (0,), steps=150) if not e.binary]
    fitted = measure_point(float_point, device="cpu")
    assert fitted["train_error"] == 0
    assert fitted["memorized_bits"] == pytest.approx(fitted["label_bits"], rel=0.05)


def test_an_interrupted_grid_keeps_what_was_measured_and_goes_on(measure, tmp_path):
    three = [*map(partial(measure_point, device="cpu"), TINY[:2]), KeyboardInterrupt]
    stops = pytest.raises(Interrupted, match="is kept; the same command continues it")
    with patch.object(capacity, "measure_point", side_effect=three), stops:
        measure(TINY)
    assert load_grid(tmp_path / "grid") == three[:2]
    with patch.object(capacity, "measure_point", side_effect=measure_point) as measured:
        rows = measure(TINY)
    assert [call.args[0] for call in measured.call_args_list] == TINY[2:]
    assert [row["n_train"] for row in rows] == [50, 50, 100, 100]
    assert rows[:2] == three[:2]
    assert load_grid(tmp_path / "grid") == rows


def test_widths_and_seeds_that_few_digits_do_not_hold_are_known_again(measure, monkeypatch):
    grid = make_grid(widths=(0.1 / 3,), sizes=(50,), seeds=(2**40, 2**60 + 1), steps=1)
    first = measure([*grid, grid[0]])  # one of them twice
    assert [row["seed"] for row in first] == [e.seed for e in grid]
    monkeypatch.setattr(capacity, "measure_point", None)  # they were measured already
    assert measure(grid) == first


def test_points_that_share_their_data_are_told_apart_by_it(measure):
    rows = measure([TINY[0], replace(TINY[0], data_seed=7)])
    assert [row["data_seed"] for row in rows] == [0, 7]


@pytest.mark.parametrize("changed", [{"l2": 1e-3, "l2_target": "weights"}, {"corruption_seed": 1}])
def test_points_that_differ_in_more_than_a_grid_may_are_refused(changed, measure, tmp_path):
    name = next(iter(changed))
    with pytest.raises(InvalidValue, match=f"may differ in width, .* only; {name} is .* in the"):
        measure([*TINY, replace(TINY[0], **changed)])
    assert not (tmp_path / "grid").exists()


def test_a_grid_is_no_run_and_says_what_it_is(measure, tmp_path):
    measure(TINY[:1])
    about = json.loads((tmp_path / "grid" / "grid.json").read_text())
    assert about["experiment_sha256"] == CAPACITY.digest()
    assert about["experiment"]["name"] == "capacity"
    assert {"versions", "device", "threads"} <= set(about)
    assert len(results(tmp_path, unfinished=True)) == 0
    (tmp_path / "grid" / "grid.csv").unlink()  # as where it was stopped before its first point
    assert len(measure(TINY[:1])) == 1


def test_a_folder_of_something_else_is_refused_and_untouched(measure, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FolderInUse, match="holds no grid"):
        measure(TINY, ".")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "grid.json").write_text('{"experiment_sha256": "another"}')
    with pytest.raises(InvalidValue, match="grid of another experiment"):
        measure(TINY, ".")
    with pytest.raises(DataNotFound, match=r"no grid\.csv"):
        load_grid(tmp_path)


@pytest.mark.parametrize(
    "text", ["width\n1\n", "n_train,seed,weights,binary\n1,,3,1\n", "a,b\n1\n"]
)
def test_a_table_that_is_no_grid_is_refused_by_name(text, tmp_path):
    (tmp_path / "grid.csv").write_text(text)
    with pytest.raises(DamagedFile, match=r"grid\.csv(, line 2:)? .*(is no table|no table of)"):
        load_grid(tmp_path)


def test_a_grid_that_another_process_measures_is_refused(measure, tmp_path):
    with locked(tmp_path / "grid"), pytest.raises(FolderInUse, match="another process"):
        measure(TINY)


def test_the_stored_grid_is_whole():
    rows = load_grid()
    about = json.loads((capacity.STORED / "grid.json").read_text())
    assert about["experiment_sha256"] == CAPACITY.digest()
    expected = {tuple(getattr(e, name) for name in capacity.KEY) for e in make_grid()}
    assert {tuple(row[name] for name in capacity.KEY) for row in rows} == expected
    assert len(rows) == len(expected)
    assert all(0 <= row["memorized_bits"] <= row["label_bits"] * (1 + 1e-8) for row in rows)


def test_the_command_measures_the_grid_into_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("bnnlib.studies.capacity.make_grid", lambda: TINY[:2])
    out = tmp_path / "grid"
    result = CliRunner().invoke(main, ["capacity", "--out", str(out), "--device", "cpu"])
    assert (result.exit_code, result.stdout) == (0, f"2 runs\n{out / 'grid.csv'}\n")
    assert len(load_grid(out)) == 2
