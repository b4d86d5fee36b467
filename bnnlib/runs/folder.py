"""The folder of a run: opened under a lock, begun, finished, and read again without being trusted.

It holds `experiment.json`, `labels.npz`, `history.csv` and `parameters.safetensors`. What a folder
holds is never overwritten by another run.
"""

import hashlib
import io
import os
import warnings
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bnnlib.data.npz import read_npz
from bnnlib.errors import BnnlibWarning, DamagedFile, DataNotFound, FolderInUse, InvalidValue, shown
from bnnlib.experiments.build import build_model
from bnnlib.experiments.experiment import Experiment
from bnnlib.files import (
    LOCK,
    TEMPORARY,
    atomic_write,
    differing,
    read_json,
    read_tensors,
    read_text,
    tensor_bytes,
    write_json,
)
from bnnlib.models import binarynet
from bnnlib.runs.checkpoint import check_format
from bnnlib.runs.result import Run, parameter_hash
from bnnlib.training import History

# Histories of long runs: in an installed bnnlib within the package, in the repository beside it.
_WITHIN = Path(__file__).parents[1] / "results"
RESULTS = _WITHIN if _WITHIN.is_dir() else Path(__file__).parents[2] / "results"
FORMAT = 1  # of a folder; raised when an older bnnlib could misread a newer one
RECORD, HISTORY, LABELS = "experiment.json", "history.csv", "labels.npz"
PARAMETERS = "parameters.safetensors"
_LEFT_BY_A_FALSE_START = {LOCK, RECORD + TEMPORARY}

# -------------------------------------------------------------------------------- the record

# What a record holds: `str` as a key stands for any name, a list for any number of one kind.
_SURROUNDINGS = {"versions": {str: str}, "device": str, "threads": int, "started": str}
_BEGUN = {
    "experiment": dict,
    "experiment_sha256": str,
    **_SURROUNDINGS,
    "images": {str: int},
    "corruptions": {str: [str]},
    "image_sha256": {str: str},
    "label_sha256": {str: str},
}
_OF_SPLITS = ("images", "corruptions", "image_sha256", "label_sha256")
_LATER = {  # what comes after the beginning, or came with a later bnnlib
    "trained_on": str,
    "continued": [_SURROUNDINGS],
    "parameter_sha256": str,
    "history_sha256": str,
    "seconds": float,
}


