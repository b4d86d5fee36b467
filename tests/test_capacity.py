import json
from dataclasses import replace
from math import log2

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bnnlib import capacity
from bnnlib.__main__ import main
from bnnlib.capacity import load_grid, measure, measure_grid, mutual_information, points
from bnnlib.errors import DamagedFile, DataNotFound, FolderInUse, Interrupted, InvalidValue
from bnnlib.experiments import CAPACITY, stored_runs
from bnnlib.files import locked

TINY = points(widths=(0.0625,), sizes=(50, 100), seeds=(0,), steps=4)


def without_seconds(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


# ------------------------------------------------------------------------- mutual information


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


def test_all_labels_fitted_is_all_bits_and_never_more():
    labels = torch.arange(10).repeat(100)
    assert mutual_information(labels, labels) == log2(10)
    assert mutual_information(9 - labels, labels) == log2(10)  # a known mistake tells as much


def test_a_constant_prediction_tells_nothing():
    labels = torch.arange(10).repeat(10)
    assert mutual_information(torch.zeros_like(labels), labels) == 0


def test_independent_predictions_tell_nearly_nothing():
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randint(10, (2, 4000), generator=generator) for _ in range(20)]
    bits = [4000 * mutual_information(*pair) for pair in pairs]
    assert 0 <= np.mean(bits) < 10  # without the correction: about 58


# --------------------------------------------------------------------------------- the grid


def test_points_pair_each_binary_network_with_its_twin_at_equal_steps():
    grid = points((0.5, 1.0), (1000, 250), (3, 4), steps=400)
    assert len(grid) == 16
    assert [e.n_train for e in grid] == [250] * 8 + [1000] * 8
    assert {(e.n_train, e.epochs) for e in grid} == {(250, 80), (1000, 20)}
    assert {(e.seed, e.data_seed) for e in grid} == {(3, 3), (4, 4)}
    assert [e.binary for e in grid].count(False) == 8


def test_a_row_counts_weights_and_bits():
    row = measure(TINY[0], device="cpu")
    hidden = 4
    assert row["weights"] == 192 * hidden + hidden**2 + 10 * hidden
    assert row["label_bits"] == 50 * log2(10)
    assert 0 <= row["memorized_bits"] <= row["label_bits"]
    assert 0 <= row["train_error"] <= 1


def test_a_network_that_fits_all_its_labels_memorizes_all_bits():
    (point,) = [e for e in points((1.0,), (50,), (0,), steps=150) if not e.binary]
    row = measure(point, device="cpu")
    assert row["train_error"] == 0
    assert row["memorized_bits"] == pytest.approx(row["label_bits"], rel=0.05)


def test_a_grid_that_was_stopped_goes_on(tmp_path, monkeypatch):
    whole = measure_grid(TINY, tmp_path / "whole", device="cpu")
    measure_grid(TINY[:2], tmp_path / "half", device="cpu")
    measured = []
    monkeypatch.setattr(capacity, "measure", lambda e, d: measured.append(e) or measure(e, d))
    rest = measure_grid(TINY, tmp_path / "half", device="cpu")
    assert measured == TINY[2:]
    assert [row["n_train"] for row in rest] == [50, 50, 100, 100]
    for row, kept in zip(without_seconds(whole), without_seconds(rest), strict=True):
        assert row == kept
    assert without_seconds(load_grid(tmp_path / "half")) == without_seconds(
        load_grid(tmp_path / "whole")
    )


def test_widths_and_seeds_that_few_digits_do_not_hold_are_known_again(tmp_path, monkeypatch):
    grid = points(widths=(0.1 / 3,), sizes=(50,), seeds=(2**40, 2**60 + 1), steps=1)
    first = measure_grid([*grid, grid[0]], tmp_path, device="cpu")  # one of them twice
    assert len(first) == len(grid)
    monkeypatch.setattr(capacity, "measure", lambda *_: pytest.fail("it was measured already"))
    again = measure_grid(grid, tmp_path, device="cpu")
    assert again == first
    assert [row["seed"] for row in again] == [e.seed for e in grid]


