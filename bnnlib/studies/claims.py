"""What the book claims, each claim tied to the stored runs that it rests on.

A claim becomes one row: what was measured, its interval over the seeds, the threshold, the
verdict, and what the runs cost.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite, isnan, nan, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from bnnlib.errors import DamagedFile, InvalidValue, check_name, shown
from bnnlib.files import read_json
from bnnlib.history import epochs_to_reach
from bnnlib.runs.ledger import load_runs, stored_table
from bnnlib.runs.record import RESULTS
from bnnlib.runs.result import Run, differences
from bnnlib.studies.capacity import bits_per_weight

if TYPE_CHECKING:
    import pandas as pd

Metric = Callable[..., float]
Point = str | Mapping[str, Any]
SEEDS = 3  # below so many there is no verdict
METHOD = (
    "The estimate is the mean of the values, one for each of n seeds. The interval is that of the "
    "mean, mean ± t(n - 1) s / sqrt(n) with the 97.5 % quantile of Student's t. A claim holds "
    "where all of the interval is within the threshold, fails where all of it is outside, and is "
    "open otherwise. Predicted: the threshold was named before anybody had seen such runs."
)


@dataclass(frozen=True)
class Claim:
    """One sentence that runs can refute: that a number lies from `low` to `high`, its thresholds.

    `metric` makes one number of what one seed made: of a `Run` of each of `experiments`. Where
    `table` names a stored table, each of them is a point of a sweep, {column: value, ...}, and
    `metric` takes a DataFrame of each, its rows in this table. `predicted`: the thresholds were
    named before anybody had seen such runs, and not after a first look.
    """

    text: str
    experiments: tuple[Point, ...]
    metric: Metric
    low: float = -inf
    high: float = inf
    unit: str = "%"
    table: str = ""
    predicted: bool = False

    def __post_init__(self) -> None:
        if (self.low, self.high) == (-inf, inf):
            raise InvalidValue(f"{shown(self.text)} cannot fail: it has no threshold")

    @property
    def threshold(self) -> str:
        """In words, such as "at most 5"."""
        if self.low == -inf:
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if self.high == inf else f"{self.low:g} to {self.high:g}"

    def verdict(self, low: float, high: float) -> str:
        """Whether the claim "holds" in all of an interval, "fails" in all of it, or is "open"."""
        if self.low <= low and high <= self.high:
            return "holds"
        return "fails" if high < self.low or low > self.high else "open"


# ------------------------------------------------------------ what is measured, for one seed


def last(column: str = "train_error") -> Metric:
    """The last value of a column, in percent."""
    return lambda run: 100 * run.history.last(column)


def excess(column: str = "train_error") -> Metric:
    """Last value of a column of the first experiment, less that of the second, in points."""
    return lambda first, second: last(column)(first) - last(column)(second)


def balanced_test_error(run: Run) -> float:
    """The last test error as the mean over the classes, however many images each has, in percent.

    An answer that does not depend on the image, whatever it is, has 90 % with ten classes: what it
    gains in a class that it prefers it loses in the others.
    """
    names = [name for name in run.history.columns if name.startswith("test_error_class_")]
    errors = map(run.history.last, names)
    return 100 * mean(error for error in errors if not isnan(error))


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


def columns_that_differ(one: Run, other: Run) -> int:
    """In how many columns two histories differ, in any epoch and bit, times aside."""
    return len(differences(one, other))


def of_rows(
    column: str, combine: Callable[[np.ndarray], float] = np.max, factor: float = 1
) -> Metric:
    """`combine` of a column of a stored table, in the rows of all points in order, times `factor`.

    A value that is missing is NaN, which no interval takes.
    """

    def metric(*points: "pd.DataFrame") -> float:
        values = [rows[column].to_numpy(float, na_value=nan) for rows in points]
        return factor * float(combine(np.concatenate(values)))

    return metric


def more_bits(*points: "pd.DataFrame") -> float:
    """The most bits a weight at a point, over the numbers of images; of two points, what the
    second has more.
    """
    most = [float(bits_per_weight(rows).max()) for rows in points]
    return most[-1] - most[0] * (len(most) > 1)


# ------------------------------------------------------------------------------ the claims

NOISE = {
    data: (f"{data}-true-labels", *(f"{data}-noise-{percent}" for percent in (25, 50, 75, 100)))
    for data in ("svhn", "cifar10")
}

# A guess has a balanced error of 90 %, with a standard deviation of 2.3 points on SVHN's 202 test
# images and of 0.7 on CIFAR-10's 2,000; so these must be within 6 points and within 3.
# fmt: off
CLAIMS = (
    Claim(
        "SVHN: random labels are memorized (training error)",
        ("svhn-random-labels",), last(), high=5,
    ),
    Claim(
        "CIFAR-10: random labels are memorized (training error)",
        ("cifar10-random-labels",), last(), high=1,
    ),
    Claim(
        "SVHN: the memorizer guesses true labels, within 6 points of 90 % (balanced error)",
        ("svhn-noise-100",), balanced_test_error, low=84, high=96, predicted=True,
    ),
    Claim(
        "CIFAR-10: the memorizer guesses true labels, within 3 points of 90 % (balanced error)",
        ("cifar10-noise-100",), balanced_test_error, low=87, high=93,
    ),
    Claim(
        "SVHN, stochastic: true labels are guessed, within 6 points of 90 % (test error)",
        ("svhn-stochastic",), last("test_error"), low=84, high=96,
    ),
    Claim(
        "SVHN: with true labels the same network learns (test error lower by)",
        ("svhn-noise-100", "svhn-true-labels"), excess("test_error"),
        low=10, unit="points", predicted=True,
    ),
    Claim(
        "CIFAR-10: with true labels the same network learns (test error lower by)",
        ("cifar10-noise-100", "cifar10-true-labels"), excess("test_error"), low=10, unit="points",
    ),
    Claim(
        "SVHN: the test error rises with each step of label noise (smallest step)",
        NOISE["svhn"], smallest_step(), low=0, unit="points", predicted=True,
    ),
    Claim(
        "CIFAR-10: the test error rises with each step of label noise (smallest step)",
        NOISE["cifar10"], smallest_step(), low=0, unit="points",
    ),
    Claim(
        "CIFAR-10, half the labels drawn anew: the unchanged reach 50 % error before the changed",
        ("cifar10-noise-50",), epochs_later(0.5, "train_error_clean", "train_error_corrupted"),
        low=1, unit="epochs",
    ),
    Claim(
        "SVHN: the full-precision twin memorizes sooner (10 % error)",
        ("svhn-float", "svhn-random-labels"), epochs_later(0.1), low=1, unit="epochs",
    ),
    Claim(
        "CIFAR-10: the full-precision twin memorizes sooner (10 % error)",
        ("cifar10-float", "cifar10-random-labels"), epochs_later(0.1), low=1, unit="epochs",
    ),
    Claim(
        "SVHN, true labels: the binary network errs more than its twin (test error higher by)",
        ("svhn-true-labels", "svhn-float-true-labels"), excess("test_error"),
        low=0, unit="points", predicted=True,
    ),
    Claim(
        "CIFAR-10, true labels: the binary network errs more than its twin (test error higher by)",
        ("cifar10-true-labels", "cifar10-float-true-labels"), excess("test_error"),
        low=0, unit="points",
    ),
    Claim(
        "SVHN: the L2 penalty as coded changes nothing, in no epoch (columns that differ)",
        ("svhn-l2", "svhn-random-labels"), columns_that_differ, high=0, unit="columns",
    ),
    Claim(
        "SVHN: an L2 of 5e-4 on the weights prevents memorizing (training error higher by)",
        ("svhn-l2-weights-5e-4", "svhn-random-labels"), excess(), low=10, unit="points",
    ),
    Claim(
        "SVHN: with true labels the same penalty lets the network learn (test error)",
        ("svhn-l2-weights-5e-4-true-labels",), last("test_error"), high=50,
    ),
    Claim(
        "SVHN: an L2 of 5e-6 on the weights does not prevent memorizing (training error)",
        ("svhn-l2-weights-5e-6",), last(), high=10, predicted=True,
    ),
    Claim(
        "SVHN: an L2 of 5e-7 on the weights does not prevent memorizing (training error)",
        ("svhn-l2-weights-5e-7",), last(), high=5, predicted=True,
    ),
    Claim(
        "SVHN: an L2 of 5e-4 on the scales does not prevent memorizing (training error)",
        ("svhn-l2-gamma",), last(), high=5, predicted=True,
    ),
    Claim(
        "SVHN: dropout does not prevent memorizing (training error)",
        ("svhn-dropout",), last(), high=10,
    ),
    Claim(
        "CIFAR-10: dropout does not prevent memorizing (training error)",
        ("cifar10-dropout",), last(), high=10,
    ),
    Claim(
        "SVHN: dropout as of July 2017 does not prevent memorizing (training error)",
        ("svhn-dropout-july-2017",), last(), high=10, predicted=True,
    ),
    Claim(
        "SVHN: dropout after the activation does not prevent memorizing (training error)",
        ("svhn-dropout-after-activation",), last(), high=10, predicted=True,
    ),
    Claim(
        "CIFAR-10: dropout after the activation hinders more than before it (error higher by)",
        ("cifar10-dropout-after-activation", "cifar10-dropout"), excess(),
        low=0, unit="points", predicted=True,
    ),
    Claim(
        "SVHN, stochastic: random labels are memorized, tested as coded (training error)",
        ("svhn-stochastic",), last(), high=5,
    ),
    Claim(
        "CIFAR-10, stochastic: random labels are memorized, tested as coded (training error)",
        ("cifar10-stochastic",), last(), high=5,
    ),
    Claim(
        "CIFAR-10, 0/1 activations: with sign(W) random labels are memorized (training error)",
        ("cifar10-sigmoid-deterministic",), last(), high=5, predicted=True,
    ),
    Claim(
        "CIFAR-10, +1/-1 activations: with drawn weights they are not (training error)",
        ("cifar10-tanh-stochastic",), last(), low=50, predicted=True,
    ),
    Claim(
        "CIFAR-10: the labels of Gaussian inputs are memorized (training error)",
        ("cifar10-gaussian-inputs",), last(), high=1,
    ),
    Claim(
        "CIFAR-10: random labels of Gaussian inputs are as hard as true ones (error higher by)",
        ("cifar10-gaussian-random-labels", "cifar10-gaussian-inputs"), excess(),
        low=-15, high=15, unit="points", predicted=True,
    ),
    Claim(
        "CIFAR-10: noise as bright and varied is harder than random labels (error higher by)",
        ("cifar10-gaussian-matched", "cifar10-random-labels"), excess(),
        low=10, unit="points", predicted=True,
    ),
    Claim(
        "CIFAR-10: random pixels are harder than random labels (training error higher by)",
        ("cifar10-random-pixels", "cifar10-random-labels"), excess(),
        low=10, unit="points", predicted=True,
    ),
    Claim(
        "CIFAR-10: shuffled pixels leave a rule to find (test error)",
        ("cifar10-shuffled-pixels",), last("test_error"), high=85, predicted=True,
    ),
    Claim(
        "CIFAR-10: shuffled pixels make it harder to find (test error higher by)",
        ("cifar10-shuffled-pixels", "cifar10-true-labels"), excess("test_error"),
        low=5, unit="points", predicted=True,
    ),
    Claim(
        "CIFAR-10: random labels of images are memorized no sooner than labels of Gaussian inputs "
        "(1 % error; never counts as one epoch past the end)",
        ("cifar10-gaussian-inputs", "cifar10-random-labels"), epochs_later(0.01),
        low=0, unit="epochs",
    ),
)

PHOTOGRAPHS, NOISY = {"gaussian_variance": 0.0}, {"gaussian_variance": 0.1}
DEEP = {"network": "cifar10", "activation": "binary_tanh", "weights": "deterministic"}
WHITE = NOISY | {"gaussian_shape": "white"}


def _chaos(text: str, *points: Point, column: str = "train_error", **thresholds) -> Claim:
    """A claim about `sweeps/chaos.toml`: one point, or how much the second has more."""
    if column == "train_error":
        metric = of_rows(column, lambda errors: errors[-1] - errors[0] * (len(errors) > 1), 100)
    else:
        metric = of_rows(column)
    return Claim(text, points, metric, table="chaos", predicted=True, **thresholds)


CHAOS_CLAIMS = (  # random labels on 2,000 CIFAR-10 images, or on noise in their place
    _chaos(
        "Chaos: frozen convolutions, fixed statistics: photographs are memorized (to 1 % error)",
        PHOTOGRAPHS | {"network": "frozen"}, column="epochs_to_1", high=20, unit="epochs",
    ),
    _chaos(
        "Chaos: frozen convolutions, fixed statistics: white noise is memorized (to 1 % error)",
        WHITE | {"network": "frozen"}, column="epochs_to_1", high=20, unit="epochs",
    ),
    _chaos(
        "Chaos: frozen convolutions, statistics of the batch: photographs are not (training error)",
        PHOTOGRAPHS | {"network": "frozen_batch"}, low=60,
    ),
    _chaos(
        "Chaos: frozen convolutions, statistics of the batch: white noise is not (training error)",
        WHITE | {"network": "frozen_batch"}, low=60,
    ),
    _chaos(
        "Chaos: white noise, as bright and varied, is harder than photographs (error higher by)",
        PHOTOGRAPHS | DEEP, WHITE | DEEP, low=10, unit="points",
    ),
    _chaos(
        "Chaos: noise with the photographs' covariance is not harder (error higher by)",
        PHOTOGRAPHS | DEEP, NOISY | DEEP | {"gaussian_shape": "images"}, high=10, unit="points",
    ),
    _chaos(
        "Chaos: blurred noise is not harder (error higher by)",
        PHOTOGRAPHS | DEEP, NOISY | DEEP | {"gaussian_shape": "blurred"}, high=10, unit="points",
    ),
    _chaos(
        "Chaos: with real activations white noise is memorized (training error)",
        WHITE | {"activation": "hardtanh"}, high=5,
    ),
    _chaos(
        "Chaos: with real weights white noise is easier (error lower by)",
        WHITE | {"weights": "real"}, WHITE | DEEP, low=10, unit="points",
    ),
    _chaos(
        "Chaos: a network of two convolutions memorizes white noise (training error)",
        WHITE | {"network": "small"}, high=5,
    ),
)

QUARTER = {"network": "dense", "width": 0.25}  # two hidden layers of 16 units
SIGNS = {"binary": True, "weights": "deterministic", "activation": "binary_tanh"}

BITS_CLAIMS = (  # random labels of coin tosses
    Claim(
        "Perceptron: straight-through training has a plateau, however long (at most 64,000 steps)",
        ({"method": "train", "n_inputs": 1001},), of_rows("bits"),
        high=0.52, unit="bits a weight", table="perceptron", predicted=True,
    ),
    Claim(
        "Perceptron: on the same patterns SBPI stores more than that",
        ({"method": "sbpi", "n_inputs": 1001},), of_rows("bits"),
        low=0.68, unit="bits a weight", table="perceptron", predicted=True,
    ),
    Claim(
        "Dense network: a binary weight with binary activations stores a fraction of a bit",
        (QUARTER | SIGNS,), more_bits, high=0.35, unit="bits a weight",
        table="capacity", predicted=True,
    ),
    Claim(
        "Dense network: a float weight stores more than one bit",
        (QUARTER | {"binary": False},), more_bits, low=1.5, unit="bits a weight",
        table="capacity", predicted=True,
    ),
    Claim(
        "Dense network: real weights with binary activations store more than the reverse (more by)",
        (QUARTER | SIGNS | {"activation": "hardtanh"}, QUARTER | SIGNS | {"weights": "real"}),
        more_bits, low=0.2, unit="bits a weight", table="capacity", predicted=True,
    ),
    Claim(
        "Binary network: a weight stores less under two hidden layers than under none (less by)",
        (QUARTER | SIGNS, QUARTER | SIGNS | {"network": "linear"}),
        more_bits, low=0.05, unit="bits a weight", table="capacity", predicted=True,
    ),
)
TABLE_CLAIMS = CHAOS_CLAIMS + BITS_CLAIMS
# fmt: on


# ------------------------------------------------------------------------------ the verdicts


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The interval of the mean over seeds by Student's t: mean ± t(n - 1) s / sqrt(n).

    That is right for numbers that are normally distributed over the seeds. Where all are equal
    it is a point. Raises InvalidValue for fewer than two numbers, NaN and infinity.
    """
    from scipy.special import stdtrit  # the inverse of Student's distribution

    if len(values) < 2 or not all(map(isfinite, values)):
        raise InvalidValue(f"an interval needs two finite numbers or more, got {shown(values)}")
    half = stdtrit(len(values) - 1, (1 + level) / 2) * stdev(values) / sqrt(len(values))
    return mean(values) - half, mean(values) + half


