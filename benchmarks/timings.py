"""How fast training is: steps timed on this machine, and the benchmarks' last kept runs.

The kept runs are `training.json`, `inference.json` and `contention.json` in `benchmarks/results`.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
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
from bnnlib.kernels import bits
from bnnlib.optim import BinaryAdam, parameter_groups
from bnnlib.plots import COLOURS, GREY, use_book_style
from bnnlib.process import keep_freed_memory
from bnnlib.runs.record import RESULTS
from bnnlib.training import Step, TrainingState

STORED = RESULTS.parent / "benchmarks" / "results" / "training.json"
CONTENTION, INFERENCE = STORED.with_name("contention.json"), STORED.with_name("inference.json")
LISTS = ("speeds", "limits", "memory", "growth", "startup")
ENGINE_LISTS = ("engines", "rates", "memory")
MARKERS = {"forward": "o", "weight gradient": "s", "data gradient": "^"}
QUARTILES = ("low", "median", "high")
Row = dict[str, Any]

# ------------------------------------------------------------------------- on this machine

QUIET = 0.9  # of the time; a process that has a core for less of it shares the machine


class Pace(NamedTuple):
    """How long a training step, or a call, takes: medians over the rounds."""

    seconds: float
    share: float  # of that time, in which the process had a core

    @property
    def on_core(self) -> float:
        """The seconds without those in which other processes had the core, for one thread."""
        return self.seconds * self.share


def time_steps(
    experiments: Mapping[str, Experiment],
    rounds: int = 5,
    steps: Mapping[str, int] | None = None,
    plain: Collection[str] = (),
) -> dict[str, Pace]:
    """The pace of each experiment, on drawn images, on this processor.

    They take turns: in each round every one trains one step, or `steps[name]` of them, so that a
    slow moment of the machine slows all. A first round, which allocates, is not counted. Those
    named in `plain` train `without_kernels`.
    """
    keep_freed_memory()  # as a run does
    turns = {name: _turn(e, (steps or {}).get(name, 1)) for name, e in experiments.items()}
    return _in_turns(turns | {name: without_kernels()(turns[name]) for name in plain}, rounds)


def time_calls(
    calls: Mapping[str, Callable[[], object]], rounds: int = 5, times: int = 1
) -> dict[str, Pace]:
    """The pace of each function, called `times` in each round; the rest as in `time_steps`."""
    keep_freed_memory()
    return _in_turns({name: partial(_timed, call, times) for name, call in calls.items()}, rounds)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Inside the `with` block, or the function decorated, products are as with BNNLIB_KERNELS=off:
    PyTorch's in layers, and those of NumPy in packed networks.
    """
    before, bits.library = bits.library, lambda: None
    try:
        yield
    finally:
        bits.library = before


def _in_turns(turns: Mapping[str, Callable[[], Pace]], rounds: int) -> dict[str, Pace]:
    taken = [{name: turn() for name, turn in turns.items()} for _ in range(rounds + 1)][1:]
    rounds_of = {name: [of_round[name] for of_round in taken] for name in turns}
    return {
        name: Pace(median(pace.seconds for pace in own), median(pace.share for pace in own))
        for name, own in rounds_of.items()
    }


def is_quiet(*paces: Mapping[str, Pace]) -> bool:
    """Whether each of these times was taken with a core for nearly all of it."""
    return _least_share(paces) >= QUIET


def how_quiet(*paces: Mapping[str, Pace]) -> str:
    """What these times are worth, in one sentence."""
    share = _least_share(paces)
    if is_quiet(*paces):
        return f"The machine was quiet: this process had a core for {share:.0%} of the time."
    return (
        "The machine was too busy to tell: this process had a core for only "
        f"{share:.0%} of the time, so the times are too long."
    )


def _least_share(several: Sequence[Mapping[str, Pace]]) -> float:
    return min(pace.share for paces in several for pace in paces.values())


