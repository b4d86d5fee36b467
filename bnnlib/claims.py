"""What the book claims, each claim tied to the stored runs that it rests on.

In: stored runs, and the grid of `capacity`. Out: one row for each claim: its runs, mean and range
over the seeds, verdict. Next file: `plots.py`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isnan
from pathlib import Path
from typing import Any

from bnnlib.capacity import ABOUT, STORED, Row, load_grid
from bnnlib.errors import DamagedFile
from bnnlib.files import read_json
from bnnlib.folders import RESULTS
from bnnlib.history import History
from bnnlib.probes import epochs_to_reach
from bnnlib.runs import Run, distance_from_a_guess, profile_of

Values = list[float]  # one for each seed
Measure = Callable[..., Values]


@dataclass(frozen=True)
class Claim:
    """One sentence that runs can refute.

    `measure` is given the runs of each of `experiments`, in order of their seeds, and returns
    a value for each seed; the claim holds if `holds` is true of those values.
    """

    text: str
    experiments: tuple[str, ...]
    measure: Measure
    holds: Callable[[Values], bool]
    unit: str = "%"


# ------------------------------------------------------------------ what is measured in runs


def last(column: str = "train_error") -> Measure:
    """The last value of a column, in percent."""
    return lambda runs: [100 * run.history.last(column) for run in runs]


def excess(column: str = "train_error") -> Measure:
    """Last value of a column of the first experiment, less that of the second, in points."""

    def measure(first: Sequence[Run], second: Sequence[Run]) -> Values:
        pairs = zip(last(column)(first), last(column)(second), strict=True)
        return [a - b for a, b in pairs]

    return measure


def steepest(column: str = "test_error") -> Measure:
    """The smallest step of a column from one experiment to the next, in points."""

    def measure(*groups: Sequence[Run]) -> Values:
        levels = [last(column)(runs) for runs in groups]  # (experiments, seeds)
        return [min(b - a for a, b in pairwise(seed)) for seed in zip(*levels, strict=True)]

    return measure


def epochs_later(limit: float, column: str = "train_error", other: str = "") -> Measure:
    """By how many epochs the second experiment reaches a limit later than the first.

    With one experiment: by how many the column `other` does. One that never gets there counts
    as one epoch past its end.
    """

    def epoch(run: Run, name: str) -> int:
        found = epochs_to_reach(run.history, [limit], name)[0]
        return run.experiment.epochs + 1 if found is None else found

    def measure(first: Sequence[Run], second: Sequence[Run] | None = None) -> Values:
        pairs = zip(first, second or first, strict=True)
        return [epoch(b, other or column) - epoch(a, column) for a, b in pairs]

    return measure


def largest_difference(first: Sequence[Run], second: Sequence[Run]) -> Values:
    """How far two histories are apart anywhere but in their times.

    NaN equals NaN; anything else is infinitely far from it. A column or an epoch that only one
    of them has is infinitely far from nothing.
    """

    def gap(x: float, y: float) -> float:
        if x == y or (isnan(x) and isnan(y)):
            return 0.0
        return inf if isnan(x) or isnan(y) else abs(x - y)

    def apart(a: History, b: History) -> float:
        columns = set(a.columns) - {"seconds"}
        if columns != set(b.columns) - {"seconds"} or len(a) != len(b):
            return inf
        return max(gap(*xy) for c in columns for xy in zip(a[c], b[c], strict=True))

    return [apart(a.history, b.history) for a, b in zip(first, second, strict=True)]


def standard_deviations_from_a_guess(runs: Sequence[Run]) -> Values:
    """Distance of the last test error from 90 %, in standard deviations of a blind guess."""
    return [distance_from_a_guess(run) for run in runs]


# ---------------------------------------------------------------------- when a claim holds


def each(is_good: Callable[[float], bool]) -> Callable[[Values], bool]:
    """True of every seed."""
    return lambda values: all(map(is_good, values))


def mean_within(low: float, high: float) -> Callable[[Values], bool]:
    """The mean over the seeds lies between two numbers."""
    return lambda values: low <= sum(values) / len(values) <= high


# ------------------------------------------------------------------------------ the claims

NOISE = ("cifar10-true-labels", *(f"cifar10-noise-{percent}" for percent in (25, 50, 75, 100)))

CLAIMS = (
    Claim(
        "SVHN: random labels are memorized; training error at most 5 %",
        ("svhn-random-labels",),
        last(),
        each(lambda error: error <= 5),
    ),
    Claim(
        "CIFAR-10: random labels are memorized; training error at most 1 %",
        ("cifar10-random-labels",),
        last(),
        each(lambda error: error <= 1),
    ),
    Claim(
        "SVHN: on random test labels the memorizer guesses",
        ("svhn-random-labels",),
        standard_deviations_from_a_guess,
        each(lambda distance: distance <= 4),
        "sd from 90 %",
    ),
    Claim(
        "CIFAR-10: on random test labels the memorizer guesses",
        ("cifar10-random-labels",),
        standard_deviations_from_a_guess,
        each(lambda distance: distance <= 4),
        "sd from 90 %",
    ),
    Claim(
        "CIFAR-10: on true test labels the memorizer guesses, in the mean over the seeds",
        ("cifar10-noise-100",),
        last("test_error"),
        mean_within(87, 93),
    ),
    Claim(
        "SVHN, stochastic: on true test labels it errs as a constant guess can (80.4 to 93.9 %)",
        ("svhn-stochastic",),
        last("test_error"),
        mean_within(80.4, 93.9),
    ),
    Claim(
        "SVHN: with true labels the same network learns; test error at least 10 points lower",
        ("svhn-random-labels", "svhn-true-labels"),
        excess("test_error"),
        each(lambda points: points >= 10),
        "points",
    ),
    Claim(
        "CIFAR-10: with true labels the same network learns; test error at least 10 points lower",
        ("cifar10-random-labels", "cifar10-true-labels"),
        excess("test_error"),
        each(lambda points: points >= 10),
        "points",
    ),
    Claim(
        "CIFAR-10: the test error rises with each step of label noise (the smallest step)",
        NOISE,
        steepest(),
        each(lambda points: points > 0),
        "points",
    ),
    Claim(
        "CIFAR-10, half the labels random: true labels are fitted to 50 % error before random ones",
        ("cifar10-noise-50",),
        epochs_later(0.5, "train_error_clean", "train_error_corrupted"),
        each(lambda epochs: epochs > 0),
        "epochs later",
    ),
    Claim(
        "SVHN: the full-precision twin memorizes in fewer epochs (10 % error)",
        ("svhn-float", "svhn-random-labels"),
        epochs_later(0.1),
        each(lambda epochs: epochs > 0),
        "epochs later",
    ),
    Claim(
        "CIFAR-10: the full-precision twin memorizes in fewer epochs (10 % error)",
        ("cifar10-float", "cifar10-random-labels"),
        epochs_later(0.1),
        each(lambda epochs: epochs > 0),
        "epochs later",
    ),
    Claim(
        "CIFAR-10, true labels: the binary network's test error is higher than its twin's",
        ("cifar10-true-labels", "cifar10-float-true-labels"),
        excess("test_error"),
        each(lambda points: points > 0),
        "points",
    ),
    Claim(
        "SVHN: the L2 penalty as coded changes nothing, in no epoch",
        ("svhn-l2", "svhn-random-labels"),
        largest_difference,
        each(lambda difference: difference == 0),
        "largest difference",
    ),
    Claim(
        "SVHN: an L2 of 5e-4 that reaches the weights keeps over 10 points more from being fitted",
        ("svhn-l2-weights-5e-4", "svhn-random-labels"),
        excess(),
        each(lambda points: points > 10),
        "points",
    ),
    Claim(
        "SVHN: dropout does not prevent memorizing; training error at most 10 %",
        ("svhn-dropout",),
        last(),
        each(lambda error: error <= 10),
    ),
    Claim(
        "CIFAR-10: dropout does not prevent memorizing; training error at most 10 %",
        ("cifar10-dropout",),
        last(),
        each(lambda error: error <= 10),
    ),
    Claim(
        "SVHN: stochastic weights with 0/1 activations, tested as coded, are memorized (5 %)",
        ("svhn-stochastic",),
        last(),
        each(lambda error: error <= 5),
    ),
    Claim(
        "CIFAR-10: stochastic weights with 0/1 activations, tested as coded, are memorized (5 %)",
        ("cifar10-stochastic",),
        last(),
        each(lambda error: error <= 5),
    ),
    Claim(
        "CIFAR-10: labels of Gaussian inputs are memorized; training error at most 1 %",
        ("cifar10-gaussian-inputs",),
        last(),
        each(lambda error: error <= 1),
    ),
    Claim(
        "CIFAR-10: random labels of images take longer than labels of Gaussian inputs (1 % error)",
        ("cifar10-gaussian-inputs", "cifar10-random-labels"),
        epochs_later(0.01),
        each(lambda epochs: epochs >= 0),
        "epochs later",
    ),
)


def bits_per_weight(binary: bool) -> Callable[[Sequence[Row]], Values]:
    """For each seed, the most memorized bits for each weight, over widths and set sizes."""

    def measure(rows: Sequence[Row]) -> Values:
        kind = [row for row in rows if row["binary"] == binary]
        seeds = sorted({row["seed"] for row in kind})
        ratios = [(row["seed"], row["memorized_bits"] / row["weights"]) for row in kind]
        return [max(ratio for s, ratio in ratios if s == seed) for seed in seeds]

    return measure


GRID_CLAIMS = (  # of the grid of `capacity`, whose loss, rate and steps decide the numbers, too
    Claim(
        "Noise, by the grid's recipe: a binary weight stores at most 0.833 bits of labels",
        ("capacity",),
        bits_per_weight(binary=True),
        each(lambda bits: bits <= 0.833),
        "bits a weight",
    ),
    Claim(
        "Noise, by the grid's recipe: some float twin stores over 0.833 bits of labels a weight",
        ("capacity",),
        bits_per_weight(binary=False),
        each(lambda bits: bits > 0.833),
        "bits a weight",
    ),
)


def judge(claim: Claim, runs: Sequence[Run], profile: str) -> dict[str, Any]:
    """One row: the claim, its runs at this profile, mean and range over the seeds, verdict.

    The verdict is "holds" or "fails"; where runs are missing it is "not run at PROFILE length"
    or, with one or two seeds, "fewer than 3 seeds".
    """
    chosen = [r for r in runs if r.experiment.name in claim.experiments]
    groups = _by_seed([r for r in chosen if profile_of(r.experiment) == profile], claim.experiments)
    used = [run for group in groups for run in group]
    if not used:
        return _row(claim, profile) | {"seeds": 0, "verdict": f"not run at {profile} length"}
    data = {f"{run.record['images']['train']:,} of {run.experiment.dataset}" for run in used}
    devices = {run.record["device"] for run in used}
    return _row(claim, profile, data, devices) | _verdict(claim, claim.measure(*groups))


def judge_grid(claim: Claim, folder: str | Path = STORED) -> dict[str, Any]:
    """The same for a claim about the grid of `capacity`."""
    rows = load_grid(folder)
    about = read_json(Path(folder) / ABOUT)
    try:
        dataset, device = about["experiment"]["dataset"], about["device"]
    except (LookupError, TypeError) as error:
        raise DamagedFile(f"{folder}/{ABOUT} describes no grid: {error!r}") from error
    data = {f"up to {max(row['n_train'] for row in rows):,} of {dataset}"}
    return _row(claim, "grid", data, {device}) | _verdict(claim, claim.measure(rows))


def _row(
    claim: Claim, profile: str, data: Iterable[str] = (), devices: Iterable[str] = ()
) -> dict[str, Any]:
    return {
        "claim": claim.text,
        "experiments": ", ".join(claim.experiments),
        "profile": profile,
        "data": ", ".join(sorted(data)),
        "device": ", ".join(sorted(devices)),
    }


def _verdict(claim: Claim, values: Values) -> dict[str, Any]:
    verdict = "fewer than 3 seeds"
    if len(values) >= 3:
        verdict = "holds" if claim.holds(values) else "fails"
    return {
        "seeds": len(values),
        "mean": sum(values) / len(values),
        "lowest": min(values),
        "highest": max(values),
        "unit": claim.unit,
        "verdict": verdict,
    }


def _by_seed(runs: Sequence[Run], names: Sequence[str]) -> list[list[Run]]:
    """The runs of each experiment, in order of the seeds that all of them have."""
    found: Mapping[str, dict[int, Run]] = {
        name: {r.experiment.seed: r for r in runs if r.experiment.name == name} for name in names
    }
    shared = sorted(set.intersection(*(set(of_name) for of_name in found.values())))
    return [[found[name][seed] for seed in shared] for name in names]


# ------------------------------------------------------------------------------- reliability


def reliability(path: str | Path = RESULTS / "reliability.json") -> list[dict[str, Any]]:
    """One row for each kind of fault that `python -m benchmarks.faults` tried, and its outcome."""
    faults = read_json(path).get("faults")
    if not isinstance(faults, list) or not all(isinstance(row, dict) for row in faults):
        raise DamagedFile(f"{path} lists no faults")
    return [{name.replace("_", " "): value for name, value in row.items()} for row in faults]
