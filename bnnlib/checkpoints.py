"""The state of a training, kept in a folder so that a restored run is the same run, bit for bit.

In: a model, its optimizer, generators and position. Out: the same, from a file. A checkpoint is
one safetensors file, whose name carries a part of its SHA-256. Next file: `runs.py`.
"""

import json
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnnlib.errors import BnnlibWarning, CannotWrite, DamagedFile, InvalidValue, shown
from bnnlib.files import flush, make_folder, parse_json, sha256
from bnnlib.history import History, is_column
from bnnlib.layers import random_generator
from bnnlib.optim import BinaryAdam
from bnnlib.probes import Recorder
from bnnlib.tensors import Form, forms, read_metadata, read_tensors, write_tensors
from bnnlib.train import Position, check_finite

FORMAT = 1  # of a checkpoint; raised when an older bnnlib could misread a newer one
KEPT = 2  # checkpoints in a folder
MOMENTS = ("exp_avg", "exp_avg_sq")  # as `BinaryAdam` names them
NAME = re.compile(r"checkpoint-(\d{9,})-([0-9a-f]{16})\.safetensors")


@dataclass
class Training:
    """Everything that changes while a network is trained."""

    digest: str  # of the experiment, which does not change
    model: nn.Module
    optimizer: BinaryAdam
    order: torch.Generator  # of the batches, on the CPU
    recorder: Recorder
    position: Position = field(default_factory=Position)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    @property
    def steps(self) -> int:
        """Updates of the parameters so far."""
        return int(self.optimizer.updates)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the state, by name."""
        position, sampling = self.position, random_generator(self.model)
        begun = position.order is not None
        state = {"generator.order": position.order if begun else self.order.get_state()}
        if sampling is not None:
            state["generator.layers"] = sampling.get_state()
        if position.history:
            state["history"] = _table(position.history)
        if position.done:
            state["epoch.losses"] = position.losses[: position.done]
            state["epoch.wrong"] = position.wrong[: position.done]
        state |= {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, p in self.model.named_parameters():
            state |= {f"optimizer.{name}.{k}": self.optimizer.moments(p)[k] for k in MOMENTS}
        return state | {f"signs.{name}": sign for name, sign in self.recorder.signs.items()}

    def about(self) -> dict[str, Any]:
        """The rest of the state, as JSON has it."""
        return {
            "format": FORMAT,
            "experiment_sha256": self.digest,
            "device": self.device.type,
            "epochs": len(self.position.history),
            "steps": self.position.done,  # of the epoch under way
            "seconds": time.perf_counter() - self.position.started,
            "updates": [self.steps] * len(self.optimizer.param_groups),
            "columns": self.position.history.columns,
        }

    def save(self, path: Path) -> str:
        """Write the whole state to one file; returns its SHA-256.

        Raises NotFinite instead of keeping a NaN, CannotWrite where the disk is full.
        """
        check_finite(self.model, self.optimizer, self.position)
        about = json.dumps(self.about(), allow_nan=False)
        return write_tensors(path, self.tensors(), {"bnnlib": about})

    def restore(self, path: Path) -> None:
        """Take over the state in a file. Raises DamagedFile for that of another training."""
        about = _read_about(path)
        if about["experiment_sha256"] != self.digest:
            raise DamagedFile(f"{path} is the state of another experiment; remove it")
        if about["device"] != self.device.type and random_generator(self.model) is not None:
            raise InvalidValue(
                f"{path} was saved on {about['device']!r}; its random numbers go on only there, "
                f"not on {self.device.type!r}"
            )
        state = read_tensors(path, self._forms(about))
        try:
            self._take_over(state, about)
        except (RuntimeError, ValueError) as error:
            raise DamagedFile(f"{path} holds no state of this training: {error}") from error

    def _forms(self, about: dict[str, Any]) -> dict[str, Form]:
        """What a file must hold for this training, where it was when the file was written."""
        form, epochs, steps = forms(self.tensors()), about["epochs"], about["steps"]
        if epochs:
            form |= {"history": ((epochs, len(about["columns"])), torch.float64)}
        if steps:
            form |= {"epoch.losses": ((steps,), torch.float32)}
            form |= {"epoch.wrong": ((steps,), torch.int64)}
        return form

    @torch.no_grad()
    def _take_over(self, state: dict[str, Tensor], about: dict[str, Any]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        for name, p in self.model.named_parameters():
            for kind, tensor in self.optimizer.moments(p).items():
                tensor.copy_(state[f"optimizer.{name}.{kind}"])  # keeps its memory format
        updates = about["updates"]
        if updates != updates[:1] * len(self.optimizer.param_groups):
            raise ValueError(f"its groups of parameters took {shown(updates)} steps")
        self.optimizer.updates.fill_(updates[0])
        if "generator.layers" in state:
            random_generator(self.model).set_state(state["generator.layers"])
        self.order.set_state(state["generator.order"])
        self._take_position(state, about)
        self.recorder.signs = {k: v.to(self.device) for k, v in part("signs.").items()}

    def _take_position(self, state: dict[str, Tensor], about: dict[str, Any]) -> None:
        if about["epochs"]:
            self.position.history = _history(state["history"], about["columns"])
        self.position.order = state["generator.order"]
        self.position.started = time.perf_counter() - about["seconds"]
        self.position.done = about["steps"]
        if about["steps"]:
            self.position.losses = state["epoch.losses"]
            self.position.wrong = state["epoch.wrong"]


def _table(history: History) -> Tensor:
    """(epochs, columns) float64; NaN where a row lacks a column."""
    columns = history.columns
    rows = [[row.get(name, nan) for name in columns] for row in history.rows]
    return torch.tensor(rows, dtype=torch.float64)


def _history(table: Tensor, columns: list[str]) -> History:
    """The history of a table; raises ValueError unless its epochs are 1, 2, ..., with times."""
    rows = [dict(zip(columns, values, strict=True)) for values in table.tolist()]
    for number, row in enumerate(rows, start=1):
        if row.get("epoch") != number or not is_time(row.get("seconds")):
            raise ValueError(f"row {number} of its history is not that of epoch {number}")
        row["epoch"] = number
    return History(rows)


def _read_about(path: Path) -> dict[str, Any]:
    about = parse_json(read_metadata(path).get("bnnlib", "{}"), path)
    check_format(path, about.get("format"), FORMAT)
    for name, fits in _ABOUT_FORMS.items():
        if not fits(about.get(name)):
            raise DamagedFile(f"{path} is no checkpoint: its {name!r} is {shown(about.get(name))}")
    return about


def is_count(value: object) -> bool:
    """Whether a value from JSON is a whole number, 0 or larger, of ordinary size."""
    return type(value) is int and 0 <= value < 2**63


def is_time(value: object) -> bool:
    """Whether a value from JSON is a time in seconds, of less than three hundred years."""
    return type(value) in (int, float) and 0 <= value < 1e10


def check_format(path: Path, found: object, known: int) -> None:
    """Raise DamagedFile for a file of a format that this version does not know."""
    if not is_count(found) or not 1 <= found <= known:
        raise DamagedFile(
            f"{path} has format {shown(found)}; this bnnlib reads formats 1 to {known}"
        )


def _are_columns(value: object) -> bool:
    """Whether this is a list of different column names."""
    texts = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return texts and all(map(is_column, value)) and len(set(value)) == len(value)


_ABOUT_FORMS: dict[str, Callable[[Any], bool]] = {
    "experiment_sha256": lambda value: isinstance(value, str),
    "device": lambda value: isinstance(value, str) and value.isalpha(),
    "epochs": is_count,
    "steps": is_count,
    "seconds": is_time,
    "updates": lambda value: isinstance(value, list) and all(map(is_count, value)),
    "columns": _are_columns,
}


class Checkpoints:
    """The last two states of a training, in the subfolder `checkpoints` of its run.

    `every` is the least number of seconds between two saves by `save_if_due`.
    """

    def __init__(self, folder: Path, training: Training, every: float):
        self.folder, self.training, self.every = folder / "checkpoints", training, every
        self.saved, self.saved_at = time.monotonic(), None
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise DamagedFile(f"{self.folder} is a link or a file, not a folder; remove it")

    def paths(self) -> list[Path]:
        """The files, oldest first."""
        named = {path: NAME.fullmatch(path.name) for path in self._files()}
        return sorted((p for p in named if named[p]), key=lambda p: int(named[p][1]))

    def _files(self) -> list[Path]:
        """What bnnlib may have made in the subfolder: files, no links, folders or devices."""
        if not self.folder.is_dir():
            return []
        found = self.folder.glob("checkpoint*")
        return [path for path in found if path.is_file() and not path.is_symlink()]

    @property
    def needed(self) -> int:
        """Bytes of disk that are needed beside the states there, for as many as there can be."""
        state = sum(tensor.nbytes for tensor in self.training.tensors().values())
        return (KEPT + 1) * state - sum(path.stat().st_size for path in self._files())

    def save(self) -> None:
        """Write the state, unless it is the last one saved, then forget all but the last two."""
        here = (self.training.steps, len(self.training.position.history))
        if here == self.saved_at:
            return
        make_folder(self.folder)
        unnamed = self.folder / "checkpoint.safetensors"
        digest = self.training.save(unnamed)
        path = self.folder / f"checkpoint-{self.training.steps:09d}-{digest[:16]}.safetensors"
        try:
            unnamed.replace(path)
            flush(self.folder)  # before an older one goes
            for old in self.paths()[:-KEPT]:
                old.unlink()
        except OSError as error:
            raise CannotWrite(f"{path} cannot be written: {error.strerror}") from error
        self.saved, self.saved_at = time.monotonic(), here

    def save_if_due(self) -> None:
        """Save where the last save is long enough ago."""
        if time.monotonic() - self.saved >= self.every:
            self.save()

    def restore(self) -> Path | None:
        """Bring the training to the newest whole state; returns its file, None if there is none.

        A damaged file is put aside, under the ending `.damaged`, with a warning.
        """
        paths = self.paths()
        while paths:
            path = paths.pop()
            if _is_whole(path):
                self.training.restore(path)
                return path
            _put_aside(path)
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
        try:
            for path in self._files():
                path.unlink()
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()
        except OSError as error:
            raise CannotWrite(f"{self.folder} cannot be emptied: {error.strerror}") from error


def _is_whole(path: Path) -> bool:
    """Whether the SHA-256 of a checkpoint is the one in its name."""
    try:
        return sha256(path).startswith(NAME.fullmatch(path.name)[2])
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from error


def _put_aside(path: Path) -> None:
    try:
        path.replace(path.with_suffix(".damaged"))
    except OSError as error:
        raise CannotWrite(f"{path} cannot be put aside: {error.strerror}") from error
