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
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bnnlib.data.npz import read_npz
from bnnlib.errors import BnnlibWarning, DamagedFile, FolderInUse, InvalidValue, shown
from bnnlib.experiments.build import build_model, network_settings
from bnnlib.experiments.experiment import Experiment
from bnnlib.files import LOCK, atomic_write, read_text, write_json
from bnnlib.history import TIMES
from bnnlib.models import Inputs, build_network
from bnnlib.names import NETWORKS
from bnnlib.runs.record import (
    FORMAT,
    HISTORY,
    LABELS,
    PARAMETERS,
    RECORD,
    SURROUNDINGS,
    check_hash,
    check_holds,
    check_same,
    read_record,
    read_run,
    table_hash,
)
from bnnlib.runs.result import Run, inputs_of_run, parameter_hash
from bnnlib.tensors import differing, read_tensors, tensor_bytes

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
    there, begun = read_record(folder)
    check_same(folder, there, e)
    if "seconds" in begun:
        raise FolderInUse(f"another process has just finished the run in {folder}; call again")
    for name in ("images", "image_sha256", "label_sha256"):
        if begun[name] != record[name]:
            raise InvalidValue(
                f"{folder} was begun with other data: its {name} is {shown(begun[name])}, "
                f"that of the data here {shown(record[name])}"
            )
    here = {name: record[name] for name in SURROUNDINGS}
    uses = _uses(begun.get("uses", {}), record.get("uses", {}))
    changes = [
        f"{name} {shown(begun[name])} then, {shown(here[name])} now"
        for name in SURROUNDINGS
        if name != "started" and begun[name] != here[name]
    ] + [f"{file} has changed" for file in uses if uses[file] != begun.get("uses", {}).get(file)]
    if changes:
        warnings.warn(
            f"{folder} goes on in other surroundings, so it may differ from an uninterrupted run, "
            f"in its last bits at least: {'; '.join(changes)}",
            BnnlibWarning,
            stacklevel=2,
        )
    continued = [*begun.get("continued", []), here]
    again = {name: begun[name] for name in SURROUNDINGS} | {"continued": continued}
    return again | ({"uses": uses} if uses else {})


def _uses(begun: dict[str, list[str]], here: dict[str, list[str]]) -> dict[str, list[str]]:
    """The files of the user's then and now; of one that has changed, both hashes."""
    both = dict(begun)
    for file, hashes in here.items():
        known = both.get(file, [])
        both[file] = known if known[-1:] == hashes else known + hashes
    return both


def finish(folder: Path, result: Run) -> Run:
    """Write parameters, history and, with the time it took, the mark of a finished run."""
    if result.model is not None:
        atomic_write(folder / PARAMETERS, tensor_bytes(result.model.state_dict()))
    result.history.save(folder / HISTORY)
    record = result.record | {"history_sha256": table_hash(read_text(folder / HISTORY))}
    taken = {name: sum(row.get(name, nan) for row in result.history.rows) for name in TIMES}
    record |= {name: round(time, 3) for name, time in taken.items() if not isnan(time)}
    _write_record(folder, result.experiment, record)
    with suppress(OSError):  # nobody writes here again; Windows keeps a file that is open
        (folder / LOCK).unlink()
    return replace(result, record=record)


# ------------------------------------------------------------------------------ reading it


def load_run(folder: str | Path) -> Run:
    """Read a run's folder; its model and labels too, where they were kept.

    The folder may be a stranger's: its files are checked against each other and against the
    hashes of the record, and nothing in them is executed. Raises DataNotFound where the
    folder holds no run, DamagedFile with the file that is not what it should be.
    """
    folder = Path(folder)
    for name in (RECORD, HISTORY):
        check_holds(folder, name)
    (experiment, record, history), model, labels = read_run(folder), None, None
    if "parameter_sha256" in record and os.path.isfile(folder / PARAMETERS):
        model = _load_model(folder / PARAMETERS, experiment, inputs_of_run(experiment, record))
        check_hash(folder / PARAMETERS, parameter_hash(model), record["parameter_sha256"])
    if os.path.isfile(folder / LABELS):
        labels = _load_labels(folder / LABELS, record)
    return Run(experiment, history, record, model, labels, folder)


def _load_model(path: Path, e: Experiment, inputs: Inputs) -> nn.Module:
    state, _ = read_tensors(path)
    if e.network in NETWORKS.shipped:
        with torch.device("meta"):  # shapes alone, before memory is taken for one of any size
            outline = build_network(e.network, inputs, torch.Generator(), **network_settings(e))
        _check_fits(path, state, outline)
    model = build_model(e, inputs=inputs)
    _check_fits(path, state, model)
    model.load_state_dict(state)
    return model


def _check_fits(path: Path, state: dict[str, torch.Tensor], model: nn.Module) -> None:
    if wrong := differing(state, model.state_dict()):
        raise DamagedFile(f"{path} does not fit the network: it differs in {shown(wrong)}")


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
        check_hash(path, found, record["label_sha256"][split])
    return {split: torch.from_numpy(array) for split, array in labels.items()}
