"""Many runs: planned, begun, looked at."""

from pathlib import Path

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
from bnnlib.errors import InvalidValue
from bnnlib.experiments.profiles import PROFILES
from bnnlib.files import as_folder
from bnnlib.runs.record import counted
from bnnlib.sweeps.launch import launch, run_arguments, status_lines
from bnnlib.sweeps.plan import planned_grid
from bnnlib.sweeps.where import Where, check_installed


@click.command()
@click.argument("grid", metavar="GRID.toml|status")
@click.argument("folder", required=False, metavar="[DIR]")
@click.option("--scheduler", metavar="ADDRESS", show_default="none", help="Of a Dask scheduler.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="one for each core or GPU",
    help="Processes on this machine.",
)
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
@click.option("--dry-run", is_flag=True, help="Show what would run and what it costs, no more.")
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
    done = launch(
        planned, out.absolute(), grid, where, how, lambda text: click.echo(text, err=True)
    )
    click.echo(f"{counted(len(done.finished), 'run')} in {out}, {len(done.failed)} failed")
    if done.failed:
        click.get_current_context().exit(1)


def _dry(where: Where) -> None:
    """What SLURM would be given, if it is asked for."""
    if where.slurm:
        check_installed()
        from bnnlib.sweeps.clusters import job_script

        click.echo(f"\nfor each job:\n{job_script(where.slurm)}")


def _status(folder: Path) -> None:
    click.echo("\n".join(status_lines(folder)))
