"""`python -m bnnlib`: list the experiments, describe one, run one."""

import json
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import click

from bnnlib.capacity import measure_grid, points
from bnnlib.errors import BnnlibError, Interrupted, InvalidValue, check_name, shown
from bnnlib.experiments import (
    PROFILES,
    PUBLISHED,
    VARIANTS,
    Experiment,
    at_profile,
    named,
    run,
)
from bnnlib.limits import type_in_words
from bnnlib.precision import PRECISIONS
from bnnlib.side_by_side import run_side_by_side
from bnnlib.train import describe_row


def parse_field(field: str, text: str) -> Any:
    """The value of `text` for a field of `Experiment`, by the field's type.

    "none" is None where the field allows it; a tuple is written with commas, an empty one as
    nothing. Raises InvalidValue for an unknown field or a text that does not fit.
    """
    hints = get_type_hints(Experiment)
    check_name("field", field, hints)
    try:
        return _parse(hints[field], text.strip())
    except ValueError as error:
        words = type_in_words(hints[field], several="{}, or several with commas between them")
        raise InvalidValue(f"{field} takes {words}, got {shown(text)}") from error


def _parse(hint: Any, text: str) -> Any:
    if get_origin(hint) is tuple:
        return tuple(_parse(get_args(hint)[0], part.strip()) for part in text.split(",") if part)
    if NoneType in get_args(hint):
        return None if text.lower() == "none" else _parse(get_args(hint)[0], text)
    if hint is bool:
        return ("false", "true").index(text.lower()) == 1  # ValueError for any other word
    return hint(text)


def with_settings(experiment: Experiment, settings: tuple[str, ...]) -> Experiment:
    """The experiment with each `field=value` applied; raises InvalidValue for a field set twice."""
    changes = {}
    for setting in settings:
        field, equals, text = setting.partition("=")
        field = field.strip()
        if not equals:
            raise InvalidValue(f"--set takes field=value, got {shown(setting)}")
        if field in changes:
            raise InvalidValue(f"--set gives {field} twice, the second time as {shown(text)}")
        changes[field] = parse_field(field, text)
    return replace(experiment, **changes)


def as_dict(experiment: Experiment) -> dict[str, Any]:
    """All fields, and the numbers that follow from them."""
    derived = {"lr_decay": experiment.lr_decay, "steps": experiment.steps}
    return asdict(experiment) | derived


class Group(click.Group):
    """A command group that names the nearest command, and prints our errors in one line."""

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
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. [runs/NAME/...]")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Change one field.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the real data sets.")
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
@click.option("--seeds", metavar="N,N,...", help="One run for each seed, side by side.")
def run_experiment(
    name, profile, out, settings, device, data, download, checkpoint_every, precision, seeds
) -> None:
    """Run one experiment and keep it in a folder; an unfinished run there goes on.

    Ctrl-C once, or SIGTERM: finish the step, save, stop with status 130. Twice: stop now.

    --seeds 0,1,2 runs three at once, with these as seed and corruption_seed, each in a folder
    of its own (seedN inside the folder --out).
    """
    if seeds is not None:
        sys.exit(_run_seeds(click.get_current_context().params))
    experiment = with_settings(at_profile(named(name), profile), settings)
    out = out or default_folder(experiment, profile)
    how = {
        "device": device,
        "root": data,
        "download": download,
        "checkpoint_every": checkpoint_every,
        "precision": precision,
    }
    if experiment.evaluates and not experiment.run_folder:
        experiment = _with_run_to_evaluate(experiment, profile, how)
    result = run(experiment, out, **how)
    last = describe_row(result.history.rows[-1]) if len(result.history) else "not trained"
    click.echo(f"{last}\n{out}")


def _run_seeds(asked: dict[str, Any]) -> int:
    """Run `bnnlib run` once for each seed, at the same time; returns the largest exit status."""
    original = at_profile(named(asked["name"]), asked["profile"])
    commands = {}
    for text in asked["seeds"].split(","):
        seed = parse_field("seed", text)
        if f"seed {seed}" in commands:
            raise InvalidValue(f"--seeds names {seed} twice")
        settings = (*asked["settings"], f"seed={seed}", f"corruption_seed={seed}")
        with_settings(original, settings)  # a mistake is told before the first one starts
        out = asked["out"] and asked["out"] / f"seed{seed}"
        commands[f"seed {seed}"] = _arguments(asked | {"settings": settings, "out": out})
    return max(run_side_by_side(commands).values())


def _arguments(asked: dict[str, Any]) -> list[str]:
    """The command line of `bnnlib run` for one run."""
    arguments = ["run", asked["name"], *(["--download"] if asked["download"] else [])]
    for option in ("profile", "out", "device", "data", "checkpoint_every", "precision"):
        if asked[option] is not None:
            arguments += [f"--{option.replace('_', '-')}", str(asked[option])]
    return arguments + [part for text in asked["settings"] for part in ("--set", text)]


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/capacity"))
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ...")
def capacity(out, device) -> None:
    """Count the bits that small networks memorize; a grid that was stopped goes on."""
    rows = measure_grid(points(), out, device)
    click.echo(f"{len(rows)} runs\n{out / 'grid.csv'}")


def default_folder(experiment: Experiment, profile: str) -> Path:
    """Where a run is kept if nobody says otherwise."""
    return Path("runs") / experiment.name / f"{profile}-seed{experiment.seed}"


def _with_run_to_evaluate(e: Experiment, profile: str, how: dict[str, Any]) -> Experiment:
    """`e` with the folder of the run it evaluates, which is trained first if it is not there."""
    seeds = {"seed": e.seed, "corruption_seed": e.corruption_seed, "data_seed": e.data_seed}
    source = replace(at_profile(named(e.evaluates), profile), dataset=e.dataset, **seeds)
    folder = default_folder(source, profile)
    click.echo(f"{e.name} evaluates {folder}", err=True)
    run(source, folder, **how)
    return replace(e, run_folder=str(folder))


if __name__ == "__main__":
    main(prog_name="python -m bnnlib")
