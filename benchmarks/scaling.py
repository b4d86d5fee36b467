"""What `python -m benchmarks.sweeps` left, read, drawn, and carried on to what was not measured.

The kept file is `benchmarks/results/sweeps.json`.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes

from benchmarks.settings import training_flops
from bnnlib.errors import DamagedFile
from bnnlib.experiments.experiment import Experiment
from bnnlib.files import read_json
from bnnlib.plots import COLOURS
from bnnlib.runs.record import RESULTS

STORED = RESULTS.parent / "benchmarks" / "results" / "sweeps.json"
PARTS = ("overhead", "ledger", "folders", "requests", "speedup", "kills", "paces")
HOUR = 3600
Row = dict[str, Any]


def load_sweeps(path: str | Path = STORED) -> dict[str, Row]:
    """What the benchmark wrote: of each part its machine, versions, date, and a list of rows.

    Raises DamagedFile for a file without these parts.
    """
    found = read_json(path)
    for name in PARTS:
        part = found.get(name)
        rows = part.get("rows") if isinstance(part, dict) else None
        if not (rows and isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
            raise DamagedFile(f"{path} is no result of the benchmark: it has no part {name!r}")
    return {name: found[name] for name in PARTS}


def machines(parts: Mapping[str, Row]) -> list[Row]:
    """A row for each part: what it was measured on, when, and how long that took."""
    return [
        {
            "part": name,
            "processor": part["machine"]["processor"],
            "cores": part["machine"]["cores"],
            "load before": part["machine"]["load"],
            "measured": part["started"][:10],
            "minutes": round(part["seconds"] / 60, 1),
        }
        for name, part in parts.items()
    ]


def middles(rows: Sequence[Row], *names: str) -> list[Row]:
    """One row for all that are alike in these columns: of each other number the median."""

    def key(row: Row) -> tuple:
        return tuple(row[name] for name in names)

    groups = [list(group) for _, group in groupby(sorted(rows, key=key), key)]
    return [
        {k: v if k in names else median(r[k] for r in group) for k, v in group[0].items()}
        for group in groups
    ]


def slope(rows: Sequence[Row], what: str, by: str = "runs") -> float:
    """How much `what` grows with each run, from the smallest to the largest size."""
    first, last = min(rows, key=lambda r: r[by]), max(rows, key=lambda r: r[by])
    return (last[what] - first[what]) / (last[by] - first[by])


def plot_by_runs(
    rows: Sequence[Row], ax: Axes, what: str, colour: str, scale: float = 1.0, **style: Any
) -> Axes:
    """A line of `what`, times `scale`, against the number of runs; both axes are logarithmic."""
    points = sorted((row["runs"], scale * row[what]) for row in rows)
    ax.plot(*zip(*points, strict=True), marker="o", color=COLOURS[colour], **style)
    ax.set(xscale="log", yscale="log", xlabel="runs")
    return ax


# ------------------------------------------------------------------------------------ its cost


def gpu_hours(e: Experiment, measured: Experiment, seconds_an_epoch: float) -> float:
    """Hours of a GPU for a run, from the seconds of an epoch of another one.

    By the operations of its training steps; evaluations, which take a third of an epoch at most
    where there are as many test images as training images, are part of the measured epoch.
    """
    return e.epochs * seconds_an_epoch * _work(e) / _work(measured) / HOUR


def core_hours(e: Experiment, seconds_a_step: float) -> float:
    """Hours of a core for the training steps of a run."""
    return e.steps * seconds_a_step / HOUR


def _work(e: Experiment) -> float:
    """Operations of an epoch's training steps."""
    return e.images("train") * training_flops(e.network, e.width)


def study_costs(
    experiments: Mapping[str, Experiment], paces: Sequence[Row], on_gpu: Row, seeds: int
) -> Iterator[Row]:
    """A row for each experiment with so many seeds: steps, hours of a GPU and of a core."""
    seconds = {row["experiment"]: row["seconds_a_step"] for row in paces}
    measured = experiments[on_gpu["experiment"]]
    for name, e in experiments.items():
        yield {
            "experiment": name,
            "million steps": seeds * e.steps / 1e6,
            "GPU hours": seeds * gpu_hours(e, measured, on_gpu["seconds_an_epoch"]),
            "core hours": seeds * core_hours(e, seconds[name]),
        }
