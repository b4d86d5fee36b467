"""`python -m bnnlib`: list the experiments, describe one, run one."""

import errno
import json
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from bnnlib.capacity import measure_grid, points
from bnnlib.data import write_svhn_subset
from bnnlib.errors import BnnlibError, Interrupted, InvalidValue, check_name, shown
from bnnlib.experiments import (
    EVALUATION_FIELDS,
    PROFILES,
    PUBLISHED,
    VARIANTS,
    Experiment,
    as_scored,
    at_profile,
    is_finished,
    named,
    resolve_device,
    run,
    run_to_score,
)
from bnnlib.folders import check_folder
from bnnlib.limits import type_in_words
from bnnlib.precision import PRECISIONS
from bnnlib.side_by_side import run_side_by_side
from bnnlib.train import describe_row

MOST_SEEDS = 1000  # at once; each is a process
HOW = ("device", "data", "download", "checkpoint_every", "precision")  # options: not what is run
SEED_RANGE = re.compile(r" *([0-9]{1,19})(?:-([0-9]{1,19}))? *")


def parse_field(field: str, text: str) -> Any:
    """The value of `text` for a field of `Experiment`, by the field's type.

    "none" is None where the field allows it; a tuple is written with commas, an empty one as
    nothing. Raises InvalidValue for an unknown field or a text that does not fit.
    """
    hints = get_type_hints(Experiment)
    check_name("field", field, hints)
    hint, text = hints[field], text.strip()
    several = f"{{}}, or several with commas between them, or nothing: `{field}=`"
    try:
        if get_origin(hint) is tuple and (text[:1] in ("[", "(") or text.lower() == "none"):
            raise ValueError("this is how Python writes it")
        return _parse(hint, text)
    except ValueError as error:
        words = type_in_words(hint, several)
        raise InvalidValue(f"{field} takes {words}, got {shown(text)}") from error


def _parse(hint: Any, text: str) -> Any:
    if get_origin(hint) is tuple:
        return tuple(_parse(get_args(hint)[0], part.strip()) for part in text.split(",") if part)
    if NoneType in get_args(hint):
        return None if text.lower() == "none" else _parse(get_args(hint)[0], text)
    if hint is bool:
        return ("false", "true").index(text.lower()) == 1  # ValueError for any other word
    return hint(text)


def changes_in(settings: tuple[str, ...]) -> dict[str, Any]:
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


def with_settings(experiment: Experiment, settings: tuple[str, ...]) -> Experiment:
    """The experiment with each `field=value` applied."""
    return replace(experiment, **changes_in(settings))


