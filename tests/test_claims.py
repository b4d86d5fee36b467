from dataclasses import replace
from math import inf, nan

import pytest

from bnnlib.claims import (
    CLAIMS,
    GRID_CLAIMS,
    Claim,
    bits_per_weight,
    each,
    epochs_later,
    excess,
    judge,
    judge_grid,
    largest_difference,
    last,
    mean_within,
    standard_deviations_from_a_guess,
    steepest,
)
from bnnlib.experiments import Run, named, reduced, stored_runs
from bnnlib.history import History


def made(name="svhn-random-labels", seed=0, rows=(), **row):
    """A run that never took place, with these last errors or these rows."""
    rows = list(rows) or [{"epoch": 1, **row}]
    record = {"images": {"train": 881, "test": 100}, "device": "a computer"}
    return Run(replace(reduced(named(name)), seed=seed), History(rows), record)


A, B = "svhn-random-labels", "svhn-dropout"


# ------------------------------------------------------------------------------- the measures


def test_last_and_excess_are_in_percent():
    first, second = [made(train_error=0.25)], [made(train_error=0.05)]
    assert last()(first) == [25]
    assert excess()(first, second) == pytest.approx([20])
    assert excess("train_error")(second, first) == pytest.approx([-20])


def test_the_smallest_step_from_level_to_level_is_taken_within_each_seed():
    levels = [[made(test_error=e) for e in seeds] for seeds in ((0.1, 0.2), (0.3, 0.25), (0.9, 1))]
    assert steepest()(*levels) == pytest.approx([20, 5])


def test_epochs_later_counts_one_that_never_gets_there_as_past_its_end():
    def falling(*errors):
        return [made(rows=[{"epoch": i + 1, "train_error": e} for i, e in enumerate(errors)])]

    quick, slow, never = falling(0.4, 0.0), falling(0.9, 0.4), falling(0.9, nan)
    assert epochs_later(0.5)(quick, slow) == [1]
    assert epochs_later(0.5)(slow, quick) == [-1]
    assert epochs_later(0.5)(quick, never) == [reduced(named(A)).epochs]


def test_epochs_later_between_two_columns_of_one_run():
    rows = [{"epoch": 1, "a": 0.4, "b": 0.9}, {"epoch": 5, "a": 0.1, "b": 0.3}]
    assert epochs_later(0.5, "a", "b")([made(rows=rows)]) == [4]


def test_histories_differ_by_their_largest_gap_and_not_by_their_times():
    base = made(train_error=0.5, test_error=nan, seconds=1.0)
    same = made(train_error=0.5, test_error=nan, seconds=2.0)
    assert largest_difference([base], [same]) == [0]
    other = made(train_error=0.5, test_error=0.3, seconds=1.0)
    assert largest_difference([same], [made(train_error=0.25, test_error=nan)]) == [0.25]
    assert largest_difference([base], [other]) == [inf]


@pytest.mark.parametrize(
    "other",
    [
        made(train_error=0.5),
        made(train_error=0.5, test_error=0.9, flips_conv1=0.0),
        made(rows=[{"epoch": 1, "train_error": 0.5, "test_error": 0.9}] * 2),
    ],
)
def test_a_column_or_an_epoch_that_one_run_lacks_is_a_difference(other):
    base = made(train_error=0.5, test_error=0.9, seconds=1.0)
    assert largest_difference([base], [other]) == [inf]
    assert largest_difference([other], [base]) == [inf]


def test_the_distance_from_a_guess_is_in_standard_deviations():
    runs = [made(test_error=e) for e in (0.9, 0.96)]
    assert standard_deviations_from_a_guess(runs) == pytest.approx([0, 2])


def test_conditions():
    assert each(lambda v: v > 1)([2, 3])
    assert not each(lambda v: v > 1)([2, 1])
    assert mean_within(87, 93)([80, 100])
    assert not mean_within(87, 93)([80, 80])


# --------------------------------------------------------------------------------- the verdict


POINTS = Claim("dropout hinders", (B, A), excess(), each(lambda p: p > 0), "points")


def runs_of(errors):
    return [made(name, s, train_error=e) for name, es in errors.items() for s, e in enumerate(es)]


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        ({A: (0.0, 0.0, 0.0), B: (0.1, 0.2, 0.3)}, "holds"),
        ({A: (0.0, 0.2, 0.0), B: (0.1, 0.1, 0.1)}, "fails"),
        ({A: (0.0, 0.0), B: (0.1, 0.1)}, "fewer than 3 seeds"),
        ({A: (0.0, 0.0, 0.0), B: (0.1, 0.1)}, "fewer than 3 seeds"),
        ({A: (0.0, 0.0, 0.0)}, "not run at reduced length"),
        ({}, "not run at reduced length"),
    ],
)
def test_a_verdict_needs_three_seeds_of_every_experiment(errors, verdict):
    assert judge(POINTS, runs_of(errors), "reduced")["verdict"] == verdict


def test_a_row_names_the_runs_it_rests_on():
    row = judge(POINTS, runs_of({A: (0.0, 0.0, 0.1), B: (0.1, 0.2, 0.6)}), "reduced")
    assert row["seeds"] == 3
    assert (row["lowest"], row["mean"], row["highest"]) == pytest.approx((10, 80 / 3, 50))
    assert row["experiments"] == f"{B}, {A}"
    assert row["data"] == "881 of svhn_exact_subset.npz"
    assert row["device"] == "a computer"


def test_runs_of_another_length_do_not_count():
    runs = runs_of({A: (0.0,) * 3, B: (0.1,) * 3})
    assert judge(POINTS, runs, "full")["verdict"] == "not run at full length"
    own = [replace(run, experiment=replace(run.experiment, width=0.3)) for run in runs]
    assert judge(POINTS, own, "reduced")["verdict"] == "not run at reduced length"


def test_bits_per_weight_takes_the_best_of_each_seed():
    keys = ("binary", "seed", "weights", "memorized_bits")
    table = [(True, 0, 10, 1), (True, 0, 10, 4), (True, 1, 20, 2), (False, 0, 10, 30)]
    rows = [dict(zip(keys, row, strict=True)) for row in table]
    assert bits_per_weight(binary=True)(rows) == pytest.approx([0.4, 0.1])
    assert bits_per_weight(binary=False)(rows) == pytest.approx([3])


# --------------------------------------------------------------------------- the claims made


def test_each_claim_names_experiments_that_exist_and_says_it_once():
    texts = [claim.text for claim in (*CLAIMS, *GRID_CLAIMS)]
    assert len(set(texts)) == len(texts)
    for claim in (*CLAIMS, *GRID_CLAIMS):
        assert [named(name).name for name in claim.experiments] == list(claim.experiments)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text)
def test_each_claim_has_its_runs(claim):
    assert judge(claim, stored_runs(), "reduced")["verdict"] in ("holds", "fails")


@pytest.mark.parametrize("claim", GRID_CLAIMS, ids=lambda claim: claim.text)
def test_each_claim_about_bits_has_its_grid(claim):
    assert judge_grid(claim)["verdict"] in ("holds", "fails")
