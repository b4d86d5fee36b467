"""What a sweep will cost: seconds a training step, measured here, times the steps that are left."""

import functools
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bnnlib.batches import Batches
from bnnlib.data.images import ImageSet, load
from bnnlib.errors import BnnlibError
from bnnlib.experiments.build import build_model
from bnnlib.experiments.experiment import Experiment
from bnnlib.layers import derive_seed
from bnnlib.losses import l2_penalty
from bnnlib.models import penalized_parameters, usual_inputs
from bnnlib.names import LOSSES, NETWORKS
from bnnlib.optim import make_optimizer
from bnnlib.training import Step, TrainingState

# The fields that decide how long a step takes.
DECIDE = (
    *("network", "width", "binary", "activation", "weights", "batch_size", "loss", "optimizer"),
    *("dropout", "dropout_position", "l2_target"),
)
BATCHES = 4  # of noise
MEASURED_FOR = 0.5  # seconds, after one epoch of those batches


def steps_in_all(
    experiments: Mapping[str, Experiment], root: str | Path | None = None
) -> dict[str, int]:
    """The training steps of each experiment, by its name; without those whose data is not there.

    A set in a file is read where only it knows how many images it has.
    """
    read = functools.cache(lambda dataset: len(load(dataset, "train", root)))
    steps = {}
    for name, e in experiments.items():
        with suppress(BnnlibError):
            images = read(e.dataset) if e.images("train") is None else e.images("train")
            images = images if e.n_train is None else min(images, e.n_train)
            steps[name] = images // e.batch_size * e.epochs
    return steps


def seconds_a_step(
    experiments: Iterable[Experiment], threads: int = 1, device: torch.device | str = "cpu"
) -> dict[tuple[Any, ...], float]:
    """The time of a training step of each kind that occurs, by `kind`; on images of noise.

    Only of networks that bnnlib ships: what others take is not known before their data is read.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        each = {kind(e): e for e in experiments if e.network in NETWORKS.shipped}
        return {key: _measure(e, device) for key, e in each.items()}
    finally:
        torch.set_num_threads(before)


def kind(e: Experiment) -> tuple[Any, ...]:
    """What tells two kinds of training step apart."""
    return tuple(getattr(e, name) for name in DECIDE)


def _measure(e: Experiment, device: torch.device | str) -> float:
    inputs = usual_inputs(e.network)
    generator = torch.Generator().manual_seed(derive_seed(e.seed, "cost"))
    n, size = BATCHES * e.batch_size, inputs.image_size
    images = torch.randint(
        256, (n, inputs.in_channels, size, size), generator=generator, dtype=torch.uint8
    )
    labels = torch.randint(inputs.classes, (n,), generator=generator)
    names = tuple(map(str, range(inputs.classes)))
    batches = Batches(ImageSet(images, labels, "noise", "train", names), e.batch_size, device)
    model = build_model(e, device, inputs=inputs)
    state = TrainingState(model, make_optimizer(e.optimizer, model, e.lr_start), generator)
    penalized = penalized_parameters(model, e.l2_target)
    penalty = (lambda: e.l2 * l2_penalty(penalized)) if e.l2 else None
    step = Step(state, batches, penalty, LOSSES[e.loss])
    _epoch(step)
    start, steps, seconds = time.perf_counter(), 0, 0.0
    while not steps or seconds < MEASURED_FOR:
        _epoch(step)
        steps, seconds = steps + BATCHES, time.perf_counter() - start
    return seconds / steps


def _epoch(step: Step) -> None:
    step.begin_epoch()
    for _ in range(BATCHES):
        step()
    step.state.epoch_start, step.state.done = None, 0
    step.losses.sum().item()  # a GPU has done it all only now
