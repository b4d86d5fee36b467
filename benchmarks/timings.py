"""How fast training is: steps timed on this machine, and the benchmarks' last kept runs.

The kept runs are `training.json` and `contention.json` in `benchmarks/results`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bnnlib.batches import Batches
from bnnlib.data.images import load
from bnnlib.errors import DamagedFile
from bnnlib.experiments.build import build_model
from bnnlib.experiments.experiment import Experiment
from bnnlib.files import read_json
from bnnlib.optim import BinaryAdam, parameter_groups
from bnnlib.plots import COLOURS, GREY, use_book_style
from bnnlib.process import keep_freed_memory
from bnnlib.runs.record import RESULTS
from bnnlib.training import Step, TrainingState

STORED = RESULTS.parent / "benchmarks" / "results" / "training.json"
CONTENTION = STORED.with_name("contention.json")
LISTS = ("speeds", "limits", "memory", "growth", "startup")
QUARTILES = ("low", "median", "high")
Row = dict[str, Any]

# ------------------------------------------------------------------------- on this machine

QUIET = 0.9  # of the time; a process that has a core for less of it shares the machine


class Pace(NamedTuple):
    """How long a training step takes: medians over the rounds."""

    seconds: float
    share: float  # of that time, in which the process had a core


def time_steps(
    experiments: Mapping[str, Experiment], rounds: int = 5, steps: Mapping[str, int] | None = None
) -> dict[str, Pace]:
    """The pace of each experiment, on drawn images, on this processor.

    They take turns: in each round every one trains one step, or `steps[name]` of them, so that a
    slow moment of the machine slows all. A first round, which allocates, is not counted.
    """
    keep_freed_memory()  # as a run does
    turns = {name: _turn(e, (steps or {}).get(name, 1)) for name, e in experiments.items()}
    taken = [{name: turn() for name, turn in turns.items()} for _ in range(rounds + 1)][1:]
    rounds_of = {name: [of_round[name] for of_round in taken] for name in turns}
    return {
        name: Pace(median(pace.seconds for pace in own), median(pace.share for pace in own))
        for name, own in rounds_of.items()
    }


def how_quiet(paces: Mapping[str, Pace]) -> str:
    """What these times are worth, in one sentence."""
    share = min(pace.share for pace in paces.values())
    if share >= QUIET:
        return f"The machine was quiet: this process had a core for {share:.0%} of the time."
    return (
        "The machine was too busy to tell: this process had a core for only "
        f"{share:.0%} of the time, so the times are too long."
    )


def _turn(e: Experiment, steps: int) -> Callable[[], Pace]:
    """A function that trains so many steps, and tells how long one of them took."""
    model, order = build_model(e), torch.Generator().manual_seed(0)
    data = load("patterns" if e.network == "dense" else "shapes", "train", n=steps * e.batch_size)
    state = TrainingState(model, BinaryAdam(parameter_groups(model), lr=e.lr_start), order)
    step = Step(state, Batches(data, e.batch_size))

    def turn() -> Pace:
        step.begin_epoch()
        clock, core = time.perf_counter(), time.thread_time()
        for _ in range(steps):
            step()
        clock, core = time.perf_counter() - clock, time.thread_time() - core
        state.epoch_start, state.done = None, 0
        return Pace(clock / steps, core / clock)

    return turn


# ------------------------------------------------------------------------ kept in the project


def load_timings(path: str | Path = STORED, lists: Sequence[str] = LISTS) -> Row:
    """What a benchmark wrote: its machine, versions and date, and lists of rows.

    "speeds" has a row for each network and contender, "limits" the machine's own limit for each
    network, "memory" a row for each contender, "growth" one for each point and contender,
    "startup" the seconds of each program. Those of `benchmarks.contention` have the one list
    "contention". Raises DamagedFile for a file without these lists.
    """
    results = read_json(path)
    for name in lists:
        rows = results.get(name)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DamagedFile(f"{path} is no result of the benchmark: it has no list {name!r}")
    return results


def speed_table(results: Mapping[str, Any]) -> list[Row]:
    """One row for each network, width and contender: medians, the times with quartiles, as text."""
    return [
        {
            "network": row["network"],
            "width": row["width"],
            "contender": row["contender"],
            "ms a step": _spread(row["milliseconds"]),
            "images/s": f"{row['images_per_second']['median']:,.0f}",
            "to the twin": f"{row['speed_to_twin']['median']:.2f}",
            "to the tuned twin": f"{row['speed_to_tuned_twin']['median']:.2f}",
            "of the limit": f"{row['share_of_limit']['median']:.0%}",
        }
        for row in results["speeds"]
    ]


def _spread(quartiles: Mapping[str, float]) -> str:
    low, middle, high = (f"{quartiles[name]:,.1f}" for name in QUARTILES)
    return f"{middle}\N{NO-BREAK SPACE}({low}–{high})"


def contention_table(results: Mapping[str, Any]) -> list[Row]:
    """One row for each network, number of threads and turns of their spin: medians, as text."""
    return [
        {
            "network": f"{row['network']} × {row['width']:g}",
            "threads": row["threads"],
            "turns": f"{row['spin']:,}" if row["threads"] > 1 else "",
            "ms a step": f"{row['alone']['median']:,.0f}",
            "to the default": f"{row['alone_to_library']['median']:.2f}",
            "ms beside": f"{row['beside']['median']:,.0f}",
            "beside to alone": f"{row['beside_to_alone']['median']:.1f}",
        }
        for row in results["contention"]
    ]


def networks(results: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The networks that were compared, by name and width."""
    return [(row["network"], row["width"]) for row in results["limits"]]


