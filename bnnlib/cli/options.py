"""The options and arguments that several commands share."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from bnnlib.data.npz import find_npz
from bnnlib.data.published import data_folder
from bnnlib.errors import DataNotFound, InvalidValue, check_name
from bnnlib.experiments.experiment import FIELDS, Experiment
from bnnlib.experiments.profiles import PROFILES
from bnnlib.experiments.variants import EXPERIMENTS
from bnnlib.files import as_folder
from bnnlib.names import PRECISIONS, check_device, use


def checked(check: Callable[[Any], object]) -> Callable:
    """The callback of an option whose value `check` may refuse, before PyTorch is loaded."""

    def callback(_: click.Context, __: click.Parameter, value: Any) -> Any:
        check(value)
        return value

    return callback


def completed(names: Iterable[str]) -> Callable:
    """The `shell_complete` of a parameter that takes one of these names."""
    return lambda _, __, begun: [name for name in names if name.startswith(begun)]


def _folder(_: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """The folder, or the folders, of an argument or an option."""
    name = "RUN" if isinstance(parameter, click.Argument) else parameter.opts[0]
    if isinstance(value, tuple):
        return tuple(as_folder(name, part) for part in value)
    return None if value is None else as_folder(name, value)


def folder_option(name: str, help: str, **more: Any) -> Callable:
    """An option that takes the path of a folder."""
    return click.option(
        name, callback=_folder, type=click.Path(), metavar="FOLDER", help=help, **more
    )


def run_folder(name: str, **more: Any) -> Callable:
    """An argument that takes the folder of a run."""
    return click.argument(name, callback=_folder, type=click.Path(), **({"metavar": "RUN"} | more))


def _use(context: click.Context, _: click.Parameter, files: tuple[str, ...]) -> None:
    if not context.resilient_parsing:  # nothing is imported to complete a word
        for file in files:
            use(file)


def check_data(e: Experiment, data: Path | None, download: bool) -> None:
    """Raise DataNotFound where the folder of --data, or the file of the images, is missing."""
    if data and not (download or data.is_dir()):
        raise DataNotFound(f"--data: there is no folder {data}")
    if e.dataset.endswith(".npz"):
        find_npz(e.dataset, data_folder(data))


NAME = click.argument("name", shell_complete=completed(EXPERIMENTS))
PROFILE = click.option(
    "--profile",
    default="quick",
    shell_complete=completed(PROFILES),
    help=f"Length of the experiment: {', '.join(PROFILES)}.",
)
SET = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="FIELD=VALUE",
    shell_complete=completed([f"{field}=" for field in FIELDS]),
    help="Change one field; repeatable. `bnnlib describe NAME` shows all of them.",
)
USE = click.option(
    "--use",
    multiple=True,
    is_eager=True,  # what it registers may be meant by all that follows
    expose_value=False,
    callback=_use,
    type=click.Path(),
    metavar="FILE",
    help="A Python file of yours that registers names, imported first; repeatable.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="For programs.")
DEVICE = click.option(
    "--device", default="auto", callback=checked(check_device), help="auto, cpu, cuda or cuda:N."
)
DATA = folder_option(
    "--data", "Folder of the real data sets.", show_default="$BNNLIB_DATA, or data"
)
DOWNLOAD = click.option("--download", is_flag=True, help="Fetch a real set that is not there.")


def _check_seconds(value: float) -> None:
    if not value >= 0:  # NaN is not
        raise InvalidValue(f"--checkpoint-every must be 0 seconds or more, got {value}")


CHECKPOINT_EVERY = click.option(
    "--checkpoint-every",
    default=300.0,
    metavar="SECONDS",
    type=float,
    callback=checked(_check_seconds),
    help="Least time between two saves of the state, in seconds.",
)
PRECISION = click.option(
    "--precision",
    default="auto",
    shell_complete=completed(PRECISIONS),
    callback=checked(lambda value: check_name("precision", value, PRECISIONS)),
    help=f"Of the sums of binary layers: {', '.join(PRECISIONS)}; auto: half on a GPU.",
)
