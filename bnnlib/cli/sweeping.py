"""Many runs: planned, begun, looked at, and stored ones made again."""

from dataclasses import replace
from pathlib import Path
from secrets import randbits
from typing import TYPE_CHECKING

import click

from bnnlib.cli.options import (
    CHECKPOINT_EVERY,
    DATA,
    DEVICE,
    PRECISION,
    USE,
    completed,
    folder_option,
)
from bnnlib.errors import DataNotFound, InvalidValue
from bnnlib.experiments.profiles import PROFILES
from bnnlib.files import as_folder
from bnnlib.runs.record import RESULTS, counted, read_record
from bnnlib.sweeps.launch import launch, run_arguments, status_lines
from bnnlib.sweeps.plan import plan, planned_grid
from bnnlib.sweeps.state import Sweep
from bnnlib.sweeps.tasks import RunTask, label, run_name
from bnnlib.sweeps.where import Where, check_installed

if TYPE_CHECKING:
    import pandas as pd

WORKERS = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="one for each core or GPU",
    help="Processes on this machine.",
)
DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Show what would run and what it costs, no more."
)


@click.command()
@click.argument("grid", metavar="GRID.toml|status")
@click.argument("folder", required=False, metavar="[DIR]")
@click.option("--scheduler", metavar="ADDRESS", show_default="none", help="Of a Dask scheduler.")
@WORKERS
@click.option(
    "--slurm",
    metavar="FILE",
    show_default="none",
    help="A TOML file with the arguments of dask_jobqueue.SLURMCluster, and `jobs`, at most.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Of each worker. Results depend on it in their last bits.",
)
@click.option(
    "--profile",
    show_default="the grid's",
    shell_complete=completed(PROFILES),
    help=f"Length of all experiments: {', '.join(PROFILES)}.",
)
@folder_option("--out", "Folder of the runs, each in NAME/DIGEST.", default="runs")
@DRY_RUN
@USE
@DEVICE
@DATA
@CHECKPOINT_EVERY
@PRECISION
def sweep(grid, folder, out, dry_run, profile, **options) -> None:
    """Make every run of a grid, side by side.

    Finished runs are left alone, unfinished ones go on. A run that fails is reported with the file
    of its traceback; the others go on, and the exit status is 1.

    `bnnlib sweep status DIR` tells how far the sweeps in a folder are.
    """
    if grid == "status":
        return _status(as_folder("DIR", folder or str(out)))
    if folder is not None:
        raise InvalidValue(f"sweep takes one grid, got {grid!r} and {folder!r}")
    where = Where(**{k: options[k] for k in ("scheduler", "slurm", "workers", "threads", "device")})
    planned = planned_grid(grid, out.absolute(), profile, where, options["data"])
    click.echo("\n".join(planned.table(where)))
    if dry_run:
        return _dry(where)
    check_installed()
    how = {k: options[k] for k in ("device", "precision", "checkpoint_every")}
    how = run_arguments(root=options["data"], **how)
    done = launch(planned, out.absolute(), grid, where, how, _tell)
    click.echo(f"{counted(len(done.finished), 'run')} in {out}, {len(done.failed)} failed")
    if done.failed:
        click.get_current_context().exit(1)


def _tell(text: str) -> None:
    click.echo(text, err=True)


def _dry(where: Where) -> None:
    """What SLURM would be given, if it is asked for."""
    if where.slurm:
        check_installed()
        from bnnlib.sweeps.clusters import job_script

        click.echo(f"\nfor each job:\n{job_script(where.slurm)}")


def _status(folder: Path) -> None:
    click.echo("\n".join(status_lines(folder)))


# ------------------------------------------------------------------------- stored runs, again


@click.command()
@click.argument("name", required=False, metavar="[NAME]")
@click.option(
    "--lot",
    type=click.IntRange(0, 2**32 - 1),
    metavar="N",
    show_default="another each time",
    help="Seed of the lot.",
)
@folder_option("--stored", "Folder of the stored runs.", show_default="those of the book")
@folder_option("--out", "Folder of the runs that are made again.", default="runs/again")
@WORKERS
@DRY_RUN
@USE
@DEVICE
@DATA
def reproduce(name, lot, stored, out, workers, dry_run, device, data) -> None:
    """Make stored runs again, and compare.

    One run of each experiment, drawn by lot; or of the experiment NAME alone; or the run NAME, as
    `bnnlib results --csv` writes its path. On the same kind of processor, with the same versions
    and number of threads, it must be equal, bit for bit; elsewhere its errors must lie where those
    of another seed would. Where one is not reproduced, the exit status is 1.
    """
    from bnnlib.runs.ledger import results
    from bnnlib.studies.reproduction import draw

    lot = randbits(32) if lot is None else lot
    table = results(stored or RESULTS)
    drawn = draw(table, lot, name)
    click.echo(f"lot {lot}: {counted(len(drawn), 'run')} of {table.attrs['folder']}")
    how, failed = run_arguments(device, data, "auto", 300.0), 0
    for threads, rows in drawn.groupby("threads"):
        where = Where(workers=workers, threads=int(threads), device=device)
        tasks = _tasks_again(rows, table, out.absolute())
        planned = plan(list(tasks.values()), 0, where.threads, device, data)
        click.echo("\n".join(planned.table(where)))
        if not dry_run:
            check_installed()
            done = launch(planned, out.absolute(), "again", where, how, _tell)
            failed += sum(not _tell_again(run, tasks[run], done, table) for run in rows.index)
    if failed:
        click.get_current_context().exit(1)


def _tasks_again(rows: "pd.DataFrame", table: "pd.DataFrame", out: Path) -> dict[str, RunTask]:
    """A task for each stored run, by its path; before an evaluation that of what it scores."""
    tasks: dict[str, RunTask] = {}
    for run in rows.index:
        task = _task_again(run, table, out)
        if task.experiment.evaluates:
            scored = Path(task.experiment.run_folder).name
            found = table.index[[digest.startswith(scored) for digest in table["digest"]]]
            if not len(found):
                raise DataNotFound(f"{run} scores a run that is not stored: {scored}")
            tasks[found[0]] = _task_again(found[0], table, out)
            task = replace(task, needs=tasks[found[0]].name)
        tasks[run] = task
    return tasks


def _task_again(run: str, table: "pd.DataFrame", out: Path) -> RunTask:
    e, _ = read_record(Path(table.attrs["folder"], run))
    name = run_name(e)
    return RunTask(e, out / name, name, label(e.name, {"seed": e.seed}))


def _tell_again(run: str, task: RunTask, sweep: Sweep, table: "pd.DataFrame") -> bool:
    """Say in a line how a stored run and the new one compare; whether it is reproduced."""
    from bnnlib.studies.reproduction import Reproduction, compare

    found = Reproduction(False, "not finished")
    if task.name in sweep.finished:
        same = table[["experiment", "profile"]] == table.loc[run, ["experiment", "profile"]]
        found = compare(Path(table.attrs["folder"], run), task.folder, table[same.all(axis=1)])
    click.echo(f"{run}: {found.text}")
    return found.reproduced