def judge(claim: Claim, table: "pd.DataFrame", profile: str) -> dict[str, Any]:
    """One row: the claim, its runs at this profile, what they gave, the verdict, the cost.

    `table` is a ledger, as `results` gives it; a claim about a stored table, which has no
    profiles, takes that from the folder `tables` beside the runs. `values` are those of the seeds
    that all experiments have, `estimate` is their mean, `low` and `high` its 95 % interval, `least`
    and `most` are the thresholds, and `CPU hours` count each run once. The verdict is that of
    `Claim.verdict`; where runs are missing it is "not run at PROFILE length" or, with one or two
    seeds, "fewer than 3 seeds".
    """
    if claim.table:
        source = stored_table(claim.table, Path(table.attrs["folder"]) / "tables")
    else:
        source = table[table["profile"] == profile]
    points = [_rows_at(point, source) for point in claim.experiments]
    seeds = sorted(set.intersection(*(set(rows["seed"]) for rows in points)))
    row = {
        "claim": claim.text,
        "experiments": "; ".join(map(_shown_point, claim.experiments)),
        **_about([rows[rows["seed"].isin(seeds)] for rows in points]),
        "seeds": len(seeds),
        "threshold": claim.threshold,
        "least": claim.low,
        "most": claim.high,
        "unit": claim.unit,
        "predicted": claim.predicted,
    }
    values = []
    for seed in seeds:
        group = [rows[rows["seed"] == seed] for rows in points]
        values.append(claim.metric(*group if claim.table else map(_run_of, group)))
    low, high = interval(values) if len(values) > 1 else (nan, nan)
    estimate = mean(values) if values else nan
    row |= {"values": values, "estimate": estimate, "low": low, "high": high}
    if len(values) >= SEEDS:
        verdict = claim.verdict(low, high)
    elif values:
        verdict = f"fewer than {SEEDS} seeds"
    elif claim.table:
        verdict = f"not in the table {claim.table}"
    else:
        verdict = f"not run at {profile} length"
    return row | {"verdict": verdict}


