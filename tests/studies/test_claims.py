"""What is measured of runs, its interval and verdict, and that every claim has its runs."""

import csv
import json
from dataclasses import replace
from math import inf, nan

import numpy as np
import pandas as pd
import pytest

from bnnlib.errors import DataNotFound, InvalidValue
from bnnlib.experiments.profiles import reduced
from bnnlib.experiments.variants import named
from bnnlib.history import History
from bnnlib.runs.ledger import results
from bnnlib.runs.record import RESULTS
from bnnlib.runs.result import Run
from bnnlib.studies import claims
from bnnlib.studies.claims import (
    CLAIMS,
    TABLE_CLAIMS,
    Claim,
    cpu_hours,
    excess,
    interval,
    judge,
    last,
    of_rows,
)


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


def test_the_balanced_error_of_an_answer_that_is_always_the_same_is_90_percent():
    counts = [15, 41, 26, 31, 17, 23, 17, 13, 9, 10]  # SVHN's 202 test images
    always_1 = {f"test_error_class_{i}": float(i != 1) for i in range(10)}
    plain = 1 - counts[1] / sum(counts)
    assert claims.balanced_test_error(made(test_error=plain, **always_1)) == pytest.approx(90)
    assert 100 * plain < 80
    assert claims.balanced_test_error(made(**always_1 | {"test_error_class_3": nan})) < 90


def test_rows_of_points_become_one_number_in_their_order():
    one = pd.DataFrame({"train_error": [0.1, 0.4], "epochs_to_1": pd.array([5, None], "Int64")})
    other = pd.DataFrame({"train_error": [0.2], "epochs_to_1": pd.array([7], "Int64")})
    assert of_rows("train_error", factor=100)(one, other) == pytest.approx(40)
    assert of_rows("train_error", np.min)(one, other) == pytest.approx(0.1)
    assert of_rows("train_error", lambda v: v[2] - v[0])(one, other) == pytest.approx(0.1)
    assert of_rows("epochs_to_1")(other) == 7
    assert np.isnan(of_rows("epochs_to_1")(one, other))


# ------------------------------------------------------------------------------ the interval


def within(t, freedom):
    """The mass of Student's distribution from -t to t, with x = sqrt(freedom) tan(angle)."""
    angles = np.linspace(-np.pi / 2, np.pi / 2, 400_001)
    density = np.cos(angles) ** (freedom - 1)
    inside = np.abs(angles) <= np.arctan(t / freedom**0.5)
    return density[inside].sum() / density.sum()


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10, 30])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_the_interval_holds_its_share_of_students_distribution(n, level):
    values = np.random.default_rng(n).normal(40, 3, n)
    low, high = interval(list(values), level)
    assert (low + high) / 2 == pytest.approx(values.mean())
    t = (high - low) / 2 / (values.std(ddof=1) / n**0.5)
    assert within(t, n - 1) == pytest.approx(level, abs=1e-5)


def test_an_interval_of_equal_numbers_is_a_point():
    assert interval([0.1, 0.1, 0.1]) == (0.1, 0.1)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, nan], [1.0, 2.0, inf]])
def test_too_few_numbers_or_none_have_no_interval(values):
    with pytest.raises(InvalidValue, match="two finite numbers"):
        interval(values)


# -------------------------------------------------------------------------------- the verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict", "words"),
    [
        (-inf, 4, "holds", "at most 4"),
        (-inf, 3, "holds", "at most 3"),  # the interval is 2 to 3
        (-inf, 2.5, "open", "at most 2.5"),
        (-inf, 1, "fails", "at most 1"),
        (1, inf, "holds", "at least 1"),
        (2.5, inf, "open", "at least 2.5"),
        (4, inf, "fails", "at least 4"),
        (1, 4, "holds", "1 to 4"),
        (1, 2.5, "open", "1 to 2.5"),
        (2.4, 2.6, "open", "2.4 to 2.6"),
        (4, 5, "fails", "4 to 5"),
    ],
)
def test_a_claim_holds_or_fails_in_the_whole_interval_or_is_open(low, high, verdict, words):
    claim = Claim("2 to 3", ("svhn-l2",), last(), low, high)
    assert claim.verdict(2, 3) == verdict
    assert claim.threshold == words


def test_a_claim_that_cannot_fail_is_none():
    with pytest.raises(InvalidValue, match="'it is so' cannot fail"):
        Claim("it is so", ("svhn-l2",), last())