def _matches(value: object, kind: Any) -> bool:
    """Whether a value from JSON is of a kind as `_BEGUN` writes them, and of ordinary size."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(_matches(part, kind[0]) for part in value)
    if isinstance(kind, dict):
        if not isinstance(value, dict) or not (str in kind or set(value) == set(kind)):
            return False
        return all(_matches(part, kind.get(name, kind.get(str))) for name, part in value.items())
    if kind is str:
        return isinstance(value, str) and len(value) <= 1000 and value.isprintable()
    if kind is dict:
        return isinstance(value, dict)
    return type(value) in (int, kind) and 0 <= value < 2**63


def _read_record(folder: Path) -> tuple[Experiment, dict[str, Any]]:
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
        raise DamagedFile(f"{path} describes no experiment: {error}") from error
    _check_hash(path, experiment.digest(), record["experiment_sha256"])
    known = (_BEGUN | _LATER).keys() - {"experiment"}
    return experiment, {name: value for name, value in record.items() if name in known}


def _check_hash(path: Path, found: str, recorded: str | None) -> None:
    if recorded not in (None, found):
        raise DamagedFile(
            f"{path} is not as the run left it: its SHA-256 is {found[:12]}..., "
            f"recorded was {recorded[:12]}..."
        )


def is_finished(folder: str | Path) -> bool:
    """Whether the folder holds a run that went to its end."""
    return os.path.isfile(Path(folder) / RECORD) and "seconds" in _read_record(Path(folder))[1]


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
        there, record = _read_record(folder)
        _check_same(folder, there, experiment)
        return "seconds" in record
    if {path.name for path in folder.iterdir()} - _LEFT_BY_A_FALSE_START:
        raise FolderInUse(f"{folder} holds something that is no run; choose another folder")
    return False


def _check_same(folder: Path, there: Experiment, asked: Experiment) -> None:
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


# ------------------------------------------------------------------------ begin, and finish


def begin(folder: Path, e: Experiment, record: dict, labels: dict) -> dict[str, Any]:
    """Write what is known before the first step; returns the record of the folder.

    A run that goes on keeps the record of its beginning, with a line for each time it went
    on. Raises InvalidValue where it was begun with other data, FolderInUse where another process
    has finished it meanwhile.
    """
    if os.path.isfile(folder / RECORD):
        record = record | _gone_on(folder, e, record)
    _write_record(folder, e, record)
    # Again where the run goes on: a damaged copy would spoil the finished run.
    arrays = io.BytesIO()
    np.savez_compressed(arrays, **{split: tensor.numpy() for split, tensor in labels.items()})
    atomic_write(folder / LABELS, arrays.getvalue())
    return record


def _write_record(folder: Path, e: Experiment, record: dict[str, Any]) -> None:
    write_json(folder / RECORD, {"format": FORMAT, "experiment": asdict(e), **record})


def _gone_on(folder: Path, e: Experiment, record: dict[str, Any]) -> dict[str, Any]:
    """What the record of the folder says beside, or instead of, this one."""
    there, begun = _read_record(folder)
    _check_same(folder, there, e)
    if "seconds" in begun:
        raise FolderInUse(f"another process has just finished the run in {folder}; call again")
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
    continued = [*begun.get("continued", []), here]
    return {name: begun[name] for name in _SURROUNDINGS} | {"continued": continued}


def finish(folder: Path, result: Run) -> Run:
    """Write parameters, history and, with the time it took, the mark of a finished run."""
    if result.model is not None:
        atomic_write(folder / PARAMETERS, tensor_bytes(result.model.state_dict()))
    result.history.save(folder / HISTORY)
    record = result.record | {"history_sha256": _table_hash(folder / HISTORY)}
    record["seconds"] = round(sum(result.history["seconds"]), 3)
    _write_record(folder, result.experiment, record)
    with suppress(OSError):  # nobody writes here again; Windows keeps a file that is open
        (folder / LOCK).unlink()
    return replace(result, record=record)


def _table_hash(path: Path) -> str:
    """SHA-256 of a CSV file, whatever ends its lines."""
    return hashlib.sha256("\n".join(read_text(path).splitlines()).encode()).hexdigest()


# ------------------------------------------------------------------------------ reading it


def load_run(folder: str | Path) -> Run:
    """Read a run's folder; its model and labels too, where they were kept.

    The folder may be a stranger's: its files are checked against each other and against the
    hashes of the record, and nothing in them is executed. Raises DataNotFound where the
    folder holds no run, DamagedFile with the file that is not what it should be.
    """
    folder = Path(folder)
    for name in (RECORD, HISTORY):
        if not os.path.isfile(folder / name):
            raise DataNotFound(f"{folder} holds no run that can be read: there is no {name} in it")
    experiment, record = _read_record(folder)
    _check_hash(folder / HISTORY, _table_hash(folder / HISTORY), record.get("history_sha256"))
    history, model, labels = History.load(folder / HISTORY), None, None
    if "parameter_sha256" in record and os.path.isfile(folder / PARAMETERS):
        model = _load_model(folder / PARAMETERS, experiment)
        _check_hash(folder / PARAMETERS, parameter_hash(model), record["parameter_sha256"])
    if os.path.isfile(folder / LABELS):
        labels = _load_labels(folder / LABELS, record)
    return Run(experiment, history, record, model, labels, folder)


def _load_model(path: Path, e: Experiment) -> nn.Module:
    state, _ = read_tensors(path)
    with torch.device("meta"):  # shapes alone, before memory is taken for a network of any size
        outline = binarynet(e.network, generator=torch.Generator(), width=e.width, binary=e.binary)
    if wrong := differing(state, outline.state_dict()):
        raise DamagedFile(f"{path} does not fit the network: it differs in {shown(wrong)}")
    model = build_model(e)
    model.load_state_dict(state)
    return model


def _load_labels(path: Path, record: dict[str, Any]) -> dict[str, torch.Tensor]:
    labels = read_npz(path)
    if set(labels) != set(record["label_sha256"]):
        raise DamagedFile(f"{path} holds {shown(list(labels))}, not the splits of its run")
    for split, array in labels.items():
        spec = (record["images"][split],)
        if array.dtype != np.int64 or array.shape != spec:
            raise DamagedFile(
                f"{path}: {split} must be int64 {spec}, is {array.dtype} {array.shape}"
            )
        found = hashlib.sha256(array.astype("<i8").tobytes()).hexdigest()
        _check_hash(path, found, record["label_sha256"][split])
    return {split: torch.from_numpy(array) for split, array in labels.items()}


def stored_runs(name: str | None = None, root: str | Path = RESULTS) -> list[Run]:
    """The finished runs under `root`, sorted by folder; only those of one experiment if named.

    Raises DataNotFound where there is no such folder.
    """
    if not os.path.isdir(root):
        raise DataNotFound(f"no folder {Path(root).absolute()} to look for stored runs in")
    folders = sorted(path.parent for path in Path(root).rglob(RECORD))
    records = [(folder, *_read_record(folder)) for folder in folders]
    finished = [(folder, e) for folder, e, record in records if "seconds" in record]
    return [load_run(folder) for folder, e in finished if name in (None, e.name)]
