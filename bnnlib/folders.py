"""The folder of a run: begun, locked, closed, and read again without being trusted.

In: a run. Out: `experiment.json`, `labels.npz`, `history.csv` and `parameters.safetensors`; and a
`Run` from them. What a folder holds is never overwritten by another run.
Next file: `experiments.py`.
"""

import hashlib
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bnnlib.assembly import build_model, model_forms
from bnnlib.catalogue import EVERY_SPLIT, Experiment
from bnnlib.checkpoints import check_format, is_count, is_time
from bnnlib.errors import (
    BnnlibWarning,
    CannotWrite,
    DamagedFile,
    DataNotFound,
    FolderInUse,
    InvalidValue,
    shown,
)
from bnnlib.files import LOCK, read_json, read_text, whole_or_absent, write_json
from bnnlib.history import History
from bnnlib.npz import read_npz
from bnnlib.runs import Run, parameter_hash
from bnnlib.tensors import read_tensors

# Histories of long runs: in an installed bnnlib within the package, in the repository beside it.
_WITHIN = Path(__file__).parent / "results"
RESULTS = _WITHIN if _WITHIN.is_dir() else Path(__file__).parents[1] / "results"
FORMAT = 1  # of a folder; raised when an older bnnlib could misread a newer one
RECORD, HISTORY, LABELS = "experiment.json", "history.csv", "labels.npz"
PARAMETERS = "parameters.safetensors"
_LEFT_BY_A_FALSE_START = {LOCK, RECORD + ".part"}


def is_finished(folder: str | Path) -> bool:
    """Whether the folder holds a run that went to its end."""
    return os.path.isfile(Path(folder) / RECORD) and "seconds" in _read_record(Path(folder))


def _read_record(folder: Path) -> dict[str, Any]:
    """What `experiment.json` says, its form checked, without what this version does not know.

    An old one has no format.
    """
    path = folder / RECORD
    record = read_json(path)
    check_format(path, record.get("format", 1), FORMAT)
    for name, fits in _RECORD_FORMS.items():
        if not (fits(record.get(name)) or (name in _LATER and name not in record)):
            raise DamagedFile(f"{path} describes no run: its {name!r} is {shown(record.get(name))}")
    return {name: record[name] for name in _RECORD_FORMS if name in record}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 1000 and value.isprintable()


