"""`python -m benchmarks.sweeps`: what many runs cost beside themselves, and what they withstand.

Out: `benchmarks/results/sweeps.json`, an entry for each part, with what it was measured on. The
parts: `overhead` (seconds and memory by the number of runs), `ledger` (of the table of results),
`folders` (bytes of a run), `requests` (to a file system), `speedup` (two workers beside one),
`kills` (of a sweep), `paces` (of a training step of the whole study, and of an epoch on a GPU).
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from benchmarks.overhead import ledger, overhead, speed_up
from benchmarks.records import recorded, save
from benchmarks.rounds import Row
from benchmarks.scaling import PARTS, STORED
from benchmarks.storage import folders, missing, requests
from benchmarks.storm import storm
from bnnlib.errors import BnnlibError, check_name
from bnnlib.experiments.originals import PUBLISHED
from bnnlib.files import read_json
from bnnlib.sweeps.cost import kind, seconds_a_step

# The one pace of a GPU that was measured; the machines that benchmarks run on have none.
ON_GPU = {
    "experiment": "cifar10-random-labels",
    "device": "NVIDIA H100",
    "seconds_an_epoch": 3.0,
    "source": "results/README.md",
}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    sizes: tuple[int, ...]  # of sweeps, and of ledgers
    most_looped: int  # runs without a sweep
    rounds: dict[int, int]  # of the small sizes
    epochs: int  # of a run whose speed-up is measured
    runs: int  # of those
    speed_rounds: int
    kills: int
    killed_runs: int


FULL = Plan((10, 100, 1_000, 10_000), 1_000, {10: 3, 100: 3}, 40, 8, 3, 100, 40)
QUICK = Plan((4, 16, 64), 16, {}, 2, 4, 1, 3, 4)


def paces(names: Iterable[str] = PUBLISHED) -> Iterator[Row]:
    """Seconds of a training step on one core, of each published experiment that trains; and the
    seconds of an epoch that were measured on a GPU.
    """
    experiments = [PUBLISHED[name] for name in names if not PUBLISHED[name].evaluates]
    found = seconds_a_step(experiments, threads=1)
    for e in experiments:
        yield {"experiment": e.name, "device": "cpu", "seconds_a_step": found[kind(e)]}
    yield ON_GPU


def measurements(plan: Plan) -> dict[str, Callable[[], Iterable[Row]]]:
    """The functions that give the rows of each part."""
    found = {
        "overhead": lambda: overhead(plan.sizes, plan.most_looped, plan.rounds),
        "ledger": lambda: ledger(plan.sizes),
        "folders": folders,
        "requests": requests,
        "speedup": lambda: speed_up(plan.epochs, plan.runs, plan.speed_rounds),
        "kills": lambda: [storm(plan.kills, plan.killed_runs)],
        "paces": paces,
    }
    return {name: found[name] for name in PARTS}


def is_as_promised(part: str, rows: Iterable[Row]) -> bool:
    """Whether what must never happen did not."""
    if part == "kills":
        return all(
            row["finished"] == row["rows"] == row["equal"] == row["runs"]
            and row["running"] == row["written_again"] == 0
            for row in rows
        )
    return part != "speedup" or all(row["equal"] == row["runs"] for row in rows)


def told(row: Row) -> str:
    """One row in a line."""
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
    )


@click.command()
@click.option("--only", multiple=True, metavar="PART", help=f"Of {', '.join(PARTS)}; repeatable.")
@click.option("--quick", is_flag=True, help="A trial at small sizes.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="[benchmarks/results/sweeps.json; none for --quick]",
)
def main(only: tuple[str, ...], quick: bool, out: Path | None) -> None:
    """Measure sweeps on this machine; what is not measured stays in the file as it was."""
    if out is None and not quick:
        out = STORED
    torch.set_num_threads(1)
    try:
        broken = _measure(only or PARTS, QUICK if quick else FULL, out)
    except BnnlibError as error:
        raise click.ClickException(str(error)) from error
    if broken:
        sys.exit(1)


def _measure(names: Iterable[str], plan: Plan, out: Path | None) -> list[str]:
    """Measure these parts, each saved when it is done; returns those that broke a promise."""
    for name in names:
        check_name("part", name, PARTS)
    broken, each = [], measurements(plan)
    for name in names:
        if name == "requests" and (why := missing()):
            click.echo(f"{name}: left out, because {why}", err=True)
            continue
        click.echo(name)
        found = recorded(lambda name=name: {"rows": list(_telling(each[name]()))})
        broken += [name] * (not is_as_promised(name, found["rows"]))
        if out:
            before = read_json(out) if out.is_file() else {}
            save(before | {name: found}, out)
    return broken


def _telling(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        click.echo(f"  {told(row)}")
        yield row


if __name__ == "__main__":
    main()
