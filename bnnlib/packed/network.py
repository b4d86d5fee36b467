"""A network of packed words, and its file."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnnlib.data.images import scale_pixels
from bnnlib.errors import DamagedFile, InvalidValue, shown
from bnnlib.files import atomic_write, parse_json
from bnnlib.kernels.definitions import word_count
from bnnlib.layers import BatchNorm
from bnnlib.packed.steps import (
    ON_WORDS,
    REAL,
    STEPS,
    First,
    Flatten,
    Flip,
    Layer,
    Pool,
    Real,
    Residual,
    Sums,
    in_order,
    is_last,
    lying,
)
from bnnlib.tensors import differing, read_tensors, tensor_bytes

FORMAT = 1  # of a file
ABOUT = "bnnlib packed network"  # the text beside its tensors
SLICE = 64  # images at once


class PackedNetwork:
    """Steps on packed words, called on images: (N, C, H, W) -> scores (N, classes) float32.

    Takes what the network took: uint8 pixels, or float32 images that are already scaled, as a
    tensor or an array. `first_layer` says how it treats pixels: in "integers", or where a sum has
    more than `MOST_PIXELS` terms in "float". Then the first layer is PyTorch's own, on the whole
    batch, as it is for images of floats; all that follows goes in slices of 64 images, so that
    its memory does not grow with the batch.
    """

    def __init__(self, steps: Sequence):
        self.steps = tuple(steps)
        _check_chain(self.steps)

    @property
    def first_layer(self) -> str:
        """ "integers" or "float": how the first layer computes on 8-bit pixels."""
        first = self.steps[0]
        counts = isinstance(first, First) and first.thresholds is not None
        return "integers" if counts else "float"

    @torch.no_grad()
    def __call__(self, images: Tensor | np.ndarray) -> Tensor:
        x, first = _as_batch(images), self.steps[0]
        counts = isinstance(first, First) and first.counts(x)
        if not isinstance(first, First):
            x = scale_pixels(x)
        for sliced, steps in self._by_integers if counts else self._by_floats:
            x = _in_slices(steps, x) if sliced else in_order(steps, x)
        return x

    @cached_property
    def _by_floats(self) -> list[tuple[bool, list]]:
        """Stretches of steps, and whether a batch goes through them in slices."""
        grouped = groupby(self.steps, lambda step: isinstance(step, ON_WORDS))
        return [(sliced, list(steps)) for sliced, steps in grouped]

    @cached_property
    def _by_integers(self) -> list[tuple[bool, list]]:
        """The same where the first layer takes integers."""
        (_, first), *rest = self._by_floats
        return [(True, first + rest[0][1]), *rest[1:]] if rest and rest[0][0] else self._by_floats

    def __repr__(self) -> str:
        kinds = ", ".join(type(step).__name__ for step in self.steps)
        return f"PackedNetwork(first layer in {self.first_layer}: {kinds})"

    def save(self, path: str | Path) -> int:
        """Write a new file, which `load_packed` reads; returns its size in bytes.

        The file is in the safetensors format: 8 bytes with the length of a JSON header, the
        header, then the tensors, little-endian. Its metadata has, under "bnnlib packed network", a
        JSON text {"format": 1, "steps": [...]}. Each step has a "kind" and its settings: the
        fields of the class of that name in `bnnlib.packed.steps`, which says what it computes; of
        "residual" they are lists of steps. Its tensors are named by the place of the step and the
        field, "3.words", or "5.body.1.words".

        - words: U64 (O, kernel height, kernel width, ceil(C / 64)). Bit i, counted from the lowest,
          of word j belongs to channel 64 j + i, 1 for +1; bits past the last channel are 0. (Read
          as bytes: bit i of byte j is channel 8 j + i.) The columns of a dense layer are channels
          of a 1x1 kernel, in the order (C, H, W) where it is first, else (H, W, C).
        - thresholds: I32 (O,). An activation is 1 where the integer sum is at least that. In the
          first layer it is a sum of round(2^24 (p 2/255 - 1)), computed in float32, of pixels p.
        - flips: U64 (ceil(O / 64),). Channels whose bit is then turned around.
        - bias, switches: F32 (O,), of the last layer, and of the first one for float images.

        Raises InvalidValue where the file is there already, CannotWrite where it cannot be written.
        """
        path, tensors = Path(path), {}
        if os.path.lexists(path):
            raise InvalidValue(f"{path} is there already; name another file")
        steps = [_described(step, f"{i}.", tensors) for i, step in enumerate(self.steps)]
        text = json.dumps({"format": FORMAT, "steps": steps}, allow_nan=False)
        content = tensor_bytes(tensors, {ABOUT: text})
        atomic_write(path, content)
        return len(content)


def _check_chain(steps: Sequence) -> None:
    """Raise InvalidValue where a step takes other words than the one before gives."""
    there = None  # channels, where they are known
    for step in steps:
        taken = there
        if isinstance(step, Layer | Sums | Flatten):
            taken = step.channels
        elif isinstance(step, Flip) and there:
            taken = there if len(step.flips) == word_count(there) else len(step.flips)
        if there not in (None, taken):
            raise InvalidValue(f"{type(step).__name__} of {taken} channels after {there}")
        if not isinstance(step, Pool | Flip):
            there = step.out if isinstance(step, First | Layer) else None


def _as_batch(images: Tensor | np.ndarray) -> Tensor:
    x = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    ok = isinstance(x, Tensor) and x.dtype in (torch.uint8, torch.float32)
    if not ok or x.dim() != 4 or x.device.type != "cpu":
        got = f"{x.dtype} {tuple(x.shape)}, {x.device}" if isinstance(x, Tensor) else shown(x)
        raise InvalidValue(f"images must be (N, C, H, W), uint8 or float32, on the CPU, got {got}")
    return x


def _in_slices(steps: list, x):
    if len(x) <= SLICE:
        return in_order(steps, x)
    parts = [in_order(steps, x[i : i + SLICE]) for i in range(0, len(x), SLICE)]
    return torch.cat(parts)


# --------------------------------------------------------------------------------- in a file


def _described(step: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The settings of a step as JSON has them; its tensors go to `tensors`."""
    if isinstance(step, Residual):
        parts = {"body": step.body, "shortcut": step.shortcut}
        return {"kind": "residual"} | {
            name: [_described(s, f"{prefix}{name}.{i}.", tensors) for i, s in enumerate(part)]
            for name, part in parts.items()
        }
    if isinstance(step, Real):
        module = step.module
        state = module.state_dict()
        state.pop("num_batches_tracked", None)
        tensors |= {f"{prefix}{name}": tensor for name, tensor in state.items()}
        settings = {
            name: getattr(module, name) for name in REAL[type(module)] if name != "features"
        }
        if isinstance(module, BatchNorm):
            settings["features"] = module.weight.numel()
        if isinstance(module, nn.Conv2d):
            settings["channels_last"] = is_last(module.weight)
        return {"kind": "real", "module": type(module).__name__, **settings}
    found = {"kind": type(step).__name__.lower()}
    for field in fields(step):
        value = getattr(step, field.name)
        if isinstance(value, np.ndarray):
            tensors[f"{prefix}{field.name}"] = torch.from_numpy(value)
        elif value is not None:
            found[field.name] = value
    return found


