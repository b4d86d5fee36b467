"""How fast a training step is, what memory it takes, how both grow, and the start: `make bench`.

In: nothing but this machine. Out: `benchmarks/results/training.json` and its chart.
"""

import io
import os
import platform
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np
import psutil
import torch

import bnnlib
from benchmarks.rounds import Row, compare, growth, growth_by_epochs, memory
from benchmarks.settings import LEARNING_RATE, Setting
from benchmarks.startup import startup
from benchmarks.timings import STORED, draw
from benchmarks.workers import CONTENDERS, TEST_IMAGES
from bnnlib.errors import BnnlibError
from bnnlib.experiments.build import resolve_device
from bnnlib.files import atomic_write, make_folder, write_json


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    compared: tuple[Setting, ...]
    rounds: int
    memory: Setting
    growth: dict[str, tuple[Setting, ...]]  # by the field of `Setting` that grows
    growth_rounds: int
    epochs: tuple[int, ...]


def full_plan(base: Setting) -> Plan:
    """Everything, on the original's networks."""
    quarter, small = replace(base, width=1 / 4, steps=8), replace(base, network="svhn", width=1 / 8)
    widths = {1 / 8: 16, 1 / 4: 8, 1 / 2: 4, 1: 2}  # steps of each
    return Plan(
        compared=(
            replace(base, steps=2),
            quarter,
            replace(base, width=1 / 8, steps=16),
            replace(base, network="svhn", steps=4),
        ),
        rounds=11,
        memory=replace(base, steps=5, images=50_000, test_images=10_000),
        growth={
            "batch_size": tuple(replace(quarter, batch_size=n) for n in (25, 50, 100, 200)),
            "width": tuple(replace(base, width=w, steps=n) for w, n in widths.items()),
            "images": tuple(whole_epoch(small, n) for n in (5_000, 10_000, 20_000, 40_000)),
        },
        growth_rounds=5,
        epochs=(1, 2, 4),
    )


def quick_plan(base: Setting) -> Plan:
    """A trial on narrow networks."""
    narrow = replace(base, width=1 / 8, steps=4)
    small = replace(narrow, network="svhn")
    return Plan(
        compared=(narrow,),
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


def machine(threads: int, device: str) -> Row:
    """What is measured on; `load` is how many other programs were at work just before."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": torch.cuda.get_device_name(device) if "cuda" in device else "cpu",
        "system": platform.system(),
        "load": round(psutil.getloadavg()[0], 2),
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure(plan: Plan) -> Row:
    """All the rows of a plan, told as they come, what was skipped, and versions."""
    found: Row = {"speeds": [], "limits": [], "growth": []}
    about: dict[str, Row] = {}
    for setting in plan.compared:
        rows, limit, about = compare(setting, plan.rounds)
        click.echo("\n".join(map(told, rows)))
        found["speeds"] += rows
        found["limits"].append(limit)
    skipped = {name: said["missing"] for name, said in about.items() if "missing" in said}
    for name, reason in skipped.items():
        click.echo(f"{name} was skipped: {reason}")
    click.echo("memory")
    found["memory"] = memory(plan.memory, plan.growth_rounds)
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
    libraries = {k: v for said in about.values() for k, v in said.get("versions", {}).items()}
    return found | {"skipped": skipped | missing, "libraries": libraries}


def told(row: Row) -> str:
    """One row of `speeds` in a line."""
    share, ratio = 100 * row["share_of_limit"]["median"], row["speed_to_twin"]["median"]
    name = f"{row['network']} x {row['width']:g}, {row['contender']}:"
    pace = f"{row['milliseconds']['median']:8.1f} ms a step"
    return f"{name:36} {pace}, {ratio:5.2f} x the float twin, {share:3.0f} % of the limit"


@click.command()
@click.option("--quick", is_flag=True, help="Narrow networks and few rounds.")
@click.option("--threads", default=2, show_default=True, help="Of each contender.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="[benchmarks/results/training.json; none for --quick]",
)
def main(quick: bool, threads: int, device: str, out: Path | None) -> None:
    """Compare bnnlib's training step with other programs', on this machine."""
    if out is None and not quick:
        out = STORED
    plan = quick_plan if quick else full_plan
    try:
        resolve_device(device)
        results = {"quick": quick, **run(for_device(plan(Setting(threads=threads, device=device))))}
        if out:
            save(results, out)
    except BnnlibError as error:
        raise click.ClickException(str(error)) from error


def run(plan: Plan) -> Row:
    """Carry out a plan: everything that the file will hold."""
    shared = plan.compared[0]
    about = machine(shared.threads, shared.device)
    started, start = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    found = measure(plan)
    return {
        "started": started,
        "seconds": round(time.perf_counter() - start),
        "rounds": plan.rounds,
        "batch_size": shared.batch_size,
        "learning_rate": LEARNING_RATE,
        "machine": about,
        "versions": own_versions() | found.pop("libraries"),
        "contenders": {name: kind.summary for name, kind in CONTENDERS.items()},
        **found,
    }


def own_versions() -> dict[str, str]:
    """What every contender runs on."""
    return {
        "bnnlib": bnnlib.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def save(results: Row, out: Path) -> None:
    """Write the results, and their chart beside them."""
    make_folder(out.parent)
    write_json(out, results)
    picture = io.BytesIO()
    draw(results).savefig(picture, format="png")
    atomic_write(out.with_suffix(".png"), picture.getvalue())
    click.echo(out)


if __name__ == "__main__":
    main()
