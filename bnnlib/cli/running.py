"""What can be run, and running it."""

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, replace
from pathlib import Path
from textwrap import fill
from typing import Any

import click
from click.core import ParameterSource

from bnnlib import names as registries
from bnnlib.cli.options import (
    CHECKPOINT_EVERY,
    DATA,
    DEVICE,
    DOWNLOAD,
    JSON,
    NAME,
    PRECISION,
    PROFILE,
    SET,
    USE,
    check_data,
    folder_option,
)
from bnnlib.cli.texts import as_text, parse_settings
from bnnlib.errors import InvalidValue, check_fills_batch
from bnnlib.experiments.experiment import ALLOWED, DEFAULTS, MEANINGS, Experiment, Range
from bnnlib.experiments.originals import PUBLISHED
from bnnlib.experiments.profiles import at_profile
from bnnlib.experiments.scored import EVALUATION_FIELDS, as_scored
from bnnlib.experiments.variants import VARIANTS, named
from bnnlib.history import History, describe_row
from bnnlib.runs.record import folder_to_score, holds_finished, read_run
from bnnlib.sweeps.grid import both_seeds, parse_seeds

COLUMNS = 100  # of a terminal
VALUE, MEANING = 24, 50  # columns in which the value of a field and its meaning begin
DERIVED = {
    "lr_decay": "factor on the learning rate after each epoch; none: it is no constant",
    "steps": "training steps in all",
}

# ---------------------------------------------------------------------------- what can be run


@click.command("list")
@click.option("--variants", is_flag=True, help="What the original lacks instead.")
@JSON
@USE
def list_experiments(variants: bool, as_json: bool) -> None:
    """The experiments of the original, or our variants."""
    listed = VARIANTS if variants else PUBLISHED
    if as_json:
        click.echo(json.dumps([_all_fields(e) for e in listed.values()], indent=1))
        return
    width = max(map(len, listed)) + 2
    for e in listed.values():
        click.echo(f"{e.name:<{width}}{e.summary}")


@click.command()
@JSON
@USE
def names(as_json: bool) -> None:
    """The names that fields take, yours (--use) included.

    Capitals: the dictionary of bnnlib to which such a file adds names.
    """
    closed = {field: list(a) for field, a in ALLOWED.items() if not isinstance(a, Range)}
    if as_json:
        click.echo(json.dumps(closed, indent=1))
        return
    of = {id(value): name for name, value in vars(registries).items() if name.isupper()}
    for field, listed in closed.items():
        is_open = isinstance(ALLOWED[field], registries.Registry)
        registry = of[id(ALLOWED[field])] if is_open else ""
        click.echo(_hanging(f"{field:<22}{registry:<13}", ", ".join(listed), 35))


