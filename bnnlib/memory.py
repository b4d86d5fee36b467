"""The memory that a run needs, and the memory that its process keeps.

In: an `Experiment`. Out: a number of bytes, or an error before the first second is lost.
Next file: `interrupts.py`.
"""

import ctypes

import psutil
import torch
from torch import nn

from bnnlib.assembly import outline
from bnnlib.catalogue import EVERY_SPLIT, Experiment
from bnnlib.data import SIZES
from bnnlib.errors import TooLarge
from bnnlib.files import in_words
from bnnlib.layers import BinaryLayer, BinarySigmoid, BinaryTanh, binary_layers
from bnnlib.models import ARCHITECTURES

# Options of glibc's mallopt, by their names and numbers in malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def memory_needed(experiment: Experiment, half: bool = False) -> int:
    """Bytes without which an experiment cannot train: a lower bound, from its second step on.

    Counts what is there when a backward pass begins: the images, the parameters with their Adam
    moments, and what the batch has left for it. The images of a `.npz` file are not known yet
    and count nothing. `half`: signs are kept in half precision.
    """
    return sum(_memory_parts(experiment, half).values())


def _memory_parts(e: Experiment, half: bool) -> dict[str, int]:
    """Bytes, by the field that would make them fewer."""
    if e.evaluates:
        return {}  # it trains nothing, and the network is that of another run
    model = outline(e)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    parts = {f"n_{split}": _image_bytes(e, split) for split in EVERY_SPLIT}
    if e.epochs == 0:
        return parts | {"width": parameters}
    side = ARCHITECTURES[e.network].image_size
    outputs = e.batch_size * _bytes_kept_by_image(model, side, sign=2 if half else 4)
    return parts | {"width": 3 * parameters + _sample_bytes(e, model), "batch_size": outputs}


def _image_bytes(e: Experiment, split: str) -> int:
    if e.dataset not in SIZES:
        return 0
    pixel = 4 if e.gaussian_variance and split in e.gaussian_splits else 1  # float32 or uint8
    side, label = ARCHITECTURES[e.network].image_size, 8
    return e.images(split) * (3 * side * side * pixel + label)


def _sample_bytes(e: Experiment, model: nn.Module) -> int:
    """The stochastic weights, which are kept for the backward pass."""
    layers = binary_layers(model) if e.weights == "stochastic" else []
    return 4 * sum(layer.weight.numel() for layer in layers)


def _bytes_kept_by_image(model: nn.Module, side: int, sign: int) -> int:
    """One image of a batch and what the layers make of it, kept for the backward pass."""
    channels, kept = 3, 4 * 3 * side * side
    for layer in model:
        if isinstance(layer, nn.Flatten):
            side = 1
            continue
        if isinstance(layer, nn.MaxPool2d):
            side //= 2
            kept += 8 * channels * side * side  # where each maximum was, int64
        elif isinstance(layer, nn.Conv2d | nn.Linear | BinaryLayer):
            channels = len(layer.weight)
        is_sign = isinstance(layer, BinaryTanh | BinarySigmoid)
        kept += (sign if is_sign else 4) * channels * side * side
    return kept


def check_memory(
    experiment: Experiment, device: torch.device | str = "cpu", half: bool = False
) -> None:
    """Raise TooLarge where the device has less free memory than the experiment needs."""
    needed, free = memory_needed(experiment, half), _free_memory(torch.device(device))
    if needed > free:
        parts = _memory_parts(experiment, half)
        most = max(parts, key=parts.get)
        raise TooLarge(
            f"{experiment.name} needs at least {in_words(needed)} of memory, most of it for "
            f"{most}={getattr(experiment, most)}, and {in_words(free)} are free; "
            f"use a smaller {most}"
        )


def _free_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    # What earlier runs of this process have freed, PyTorch keeps for the next one.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that a training step frees, for the step that follows.

    glibc gives it back to the system and takes it anew, page by page, at every step. Returns
    whether the C library has such a setting. It is the whole process's, and changes no result.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, 2**30) and mallopt(M_MMAP_THRESHOLD, 2**25))
