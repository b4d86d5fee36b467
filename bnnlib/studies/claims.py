"""What the book claims, each claim tied to the stored runs that it rests on.

A claim becomes one row: its runs, mean and range over the seeds, verdict.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnnlib.errors import DamagedFile
from bnnlib.files import Row, read_json
from bnnlib.history import epochs_to_reach
from bnnlib.runs.ledger import load_runs
from bnnlib.runs.record import RESULTS
from bnnlib.runs.result import Run, differences, distance_from_a_guess
from bnnlib.studies.capacity import ABOUT, STORED, load_grid

if TYPE_CHECKING:
    import pandas as pd

Values = list[float]  # one for each seed
Metric = Callable[..., float]
Holds = Callable[[Values], bool]
FEW = "fewer than 3 seeds"


@dataclass(frozen=True)
class Claim:
    """One sentence that runs can refute.

    `metric` makes one number of the runs of one seed, one of each of `experiments`; the claim
    holds if `holds` is true of the numbers of all seeds.
    """

    text: str
    experiments: tuple[str, ...]
    metric: Metric
    holds: Holds
    unit: str = "%"


# ------------------------------------------------------------ what is measured, for one seed


def last(column: str = "train_error") -> Metric:
    """The last value of a column, in percent."""
    return lambda run: 100 * run.history.last(column)


def excess(column: str = "train_error") -> Metric:
    """Last value of a column of the first experiment, less that of the second, in points."""
    return lambda first, second: last(column)(first) - last(column)(second)


def smallest_step(column: str = "test_error") -> Metric:
    """The smallest step of a column from one experiment to the next, in points."""
    return lambda *runs: min(b - a for a, b in pairwise(map(last(column), runs)))


def epochs_later(limit: float, column: str = "train_error", other: str = "") -> Metric:
    """By how many epochs the second experiment reaches a limit later than the first.

    With one experiment: by how many the column `other` does. One that never gets there counts
    as one epoch past its end.
    """

    def epoch(run: Run, name: str) -> int:
        found = epochs_to_reach(run.history, [limit], name)[0]
        return run.experiment.epochs + 1 if found is None else found

    return lambda *runs: epoch(runs[-1], other or column) - epoch(runs[0], column)


def columns_that_differ(one: Run, other: Run) -> float:
    """In how many columns two histories differ, in any epoch and bit, times aside."""
    return len(differences(one, other))


def bits_per_weight(*rows: Row, binary: bool) -> float:
    """The most memorized bits for each weight, over the widths and set sizes of a grid."""
    return max(r["memorized_bits"] / r["weights"] for r in rows if r["binary"] == binary)


# ---------------------------------------------------------------------- when a claim holds


def at_most(limit: float) -> Holds:
    """No seed has more."""
    return lambda values: all(value <= limit for value in values)


def at_least(limit: float) -> Holds:
    """No seed has less."""
    return lambda values: all(value >= limit for value in values)


def above(limit: float) -> Holds:
    """Every seed has more."""
    return lambda values: all(value > limit for value in values)


def mean_within(low: float, high: float) -> Holds:
    """The mean over the seeds lies between two numbers."""
    return lambda values: low <= sum(values) / len(values) <= high


# ------------------------------------------------------------------------------ the claims

NOISE = ("cifar10-true-labels", *(f"cifar10-noise-{percent}" for percent in (25, 50, 75, 100)))

# fmt: off
CLAIMS = (
    Claim(
        "SVHN: random labels are memorized; training error at most 5 %",
        ("svhn-random-labels",), last(), at_most(5),
    ),
    Claim(
        "CIFAR-10: random labels are memorized; training error at most 1 %",
        ("cifar10-random-labels",), last(), at_most(1),
    ),
    Claim(
        "SVHN: on random test labels the memorizer guesses",
        ("svhn-random-labels",), distance_from_a_guess, at_most(4), "sd from 90 %",
    ),
    Claim(
        "CIFAR-10: on random test labels the memorizer guesses",
        ("cifar10-random-labels",), distance_from_a_guess, at_most(4), "sd from 90 %",
    ),
    Claim(
        "CIFAR-10: on true test labels the memorizer guesses, in the mean over the seeds",
        ("cifar10-noise-100",), last("test_error"), mean_within(87, 93),
    ),
    Claim(
        "SVHN, stochastic: on true test labels it errs as a constant guess can (80.4 to 93.9 %)",
        ("svhn-stochastic",), last("test_error"), mean_within(80.4, 93.9),
    ),
    Claim(
        "SVHN: with true labels the same network learns; test error at least 10 points lower",
        ("svhn-random-labels", "svhn-true-labels"), excess("test_error"), at_least(10), "points",
    ),
    Claim(
        "CIFAR-10: with true labels the same network learns; test error at least 10 points lower",
        ("cifar10-random-labels", "cifar10-true-labels"),
        excess("test_error"), at_least(10), "points",
    ),
    Claim(
        "CIFAR-10: the test error rises with each step of label noise (the smallest step)",
        NOISE, smallest_step(), above(0), "points",
    ),
    Claim(
        "CIFAR-10, half the labels random: true labels are fitted to 50 % error before random ones",
        ("cifar10-noise-50",),
        epochs_later(0.5, "train_error_clean", "train_error_corrupted"), above(0), "epochs later",
    ),
    Claim(
        "SVHN: the full-precision twin memorizes in fewer epochs (10 % error)",
        ("svhn-float", "svhn-random-labels"), epochs_later(0.1), above(0), "epochs later",
    ),
    Claim(
        "CIFAR-10: the full-precision twin memorizes in fewer epochs (10 % error)",
        ("cifar10-float", "cifar10-random-labels"), epochs_later(0.1), above(0), "epochs later",
    ),
    Claim(
        "CIFAR-10, true labels: the binary network's test error is higher than its twin's",
        ("cifar10-true-labels", "cifar10-float-true-labels"),
        excess("test_error"), above(0), "points",
    ),
    Claim(
        "SVHN: the L2 penalty as coded changes nothing, in no epoch",
        ("svhn-l2", "svhn-random-labels"), columns_that_differ, at_most(0), "columns that differ",
    ),
    Claim(
        "SVHN: an L2 of 5e-4 that reaches the weights keeps over 10 points more from being fitted",
        ("svhn-l2-weights-5e-4", "svhn-random-labels"), excess(), above(10), "points",
    ),
    Claim(
        "SVHN: dropout does not prevent memorizing; training error at most 10 %",
        ("svhn-dropout",), last(), at_most(10),
    ),
    Claim(
        "CIFAR-10: dropout does not prevent memorizing; training error at most 10 %",
        ("cifar10-dropout",), last(), at_most(10),
    ),
    Claim(
        "SVHN: stochastic weights with 0/1 activations, tested as coded, are memorized (5 %)",
        ("svhn-stochastic",), last(), at_most(5),
    ),
    Claim(
        "CIFAR-10: stochastic weights with 0/1 activations, tested as coded, are memorized (5 %)",
        ("cifar10-stochastic",), last(), at_most(5),
    ),
    Claim(
        "CIFAR-10: labels of Gaussian inputs are memorized; training error at most 1 %",
        ("cifar10-gaussian-inputs",), last(), at_most(1),
    ),
    Claim(
        "CIFAR-10: random labels of images take longer than labels of Gaussian inputs (1 % error)",
        ("cifar10-gaussian-inputs", "cifar10-random-labels"),
        epochs_later(0.01), at_least(0), "epochs later",
    ),
)
GRID_CLAIMS = (  # of the grid of `capacity`, whose loss, rate and steps decide the numbers, too
    Claim(
        "Noise, by the grid's recipe: a binary weight stores at most 0.833 bits of labels",
        ("capacity",), partial(bits_per_weight, binary=True), at_most(0.833), "bits a weight",
    ),
    Claim(
        "Noise, by the grid's recipe: some float twin stores over 0.833 bits of labels a weight",
        ("capacity",), partial(bits_per_weight, binary=False), above(0.833), "bits a weight",
    ),
)
# fmt: on


def judge(claim: Claim, table: "pd.DataFrame", profile: str) -> dict[str, Any]:
    """One row: the claim, its runs at this profile, mean and range over the seeds, verdict.

    `table` is a ledger, as `results` gives it. The verdict is "holds" or "fails"; where runs are
    missing it is "not run at PROFILE length" or, with one or two seeds, "fewer than 3 seeds".
    """
    rows = table[table["profile"] == profile]
    seeds = [set(rows.loc[rows["experiment"] == name, "seed"]) for name in claim.experiments]
    shared = sorted(set.intersection(*seeds))  # those that all of them have
    rows = rows[rows["experiment"].isin(claim.experiments) & rows["seed"].isin(shared)]
    used = {(run.experiment.name, run.experiment.seed): run for run in load_runs(rows)}
    groups = [[used[name, seed] for name in claim.experiments] for seed in shared]
    data = {f"{r.record['images']['train']:,} of {r.experiment.dataset}" for r in used.values()}
    return _row(claim, groups, profile, data, set(rows["device"]))


def judge_grid(claim: Claim, folder: str | Path = STORED) -> dict[str, Any]:
    """The same for a claim about the grid of `capacity`."""
    rows = load_grid(folder)
    about = read_json(Path(folder) / ABOUT)
    try:
        dataset, device = about["experiment"]["dataset"], about["device"]
    except (LookupError, TypeError) as error:
        raise DamagedFile(f"{folder}/{ABOUT} describes no grid: {error!r}") from error
    seeds = sorted({row["seed"] for row in rows})
    groups = [[row for row in rows if row["seed"] == seed] for seed in seeds]
    data = {f"up to {max(row['n_train'] for row in rows):,} of {dataset}"}
    return _row(claim, groups, "grid", data, {device})


def _row(
    claim: Claim,
    groups: Sequence[Sequence[Any]],
    profile: str,
    data: Iterable[str],
    devices: Iterable[str],
) -> dict[str, Any]:
    row = {
        "claim": claim.text,
        "experiments": ", ".join(claim.experiments),
        "profile": profile,
        "data": ", ".join(sorted(data)),
        "device": ", ".join(sorted(devices)),
        "seeds": len(groups),
    }
    if not groups:
        return row | {"verdict": f"not run at {profile} length"}
    values = [claim.metric(*group) for group in groups]
    row |= {"mean": sum(values) / len(values), "lowest": min(values), "highest": max(values)}
    verdict = "holds" if claim.holds(values) else "fails"
    return row | {"unit": claim.unit, "verdict": verdict if len(values) > 2 else FEW}


def reliability(path: str | Path = RESULTS / "reliability.json") -> list[dict[str, Any]]:
    """One row for each kind of fault that `python -m benchmarks.faults` tried, and its outcome."""
    faults = read_json(path).get("faults")
    if not isinstance(faults, list) or not all(isinstance(row, dict) for row in faults):
        raise DamagedFile(f"{path} lists no faults")
    return [{name.replace("_", " "): value for name, value in row.items()} for row in faults]