POINTS = Claim("dropout hinders", (B, A), excess(), low=0, unit="points")


@pytest.fixture
def ledger_of(write_run, tmp_path):
    """Makes a ledger of runs with these last errors, a seed for each, by experiment."""

    def make(errors, **changes):
        for name, values in errors.items():
            for seed, error in enumerate(values):
                e = replace(reduced(named(name)), seed=seed, **changes)
                rows = [{"epoch": 1, "train_error": error, "test_error": 0.9}]
                write_run(tmp_path / name / str(seed), e, rows, seconds=360.0)
        return results(tmp_path)

    return make


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        ({A: (0.0, 0.0, 0.0), B: (0.2, 0.21, 0.22)}, "holds"),
        ({A: (0.2, 0.2, 0.2), B: (0.1, 0.11, 0.1)}, "fails"),
        ({A: (0.0, 0.0, 0.0), B: (0.1, 0.2, 0.5)}, "open"),  # though no seed contradicts it
        ({A: (0.0, 0.0, 0.0), B: (0.1, 0.1)}, "fewer than 3 seeds"),
        ({A: (0.0, 0.0, 0.0), B: (0.1,)}, "fewer than 3 seeds"),
        ({A: (0.0, 0.0, 0.0)}, "not run at reduced length"),
    ],
)
def test_a_verdict_needs_three_seeds_of_every_experiment(errors, verdict, ledger_of):
    assert judge(POINTS, ledger_of(errors), "reduced")["verdict"] == verdict


def test_a_row_says_what_was_measured_and_what_it_cost(ledger_of):
    row = judge(POINTS, ledger_of({A: (0.0, 0.0, 0.1), B: (0.2, 0.1, 0.6, 0.9)}), "reduced")
    assert row["values"] == pytest.approx([20, 10, 50])
    assert row["seeds"] == 3
    assert row["estimate"] == pytest.approx(80 / 3)
    half = 4.302653 * np.std([20, 10, 50], ddof=1) / 3**0.5  # t of 2 degrees of freedom
    assert (row["low"], row["high"]) == pytest.approx((80 / 3 - half, 80 / 3 + half))
    assert (row["threshold"], row["unit"]) == ("at least 0", "points")
    assert row["experiments"] == f"{B}; {A}"
    assert row["data"] == "881 images"
    assert row["device"] == "a computer"
    assert row["CPU hours"] == pytest.approx(0.6)  # six runs of 360 s on one thread


def test_what_a_run_took_of_the_processors_counts_where_it_was_measured():
    rows = {"seconds": [3600.0, 3600.0], "threads": [2, 2], "cpu_seconds": [1800.0, nan]}
    assert cpu_hours(pd.DataFrame(rows)).tolist() == [0.5, 2.0]


def test_runs_of_another_length_do_not_count(ledger_of):
    errors = {A: (0.0,) * 3, B: (0.1,) * 3}
    assert judge(POINTS, ledger_of(errors), "full")["verdict"] == "not run at full length"
    own = ledger_of(errors, width=0.3)
    assert judge(POINTS, own, "reduced")["verdict"] == "not run at reduced length"


# ----------------------------------------------------------------------------- stored tables

SWEPT = ({"experiment": A, "width": 0.25}, {"experiment": A, "width": 0.5})
DIFFERENCE = of_rows("train_error", lambda values: values[0] - values[1], 100)
NARROW = Claim("narrow is worse", SWEPT, DIFFERENCE, low=0, unit="points", table="widths")


@pytest.fixture
def swept(write_run, tmp_path):
    """The ledger of a folder without runs, with a table of six runs of two widths beside it."""
    runs = tmp_path / "runs"
    for width, errors in ((0.25, (0.30, 0.31, 0.32)), (0.5, (0.1, 0.1, 0.1))):
        for seed, error in enumerate(errors):
            e = replace(reduced(named(A)), width=width, seed=seed)
            row = {"epoch": 1, "train_error": error, "test_error": 0.9}
            write_run(runs / f"{width}-{seed}", e, [row], seconds=36.0)
    tables = tmp_path / "kept" / "tables"
    tables.mkdir(parents=True)
    (tables / "widths.csv").write_bytes(results(runs).to_csv().encode())
    return results(tmp_path / "kept")