def _rows_at(point: Point, source: "pd.DataFrame") -> "pd.DataFrame":
    wanted = {"experiment": point} if isinstance(point, str) else point
    for column, value in wanted.items():
        check_name("column", column, source.columns)
        source = source[source[column] == value]
    return source


def _shown_point(point: Point) -> str:
    if isinstance(point, str):
        return point
    return ", ".join(f"{column} {value}" for column, value in point.items())


def _run_of(rows: "pd.DataFrame") -> Run:
    return load_runs(rows)[-1]


def _about(points: "Sequence[pd.DataFrame]") -> dict[str, Any]:
    """What the rows of all points say of data, machines and cost; of a table, as far as it does."""
    import pandas as pd

    rows = pd.concat(points)
    rows = rows[~rows.index.duplicated()]  # a row of two points
    about: dict[str, Any] = {"data": "", "device": "", "CPU hours": nan}
    if "images" in rows:
        names = [f" of {name}" for name in rows.get("dataset", ())] or [" images"] * len(rows)
        pairs = zip(rows["images"], names, strict=True)
        about["data"] = "; ".join(sorted({f"{n:,}{name}" for n, name in pairs}))
    if "device" in rows:
        about["device"] = "; ".join(sorted(set(rows["device"])))
    if "seconds" in rows:
        about["CPU hours"] = float(cpu_hours(rows).sum())
    return about


