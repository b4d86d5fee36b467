"""Tensors in files, in the safetensors format, which runs nothing when it is read."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bnnlib.errors import DamagedFile, shown


def tensor_bytes(tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> bytes:
    """Tensors by name, and texts beside them, in the safetensors format.

    To be written by `atomic_write`: the library's own `save_file` maps the file into memory,
    and where the disk is full the process dies of it (SIGBUS).
    """
    plain = {  # copies, because safetensors keeps no two names of one tensor
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return save(plain, dict(about or {}))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and the texts beside them.

    Raises DamagedFile for another file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # Copies, because what the library returns are views of the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = shown(getattr(error, "strerror", None) or str(error))
        raise DamagedFile(f"{path} is not a whole safetensors file: {reason}") from error


def differing(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The names of those that are missing, too many, or of another shape or type than expected."""
    one, other = ({k: (t.shape, t.dtype) for k, t in ts.items()} for ts in (tensors, expected))
    return [name for name in other | one if one.get(name) != other.get(name)]
