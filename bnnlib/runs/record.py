"""What a folder says of its run, read without being trusted, its profile, and whose folder it is.

It needs no PyTorch: to look at a run is quick.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnnlib.errors import DamagedFile, DataNotFound, FolderInUse, InvalidValue, shown
from bnnlib.experiments.experiment import FIELDS, Experiment
from bnnlib.experiments.profiles import PROFILES, at_profile
from bnnlib.experiments.variants import EXPERIMENTS
from bnnlib.files import LOCK, TEMPORARY, read_json, read_text
from bnnlib.history import History
from bnnlib.names import DRAWN

# Histories of long runs: in an installed bnnlib within the package, in the repository beside it.
_WITHIN = Path(__file__).parents[1] / "stored"
RESULTS = _WITHIN if _WITHIN.is_dir() else Path(__file__).parents[2] / "results"
FORMAT = 1  # of a folder; raised when an older bnnlib could misread a newer one
RECORD, HISTORY, LABELS = "experiment.json", "history.csv", "labels.npz"
PARAMETERS = "parameters.safetensors"
_LEFT_BY_A_FALSE_START = {LOCK, RECORD + TEMPORARY}

# What a record holds: `str` as a key stands for any name, a list for any number of one kind, a
# range for a whole number in it.
SURROUNDINGS = {"versions": {str: str}, "device": str, "threads": int, "started": str}
_BEGUN = {
    "experiment": dict,
    "experiment_sha256": str,
    **SURROUNDINGS,
    "images": {str: int},
    "corruptions": {str: [str]},
    "image_sha256": {str: str},
    "label_sha256": {str: str},
}
_OF_SPLITS = ("images", "corruptions", "image_sha256", "label_sha256")
_LATER = {  # what comes after the beginning, or came with a later bnnlib
    "trained_on": str,
    "continued": [SURROUNDINGS],
    "parameter_sha256": str,
    "history_sha256": str,
    "seconds": float,
    "cpu_seconds": float,
    "inputs": {
        "in_channels": range(1, 4),
        "image_size": range(1, 10**5),
        "classes": range(1, 10**6),
    },
    "uses": {str: [str]},  # SHA-256 of each file of the user's, in the order in which it changed
}


def _matches(value: object, kind: Any) -> bool:
    """Whether a value from JSON is of a kind as `_BEGUN` writes them, and of ordinary size."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(_matches(part, kind[0]) for part in value)
    if isinstance(kind, dict):
        if not isinstance(value, dict) or not (str in kind or set(value) == set(kind)):
            return False
        parts = {name: kind.get(name, kind.get(str)) for name in value}
        return all(_matches(name, str) and _matches(value[name], parts[name]) for name in value)
    if kind is str:
        return isinstance(value, str) and len(value) <= 1000 and value.isprintable()
    if kind is dict:
        return isinstance(value, dict)
    if isinstance(kind, range):
        return type(value) is int and value in kind
    return type(value) in (int, kind) and 0 <= value < 2**63


def read_record(folder: Path) -> tuple[Experiment, dict[str, Any]]:
    """What `experiment.json` says, validated, without what this version does not know."""
    path = folder / RECORD
    record = read_json(path)
    check_format(path, record.get("format", 1), FORMAT)  # an old one has none
    for name, kind in (_BEGUN | _LATER).items():
        if not _matches(record.get(name), kind) and (name in _BEGUN or name in record):
            raise DamagedFile(f"{path} describes no run: its {name!r} is {shown(record.get(name))}")
    splits = set(record["images"])
    if "train" not in splits or any(set(record[name]) != splits for name in _OF_SPLITS):
        raise DamagedFile(
            f"{path} describes no run: {', '.join(_OF_SPLITS)} differ in their splits"
        )
    try:
        experiment = Experiment(**record["experiment"])
    except (InvalidValue, TypeError) as error:  # the second: a field is missing
        if uses := record.get("uses"):  # a file that a folder names is never imported from here
            raise InvalidValue(
                f"{path}: {error}; the run was made with {', '.join(uses)}: name that file "
                "(--use FILE, or bnnlib.use(FILE)) to read it"
            ) from error
        raise DamagedFile(f"{path} describes no experiment: {error}") from error
    check_hash(path, experiment.digest(), record["experiment_sha256"])
    known = (_BEGUN | _LATER).keys() - {"experiment"}
    return experiment, {name: value for name, value in record.items() if name in known}


def check_hash(path: Path, found: str, recorded: str | None) -> None:
    if recorded not in (None, found):
        raise DamagedFile(
            f"{path} is not as the run left it: its SHA-256 is {found[:12]}..., "
            f"recorded was {recorded[:12]}..."
        )


def check_format(path: Path, found: object, known: int) -> None:
    """Raise DamagedFile for a file of a format that this version does not know."""
    if type(found) is not int or not 1 <= found <= known:
        raise DamagedFile(
            f"{path} has format {shown(found)}; this bnnlib reads formats 1 to {known}"
        )


def read_run(folder: Path) -> tuple[Experiment, dict[str, Any], History]:
    """Experiment, record and history of a run, finished or not, as `load_run` reads them.

    Raises DataNotFound where the folder holds no run, DamagedFile for a file that was altered.
    """
    experiment, record, text = read_texts(folder)
    return experiment, record, History.parse(text, folder / HISTORY)


def read_texts(folder: Path) -> tuple[Experiment, dict[str, Any], str]:
    """Experiment and record of a run, and the text of its history, which has the recorded hash.

    It is empty while the first epoch is under way. Raises what `read_run` raises.
    """
    path = folder / HISTORY
    check_holds(folder, RECORD)
    experiment, record = read_record(folder)
    if "seconds" not in record and not os.path.isfile(path):
        return experiment, record, ""
    check_holds(folder, HISTORY)
    text = read_text(path)
    check_hash(path, table_hash(text), record.get("history_sha256"))
    return experiment, record, text


