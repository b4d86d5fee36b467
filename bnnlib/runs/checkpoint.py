"""The state of a training, kept in a folder so that a resumed run is the same run, bit for bit.

A checkpoint is one safetensors file, whose name carries a part of its SHA-256.
"""

import hashlib
import json
import re
import time
import warnings
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnnlib.errors import BnnlibWarning, DamagedFile, InvalidValue, shown
from bnnlib.files import (
    atomic_write,
    check_columns,
    differing,
    make_folder,
    parse_json,
    read_tensors,
    sha256,
    tensor_bytes,
    writing,
)
from bnnlib.layers import random_generator
from bnnlib.training import History, TrainingState

FORMAT = 1  # of a checkpoint; raised when an older bnnlib could misread a newer one
KEPT = 2  # checkpoints in a folder
NAME = re.compile(r"checkpoint-(\d{9})-([0-9a-f]{16})\.safetensors")


class Checkpoints:
    """The last two states of a training, in the subfolder `checkpoints` of its run.

    `digest` is the experiment's; `every` is the least number of seconds between two saves by
    `save_if_due`.
    """

    def __init__(self, folder: Path, state: TrainingState, digest: str, every: float):
        self.folder, self.state, self.digest = folder / "checkpoints", state, digest
        self.every, self.saved, self.saved_at = every, time.monotonic(), None
        if self.folder.exists() and not self.folder.is_dir():  # told before hours of training
            raise DamagedFile(f"{self.folder} is not a folder; remove it")

    def paths(self) -> list[Path]:
        """The files, oldest first."""
        return sorted(p for p in self.folder.glob("checkpoint-*") if NAME.fullmatch(p.name))

    def save(self) -> None:
        """Write the state, unless it is the last one saved, then forget all but the last two.

        Raises NotFinite instead of keeping a NaN, CannotWrite where the disk is full.
        """
        updates = int(self.state.optimizer.updates)
        here = (updates, len(self.state.history))
        if here == self.saved_at:
            return
        self.state.check_finite()
        about = json.dumps(_describe(self.state, self.digest), allow_nan=False)
        content = tensor_bytes(_tensors(self.state), {"bnnlib": about})
        digest = hashlib.sha256(content).hexdigest()
        make_folder(self.folder)
        atomic_write(self.folder / f"checkpoint-{updates:09d}-{digest[:16]}.safetensors", content)
        with writing(self.folder):
            for old in self.paths()[:-KEPT]:
                old.unlink()
        self.saved, self.saved_at = time.monotonic(), here

    def save_if_due(self) -> None:
        """Save where the last save is long enough ago."""
        if time.monotonic() - self.saved >= self.every:
            self.save()

    def restore(self) -> Path | None:
        """Bring the training to the newest whole state; returns its file, None if there is none.

        A damaged file is put aside, under the ending `.damaged`, with a warning. Raises
        DamagedFile for the state of another training, InvalidValue on another kind of device.
        """
        paths = self.paths()
        while paths:
            path = paths.pop()
            if sha256(path).startswith(NAME.fullmatch(path.name)[2]):
                restore(self.state, path, self.digest)
                return path
            with writing(path):
                path.replace(path.with_suffix(".damaged"))
            then = "the state before it is used" if paths else "the run begins anew"
            warnings.warn(
                f"{path} is damaged (its SHA-256 is not the one in its name) and was put aside; "
                + then,
                BnnlibWarning,
                stacklevel=2,
            )
        return None

    def remove(self) -> None:
        """Delete all states of a training that is over; what bnnlib did not make stays."""
        with writing(self.folder):
            for path in self.folder.glob("checkpoint*"):
                path.unlink()
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()


# ------------------------------------------------------------------------- a state as a file


