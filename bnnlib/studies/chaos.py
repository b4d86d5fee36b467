"""How much of a network's answer depends on the other images of a batch.

Batch normalization compares an image with its batch, and a sign makes a whole step of the smallest
difference: in training, the signs of an image in a deep layer depend on its neighbours.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from bnnlib.errors import check_fills_batch, check_whole
from bnnlib.layers import evaluating
from bnnlib.models import cifar10

SETTLES_AFTER = 40  # training batches; the start has 0.9^40, below 2 %, of an average then


# ------------------------------------------------------- convolutions that stay as they were drawn


class FirstSigns(nn.Sequential):
    """Layers that keep the weights that they were drawn with: (B, ...) -> (B, ...).

    `statistics`: "batch": in training each batch is normalized by itself, as everywhere.
    "running": so are the first `SETTLES_AFTER` training batches, which the averages follow; then
    the averages stay, and an image has the same output in any batch.
    """

    on_host = True  # looks at a number, so a step with it is no CUDA graph

    def __init__(self, layers: OrderedDict[str, nn.Module], statistics: str):
        super().__init__(layers)
        self.requires_grad_(False)
        self.statistics = statistics
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # training batches

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self.seen += 1
        if self.statistics == "batch" or self.seen <= SETTLES_AFTER:
            return super().forward(x)
        with evaluating(self):
            return super().forward(x)


def _frozen(statistics: str, settings: dict) -> nn.Sequential:
    layers = list(cifar10(**settings).named_children())
    cut = [name for name, _ in layers].index("flatten")
    first = FirstSigns(OrderedDict(layers[:cut]), statistics)
    return nn.Sequential(OrderedDict([("first", first), *layers[cut:]]))


def frozen(**settings) -> nn.Sequential:
    """The network `cifar10` with `FirstSigns` for convolutions, whose statistics are fixed.

    Takes what `models.binarynet` takes.
    """
    return _frozen("running", settings)


def frozen_batch(**settings) -> nn.Sequential:
    """The same, but the convolutions are normalized by the statistics of each batch."""
    return _frozen("batch", settings)


# ------------------------------------------------------------------------- what neighbours decide


@torch.inference_mode()
def signs_that_depend_on_the_batch(
    model: nn.Module, images: Tensor, batch_size: int, *, generator: torch.Generator
) -> dict[str, float]:
    """For each activation `act...`, by name: the share of an image's signs that neighbours decide.

    Every image is put into two random batches, normalized each by itself; the share is that of
    the signs that differ between the two, which is 1/2 for signs that are drawn anew.
    In: images (N, C, H, W), scaled; the last N mod batch_size are left out. `generator` on the
    CPU. Raises InvalidValue for a batch of one image, and for one that N images do not fill.
    """
    check_whole("batch_size", batch_size, 2)
    check_fills_batch(len(images), batch_size)
    images = images[: len(images) // batch_size * batch_size]
    orders = [torch.randperm(len(images), generator=generator) for _ in range(2)]
    one, other = (_signs(model, images, order, batch_size) for order in orders)
    return {name: (one[name] != other[name]).double().mean().item() for name in one}


def _signs(model: nn.Module, images: Tensor, order: Tensor, size: int) -> dict[str, Tensor]:
    """Where the output of each activation is positive, image by image: (N, ...) bool."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, output: Tensor) -> None:
        found.setdefault(name, []).append(output > 0)

    acts = {n: m for n, m in model.named_modules() if n.rpartition(".")[2].startswith("act")}
    hooks = [m.register_forward_hook(lambda *a, n=n: keep(n, a[2])) for n, m in acts.items()]
    with evaluating(model, statistics="batch"):
        for rows in order.split(size):
            model(images[rows])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts)[order.argsort()] for name, parts in found.items()}
