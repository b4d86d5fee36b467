"""From an experiment to its data and its model; every random act has a seed of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnnlib.corruption import gaussian_inputs, random_labels, random_pixels, shuffled_pixels
from bnnlib.data.images import ImageSet, load
from bnnlib.errors import InvalidValue, shown
from bnnlib.experiments.experiment import Experiment
from bnnlib.kernels.precision import set_precision
from bnnlib.layers import derive_seed, seed_layers
from bnnlib.models import USUAL_SETTINGS, Inputs, build_network, usual_inputs
from bnnlib.names import DRAWN, check_device


def resolve_device(name: str = "auto") -> torch.device:
    """The device "cpu", "cuda" or "cuda:N"; "auto" is CUDA's where there is one, else the CPU.

    Raises InvalidValue for another name and for a device that is not there.
    """
    check_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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

    Raises what `data.load` raises.
    """
    e, sets = experiment, {}
    for split, n in (("train", e.n_train), ("valid", e.n_valid), ("test", e.n_test)):
        if n == 0:
            continue
        drawn = n if e.dataset in DRAWN else None  # a real set is read whole, then cut
        data = load(e.dataset, split, root, download, drawn, e.data_seed)
        sets[split] = _corrupted(e, split, _alike(data.at_most(n), sets.get("train")))
    return sets


def _alike(data: ImageSet, train: ImageSet | None) -> ImageSet:
    """`data` with the classes of the training images; raises InvalidValue where it does not fit."""
    inputs_of(data)  # refuses what is not square
    if train is None:
        return data
    classes = train.class_names
    for what, there, here in (
        ("images", *(tuple(part.images.shape[1:]) for part in (train, data))),
        ("classes", classes[: len(data.class_names)], data.class_names),
    ):
        if here != there:
            raise InvalidValue(
                f"the splits of {data.name} must have {what} alike: {shown(there)} in training, "
                f"{shown(here)} in {data.split}"
            )
    return replace(data, class_names=classes)


def _corrupted(e: Experiment, split: str, data: ImageSet) -> ImageSet:
    def seed(purpose: str) -> int:
        return derive_seed(e.corruption_seed, purpose)

    if e.pixels == "shuffled":  # every split in the same order
        data = shuffled_pixels(data, seed=seed("shuffled pixels"))
    if e.pixels == "random":
        data = random_pixels(data, seed=seed(f"random pixels {split}"))
    if e.gaussian_variance and split in e.gaussian_splits:
        data = gaussian_inputs(
            data,
            e.gaussian_variance,
            seed=seed(f"Gaussian {split}"),
            matched=e.gaussian_matched,
            shape=e.gaussian_shape,
        )
    if e.random_labels and split in e.random_label_splits:
        data = random_labels(data, e.random_labels, seed=seed(f"labels {split}"))
    return data


def inputs_of(data: ImageSet) -> Inputs:
    """What a network for this data takes. Raises InvalidValue where images are not square."""
    channels, height, width = data.images.shape[1:]
    if height != width:
        raise InvalidValue(f"images must be square, those of {data.name} are {height} x {width}")
    return Inputs(channels, height, len(data.class_names))


def network_settings(e: Experiment) -> dict[str, Any]:
    """What an experiment says about its network, beside the name."""
    return {name: getattr(e, name) for name in USUAL_SETTINGS}


def build_model(
    experiment: Experiment,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    inputs: Inputs | None = None,
) -> nn.Module:
    """The experiment's network with its initial weights, which are the same on every device.

    `precision`: "half" lets its layers take their sums in half precision where that is exact.
    `inputs`: what `inputs_of` says of the data; None: what the network has by itself.
    PyTorch's own generator, from which layers of `torch.nn` draw, is seeded for it and then as it
    was before.
    """
    e, seed = experiment, derive_seed(experiment.seed, "initial weights")
    inputs = inputs or usual_inputs(e.network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = build_network(e.network, inputs, generator, **network_settings(e))
        if precision == "half":
            set_precision(model, torch.randn(8, inputs.in_channels, *(inputs.image_size,) * 2))
    model = model.to(device, memory_format=torch.channels_last)
    return seed_layers(model, derive_seed(e.seed, "random layers"))