def load_packed(path: str | Path) -> PackedNetwork:
    """The network in a file of `PackedNetwork.save`; nothing in the file is executed.

    Raises DamagedFile for another file, and for one whose parts do not fit together.
    """
    tensors, about = read_tensors(path)
    if ABOUT not in about:
        raise DamagedFile(f"{path} holds no packed network")
    text = parse_json(about[ABOUT], path)
    if text.get("format") != FORMAT:
        raise DamagedFile(f"{path} has format {shown(text.get('format'))}, not {FORMAT}")
    try:
        steps = _read_all(text["steps"], "", tensors)
        if not steps or tensors:
            raise InvalidValue(f"tensors of no step: {shown(list(tensors))}")
        return PackedNetwork(steps)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedFile(f"{path} holds no whole packed network: {shown(str(error))}") from error


def _read_all(described: list, prefix: str, tensors: dict[str, Tensor]) -> list:
    """The steps of a list in the file; takes their tensors out of `tensors`."""
    return [_read(step, f"{prefix}{i}.", tensors) for i, step in enumerate(described)]


def _read(described: Mapping[str, Any], prefix: str, tensors: dict[str, Tensor]) -> Any:
    settings = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in described.items()
    }
    kind = settings.pop("kind")
    if kind == "residual":
        parts = {k: _read_all(settings[k], f"{prefix}{k}.", tensors) for k in ("body", "shortcut")}
        return Residual(**{name: tuple(steps) for name, steps in parts.items()})
    own = {n.removeprefix(prefix): tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}
    if kind == "real":
        return Real(_read_module(settings, own))
    return STEPS[kind](**settings, **{name: tensor.numpy() for name, tensor in own.items()})


def _read_module(settings: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    kind = {kind.__name__: kind for kind in REAL}[settings.pop("module")]
    last = settings.pop("channels_last", False)
    if kind in (nn.Conv2d, nn.Linear):
        settings["bias"] = "bias" in state
    if set(settings) - {"bias"} != set(REAL[kind]):
        raise InvalidValue(f"settings of {kind.__name__}: {shown(settings)}")
    with torch.device("meta"):  # shapes alone, before memory is taken for one of any size
        module = kind(**settings)
    expected = module.state_dict()
    expected.pop("num_batches_tracked", None)
    if wrong := differing(state, expected):
        raise InvalidValue(f"{kind.__name__} differs in {shown(wrong)}")
    if last:
        state["weight"] = lying(state["weight"], True)
    if "num_batches_tracked" in module.state_dict():
        state["num_batches_tracked"] = torch.tensor(0)
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()