@click.command()
@NAME
@PROFILE
@SET
@JSON
@USE
def describe(name: str, profile: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Every setting of an experiment, and its meaning.

    It is the experiment that `run` with the same options makes. A value is written as --set takes
    it; * marks one that is not the default of its field.
    """
    changes = parse_settings(settings)
    e = replace(at_profile(named(name), profile), **changes)
    if e.evaluates:
        e, _ = _with_source(e, profile, changes, default_folder(e, profile))
    values = _all_fields(e)
    if as_json:
        click.echo(json.dumps(values, indent=1))
        return
    for field, value in values.items():
        star = " " if DEFAULTS.get(field, MISSING) in (MISSING, value) else "*"
        head = f"{star} {field}".ljust(VALUE) + f"{as_text(value)} "
        click.echo(_hanging(head, (MEANINGS | DERIVED)[field], MEANING))


def _hanging(head: str, text: str, indent: int) -> str:
    """`head`, and `text` in the columns from `indent` on; below it, where the head is too long."""
    lines = []
    if len(head) > indent:
        whole = {"break_long_words": False, "break_on_hyphens": False}  # what may be a path
        lines = [fill(head, COLUMNS, subsequent_indent=" " * VALUE, **whole)]
        head = ""
    start, rest = head.ljust(indent), " " * indent
    lines.append(fill(text, COLUMNS, initial_indent=start, subsequent_indent=rest))
    return "\n".join(lines)


def _all_fields(experiment: Experiment) -> dict[str, Any]:
    """All fields, and the numbers that follow from them."""
    return asdict(experiment) | {name: getattr(experiment, name) for name in DERIVED}


# ------------------------------------------------------------------------------------ running


@click.command("run")
@NAME
@PROFILE
@folder_option("--out", "Folder of the run.", show_default="runs/NAME/PROFILE-seedN")
@SET
@click.option(
    "--seeds",
    metavar="N,N-N,...",
    show_default="one run, of the seed that is set",
    help="One run for each, in OUT/seedN.",
)
@USE
@DEVICE
@DATA
@DOWNLOAD
@CHECKPOINT_EVERY
@PRECISION
def run_experiment(name, profile, out, settings, seeds, data, **how) -> None:
    """Run one experiment and keep it in a folder.

    An unfinished run there goes on, a finished one is read.

    Ctrl-C once, or SIGTERM: finish the step, save, stop with status 130. Twice: stop now.

    --seeds 0-2, or 0,1,2, runs three, with these as seed and corruption_seed: side by side, each on
    one thread or one GPU.
    """
    changes, base = parse_settings(settings), at_profile(named(name), profile)
    seeds = [] if seeds is None else parse_seeds(seeds)
    each = [both_seeds(seed) for seed in seeds] or [{}]
    if seeds and (twice := changes.keys() & each[0].keys()):
        raise InvalidValue(f"--seeds gives {' and '.join(sorted(twice))}, so --set cannot")
    trials = []  # a mistake is told before any of them runs, or loads PyTorch
    for own in each:
        e = replace(base, **changes | own)
        folder = out or default_folder(e, profile)
        folder = folder / f"seed{e.seed}" if own and out else folder
        trial = _planned(e, profile, changes | own, folder)
        if not trial[-1]:
            check_data(trial[0], data, how["download"])
        trials.append(trial)
    how |= {"root": data}
    if len(trials) > 1 and _can_sweep():
        return _run_side_by_side(trials, out, how)
    for trial in trials:
        _run_one(*trial, how)


def _planned(
    e: Experiment, profile: str, changes: Mapping[str, Any], out: Path
) -> tuple[Experiment, Experiment | None, Path, bool]:
    """The experiment, the one to be trained before it, its folder, and whether that is finished."""
    source = None
    if e.evaluates:
        e, source = _with_source(e, profile, changes, out)
    if (images := e.images("train")) is not None:
        check_fills_batch(images, e.batch_size)
    return e, source, out, holds_finished(out, e)


def _with_source(
    e: Experiment, profile: str, changes: Mapping[str, Any], out: Path
) -> tuple[Experiment, Experiment | None]:
    """An evaluation as it is made, and what is trained for it, in its `run_folder`.

    None, where somebody named the folder of a run. Raises InvalidValue where that run has other
    settings than `changes` ask for.
    """
    changes = {k: v for k, v in changes.items() if k not in EVALUATION_FIELDS}
    if e.run_folder:
        return as_scored(e, read_run(folder_to_score(e, out))[0], changes), None
    source = replace(at_profile(named(e.evaluates), profile), **changes)
    e = replace(e, epochs=0, run_folder=str(default_folder(source, profile)))
    return as_scored(e, source, {}), source


def default_folder(experiment: Experiment, profile: str) -> Path:
    """Where a run is kept if nobody says otherwise."""
    return Path("runs") / experiment.name / f"{profile}-seed{experiment.seed}"


def _can_sweep() -> bool:
    from bnnlib.sweeps.where import is_installed

    found = is_installed()
    if not found:
        told = "without Dask (pip install '.[sweep]') the seeds run one after the other"
        click.echo(told, err=True)
    return found


def _run_side_by_side(trials: list[tuple], out: Path | None, how: dict[str, Any]) -> None:
    """The runs of several seeds as a sweep on this machine."""
    from bnnlib.sweeps.launch import launch
    from bnnlib.sweeps.plan import Plan
    from bnnlib.sweeps.state import begin
    from bnnlib.sweeps.tasks import RunTask, label
    from bnnlib.sweeps.where import Where

    root = (out or trials[0][2].parents[1]).absolute()
    tasks = {}
    for e, source, folder, was_finished in trials:
        wanted = [(e, folder)]
        if source and not was_finished:
            wanted.insert(0, (source, Path(e.run_folder)))
        needs = ""
        for each, place in wanted:
            place = place.absolute()
            name = os.path.relpath(place, root)
            said = label(each.name, {"seed": each.seed})
            tasks[name] = RunTask(each, place, name, said, needs)
            needs = name
    if how.pop("download"):  # once, before the workers read
        from bnnlib.experiments.build import prepare_data

        prepare_data(trials[0][0], how["root"], True)
    planned = Plan(begin(list(tasks.values())))
    where = Where(device=how["device"])
    sweep = launch(planned, root, trials[0][0].name, where, how, lambda t: click.echo(t, err=True))
    if sweep.failed:
        click.get_current_context().exit(1)
    for _, _, folder, _ in trials:
        click.echo(_last_words(read_run(folder)[2], folder))


def _run_one(
    e: Experiment, source: Experiment | None, out: Path, was_finished: bool, how: dict[str, Any]
) -> None:
    from bnnlib.runs.run import run

    if source and not was_finished:
        told = f"{e.name} evaluates {e.run_folder}; any other: --set run_folder=FOLDER"
        click.echo(told, err=True)
        run(source, e.run_folder, **how)
    result = run(e, out, **how)
    given = click.get_current_context().get_parameter_source
    unused = [n for n in (*how, "data") if given(n) not in (None, ParameterSource.DEFAULT)]
    if was_finished and unused:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        click.echo(f"without effect on a finished run: {options}", err=True)
    click.echo(_last_words(result.history, out))


def _last_words(history: History, folder: Path) -> str:
    return f"{describe_row(history.rows[-1]) if len(history) else 'not trained'}\n{folder}"


@click.command("svhn-subset")
@DATA
@DOWNLOAD
def svhn_subset(data, download) -> None:
    """Write the 1,083 real digits of the profile reduced.

    They are taken out of SVHN's training file.
    """
    from bnnlib.data.published import write_svhn_subset

    path, written = write_svhn_subset(data, download)
    click.echo(path if written else f"{path} is there already, and right")