def seeds_in(text: str) -> list[int]:
    """The seeds in a text such as "0,1,2" or "0-2,5", in its order, each once.

    Raises InvalidValue for another form, a range that runs backwards, a seed that occurs twice,
    and more than `MOST_SEEDS`.
    """
    seeds: dict[int, None] = {}
    for part in text.split(","):
        match = SEED_RANGE.fullmatch(part)
        if not match:
            raise InvalidValue(
                "--seeds takes whole numbers and ranges with commas between them, such as 0,1,2 "
                f"or 0-2,5; got {shown(text)}"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise InvalidValue(f"--seeds has a range that runs backwards: {part.strip()}")
        if len(seeds) + last - first >= MOST_SEEDS:
            raise InvalidValue(f"--seeds takes at most {MOST_SEEDS:,} seeds, got {shown(text)}")
        for seed in range(first, last + 1):
            if seed in seeds:
                raise InvalidValue(f"--seeds names {seed} twice")
            seeds[seed] = None
    return list(seeds)


def as_dict(experiment: Experiment) -> dict[str, Any]:
    """All fields, and the numbers that follow from them."""
    derived = {"lr_decay": experiment.lr_decay, "steps": experiment.steps}
    return asdict(experiment) | derived


class Group(click.Group):
    """A command group that names the nearest command, and prints our errors in one line."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """As click's, but where the output cannot be written, that is one line and status 1."""
        try:
            try:
                return super().main(*arguments, **options)
            finally:
                if sys.stdout:
                    sys.stdout.flush()
        except OSError as error:
            if not output_is_lost():
                raise
            if error.errno != errno.EPIPE:  # whoever closes a pipe, as `head` does, knows it
                click.echo(f"Error: the output cannot be written: {error.strerror}", err=True)
            sys.exit(1)

    def invoke(self, context: click.Context) -> Any:
        try:
            with warnings.catch_warnings(), sigterm_as_ctrl_c():
                warnings.showwarning = show_warning
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


def output_is_lost() -> bool:
    """Whether the standard output cannot be written; then Python does not try again at its exit."""
    try:
        print(flush=True)  # what failed before may be forgotten by now
        return False
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Inside the `with` block SIGTERM, with which clusters stop a job, raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def show_warning(message: Warning | str, *_: object) -> None:
    """A warning in one line, without the line of code that gave it."""
    click.echo(f"Warning: {message}", err=True)


class Folder(click.Path):
    """A folder; an empty text, which Python takes for the current one, is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("a folder needs a name, got ''", param, ctx)
        return super().convert(value, param, ctx)


FOLDER = Folder(path_type=Path)


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
        click.echo(json.dumps([as_dict(e) for e in listed.values()], indent=1))
        return
    width = max(map(len, listed)) + 2
    for e in listed.values():
        click.echo(f"{e.name:<{width}}{e.summary}")


@main.command()
@click.argument("name")
@click.option("--profile", default="full", show_default=True, help=", ".join(PROFILES))
def describe(name: str, profile: str) -> None:
    """Every setting of one experiment."""
    for field, value in as_dict(at_profile(named(name), profile)).items():
        click.echo(f"{field:<23}{value}")


@main.command("run")
@click.argument("name")
@click.option("--profile", default="quick", show_default=True, help=", ".join(PROFILES))
@click.option("--out", type=FOLDER, help="Folder of the run. [runs/NAME/...]")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Change one field.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--data", type=FOLDER, help="Folder of the real data sets.")
@click.option("--download", is_flag=True, help="Fetch a real data set that is not there.")
@click.option(
    "--checkpoint-every",
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    type=float,
    help="Least time between two saves of the state.",
)
@click.option("--precision", default="auto", show_default=True, help=", ".join(PRECISIONS))
@click.option("--seeds", metavar="N,N-N,...", help="One run for each seed, side by side.")
def run_experiment(
    name, profile, out, settings, device, data, download, checkpoint_every, precision, seeds
) -> None:
    """Run one experiment and keep it in a folder; an unfinished run there goes on.

    Ctrl-C once, or SIGTERM: finish the step, save, stop with status 130. Twice: stop now.

    --seeds 0-2, or 0,1,2, runs three at once, with these as seed and corruption_seed, each in a
    folder of its own (seedN inside the folder --out).
    """
    if seeds is not None:
        sys.exit(_run_seeds(click.get_current_context().params))
    experiment = with_settings(at_profile(named(name), profile), settings)
    out = (out or default_folder(experiment, profile)).expanduser()
    how = {
        "device": device,
        "root": data,
        "download": download,
        "checkpoint_every": checkpoint_every,
        "precision": precision,
    }
    was_finished = is_finished(out)
    if experiment.evaluates:
        experiment = _with_run(experiment, profile, changes_in(settings), how, out)
    result = run(experiment, out, **how)
    if was_finished and (unused := _given(HOW)):
        click.echo(f"without effect on a finished run: {', '.join(unused)}", err=True)
    last = describe_row(result.history.rows[-1]) if len(result.history) else "not trained"
    click.echo(f"{last}\n{out}")


def _run_seeds(asked: dict[str, Any]) -> int:
    """Run `bnnlib run` once for each seed, at the same time; returns the largest exit status."""
    original = at_profile(named(asked["name"]), asked["profile"])
    commands = {}
    for seed in seeds_in(asked["seeds"]):
        settings = (*asked["settings"], f"seed={seed}", f"corruption_seed={seed}")
        with_settings(original, settings)  # a mistake is told before the first one starts
        out = asked["out"] and asked["out"] / f"seed{seed}"
        commands[f"seed {seed}"] = _arguments(asked | {"settings": settings, "out": out})
    return max(run_side_by_side(commands).values())


def _arguments(asked: dict[str, Any]) -> list[str]:
    """The command line of `bnnlib run` for one run, with the options that were given."""
    arguments = ["run", asked["name"]]
    for option, name in _given(("profile", "out", *HOW)).items():
        arguments += [option] if asked[name] is True else [option, str(asked[name])]
    return arguments + [part for text in asked["settings"] for part in ("--set", text)]


def _given(options: Iterable[str]) -> dict[str, str]:
    """Those of the options that the user has written, as they are written."""
    source = click.get_current_context().get_parameter_source
    written = [name for name in options if source(name) is not ParameterSource.DEFAULT]
    return {f"--{name.replace('_', '-')}": name for name in written}


@main.command()
@click.option("--out", type=FOLDER, default=Path("runs/capacity"))
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ...")
def capacity(out, device) -> None:
    """Count the bits that small networks memorize; a grid that was stopped goes on."""
    resolve_device(device)  # a mistake is told before the folder is made
    rows = measure_grid(points(), out, device)
    click.echo(f"{len(rows)} runs\n{out / 'grid.csv'}")


@main.command("svhn-subset")
@click.option("--data", type=FOLDER, help="Folder of train_32x32.mat.")
@click.option("--download", is_flag=True, help="Fetch that file if it is not there.")
def svhn_subset(data, download) -> None:
    """Write the 1,083 real digits of the profile reduced, from SVHN's training file."""
    path, written = write_svhn_subset(data, download)
    click.echo(path if written else f"{path} is there already, and right")


def default_folder(experiment: Experiment, profile: str) -> Path:
    """Where a run is kept if nobody says otherwise."""
    return Path("runs") / experiment.name / f"{profile}-seed{experiment.seed}"


def _with_run(
    e: Experiment, profile: str, changes: dict[str, Any], how: dict[str, Any], out: Path
) -> Experiment:
    """An evaluation with the folder of its run; if none is named, that is trained with `changes`.

    Raises InvalidValue where a run that is named is of other settings.
    """
    changes = {k: v for k, v in changes.items() if k not in EVALUATION_FIELDS}
    if e.run_folder:
        as_scored(e, run_to_score(e, out).experiment, changes)
        return e
    source = replace(at_profile(named(e.evaluates), profile), **changes)
    folder = default_folder(source, profile)
    e = replace(e, epochs=0, run_folder=str(folder))
    check_folder(out, as_scored(e, source, {}))  # before anything is trained for it
    if not is_finished(out):
        click.echo(f"{e.name} evaluates {folder}; any other: --set run_folder=FOLDER", err=True)
        run(source, folder, **how)
    return e


if __name__ == "__main__":
    main(prog_name="python -m bnnlib")
