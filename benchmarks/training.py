"""How fast a training step is, what memory it takes, how both grow, and the start: `make bench`.

In: nothing but this machine. Out: `benchmarks/results/training.json` and its chart.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import click

from benchmarks.records import recorded, save
from benchmarks.rounds import Comparison, Row, compare, growth, growth_by_epochs, limit_row, memory
from benchmarks.settings import LEARNING_RATE, Setting
from benchmarks.startup import startup
from benchmarks.timings import STORED, draw
from benchmarks.workers import CONTENDERS, TEST_IMAGES
from bnnlib.errors import BnnlibError
from bnnlib.experiments.build import resolve_device

TWIN, TUNED = "float twin", "float twin, tuned"
ACTS = {"trained_peak_bytes": "epoch", "peak_bytes": "evaluate"}


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    compared: tuple[Setting, ...]
    rounds: int
    memory: Setting
    growth: dict[str, tuple[Setting, ...]]  # by the field of `Setting` that grows
    growth_rounds: int
    epochs: tuple[int, ...]


def full_plan(base: Setting, threads: tuple[int, ...] = (2, 1)) -> Plan:
    """Everything, on the original's networks; what is less told about, with `threads[0]` only."""
    base = replace(base, threads=threads[0])
    quarter, eighth = replace(base, width=1 / 4, steps=4), replace(base, width=1 / 8, steps=8)
    small = replace(eighth, network="svhn")
    svhn, others = replace(base, network="svhn", steps=2), threads[1:]
    widths = {1 / 8: 16, 1 / 4: 8, 1 / 2: 4, 1: 2}  # steps of each
    return Plan(
        compared=(
            *(base, quarter, eighth, svhn),
            *(replace(s, threads=n) for n in others for s in (base, quarter, eighth)),
        ),
        rounds=5,
        memory=replace(base, steps=3, images=50_000, test_images=10_000),
        growth={
            "batch_size": tuple(replace(quarter, batch_size=n) for n in (25, 50, 100, 200)),
            "width": tuple(replace(base, width=w, steps=n) for w, n in widths.items()),
            "images": tuple(whole_epoch(small, n) for n in (5_000, 10_000, 20_000)),
        },
        growth_rounds=3,
        epochs=(1, 2, 4),
    )


def quick_plan(base: Setting, threads: tuple[int, ...] = (2, 1)) -> Plan:
    """A trial on narrow networks."""
    narrow = replace(base, width=1 / 8, steps=4, threads=threads[0])
    small = replace(narrow, network="svhn")
    return Plan(
        compared=tuple(replace(narrow, threads=n) for n in threads),
        rounds=3,
        memory=replace(narrow, images=5_000, test_images=TEST_IMAGES),
        growth={
            "batch_size": tuple(replace(small, batch_size=n) for n in (25, 100)),
            "width": tuple(replace(small, width=w) for w in (1 / 8, 1 / 4)),
            "images": tuple(whole_epoch(small, n) for n in (500, 2_000)),
        },
        growth_rounds=2,
        epochs=(1, 2),
    )


def for_device(plan: Plan) -> Plan:
    """On a GPU a hundred times the steps: they are shorter, and the first are not a graph yet."""
    if "cuda" not in plan.memory.device:
        return plan

    def longer(settings: tuple[Setting, ...]) -> tuple[Setting, ...]:
        return tuple(replace(s, steps=100 * s.steps) for s in settings)

    growth = {by: s if by == "images" else longer(s) for by, s in plan.growth.items()}
    return replace(plan, compared=longer(plan.compared), growth=growth)


def whole_epoch(setting: Setting, images: int) -> Setting:
    """The same with epochs over so many images."""
    return replace(setting, images=images, steps=images // setting.batch_size)


# ---------------------------------------------------------------------------------- command


def measure(plan: Plan) -> Row:
    """All the rows of a plan, told as they come, what was skipped, and versions."""
    found: Row = {"speeds": [], "limits": [], "growth": []}
    for setting in plan.compared:
        compared = compare(CONTENDERS, setting, plan.rounds)
        rows, limit = speeds(compared)
        click.echo("\n".join(map(told, rows)))
        found["speeds"] += rows
        found["limits"].append(limit)
    skipped = compared.skipped
    for name, reason in skipped.items():
        click.echo(f"{name} was skipped: {reason}")
    click.echo("memory")
    names = [name for name, kind in CONTENDERS.items() if not kind.kernels]
    found["memory"] = memory(names, plan.memory, 2, ACTS, tested=TEST_IMAGES)
    for by, settings in plan.growth.items():
        click.echo(f"growth by {by}")
        found["growth"] += growth(by, settings, plan.growth_rounds)
    click.echo("growth by epochs")
    smallest = plan.growth["images"][0]
    found["growth"] += growth_by_epochs(smallest, plan.epochs, plan.growth_rounds)
    click.echo("starting up")
    found["startup"], missing = startup(plan.growth_rounds)
    for name, reason in missing.items():
        click.echo(f"{name} was skipped: {reason}")
    return {
        "rounds": plan.rounds,
        "batch_size": plan.memory.batch_size,
        "learning_rate": LEARNING_RATE,
        "contenders": {name: kind.summary for name, kind in CONTENDERS.items()},
        **found,
        "skipped": skipped | missing,
        "libraries": compared.libraries,
    }


def speeds(found: Comparison) -> tuple[list[Row], Row]:
    """A row for each contender, and the machine's limit."""
    limit = limit_row(found)
    references = {
        "speed_to_twin": found.seconds[TWIN],
        "speed_to_tuned_twin": found.seconds[TUNED],
        "share_of_limit": limit["seconds"],
    }
    return [found.row(name, references) for name in found.seconds], limit


def told(row: Row) -> str:
    """One row of `speeds` in a line."""
    share, ratio = 100 * row["share_of_limit"]["median"], row["speed_to_twin"]["median"]
    name = f"{row['network']} x {row['width']:g}, threads: {row['threads']}, {row['contender']}:"
    pace = f"{row['milliseconds']['median']:8.1f} ms a step"
    return f"{name:50} {pace}, {ratio:5.2f} x the float twin, {share:3.0f} % of the limit"


@click.command()
@click.option("--quick", is_flag=True, help="Narrow networks and few rounds.")
@click.option("--threads", multiple=True, type=int, help="Of each contender; repeatable. [2 1]")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="[benchmarks/results/training.json; none for --quick]",
)
def main(quick: bool, threads: tuple[int, ...], device: str, out: Path | None) -> None:
    """Compare bnnlib's training step with other programs', on this machine."""
    if out is None and not quick:
        out = STORED
    plan = quick_plan if quick else full_plan
    try:
        resolve_device(device)
        threads = threads or ((2,) if "cuda" in device else (2, 1))
        results = {"quick": quick, **run(for_device(plan(Setting(device=device), threads)))}
        if out:
            save(results, out, draw)
    except BnnlibError as error:
        raise click.ClickException(str(error)) from error


def run(plan: Plan) -> Row:
    """Carry out a plan: everything that the file will hold."""
    return recorded(lambda: measure(plan), plan.memory.device)


if __name__ == "__main__":
    main()