def _maps_names_to(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _maps_splits_to(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: (
        _maps_names_to(fits)(value) and "train" in value and set(value) <= set(EVERY_SPLIT)
    )


def _lists(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _is_surroundings(value: object) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == set(_SURROUNDINGS)
        and all(_RECORD_FORMS[name](value[name]) for name in value)
    )


_SURROUNDINGS = ("versions", "device", "threads", "started")
_RECORD_FORMS: dict[str, Callable[[Any], bool]] = {
    "experiment": lambda value: isinstance(value, dict),
    "experiment_sha256": _is_text,
    "versions": _maps_names_to(_is_text),
    "device": _is_text,
    "threads": is_count,
    "started": _is_text,
    "trained_on": _is_text,
    "images": _maps_splits_to(lambda value: is_count(value) and value > 0),
    "corruptions": _maps_splits_to(_lists(_is_text)),
    "image_sha256": _maps_splits_to(_is_text),
    "label_sha256": _maps_splits_to(_is_text),
    "continued": _lists(_is_surroundings),
    "parameter_sha256": _is_text,
    "history_sha256": _is_text,
    "seconds": is_time,
}
# What comes only later than the beginning, or came only with a later bnnlib.
_LATER = ("continued", "parameter_sha256", "history_sha256", "seconds", "trained_on")


def check_folder(folder: Path, experiment: Experiment) -> None:
    """Raise unless this folder may hold a run of `experiment`: it is new, empty, or has one.

    Raises FolderInUse for a folder of something else, InvalidValue with the differing fields
    for one of another experiment, DamagedFile for one that was altered, CannotWrite for one
    that cannot be made.
    """
    if not os.path.lexists(folder):
        _check_can_be_made(folder)
        return
    if not os.path.isdir(folder):
        raise FolderInUse(f"{folder} is not a folder; choose another")
    try:
        there = sorted(folder.iterdir())
    except OSError as error:
        raise FolderInUse(f"{folder} cannot be looked into: {error.strerror}") from error
    if os.path.isfile(folder / RECORD):
        links = ", ".join(shown(path.name) for path in there if path.is_symlink())
        if links:
            raise DamagedFile(f"{folder} holds links, which bnnlib never makes; remove {links}")
        check_same(folder, _experiment_of(folder, _read_record(folder)), experiment)
    elif any(path.name not in _LEFT_BY_A_FALSE_START for path in there):
        raise FolderInUse(f"{folder} holds something that is no run; choose another folder")


def _check_can_be_made(folder: Path) -> None:
    """Raise CannotWrite where the nearest folder above does not let a new one be made."""
    above = next(path for path in folder.absolute().parents if os.path.lexists(path))
    if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
        raise CannotWrite(f"{folder} cannot be made: {above} is no folder that you may write to")


def check_same(folder: Path, there: Experiment, asked: Experiment) -> None:
    """Raise InvalidValue with the differing fields where the two decide another run."""
    found, wanted = there.decisive(), asked.decisive()
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


def begin_folder(folder: Path, experiment: Experiment, record: dict, labels: dict) -> None:
    """Write what is known before the first step; in a folder that has it, compare it instead.

    A run that goes on keeps the record of its beginning, with a line for each time it went
    on. `record` becomes that of the folder.
    """
    if os.path.isfile(folder / RECORD):
        _go_on(folder, record)
    content = {"format": FORMAT, "experiment": asdict(experiment), **record}
    write_json(folder / RECORD, content)
    # Again where the run goes on: a damaged copy would spoil the finished run.
    with whole_or_absent(folder / LABELS) as part, part.open("wb") as file:
        np.savez_compressed(file, **{k: v.numpy() for k, v in labels.items()})


def _go_on(folder: Path, record: dict[str, Any]) -> None:
    begun = _read_record(folder)
    for name in ("images", "image_sha256", "label_sha256"):
        if begun[name] != record[name]:
            raise InvalidValue(
                f"{folder} was begun with other data: its {name} is {shown(begun[name])}, "
                f"that of the data here {shown(record[name])}"
            )
    here = {name: record[name] for name in _SURROUNDINGS}
    changes = [
        f"{name} {shown(begun[name])} then, {shown(here[name])} now"
        for name in _SURROUNDINGS
        if name != "started" and begun[name] != here[name]
    ]
    if changes:
        warnings.warn(
            f"{folder} goes on in other surroundings, so it may differ from an uninterrupted run, "
            f"in its last bits at least: {'; '.join(changes)}",
            BnnlibWarning,
            stacklevel=2,
        )
    record |= {name: begun[name] for name in here}
    record["continued"] = [*begun.get("continued", []), here]


def close_folder(result: Run) -> None:
    """Write the history and, with the time it took, the mark of a finished run."""
    result.history.save(result.folder / HISTORY)
    result.record["history_sha256"] = _table_hash(result.folder / HISTORY)
    result.record["seconds"] = round(sum(result.history["seconds"]), 3)
    content = {"format": FORMAT, "experiment": asdict(result.experiment), **result.record}
    write_json(result.folder / RECORD, content)
    with suppress(OSError):  # Windows keeps a file that is open
        (result.folder / LOCK).unlink()  # nobody will write here again


def _table_hash(path: Path) -> str:
    """SHA-256 of a CSV file, whatever ends its lines."""
    return hashlib.sha256("\n".join(read_text(path).splitlines()).encode()).hexdigest()


def load_run(folder: str | Path) -> Run:
    """Read a run's folder; its model and labels too, where they were kept.

    The folder may be a stranger's: its files are checked against each other and against the
    hashes of the record, and nothing in them is executed. Raises DataNotFound where the
    folder holds no run, DamagedFile with the file that is not what it should be.
    """
    folder = Path(folder)
    if not os.path.isfile(folder / RECORD):
        raise DataNotFound(f"{folder} holds no run: there is no {RECORD} in it")
    record = _read_record(folder)
    if not os.path.isfile(folder / HISTORY):
        raise DataNotFound(f"{folder} holds no run that can be read: there is no {HISTORY} in it")
    experiment = _experiment_of(folder, record)
    del record["experiment"]
    _check_hash(folder / HISTORY, _table_hash(folder / HISTORY), record.get("history_sha256"))
    result = Run(experiment, History.load(folder / HISTORY), record, folder=folder)
    if "parameter_sha256" in record and os.path.isfile(folder / PARAMETERS):
        result.model = _load_model(folder / PARAMETERS, experiment)
        found = parameter_hash(result.model)
        _check_hash(folder / PARAMETERS, found, record["parameter_sha256"])
    if os.path.isfile(folder / LABELS):
        result.labels = _load_labels(folder / LABELS, record)
    return result


def _experiment_of(folder: Path, record: dict[str, Any]) -> Experiment:
    """The experiment of a record, whose hash must be the recorded one."""
    try:
        experiment = Experiment(**record["experiment"])
    except InvalidValue as error:
        raise DamagedFile(f"{folder / RECORD} describes no experiment: {error}") from error
    _check_hash(folder / RECORD, experiment.digest(), record.get("experiment_sha256"))
    return experiment


def _check_hash(path: Path, found: str, recorded: str | None) -> None:
    if recorded not in (None, found):
        raise DamagedFile(
            f"{path} is not as the run left it: its SHA-256 is {found[:12]}..., "
            f"recorded was {recorded[:12]}..."
        )


def _load_model(path: Path, experiment: Experiment) -> nn.Module:
    state = read_tensors(path, model_forms(experiment))
    model = build_model(experiment)
    model.load_state_dict(state)
    return model


def _load_labels(path: Path, record: dict[str, Any]) -> dict[str, torch.Tensor]:
    arrays, labels = read_npz(path), {}
    if set(arrays) != set(record["label_sha256"]):
        raise DamagedFile(f"{path} holds {shown(list(arrays))}, not the splits of its run")
    for split, array in arrays.items():
        form = (record["images"].get(split),)
        if array.dtype != np.int64 or array.shape != form:
            raise DamagedFile(
                f"{path}: {split} must be int64 {form}, is {array.dtype} {array.shape}"
            )
        labels[split] = torch.from_numpy(array)
        found = hashlib.sha256(array.astype("<i8").tobytes()).hexdigest()
        _check_hash(path, found, record["label_sha256"][split])
    return labels


def stored_runs(name: str | None = None, root: str | Path = RESULTS) -> list[Run]:
    """The finished runs under `root`, sorted by folder; only those of one experiment if named.

    Raises DataNotFound where there is no such folder.
    """
    if not os.path.isdir(root):
        raise DataNotFound(f"no folder {Path(root).absolute()} to look for stored runs in")
    folders = sorted(path.parent for path in Path(root).rglob("experiment.json"))
    runs = [load_run(folder) for folder in folders if is_finished(folder)]
    return [r for r in runs if name in (None, r.experiment.name)]
