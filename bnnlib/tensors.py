"""Tensors in a safetensors file, whose header is checked before any of them is read.

In: tensors by name, or a file and what it should hold. Out: the file, or the tensors.
Next file: `drawing.py`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bnnlib.errors import DamagedFile, TooLarge, shown
from bnnlib.files import in_words, whole_or_absent

SHOWN = 20  # differences in one message

# The types that we write, as safetensors names them.
_TYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}

Form = tuple[tuple[int, ...], torch.dtype]  # what a tensor must be: shape and type


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors by name, and texts beside them, as a safetensors file; returns its SHA-256.

    The library's own `save_file` maps the file into memory: where the disk is full the
    process dies of it (SIGBUS), and a killed save leaves its copy behind. So the bytes,
    https://github.com/huggingface/safetensors#format, are written here in plain order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, t in tensors.items():
        start, end = end, end + t.nbytes
        kind = _NAMES[t.dtype]
        header[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, start = hashlib.sha256(), (len(text).to_bytes(8, "little"), text)
    with whole_or_absent(path) as part, part.open("wb") as file:
        for block in chain(start, map(_bytes_of, tensors.values())):  # one tensor at a time
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The values of a tensor in row-major order, as bytes."""
    return tensor.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8)


def forms(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
    """Shape and type of each tensor."""
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def read_tensors(path: str | Path, expected: Mapping[str, Form]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must be exactly the `expected` ones.

    Names, shapes and types are compared with the file's header before any tensor is read.
    Raises DamagedFile with all differences, TooLarge for what does not fit into memory.
    """
    with _opened(path) as file:
        _check_header(path, file, expected)
        _check_memory(path, expected)
        # A copy, because what the library returns is a view of the file.
        return {name: file.get_tensor(name).clone() for name in expected}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts in a safetensors file's header."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """A safetensors file, whose header the library has checked: it describes exactly the rest."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError) as error:  # the last: it cannot be mapped
        reason = shown(getattr(error, "strerror", None) or str(error))
        raise DamagedFile(f"{path} is not a whole safetensors file: {reason}") from error


def _check_header(path: str | Path, file: Any, expected: Mapping[str, Form]) -> None:
    names = set(file.keys())
    found = {name: _form_in(file, name) for name in expected if name in names}
    wrong = [f"no {name}" for name in expected if name not in names]
    wrong += [f"unknown {shown(name)}" for name in sorted(names - set(expected))]
    wrong += [
        f"{name} is {_form_in_words(found[name])}, not {_form_in_words(form)}"
        for name, form in expected.items()
        if name in found and found[name] != form
    ]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise DamagedFile(
            f"{path} does not hold the tensors it should: {'; '.join(wrong[:SHOWN])}{more}"
        )


def _check_memory(path: str | Path, expected: Mapping[str, Form]) -> None:
    needed = sum(prod(shape) * dtype.itemsize for shape, dtype in expected.values())
    free = psutil.virtual_memory().available
    if needed > free:
        raise TooLarge(f"{path} needs {in_words(needed)} of memory, {in_words(free)} are free")


def _form_in(file: Any, name: str) -> Form:
    part = file.get_slice(name)
    return tuple(part.get_shape()), _TYPES.get(part.get_dtype(), part.get_dtype())


def _form_in_words(form: Form) -> str:
    shape, dtype = form
    return f"{str(dtype).removeprefix('torch.')} {shown(shape)}"
