"""`python -m bnnlib`: list the experiments, describe one, run one."""

import errno
import json
import os
import re
import shlex
import signal
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import click
from click.core import ParameterSource

from bnnlib.data import write_svhn_subset
from bnnlib.errors import BnnlibError, Interrupted, InvalidValue, check_name, shown
from bnnlib.experiments.build import resolve_device
from bnnlib.experiments.experiment import FIELDS, Experiment, type_name
from bnnlib.experiments.originals import PUBLISHED
from bnnlib.experiments.profiles import PROFILES, at_profile
from bnnlib.experiments.variants import VARIANTS, named
from bnnlib.files import as_folder
from bnnlib.kernels.precision import PRECISIONS
from bnnlib.runs.evaluation import EVALUATION_FIELDS, as_scored, run_to_score
from bnnlib.runs.folder import holds_finished, is_finished
from bnnlib.runs.interrupts import signals_to
from bnnlib.runs.run import run
from bnnlib.studies.capacity import TABLE, make_grid, measure_grid
from bnnlib.training import describe_row

MOST_SEEDS = 1000
SEED_RANGE = re.compile(r" *([0-9]{1,19})(?:-([0-9]{1,19}))? *")

# --------------------------------------------------------------------------- texts to values


def parse_field(field: str, text: str) -> Any:
    """The value of `text` for a field of `Experiment`, by the field's type.

    "none" is None where the field allows it; a tuple is written with commas, an empty one as
    nothing. Raises InvalidValue for an unknown field or a text that does not fit.
    """
    check_name("field", field, FIELDS)
    hint, text = FIELDS[field], text.strip()
    try:
        if get_origin(hint) is tuple and (text[:1] in ("[", "(") or text.lower() == "none"):
            raise ValueError("this is how Python writes it")
        return _parse(hint, text)
    except ValueError as error:
        several = f"{{}}, or several with commas between them, or nothing: `{field}=`"
        words = type_name(hint, several)
        raise InvalidValue(f"{field} takes {words}, got {shown(text)}") from error


def _parse(hint: Any, text: str) -> Any:
    if get_origin(hint) is tuple:
        return tuple(_parse(get_args(hint)[0], part.strip()) for part in text.split(",") if part)
    if NoneType in get_args(hint):
        return None if text.lower() == "none" else _parse(get_args(hint)[0], text)
    if hint is bool:
        return ("false", "true").index(text.lower()) == 1  # ValueError for any other word
    return hint(text)


def parse_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    """The value of each field in texts `field=value`; raises InvalidValue for a field set twice."""
    changes = {}
    for setting in settings:
        field, equals, text = setting.partition("=")
        field = field.strip()
        if not equals:
            raise InvalidValue(f"--set takes field=value, got {shown(setting)}")
        if field in changes:
            raise InvalidValue(f"--set gives {field} twice, the second time as {shown(text)}")
        changes[field] = parse_field(field, text)
    return changes


def parse_seeds(text: str) -> list[int]:
    """The seeds in a text such as "0,1,2" or "0-2,5", in its order, each once.

    Raises InvalidValue for another form, a range that runs backwards, a seed that occurs twice,
    and more than `MOST_SEEDS`.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = SEED_RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or len(seeds) + last - first >= MOST_SEEDS:
            raise InvalidValue(
                f"--seeds takes at most {MOST_SEEDS:,} whole numbers and rising ranges with commas "
                f"between them, such as 0,1,2 or 0-2,5; got {shown(text)}"
            )
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise InvalidValue(f"--seeds names a seed twice: {shown(text)}")
    return seeds


# ------------------------------------------------------------------- errors, signals, streams


class Group(click.Group):
    """A command group that prints our errors in one line, and stops as a shell expects.

    SIGTERM, with which clusters stop a job, is as good as Ctrl-C.
    """

    def main(self, *arguments: Any, **options: Any) -> Any:
        """As click's, but where the output cannot be written, that is one line and status 1."""
        try:
            try:
                return super().main(*arguments, **options)
            finally:
                if sys.stdout:
                    sys.stdout.flush()
        except OSError as error:
            if not _output_is_lost():
                raise
            if error.errno != errno.EPIPE:  # whoever closes a pipe, as `head` does, knows it
                click.echo(f"Error: the output cannot be written: {error.strerror}", err=True)
            sys.exit(1)

    def invoke(self, context: click.Context) -> Any:
        try:
            with warnings.catch_warnings(), signals_to(signal.default_int_handler):
                warnings.showwarning = _show_warning
                return super().invoke(context)
        except InvalidValue as error:
            raise click.UsageError(str(error)) from None
        except BnnlibError as error:
            raise click.ClickException(str(error)) from None
        except Interrupted as interrupt:
            same = shlex.join(["python", "-m", "bnnlib", *sys.argv[1:]])
            click.echo(f"{interrupt}\nto go on: {same}", err=True)
            sys.exit(130)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)


def _output_is_lost() -> bool:
    """Whether the standard output cannot be written; then Python does not try again at its exit."""
    try:
        print(flush=True)  # what failed before may be forgotten by now
        return False
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


def _show_warning(message: Warning | str, *_: object) -> None:
    """A warning in one line, without the line of code that gave it."""
    click.echo(f"Warning: {message}", err=True)


# ------------------------------------------------------------------------------- the commands


def _folder(_: click.Context, option: click.Parameter, value: str | None) -> Path | None:
    return None if value is None else as_folder(option.opts[0], value)


DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ...")
DATA = click.option("--data", callback=_folder, help="Folder of the real data sets.")
DOWNLOAD = click.option("--download", is_flag=True, help="Fetch a real set that is not there.")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Memorization in binarized neural networks: the experiments."""


@main.command("list")
@click.option("--variants", is_flag=True, help="What the original lacks instead.")
@click.option("--json", "as_json", is_flag=True, help="Every field, for programs.")
def list_experiments(variants: bool, as_json: bool) -> None:
    """The experiments of the original, or our variants and controls, one a line."""
    listed = VARIANTS if variants else PUBLISHED
    if as_json:
        click.echo(json.dumps([_all_fields(e) for e in listed.values()], indent=1))
        return
    width = max(map(len, listed)) + 2
    for e in listed.values():
        click.echo(f"{e.name:<{width}}{e.summary}")


@main.command()
@click.argument("name")
@click.option("--profile", default="full", show_default=True, help=", ".join(PROFILES))
def describe(name: str, profile: str) -> None:
    """Every setting of one experiment."""
    for field, value in _all_fields(at_profile(named(name), profile)).items():
        click.echo(f"{field:<23}{value}")


def _all_fields(experiment: Experiment) -> dict[str, Any]:
    """All fields, and the numbers that follow from them."""
    derived = {"lr_decay": experiment.lr_decay, "steps": experiment.steps}
    return asdict(experiment) | derived


@main.command("run")
@click.argument("name")
@click.option("--profile", default="quick", show_default=True, help=", ".join(PROFILES))
@click.option("--out", callback=_folder, help="Folder of the run. [runs/NAME/...]")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Change one field.")
@click.option("--seeds", metavar="N,N-N,...", help="One run for each, in OUT/seedN.")
@DEVICE
@DATA
@DOWNLOAD
@click.option(
    "--checkpoint-every",
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    type=float,
    help="Least time between two saves of the state.",
)
@click.option("--precision", default="auto", show_default=True, help=", ".join(PRECISIONS))
def run_experiment(name, profile, out, settings, seeds, data, **how) -> None:
    """Run one experiment and keep it in a folder; an unfinished run there goes on.

    Ctrl-C once, or SIGTERM: finish the step, save, stop with status 130. Twice: stop now.

    --seeds 0-2, or 0,1,2, runs three, one after the other, with these as seed and corruption_seed.
    """
    changes, base = parse_settings(settings), at_profile(named(name), profile)
    seeds = [] if seeds is None else parse_seeds(seeds)
    each = [{"seed": seed, "corruption_seed": seed} for seed in seeds] or [{}]
    if seeds and (twice := changes.keys() & each[0].keys()):
        raise InvalidValue(f"--seeds gives {' and '.join(sorted(twice))}, so --set cannot")
    trials = [replace(base, **changes | own) for own in each]  # a mistake is told before any runs
    for e, own in zip(trials, each, strict=True):
        folder = out or default_folder(e, profile)
        folder = folder / f"seed{e.seed}" if own and out else folder
        _run_one(e, profile, changes | own, folder, how | {"root": data})


def _run_one(e: Experiment, profile: str, changes: dict, out: Path, how: dict[str, Any]) -> None:
    was_finished = is_finished(out)
    if e.evaluates:
        e = _with_source(e, profile, changes, how, out)
    result = run(e, out, **how)
    source = click.get_current_context().get_parameter_source
    unused = [n for n in (*how, "data") if source(n) not in (None, ParameterSource.DEFAULT)]
    if was_finished and unused:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        click.echo(f"without effect on a finished run: {options}", err=True)
    last = describe_row(result.history.rows[-1]) if len(result.history) else "not trained"
    click.echo(f"{last}\n{out}")


def _with_source(e: Experiment, profile: str, changes: dict, how: dict, out: Path) -> Experiment:
    """An evaluation with the folder of its run; if none is named, that run is trained first."""
    changes = {k: v for k, v in changes.items() if k not in EVALUATION_FIELDS}
    if e.run_folder:
        as_scored(e, run_to_score(e, out).experiment, changes)
        return e
    source = replace(at_profile(named(e.evaluates), profile), **changes)
    folder = default_folder(source, profile)
    e = replace(e, epochs=0, run_folder=str(folder))
    if not holds_finished(out, as_scored(e, source, {})):
        click.echo(f"{e.name} evaluates {folder}; any other: --set run_folder=FOLDER", err=True)
        run(source, folder, **how)
    return e


def default_folder(experiment: Experiment, profile: str) -> Path:
    """Where a run is kept if nobody says otherwise."""
    return Path("runs") / experiment.name / f"{profile}-seed{experiment.seed}"


@main.command()
@click.option("--out", callback=_folder, default="runs/capacity", show_default=True)
@DEVICE
def capacity(out, device) -> None:
    """Count the bits that small networks memorize; a grid that was stopped goes on."""
    resolve_device(device)  # a mistake is told before the folder is made
    rows = measure_grid(make_grid(), out, device)
    click.echo(f"{len(rows)} runs\n{out / TABLE}")


@main.command("svhn-subset")
@DATA
@DOWNLOAD
def svhn_subset(data, download) -> None:
    """Write the 1,083 real digits of the profile reduced, from SVHN's training file."""
    path, written = write_svhn_subset(data, download)
    click.echo(path if written else f"{path} is there already, and right")