def test_points_that_share_their_data_are_told_apart_by_it(tmp_path):
    (point, *_) = points(widths=(0.0625,), sizes=(50,), seeds=(0,), steps=1)
    grid = [point, replace(point, data_seed=7)]
    assert [row["data_seed"] for row in measure_grid(grid, tmp_path, device="cpu")] == [0, 7]


@pytest.mark.parametrize("changed", [{"l2": 1e-3, "l2_target": "weights"}, {"corruption_seed": 1}])
@pytest.mark.parametrize("place", [0, 2])
def test_points_that_differ_in_more_than_a_grid_may_are_refused(place, changed, tmp_path):
    grid = list(TINY)
    grid[place] = replace(grid[place], **changed)
    name = next(iter(changed))
    with pytest.raises(InvalidValue, match=f"may differ in width, .* only; {name} is .* in the"):
        measure_grid(grid, tmp_path / "grid", device="cpu")
    assert not (tmp_path / "grid").exists()


def test_a_grid_is_no_run_and_says_what_it_is(tmp_path):
    measure_grid(TINY[:1], tmp_path / "grid", device="cpu")
    about = json.loads((tmp_path / "grid" / "grid.json").read_text())
    assert about["experiment_sha256"] == CAPACITY.digest()
    assert about["experiment"]["name"] == "capacity"
    assert {"versions", "device", "threads"} <= set(about)
    assert stored_runs(root=tmp_path) == []


def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FolderInUse, match="holds no grid"):
        measure_grid(TINY, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "grid.json").write_text('{"experiment_sha256": "another"}')
    with pytest.raises(InvalidValue, match="grid of another experiment"):
        measure_grid(TINY, tmp_path)
    with pytest.raises(DataNotFound, match=r"no grid\.csv"):
        load_grid(tmp_path)


@pytest.mark.parametrize(
    "text", ["width\n1\n", "n_train,seed,weights,binary\n1,,3,1\n", "a,b\n1\n"]
)
def test_a_table_that_is_no_grid_is_refused_by_name(text, tmp_path):
    (tmp_path / "grid.csv").write_text(text)
    with pytest.raises(DamagedFile, match=r"grid\.csv is n"):
        load_grid(tmp_path)


def test_a_grid_that_was_stopped_before_its_first_point_begins_again(tmp_path):
    measure_grid(TINY[:1], tmp_path / "grid", device="cpu")
    (tmp_path / "grid" / "grid.csv").unlink()
    assert len(measure_grid(TINY[:1], tmp_path / "grid", device="cpu")) == 1


def test_an_interrupted_grid_keeps_what_was_measured(tmp_path, monkeypatch):
    def interrupted(e, device):
        if e == TINY[1]:
            raise KeyboardInterrupt
        return measure(e, device)

    monkeypatch.setattr(capacity, "measure", interrupted)
    with pytest.raises(Interrupted, match="is kept; the same command continues it"):
        measure_grid(TINY, tmp_path / "grid", device="cpu")
    assert len(load_grid(tmp_path / "grid")) == 1


def test_a_grid_that_another_process_measures_is_refused(tmp_path):
    measure_grid(TINY[:1], tmp_path / "grid", device="cpu")
    with locked(tmp_path / "grid"), pytest.raises(FolderInUse, match="another process"):
        measure_grid(TINY, tmp_path / "grid", device="cpu")


def test_the_stored_grid_is_whole():
    rows = load_grid()
    about = json.loads((capacity.STORED / "grid.json").read_text())
    assert about["experiment_sha256"] == CAPACITY.digest()
    expected = {tuple(getattr(e, name) for name in capacity.KEY) for e in points()}
    assert {tuple(row[name] for name in capacity.KEY) for row in rows} == expected
    assert len(rows) == len(expected)
    assert all(0 <= row["memorized_bits"] <= row["label_bits"] * (1 + 1e-8) for row in rows)


def test_the_command_measures_the_grid_into_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("bnnlib.__main__.points", lambda: TINY[:2])
    out = tmp_path / "grid"
    result = CliRunner().invoke(main, ["capacity", "--out", str(out), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"2 runs\n{out / 'grid.csv'}\n"
    assert len(load_grid(out)) == 2