def test_a_claim_about_points_of_a_sweep_is_judged_by_its_table(swept):
    row = judge(NARROW, swept, "reduced")
    assert (row["verdict"], row["seeds"]) == ("holds", 3)
    assert row["values"] == pytest.approx([20, 21, 22])
    assert row["experiments"] == f"experiment {A}, width 0.25; experiment {A}, width 0.5"
    assert row["CPU hours"] == pytest.approx(0.06)
    both = replace(NARROW, experiments=({"experiment": A},), metric=of_rows("train_error"))
    assert judge(both, swept, "full")["values"] == [0.3, 0.31, 0.32]  # the larger of two rows


def test_a_claim_about_points_that_a_table_lacks_says_so(swept):
    none = replace(NARROW, experiments=(SWEPT[0], {"width": 0.75}))
    assert judge(none, swept, "reduced")["verdict"] == "not in the table widths"
    with pytest.raises(InvalidValue, match="unknown column 'widht'; did you mean 'width'"):
        judge(replace(NARROW, experiments=({"widht": 0.5},)), swept, "reduced")
    with pytest.raises(DataNotFound, match=r"no table 'width' .* did you mean 'widths'"):
        judge(replace(NARROW, table="width"), swept, "reduced")


# ----------------------------------------------------------------------------- the book's claims


def test_each_claim_is_made_once():
    texts = [claim.text for claim in CLAIMS + TABLE_CLAIMS]
    assert len(set(texts)) == len(texts)


def test_each_claim_has_its_runs():
    ledger = results()
    rows = [judge(claim, ledger, "reduced") for claim in CLAIMS + TABLE_CLAIMS]
    assert [r for r in rows if r["verdict"] not in ("holds", "fails", "open")] == []


def files_of(name):
    """Record and epochs of each stored run of an experiment, read without bnnlib."""
    for folder in sorted((RESULTS / name).glob("reduced-seed*")):
        with (folder / "history.csv").open(newline="") as file:
            yield json.loads((folder / "experiment.json").read_text()), list(csv.DictReader(file))


def ends(name, column):
    """Last values of a column over the seeds, in percent."""
    return 100 * np.array([float(rows[-1][column]) for _, rows in files_of(name)])


def reaches(name, limit):
    """First epochs with a training error of at most `limit` over the seeds."""
    seeds = [[(r["epoch"], r["train_error"]) for r in rows] for _, rows in files_of(name)]
    return np.array(
        [next(int(n) for n, error in rows if error and float(error) <= limit) for rows in seeds]
    )


def class_means(name):
    return np.mean([ends(name, f"test_error_class_{i}") for i in range(10)], axis=0)


def smallest_steps():
    levels = [ends(f"cifar10-{n}", "test_error") for n in ("true-labels", *LEVELS)]
    return np.diff(levels, axis=0).min(axis=0)


LEVELS = ("noise-25", "noise-50", "noise-75", "noise-100")
BY_HAND = [
    ("CIFAR-10: random labels are mem", lambda: ends("cifar10-random-labels", "train_error")),
    ("CIFAR-10: the memorizer guesses", lambda: class_means("cifar10-noise-100")),
    ("CIFAR-10: the test error rises", smallest_steps),
    (
        "CIFAR-10, true labels: the binary",
        lambda: (
            ends("cifar10-true-labels", "test_error")
            - ends("cifar10-float-true-labels", "test_error")
        ),
    ),
    (
        "SVHN: the full-precision twin",
        lambda: reaches("svhn-random-labels", 0.1) - reaches("svhn-float", 0.1),
    ),
    ("CIFAR-10: dropout does", lambda: ends("cifar10-dropout", "train_error")),
]


@pytest.mark.parametrize(("text", "by_hand"), BY_HAND, ids=[text for text, _ in BY_HAND])
def test_a_stored_claim_is_what_its_files_say(text, by_hand):
    [claim] = [claim for claim in CLAIMS if claim.text.startswith(text)]
    row, values = judge(claim, results(), "reduced"), by_hand()
    assert row["values"] == pytest.approx(list(values))
    n = len(values)
    t = (row["high"] - row["estimate"]) / (values.std(ddof=1) / n**0.5)
    assert within(t, n - 1) == pytest.approx(0.95, abs=1e-5)
    records = [record for name in claim.experiments for record, _ in files_of(name)]
    seconds = sum(r.get("cpu_seconds", r["seconds"] * r["threads"]) for r in records)
    assert row["CPU hours"] == pytest.approx(seconds / 3600)