def check_holds(folder: Path, name: str) -> None:
    """Raise DataNotFound where a file of a run is missing."""
    if not os.path.isfile(folder / name):
        raise DataNotFound(f"{folder} holds no run that can be read: there is no {name} in it")


def table_hash(text: str) -> str:
    """SHA-256 of the text of a CSV file, whatever ends its lines."""
    return hashlib.sha256("\n".join(text.splitlines()).encode()).hexdigest()


def is_finished(folder: str | Path) -> bool:
    """Whether the folder holds a run that went to its end."""
    return os.path.isfile(Path(folder) / RECORD) and "seconds" in read_record(Path(folder))[1]


# ------------------------------------------------------------------------ its profile

LEFT_OPEN = {"name", "summary", "script", "seed", "corruption_seed", "data_seed", "run_folder"}


def profile_of(experiment: Experiment) -> str:
    """The profile whose form of the named experiment this is, whatever its seeds; or "own".

    An experiment of a name that is in neither list is "own", too.
    """
    return forms(experiment.name).get(form(vars(experiment)), "own")


def forms(name: str) -> dict[tuple[Any, ...], str]:
    """The profile of each form of the experiment of a name; none of an unknown one."""
    e = EXPERIMENTS.get(name)  # the first of two profiles that are one counts
    return {form(vars(at_profile(e, p))): p for p in reversed(PROFILES)} if e else {}


def form(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a profile decides of an experiment, from its fields or their cells in a table."""
    return tuple(as_cell(fields[name]) for name in FIELDS if name not in LEFT_OPEN)


def as_cell(value: Any) -> Any:
    """A field's value in a table: a tuple is text, as `--set` takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


# ------------------------------------------------------------------------- for a reader


def trained_on(e: Experiment, images: int) -> str:
    """Data and network in one line, for a reader who would believe the experiment's name."""
    meant = EXPERIMENTS[e.name].dataset if e.name in EXPERIMENTS else e.dataset
    notes = ["drawn"] * (e.dataset in DRAWN) + [f"in place of {meant}"] * (meant != e.dataset)
    note = f" ({', '.join(notes)})" if notes else ""
    said = [f"{counted(images, 'image')} of {Path(e.dataset).name}{note}"]
    if e.gaussian_variance and "train" in e.gaussian_splits:
        said.append("replaced by Gaussian noise")
    if e.pixels != "kept":
        said.append(f"pixels {e.pixels}")
    share = e.random_labels if "train" in e.random_label_splits else 0
    some = f"{100 * share:g} % of the labels random"
    said.append({0: "their own labels", 1: "random labels"}.get(share, some))
    twin = "" if e.binary else ", full precision"
    return f"{', '.join(said)}; network {e.network}, width {e.width:g}{twin}"


def counted(n: int, thing: str) -> str:
    """`counted(1, "image")` is '1 image', `counted(2000, "image")` is '2,000 images'."""
    return f"{n:,} {thing}{'s' * (n != 1)}"


def as_duration(seconds: float) -> str:
    """A time in the two largest of its units, such as '7 min 58 s'."""
    if not 0 <= seconds < 2**63:  # NaN is not
        return "an unknown time"
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"
    whole, low, high, size = round(seconds), "s", "min", 60
    if whole >= 3600:
        whole, low, high = round(seconds / 60), "min", "h"
    return f"{whole // size:,} {high} {whole % size} {low}"


# ------------------------------------------------------------------------ whose folder it is


def holds_finished(folder: Path, experiment: Experiment) -> bool:
    """Whether the folder holds `experiment`, finished; if it does not, it can.

    Raises FolderInUse for a folder of something else, InvalidValue with the differing fields
    for one of another experiment, DamagedFile for one that was altered.
    """
    if not os.path.lexists(folder):
        return False
    if not os.path.isdir(folder):
        raise FolderInUse(f"{folder} is not a folder; choose another")
    if os.path.isfile(folder / RECORD):
        if links := [path.name for path in folder.iterdir() if path.is_symlink()]:
            raise DamagedFile(f"{folder} holds links, which bnnlib never makes; remove {links}")
        there, record = read_record(folder)
        check_same(folder, there, experiment)
        return "seconds" in record
    if {path.name for path in folder.iterdir()} - _LEFT_BY_A_FALSE_START:
        raise FolderInUse(f"{folder} holds something that is no run; choose another folder")
    return False


def check_same(folder: Path, there: Experiment, asked: Experiment) -> None:
    """Raise InvalidValue with the differing fields where the two decide another run."""
    found, wanted = there.spec(), asked.spec()
    differing = [
        f"{field} ({shown(found[field])} there, {shown(wanted[field])} asked for)"
        for field in found
        if found[field] != wanted[field]
    ]
    if differing:
        raise InvalidValue(
            f"{folder} holds another experiment: {', '.join(differing)}; choose another folder "
            "(--out FOLDER, or out=)"
        )


def folder_to_score(e: Experiment, folder: Path | None) -> Path:
    """The folder of the run that an evaluation is about; or `folder`, where it was finished there.

    Then it has the same settings, and is read again even where the run has been moved away. The
    path in `run_folder` is as seen from `folder`, or else from here.
    """
    if folder and is_finished(folder) and read_record(folder)[0].evaluates:
        return folder
    if not e.run_folder:
        raise InvalidValue(
            f"{e.name} evaluates a finished run, of {e.evaluates} or any other; "
            "name its folder in the field run_folder"
        )
    beside = Path(os.path.normpath(folder / e.run_folder)) if folder else Path(e.run_folder)
    return beside if os.path.isfile(beside / RECORD) else Path(e.run_folder)