def _turn(e: Experiment, steps: int) -> Callable[[], Pace]:
    """A function that trains so many steps, and tells how long one of them took."""
    model, order = build_model(e), torch.Generator().manual_seed(0)
    data = load("patterns" if e.network == "dense" else "shapes", "train", n=steps * e.batch_size)
    state = TrainingState(model, BinaryAdam(parameter_groups(model), lr=e.lr_start), order)
    step = Step(state, Batches(data, e.batch_size))

    def turn() -> Pace:
        step.begin_epoch()
        pace = _timed(step, steps)
        state.epoch_start, state.done = None, 0
        return pace

    return turn


def _timed(call: Callable[[], object], times: int) -> Pace:
    clock, core = time.perf_counter(), time.thread_time()
    for _ in range(times):
        call()
    clock, core = time.perf_counter() - clock, time.thread_time() - core
    return Pace(clock / times, core / clock)


# ------------------------------------------------------------------------ kept in the project


def load_timings(path: str | Path = STORED, lists: Sequence[str] = LISTS) -> Row:
    """What a benchmark wrote: its machine, versions and date, and lists of rows.

    "speeds" has a row for each network, number of threads and contender, "limits" the machine's
    own limit for each network, "memory" a row for each contender, "growth" one for each point and
    contender, "startup" the seconds of each program. Those of `benchmarks.inference` have
    `ENGINE_LISTS`, those of `benchmarks.contention` the one list "contention". Raises DamagedFile
    for a file without these lists.
    """
    results = read_json(path)
    for name in lists:
        rows = results.get(name)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DamagedFile(f"{path} is no result of the benchmark: it has no list {name!r}")
    return results


def speed_table(results: Mapping[str, Any]) -> list[Row]:
    """One row for each network, threads and contender, as text: medians, times with quartiles."""
    return [
        {
            "network": f"{row['network']} × {row['width']:g}",
            "threads": row["threads"],
            "contender": row["contender"],
            "ms a step": _spread(row["milliseconds"]),
            "images/s": f"{row['images_per_second']['median']:,.0f}",
            "to the twin": f"{row['speed_to_twin']['median']:.2f}",
            "to the tuned twin": f"{row['speed_to_tuned_twin']['median']:.2f}",
            "of the limit": f"{row['share_of_limit']['median']:.0%}",
        }
        for row in results["speeds"]
    ]