def cpu_hours(rows: "pd.DataFrame") -> "pd.Series":
    """What each run took of the processors; where nobody measured that, its time times threads."""
    seconds = rows["seconds"] * rows.get("threads", 1)
    if "cpu_seconds" in rows:
        seconds = rows["cpu_seconds"].fillna(seconds)
    return seconds / 3600


def judge_all(table: "pd.DataFrame", profile: str = "reduced") -> "pd.DataFrame":
    """All claims of the book as `judge` judges them, a row each; their numbers are the index."""
    import pandas as pd

    rows = [judge(claim, table, profile) for claim in (*CLAIMS, *TABLE_CLAIMS)]
    return pd.DataFrame(rows, pd.RangeIndex(1, len(rows) + 1, name="number"))


def claims_json(table: "pd.DataFrame", profile: str = "reduced") -> str:
    """The rows of `judge_all` for other programs; numbers have 6 digits.

    A threshold that a claim does not have is null, and so is a number that could not be measured.
    """
    tables = [claim.table for claim in (*CLAIMS, *TABLE_CLAIMS)]
    judged = judge_all(table, profile).to_dict("index").items()
    rows = [
        {
            "number": number,
            "claim": row["claim"],
            "experiments": row["experiments"].split("; "),
            "source": f"tables/{source}.csv" if source else f"profile {profile}",
            "data": row["data"],
            "unit": row["unit"],
            "n": row["seeds"],
            "values": list(map(_number, row["values"])),
            "estimate": _number(row["estimate"]),
            "interval": [_number(row["low"]), _number(row["high"])],
            "threshold": [_number(row["least"]), _number(row["most"])],
            "predicted": row["predicted"],
            "verdict": row["verdict"],
            "cpu_hours": _number(row["CPU hours"]),
        }
        for (number, row), source in zip(judged, tables, strict=True)
    ]
    return json.dumps({"method": METHOD, "claims": rows}, indent=1, ensure_ascii=False) + "\n"


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if isfinite(value) else None


def reliability(path: str | Path = RESULTS / "reliability.json") -> list[dict[str, Any]]:
    """One row for each kind of fault that `python -m benchmarks.faults` tried, and its outcome."""
    faults = read_json(path).get("faults")
    if not isinstance(faults, list) or not all(isinstance(row, dict) for row in faults):
        raise DamagedFile(f"{path} lists no faults")
    return [{name.replace("_", " "): value for name, value in row.items()} for row in faults]
