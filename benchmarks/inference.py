"""How fast a trained network is evaluated, and in how much memory, by each program that can.

In: nothing but this machine. Out: `benchmarks/results/inference.json` and its chart. Each time is
that from uint8 images to scores; the networks have random signs and normalizations that were
calibrated, which takes as long as trained ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

from benchmarks.engines import ENGINES
from benchmarks.records import recorded, save
from benchmarks.rounds import Comparison, Row, compare, memory, rates_row
from benchmarks.settings import Setting, forward_flops
from benchmarks.timings import INFERENCE, draw_inference
from benchmarks.workers import RATES, REFERENCE, working
from bnnlib.errors import BnnlibError

EAGER, COMPILED = "PyTorch", "PyTorch, compiled"
NOT_TRIED = {"Larq Compute Engine": "its last release, 0.16, needs TensorFlow 2.16"}
ACTS = {"peak_bytes": "epoch"}


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    compared: tuple[Setting, ...]
    rounds: int
    memory: Setting


def full_plan(threads: tuple[int, ...] = (2, 1)) -> Plan:
    """The network for CIFAR-10; of other numbers of threads than the first one the largest only."""
    base = Setting(steps=2, threads=threads[0])
    quarter = replace(base, width=1 / 4, steps=16)
    singly = [replace(s, batch_size=1, steps=16 * s.steps) for s in (base, quarter)]
    fewer = [replace(base, threads=n) for n in threads[1:]]
    return Plan((base, quarter, *singly, *fewer), 5, replace(base, batch_size=500))


def quick_plan(threads: tuple[int, ...] = (2, 1)) -> Plan:
    """A trial on a narrow network."""
    base = Setting("svhn", 1 / 4, steps=4, threads=threads[0])
    fewer = [replace(base, threads=n) for n in threads[1:]]
    return Plan((base, replace(base, batch_size=1), *fewer), 2, replace(base, batch_size=500))


def measure(plan: Plan) -> Row:
    """All the rows of a plan, told as they come, what was skipped, and versions."""
    found: Row = {"engines": [], "rates": []}
    with TemporaryDirectory() as scratch:
        for setting in plan.compared:
            there = placed(setting, Path(scratch))
            with working([REFERENCE], there) as crew:
                expected = crew.workers[REFERENCE].ask("scores")
            compared = compare(ENGINES, there, plan.rounds, RATES, "scores")
            rows, rates = engines(compared, expected)
            click.echo("\n".join(map(told, rows)))
            found["engines"] += rows
            found["rates"].append(rates)
        skipped = compared.skipped | NOT_TRIED
        for name, reason in skipped.items():
            click.echo(f"{name} was skipped: {reason}")
        click.echo("memory")
        names = [name for name, kind in ENGINES.items() if not kind.kernels]
        found["memory"] = memory(names, placed(plan.memory, Path(scratch)), 2, ACTS)
    return {
        "rounds": plan.rounds,
        "contenders": {name: kind.summary for name, kind in ENGINES.items()},
        **found,
        "skipped": skipped,
        "libraries": compared.libraries,
    }


def placed(setting: Setting, scratch: Path) -> Setting:
    """With the folder of its network."""
    return replace(setting, folder=str(scratch / f"{setting.network}-{setting.width:g}"))


def engines(found: Comparison, expected: Sequence) -> tuple[list[Row], Row]:
    """A row for each engine, and the machine's rates.

    `share_of_limit` is that of the time which all products would take at the rate of words.
    `equal`: whether the scores are the network's own to the last bit; `same_class`: for which
    share of the images the largest score is the same.
    """
    s, rates = found.setting, rates_row(found.limit)
    references = {"speed_to_eager": found.seconds[EAGER]}
    if COMPILED in found.seconds:
        references["speed_to_compiled"] = found.seconds[COMPILED]
    if "words" in rates:
        flops = s.batch_size * forward_flops(s.network, s.width)
        references["share_of_limit"] = [flops / r["rates"]["words"] for r in found.limit]
    right = torch.tensor(expected)
    rows = []
    for name in found.seconds:
        scores = torch.tensor(found.last[name])
        same = (scores.argmax(1) == right.argmax(1)).float().mean().item()
        agreement = {"equal": torch.equal(scores, right), "same_class": same}
        rows.append(found.row(name, references) | agreement)
    return rows, {**found.where, **rates}


def told(row: Row) -> str:
    """One row of `engines` in a line."""
    name = f"{row['network']} x {row['width']:g}, batch {row['batch_size']}, {row['contender']}:"
    pace, ratio = row["images_per_second"]["median"], row["speed_to_eager"]["median"]
    right = "equal" if row["equal"] else f"{row['same_class']:.0%} same class"
    return f"{name:58} {pace:9,.0f} images/s, {ratio:5.2f} x PyTorch, {right}"


@click.command()
@click.option("--quick", is_flag=True, help="A narrow network and few rounds.")
@click.option("--threads", multiple=True, type=int, help="Of each program; repeatable. [2 1]")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="[benchmarks/results/inference.json; none for --quick]",
)
def main(quick: bool, threads: tuple[int, ...], out: Path | None) -> None:
    """Compare packed networks with other programs that evaluate, on this machine."""
    if out is None and not quick:
        out = INFERENCE
    plan = (quick_plan if quick else full_plan)(threads or (2, 1))
    try:
        results = {"quick": quick, **recorded(lambda: measure(plan))}
        if out:
            save(results, out, draw_inference)
    except BnnlibError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