def inference_table(results: Mapping[str, Any]) -> list[Row]:
    """One row for each network, batch, threads and engine: medians, as text."""

    def ratio(row: Row, name: str, form: str) -> str:
        return format(row[name]["median"], form) if name in row else ""

    return [
        {
            "network": f"{row['network']} × {row['width']:g}",
            "batch": row["batch_size"],
            "threads": row["threads"],
            "contender": row["contender"],
            "images/s": f"{row['images_per_second']['median']:,.0f}",
            "to PyTorch": ratio(row, "speed_to_eager", ".1f"),
            "to compiled": ratio(row, "speed_to_compiled", ".1f"),
            "of the limit": ratio(row, "share_of_limit", ".0%"),
            "same class": "equal" if row["equal"] else f"{row['same_class']:.0%}",
        }
        for row in results["engines"]
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


def roofline(limit: Mapping[str, Any]) -> list[Row]:
    """A row for each product of a row of "limits", as floats and as words.

    "intensity" are operations for each byte that factors and value have, "rate" operations a
    second.
    """
    rows = []
    for p in limit["products"]:
        for what, seconds in (("floats", p["seconds"]), ("words", p["kernel_seconds"])):
            if seconds:
                about = {"layer": p["layer"], "kind": p["kind"], "as": what}
                size = {"intensity": p["flops"] / p["bytes"][what], "rate": p["flops"] / seconds}
                rows.append(about | size)
    return rows


def panels(rows: Sequence[Row], *names: str) -> dict[tuple, list[Row]]:
    """The rows by the values of these columns."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


# ---------------------------------------------------------------------------------- figures


def plot_paces(
    paces: Mapping[str, Pace], ax: Axes, value: Callable[[float], float] = lambda s: 1000 * s
) -> Axes:
    """A bar for each pace, the first on top, with its number: of milliseconds, or another `value`
    of the seconds.
    """
    lengths = [value(pace.seconds) for pace in paces.values()]
    colours = list(COLOURS.values())[: len(paces)]
    bars = ax.barh(range(len(paces)), lengths, color=colours, alpha=0.6, height=0.7)
    ax.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8, color=GREY)
    ax.set_yticks(range(len(paces)), list(paces))
    ax.set(xlim=(0, 1.4 * max(lengths)), ylim=(len(paces) - 0.5, -0.5))
    ax.xaxis.set_major_locator(MaxNLocator(2))
    return ax


def plot_speeds(rows: Sequence[Row], ax: Axes, limit: float | None = None) -> Axes:
    """Images a second of each contender, with quartiles, and a limit, dotted."""
    low, middle, high = ([r["images_per_second"][name] for r in rows] for name in QUARTILES)
    _bars(ax, rows, middle)
    ax.hlines(range(len(rows)), low, high, colors=_colours(rows))
    if limit:
        ax.axvline(limit, color=GREY, linestyle=":")
    ax.set_xlim(0, None)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    return ax


def plot_roofline(limit: Mapping[str, Any], ax: Axes, additions: int) -> Axes:
    """The products of a row of "limits" under the roofs of the machine's rates.

    What moves more bytes than it computes lies under the slope, which is the memory's. `additions`:
    of how many products one addition takes the place in the gradients.
    """
    rates = {name: rate["median"] for name, rate in limit["rates"].items()}
    x = np.geomspace(4, 4000)
    roofs = {"floats": rates["floats"], "tables of sums": additions * rates["floats"]}
    for name, roof in (roofs | {"words": rates.get("words", 0)}).items():
        ax.plot(x, np.minimum(x * rates["bytes"], roof) / 1e9, color=GREY, linewidth=0.8)
        ax.annotate(name, (x[-1], roof / 1e9), color=GREY, fontsize=8, ha="right", va="bottom")
    for (what, kind), rows in panels(roofline(limit), "as", "kind").items():
        style = {"color": COLOURS["train" if what == "words" else "test"], "marker": MARKERS[kind]}
        points = [row["intensity"] for row in rows], [row["rate"] / 1e9 for row in rows]
        ax.plot(*points, linestyle="", label=f"{kind}, {what}", alpha=0.8, **style)
    ax.set(xscale="log", yscale="log", xlabel="operations a byte")
    ax.set_ylabel("billion operations a second")
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
    return [COLOURS["train" if _is_ours(row) else "test"] for row in rows]


def _is_ours(row: Row) -> bool:
    return row["contender"].startswith("bnnlib")


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
    """`plot_speeds` of every network and number of threads that were compared."""
    names = ("network", "width", "threads")
    limits = {
        key: results["batch_size"] / median(row["seconds"])
        for key, (row,) in panels(results["limits"], *names).items()
    }
    figure = _grid(panels(results["speeds"], *names), "{} × {:g}\nthreads: {}", limits)
    figure.supxlabel("images a second; dotted: the limit of float32", color=GREY, fontsize=10)
    return figure


def draw_inference(results: Mapping[str, Any]) -> Figure:
    """`plot_speeds` of every network, batch size and number of threads that was evaluated."""
    shown = panels(results["engines"], "network", "width", "batch_size", "threads")
    figure = _grid(shown, "{} × {:g}, batch {}\nthreads: {}", {})
    figure.supxlabel("images a second", color=GREY, fontsize=10)
    return figure


def _grid(
    shown: Mapping[tuple, Sequence[Row]], title: str, limits: Mapping[tuple, float]
) -> Figure:
    """A panel for each list of rows, up to four side by side."""
    use_book_style()
    columns = min(4, len(shown))
    lines, most = -(-len(shown) // columns), max(map(len, shown.values()))
    size = (2 + 1.7 * columns, 0.4 + lines * (0.7 + 0.19 * most))
    figure, axes = plt.subplots(lines, columns, figsize=size, sharey=True, squeeze=False)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for (key, rows), ax in zip(shown.items(), axes.flat, strict=False):
        plot_speeds(rows, ax, limits.get(key)).set_xlabel(title.format(*key), fontsize=8)
    return figure
