"""What is measured of runs, when a claim holds, and that every claim has its runs."""

from dataclasses import replace
from math import nan

import pytest

from bnnlib.experiments.profiles import reduced
from bnnlib.experiments.variants import named
from bnnlib.history import History
from bnnlib.runs.ledger import results
from bnnlib.runs.result import Run
from bnnlib.studies import claims
from bnnlib.studies.claims import CLAIMS, GRID_CLAIMS, Claim, excess, judge, last


def made(name="svhn-random-labels", seed=0, rows=(), **row):
    """A run that never took place, with these last errors or these rows."""
    rows = list(rows) or [{"epoch": 1, **row}]
    record = {"images": {"train": 881, "test": 100}, "device": "a computer"}
    return Run(replace(reduced(named(name)), seed=seed), History(rows), record)


A, B = "svhn-random-labels", "svhn-dropout"


def test_last_and_excess_are_in_percent():
    first, second = made(train_error=0.25), made(train_error=0.05)
    assert last()(first) == 25
    assert excess()(first, second) == pytest.approx(20)
    assert excess("train_error")(second, first) == pytest.approx(-20)


def test_the_smallest_step_is_from_one_experiment_to_the_next():
    levels = [made(test_error=e) for e in (0.1, 0.3, 0.9)]
    assert claims.smallest_step()(*levels) == pytest.approx(20)
    assert claims.smallest_step()(*levels[::-1]) == pytest.approx(-60)


def test_epochs_later_counts_one_that_never_gets_there_as_past_its_end():
    def falling(*errors):
        return made(rows=[{"epoch": i + 1, "train_error": e} for i, e in enumerate(errors)])

    quick, slow, never = falling(0.4, 0.0), falling(0.9, 0.4), falling(0.9, nan)
    assert claims.epochs_later(0.5)(quick, slow) == 1
    assert claims.epochs_later(0.5)(slow, quick) == -1
    assert claims.epochs_later(0.5)(quick, never) == reduced(named(A)).epochs
    columns = [{"epoch": 1, "a": 0.4, "b": 0.9}, {"epoch": 5, "a": 0.1, "b": 0.3}]
    assert claims.epochs_later(0.5, "a", "b")(made(rows=columns)) == 4


def test_histories_differ_in_the_columns_that_are_not_equal_times_aside():
    base = made(train_error=0.5, test_error=nan, seconds=1.0)
    assert claims.columns_that_differ(base, made(train_error=0.5, test_error=nan, seconds=2.0)) == 0
    assert claims.columns_that_differ(base, made(train_error=0.25, test_error=0.3)) == 2
    assert claims.columns_that_differ(base, made(train_error=0.5)) == 1


def test_bits_per_weight_takes_the_best_point():
    keys = ("binary", "weights", "memorized_bits")
    table = [(True, 10, 1), (True, 10, 4), (True, 20, 2), (False, 10, 30)]
    rows = [dict(zip(keys, row, strict=True)) for row in table]
    assert claims.bits_per_weight(*rows, binary=True) == pytest.approx(0.4)
    assert claims.bits_per_weight(*rows, binary=False) == pytest.approx(3)


@pytest.mark.parametrize(
    ("holds", "of", "not_of"),
    [
        (claims.above(1), [2, 3], [2, 1]),
        (claims.at_least(1), [2, 1], [2, 0.9]),
        (claims.at_most(2), [2, 1], [1, 2.1]),
        (claims.mean_within(87, 93), [80, 100], [80, 80]),
    ],
)
def test_conditions_are_of_every_seed_or_of_their_mean(holds, of, not_of):
    assert holds(of)
    assert not holds(not_of)


POINTS = Claim("dropout hinders", (B, A), excess(), claims.above(0), "points")


@pytest.fixture
def ledger_of(write_run, tmp_path):
    """Makes a ledger of runs with these last errors, a seed for each, by experiment."""

    def make(errors, **changes):
        for name, values in errors.items():
            for seed, error in enumerate(values):
                e = replace(reduced(named(name)), seed=seed, **changes)
                rows = [{"epoch": 1, "train_error": error}]
                write_run(tmp_path / name / str(seed), e, rows, seconds=1.0)
        return results(tmp_path)

    return make


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        ({A: (0.0, 0.0, 0.0), B: (0.1, 0.2, 0.3)}, "holds"),
        ({A: (0.0, 0.2, 0.0), B: (0.1, 0.1, 0.1)}, "fails"),
        ({A: (0.0, 0.0, 0.0), B: (0.1, 0.1)}, "fewer than 3 seeds"),
        ({A: (0.0, 0.0, 0.0)}, "not run at reduced length"),
    ],
)
def test_a_verdict_needs_three_seeds_of_every_experiment(errors, verdict, ledger_of):
    assert judge(POINTS, ledger_of(errors), "reduced")["verdict"] == verdict


def test_a_row_names_the_runs_it_rests_on(ledger_of):
    row = judge(POINTS, ledger_of({A: (0.0, 0.0, 0.1), B: (0.2, 0.1, 0.6)}), "reduced")
    assert row["seeds"] == 3
    assert (row["lowest"], row["mean"], row["highest"]) == pytest.approx((10, 80 / 3, 50))
    assert row["experiments"] == f"{B}, {A}"
    assert row["data"] == "881 of svhn_exact_subset.npz"
    assert row["device"] == "a computer"


def test_runs_of_another_length_do_not_count(ledger_of):
    errors = {A: (0.0,) * 3, B: (0.1,) * 3}
    assert judge(POINTS, ledger_of(errors), "full")["verdict"] == "not run at full length"
    own = ledger_of(errors, width=0.3)
    assert judge(POINTS, own, "reduced")["verdict"] == "not run at reduced length"


def test_each_claim_is_made_once():
    texts = [claim.text for claim in (*CLAIMS, *GRID_CLAIMS)]
    assert len(set(texts)) == len(texts)


def test_each_claim_has_its_runs_or_its_grid():
    ledger = results()
    rows = [judge(claim, ledger, "reduced") for claim in CLAIMS]
    rows += map(claims.judge_grid, GRID_CLAIMS)
    assert {row["verdict"] for row in rows} <= {"holds", "fails"}  # three seeds were run
