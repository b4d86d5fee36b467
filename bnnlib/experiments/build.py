"""From an experiment to its data and its model; every random act has a seed of its own."""

import re
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bnnlib.corruption import gaussian_inputs, random_labels, random_pixels, shuffled_pixels
from bnnlib.data import DRAWN, ImageSet, load
from bnnlib.errors import InvalidValue, unknown_name
from bnnlib.experiments.experiment import Experiment
from bnnlib.kernels.precision import set_precision
from bnnlib.layers import seed_layers
from bnnlib.models import ARCHITECTURES, binarynet

DEVICES = ("auto", "cpu", "cuda", "cuda:N")


def derive_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, so that no two random acts of a run share their numbers."""
    entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode())])
    return int(entropy.generate_state(1, np.uint64)[0] >> 1)


def resolve_device(name: str = "auto") -> torch.device:
    """The device "cpu", "cuda" or "cuda:N"; "auto" is CUDA's where there is one, else the CPU.

    Raises InvalidValue for another name and for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(name, str) or not re.fullmatch("(cpu|cuda)(:[0-9]+)?", name):
        raise unknown_name("device", name, DEVICES)
    try:
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no CUDA here; use 'cpu'")
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InvalidValue(f"device {name!r} cannot be used here: {reason}") from error
    return device


def prepare_data(
    experiment: Experiment, root: str | Path | None = None, download: bool = False
) -> dict[str, ImageSet]:
    """The splits of an experiment, corrupted as it says: "train" and, unless 0, the others.

    Raises InvalidValue where the network does not take images of that size or so many classes,
    and what `data.load` raises.
    """
    e, sets = experiment, {}
    for split, n in (("train", e.n_train), ("valid", e.n_valid), ("test", e.n_test)):
        if n == 0:
            continue
        drawn = n if e.dataset in DRAWN else None  # a real set is read whole, then cut
        data = load(e.dataset, split, root, download, drawn, e.data_seed)
        sets[split] = _corrupted(e, split, data.at_most(n))
    _check_fits(e.network, sets["train"])
    return sets


def _corrupted(e: Experiment, split: str, data: ImageSet) -> ImageSet:
    def seed(purpose: str) -> int:
        return derive_seed(e.corruption_seed, purpose)

    if e.pixels == "shuffled":  # every split in the same order
        data = shuffled_pixels(data, seed=seed("shuffled pixels"))
    if e.pixels == "random":
        data = random_pixels(data, seed=seed(f"random pixels {split}"))
    if e.gaussian_variance and split in e.gaussian_splits:
        data = gaussian_inputs(
            data, e.gaussian_variance, seed=seed(f"Gaussian {split}"), matched=e.gaussian_matched
        )
    if e.random_labels and split in e.random_label_splits:
        data = random_labels(data, e.random_labels, seed=seed(f"labels {split}"))
    return data


def _check_fits(network: str, data: ImageSet) -> None:
    takes, found = ARCHITECTURES[network], tuple(data.images.shape[2:])
    size, classes = takes.image_size, len(data.class_names)
    if found != (size, size):
        raise InvalidValue(
            f"network {network!r} takes images of {size} x {size} pixels, "
            f"those of {data.name} are {found[0]} x {found[1]}"
        )
    if classes > takes.classes:
        raise InvalidValue(
            f"network {network!r} tells {takes.classes} classes apart, {data.name} has {classes}"
        )


def build_model(
    experiment: Experiment, device: torch.device | str = "cpu", precision: str = "float32"
) -> nn.Module:
    """The experiment's network with its initial weights, which are the same on every device.

    `precision`: "half" lets its layers take their sums in half precision where that is exact.
    """
    e = experiment
    model = binarynet(
        e.network,
        generator=torch.Generator().manual_seed(derive_seed(e.seed, "initial weights")),
        width=e.width,
        binary=e.binary,
        activation=e.activation,
        weights=e.weights,
        dropout=e.dropout,
        dropout_position=e.dropout_position,
    )
    model = model.to(device, memory_format=torch.channels_last)
    return seed_layers(set_precision(model, precision), derive_seed(e.seed, "random layers"))