def _tensors(state: TrainingState) -> dict[str, Tensor]:
    """The tensors of a state, by name."""
    begun, sampling = state.epoch_start, random_generator(state.model)
    tensors = {"generator.order": state.generator.get_state() if begun is None else begun}
    if sampling is not None:
        tensors["generator.layers"] = sampling.get_state()
    if state.history:
        rows = [
            [row.get(name, nan) for name in state.history.columns] for row in state.history.rows
        ]
        tensors["history"] = torch.tensor(rows, dtype=torch.float64)
    if state.done:
        tensors["epoch.losses"] = state.losses[: state.done]
        tensors["epoch.wrong"] = state.wrong[: state.done]
    tensors |= {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    for name, p in state.model.named_parameters():
        moments = state.optimizer.moments(p)
        tensors |= {f"optimizer.{name}.{kind}": moment for kind, moment in moments.items()}
    return tensors | {f"signs.{name}": sign for name, sign in state.signs.items()}


def _describe(state: TrainingState, digest: str) -> dict[str, Any]:
    """The rest of a state, as JSON has it."""
    updates = int(state.optimizer.updates)
    return {
        "format": FORMAT,
        "experiment_sha256": digest,
        "device": next(state.model.parameters()).device.type,
        "epochs": len(state.history),
        "steps": state.done,  # of the epoch under way
        "seconds": time.perf_counter() - state.started,
        "updates": [updates] * len(state.optimizer.param_groups),
        "columns": state.history.columns,
    }


def restore(state: TrainingState, path: Path, digest: str) -> None:
    """Take over the state in a file. Raises DamagedFile for that of another training."""
    tensors, texts = read_tensors(path)
    about = parse_json(texts.get("bnnlib", "{}"), path)
    check_format(path, about.get("format"), FORMAT)
    if about.get("experiment_sha256") != digest:
        raise DamagedFile(f"{path} is the state of another experiment; remove it")
    device = next(state.model.parameters()).device.type
    if about.get("device") != device and random_generator(state.model) is not None:
        raise InvalidValue(
            f"{path} was saved on {shown(about.get('device'))}; its random numbers go on only "
            f"there, not on {device!r}"
        )
    try:
        _take_over(state, tensors, about)
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DamagedFile(f"{path} holds no state of this training: {shown(str(error))}") from error


@torch.no_grad()
def _take_over(state: TrainingState, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    _check_specs(state, tensors, about)
    optimizer, sampling = state.optimizer, random_generator(state.model)
    updates, seconds = about["updates"], about["seconds"]
    if updates != updates[:1] * len(optimizer.param_groups) or not 0 <= seconds < 1e10:
        raise ValueError(f"its groups of parameters took {updates} steps in {seconds} seconds")
    state.model.load_state_dict(part("model."))
    for name, p in state.model.named_parameters():
        for kind, moment in optimizer.moments(p).items():
            moment.copy_(tensors[f"optimizer.{name}.{kind}"])  # keeps its memory format
    optimizer.updates.fill_(updates[0])
    if sampling is not None:
        sampling.set_state(tensors["generator.layers"])
    state.generator.set_state(tensors["generator.order"])
    state.epoch_start = tensors["generator.order"]
    state.history = _history(tensors.get("history"), about["columns"])
    state.done, state.started = about["steps"], time.perf_counter() - seconds
    state.losses = tensors.get("epoch.losses", state.losses)
    state.wrong = tensors.get("epoch.wrong", state.wrong)
    state.signs = {k: v.to(optimizer.updates.device) for k, v in part("signs.").items()}


def _check_specs(state: TrainingState, found: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Raise ValueError unless these are the tensors of such a training, in shape and type."""
    expected, epochs, steps = _tensors(state), about["epochs"], about["steps"]
    if type(epochs) is not int or type(steps) is not int:
        raise TypeError(f"it counts {epochs} epochs and {steps} steps")
    if epochs:
        size = (epochs, len(about["columns"]))
        expected["history"] = torch.empty(size, dtype=torch.float64, device="meta")
    if steps:
        expected["epoch.losses"] = torch.empty(steps, device="meta")
        expected["epoch.wrong"] = torch.empty(steps, dtype=torch.int64, device="meta")
    if wrong := differing(found, expected):
        raise ValueError(f"it differs in {shown(wrong)}")


def _history(table: Tensor | None, columns: list[str]) -> History:
    """The history in a table (epochs, columns), whose epochs must be 1, 2, ..."""
    check_columns(columns)
    rows = [] if table is None else table.tolist()
    history = History([dict(zip(columns, values, strict=True)) for values in rows])
    for number, row in enumerate(history.rows, start=1):
        if row["epoch"] != number or not 0 <= row["seconds"] < 1e10:
            raise ValueError(f"row {number} of its history is not that of epoch {number}")
        row["epoch"] = number
    return history


def check_format(path: Path, found: object, known: int) -> None:
    """Raise DamagedFile for a file of a format that this version does not know."""
    if type(found) is not int or not 1 <= found <= known:
        raise DamagedFile(
            f"{path} has format {shown(found)}; this bnnlib reads formats 1 to {known}"
        )