# ---------------------------------------------------------------------------------- figures


def plot_speeds(results: Mapping[str, Any], network: str, width: float, ax: Axes) -> Axes:
    """Images a second of each contender, with quartiles, and the machine's limit, dotted."""
    key = (network, width)
    rows = [r for r in results["speeds"] if (r["network"], r["width"]) == key]
    low, middle, high = ([r["images_per_second"][name] for r in rows] for name in QUARTILES)
    _bars(ax, rows, middle)
    ax.hlines(range(len(rows)), low, high, colors=_colours(rows))
    limit = next(r["seconds"] for r in results["limits"] if (r["network"], r["width"]) == key)
    ax.axvline(results["batch_size"] / median(limit), color=GREY, linestyle=":")
    ax.set(xlabel=f"{network} × {width:g}", xlim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(3))
    return ax


def plot_memory(results: Mapping[str, Any], ax: Axes) -> Axes:
    """Peak memory of each contender; the part in a stronger colour is its imports'."""
    rows = results["memory"]
    for what in ("peak_bytes", "imports_bytes"):
        _bars(ax, rows, [row[what]["median"] / 1e6 for row in rows])
    ax.set(xlabel="peak memory (MB)", xlim=(0, None))
    return ax


def _bars(ax: Axes, rows: Sequence[Row], lengths: Sequence[float]) -> None:
    """A translucent bar for each row's contender, the first on top."""
    ax.barh(range(len(rows)), lengths, color=_colours(rows), alpha=0.6, height=0.7)
    ax.set_yticks(range(len(rows)), [row["contender"] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)


def _colours(rows: Sequence[Row]) -> list[str]:
    """bnnlib has a colour of its own."""
    return [COLOURS["train" if row["contender"] == "bnnlib" else "test"] for row in rows]


def plot_growth(
    results: Mapping[str, Any], by: str, ax: Axes, what: str = "milliseconds", scale: float = 1.0
) -> Axes:
    """A line of `what`, times `scale`, against `by`, for each contender; times are medians."""
    rows = [row for row in results["growth"] if row["by"] == by]
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = [row for row in rows if row["contender"] == name]
        x = [row["value"] for row in own]
        y = [row[what]["median"] if isinstance(row[what], dict) else row[what] for row in own]
        style = "-" if name == "bnnlib" else "--"
        line = {"marker": "o", "color": _colours(own)[0], "label": name}
        ax.plot(x, [scale * value for value in y], style, **line)
    ax.set_xlabel(by.replace("_", " "))
    ax.set(xlim=(0, 1.08 * ax.dataLim.xmax), ylim=(0, 1.1 * ax.dataLim.ymax))
    return ax


def draw(results: Mapping[str, Any]) -> Figure:
    """`plot_speeds` of every network that was compared, side by side."""
    use_book_style()
    compared = networks(results)
    figure, axes = plt.subplots(
        1, len(compared), figsize=(2 + 1.7 * len(compared), 2.6), sharey=True, squeeze=False
    )
    for (network, width), ax in zip(compared, axes.flat, strict=True):
        plot_speeds(results, network, width, ax)
    figure.supxlabel("images a second; dotted: the machine's limit", color=GREY, fontsize=10)
    return figure
