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
    make_folder,
    parse_json,
    sha256,
    writing,
)
from bnnlib.history import History
from bnnlib.layers import random_generator
from bnnlib.optim import BinaryAdam
from bnnlib.runs.record import check_format
from bnnlib.tensors import differing, read_tensors, tensor_bytes
from bnnlib.training import TrainingState

FORMAT = 2  # of a checkpoint; raised when an older bnnlib could misread a newer one
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
        steps = self.state.steps
        here = (steps, len(self.state.history))
        if here == self.saved_at:
            return
        self.state.check_finite()
        try:
            about = json.dumps(_describe(self.state, self.digest), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidValue(f"no file can hold the state of this optimizer: {error}") from error
        content = tensor_bytes(_tensors(self.state), {"bnnlib": about})
        digest = hashlib.sha256(content).hexdigest()
        make_folder(self.folder)
        atomic_write(self.folder / f"checkpoint-{steps:09d}-{digest[:16]}.safetensors", content)
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


def _device(state: TrainingState) -> torch.device:
    return next(state.model.parameters()).device


def _tensors(state: TrainingState) -> dict[str, Tensor]:
    """The tensors of a state, by name."""
    begun, sampling = state.epoch_start, random_generator(state.model)
    tensors = {"generator.order": state.generator.get_state() if begun is None else begun}
    if sampling is not None:
        tensors["generator.layers"] = sampling.get_state()
    tensors |= {f"generator.{name}": g.get_state() for name, g in pytorchs_own(state).items()}
    if state.history:
        rows = [
            [row.get(name, nan) for name in state.history.columns] for row in state.history.rows
        ]
        tensors["history"] = torch.tensor(rows, dtype=torch.float64)
    if state.done:
        tensors["epoch.losses"] = state.losses[: state.done]
        tensors["epoch.wrong"] = state.wrong[: state.done]
    tensors |= {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    tensors |= _optimizer_state(state)[0]
    return tensors | {f"signs.{name}": sign for name, sign in state.signs.items()}


def pytorchs_own(state: TrainingState) -> dict[str, torch.Generator]:
    """PyTorch's own generators, from which layers of `torch.nn` draw."""
    device = _device(state)
    own = {"torch": torch.default_generator}
    if device.type == "cuda":
        own["cuda"] = torch.cuda.default_generators[device.index or 0]
    return own


def _optimizer_state(state: TrainingState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`optimizer.state_dict()` as tensors by name, and as the rest, which JSON can hold."""
    optimizer, tensors = state.optimizer, {}
    if isinstance(optimizer, BinaryAdam):  # whose state is known before the first step
        for p in state.model.parameters():
            optimizer.moments(p)
        optimizer.updates  # noqa: B018

    def rest(name: str, values: dict[str, Any]) -> dict[str, Any]:
        own = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        tensors.update({f"optimizer.{name}.{k}": v for k, v in own.items()})
        skipped = {*own, "params", "param_names"}
        return {k: v for k, v in values.items() if k not in skipped}

    kept, names = optimizer.state_dict(), _parameter_names(state)
    of_parameters = {names[i]: rest(names[i], values) for i, values in kept["state"].items()}
    groups = [rest(f"group{i}", group) for i, group in enumerate(kept["param_groups"])]
    return tensors, {"state": of_parameters, "groups": groups}


def _parameter_names(state: TrainingState) -> list[str]:
    """The names of the optimizer's parameters, in its order."""
    names = {p: name for name, p in state.model.named_parameters()}
    return [names[p] for group in state.optimizer.param_groups for p in group["params"]]


def _describe(state: TrainingState, digest: str) -> dict[str, Any]:
    """The rest of a state, as JSON has it."""
    return {
        "format": FORMAT,
        "experiment_sha256": digest,
        "device": _device(state).type,
        "epochs": len(state.history),
        "steps": state.done,  # of the epoch under way
        "seconds": time.perf_counter() - state.started,
        "cpu_seconds": time.process_time() - state.cpu_started,
        "updates": state.steps,
        "optimizer": _optimizer_state(state)[1],
        "columns": state.history.columns,
    }


def restore(state: TrainingState, path: Path, digest: str) -> None:
    """Take over the state in a file. Raises DamagedFile for that of another training."""
    tensors, texts = read_tensors(path)
    about = parse_json(texts.get("bnnlib", "{}"), path)
    check_format(path, about.get("format"), FORMAT)
    if about.get("experiment_sha256") != digest:
        raise DamagedFile(f"{path} is the state of another experiment; remove it")
    device = _device(state).type
    if about.get("device") != device and random_generator(state.model) is not None:
        raise InvalidValue(
            f"{path} was saved on {shown(about.get('device'))}; its random numbers go on only "
            f"there, not on {device!r}"
        )
    try:
        if about["format"] == 1:
            _from_format_1(state, tensors, about)
        if about.get("device") != device:  # whose own generator nothing draws from
            tensors.pop("generator.cuda", None)
            if cuda := pytorchs_own(state).get("cuda"):
                tensors["generator.cuda"] = cuda.get_state()
        _take_over(state, tensors, about)
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DamagedFile(f"{path} holds no state of this training: {shown(str(error))}") from error


def _from_format_1(state: TrainingState, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """What format 1 had otherwise: a count of steps for each group of the one optimizer."""
    updates = about["updates"]
    if updates != updates[:1] * len(state.optimizer.param_groups):
        raise ValueError(f"its groups of parameters took {updates} steps")
    about |= {"updates": updates[0], "optimizer": _optimizer_state(state)[1]}
    tensors["optimizer.group0.step"] = torch.tensor(float(updates[0]), dtype=torch.float64)
    for name, generator in pytorchs_own(state).items():  # nothing drew from these
        tensors[f"generator.{name}"] = generator.get_state()


@torch.no_grad()
def _take_over(state: TrainingState, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    _check_specs(state, tensors, about)
    sampling, device = random_generator(state.model), _device(state)
    seconds, cpu_seconds = about["seconds"], about.get("cpu_seconds", 0.0)  # an old one has none
    updates = about["updates"]
    if type(updates) is not int or not 0 <= updates < 10**9:
        raise ValueError(f"it took {updates} steps")
    if not (0 <= seconds < 1e10 and 0 <= cpu_seconds < 1e10):
        raise ValueError(f"it took {seconds} seconds, of processors {cpu_seconds}")
    state.model.load_state_dict(part("model."))
    _load_optimizer(state, part("optimizer."), about["optimizer"])
    if sampling is not None:
        sampling.set_state(tensors["generator.layers"])
    for name, generator in pytorchs_own(state).items():
        generator.set_state(tensors[f"generator.{name}"])
    state.generator.set_state(tensors["generator.order"])
    state.epoch_start = tensors["generator.order"]
    state.history = _history(tensors.get("history"), about["columns"])
    state.done, state.steps = about["steps"], updates
    state.started = time.perf_counter() - seconds
    state.cpu_started = time.process_time() - cpu_seconds
    state.losses = tensors.get("epoch.losses", state.losses)
    state.wrong = tensors.get("epoch.wrong", state.wrong)
    state.signs = {k: v.to(device) for k, v in part("signs.").items()}


def _load_optimizer(state: TrainingState, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """`optimizer.load_state_dict` from what `_optimizer_state` made of it, to the last bit."""
    optimizer, device = state.optimizer, _device(state)

    def own(name: str) -> dict[str, Tensor]:
        here = ((key.rpartition("."), tensor) for key, tensor in tensors.items())
        return {key: tensor for (prefix, _, key), tensor in here if prefix == name}

    _check_settings(state, rest)
    groups = optimizer.state_dict()["param_groups"]
    for i, (group, saved) in enumerate(zip(groups, rest["groups"], strict=True)):
        saved = {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items()}
        group |= saved | {k: tensor.to(device) for k, tensor in own(f"group{i}").items()}
    names = _parameter_names(state)
    each = ((i, rest["state"].get(name, {}) | own(name)) for i, name in enumerate(names))
    kept = {i: values for i, values in each if values}
    optimizer.load_state_dict({"state": kept, "param_groups": groups})
    for p, name in zip(_parameters(optimizer), names, strict=True):
        for key, tensor in own(name).items():  # in the type it had, and in the layout of p
            loaded = optimizer.state[p][key]
            exact = tensor.to(loaded.device)
            like_p = tensor.shape == p.shape
            layout = torch.empty_like(p, dtype=tensor.dtype).copy_(exact) if like_p else exact
            optimizer.state[p][key] = layout


def _check_settings(state: TrainingState, found: Any) -> None:
    """Raise ValueError unless this is the part of an optimizer's state that is no tensor.

    In ours only the rate changes, which every epoch sets. Others may count there, and add to it.
    """
    own = json.loads(json.dumps(_optimizer_state(state)[1]))
    found = json.loads(json.dumps(found))  # tuples are lists
    fits = _fits(found, own)
    if fits and type(state.optimizer).__module__ == BinaryAdam.__module__:
        for group, group_found in zip(own["groups"], found["groups"], strict=True):
            group_found["lr"] = group["lr"]
        fits = found == own
    known = set(_parameter_names(state))
    if not fits or not all(
        name in known and isinstance(values, dict) for name, values in found["state"].items()
    ):
        raise ValueError("it has the settings of another optimizer")


def _fits(found: Any, own: Any) -> bool:
    """Whether a value from JSON has the parts of another one, each of the same kind."""
    if isinstance(own, dict):
        return isinstance(found, dict) and all(
            name in found and _fits(found[name], value) for name, value in own.items()
        )
    if isinstance(own, list):
        return isinstance(found, list) and len(found) == len(own) and all(map(_fits, found, own))
    if own is None:
        return True  # not set yet, or never
    numbers = {int, float}
    if type(own) in numbers:
        return type(found) in numbers and abs(found) < 2**63
    return type(found) is type(own)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _check_specs(state: TrainingState, found: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Raise ValueError unless these are the tensors of such a training, in shape and type.

    Of an optimizer that is not ours only the names of its parameters and groups are known.
    """
    expected, epochs, steps = _tensors(state), about["epochs"], about["steps"]
    if type(epochs) is not int or type(steps) is not int:
        raise TypeError(f"it counts {epochs} epochs and {steps} steps")
    if epochs:
        size = (epochs, len(about["columns"]))
        expected["history"] = torch.empty(size, dtype=torch.float64, device="meta")
    if steps:
        expected["epoch.losses"] = torch.empty(steps, device="meta")
        expected["epoch.wrong"] = torch.empty(steps, dtype=torch.int64, device="meta")
    if not isinstance(state.optimizer, BinaryAdam):
        groups = (f"group{i}" for i in range(len(state.optimizer.param_groups)))
        owners = {f"optimizer.{name}" for name in (*_parameter_names(state), *groups)}
        expected |= {k: t for k, t in found.items() if k.rpartition(".")[0] in owners}
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
