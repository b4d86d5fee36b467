"""What all contenders of one comparison share: the network's shapes, the batch, the images.

In: the name of a network of `bnnlib.models.ARCHITECTURES` and a width. Out: the shape of each
layer, the arithmetic it takes, and made-up images.
"""

from dataclasses import dataclass

import torch

from bnnlib.data.images import ImageSet
from bnnlib.models import ARCHITECTURES

LEARNING_RATE = 1e-3
KERNEL = 3  # height and width of every convolution
CLASSES = tuple("0123456789")


@dataclass(frozen=True)
class Setting:
    """One network on one machine, and how much of it is worked through at a time."""

    network: str = "cifar10"
    width: float = 1.0
    batch_size: int = 50
    steps: int = 1  # of one epoch, the unit that is timed
    images: int = 0  # held in memory; at least what an epoch takes
    test_images: int = 0  # held as well
    threads: int = 2
    device: str = "cpu"
    folder: str = ""  # with the files of a network that is evaluated

    @property
    def epoch_images(self) -> int:
        """Images that one epoch trains on."""
        return self.steps * self.batch_size


@dataclass(frozen=True)
class Shape:
    """A layer with weights: a 3x3 convolution of maps of `size` x `size`, or a dense layer."""

    name: str  # as in `bnnlib.models`: conv1 ... dense9
    inputs: int  # channels or features
    outputs: int
    size: int = 0  # 0: dense
    pooled: bool = False  # a 2x2 pool follows

    @property
    def flops(self) -> int:
        """Operations of the forward pass of one image; multiplying and adding are two."""
        places = KERNEL**2 * self.size**2 if self.size else 1
        return 2 * self.inputs * self.outputs * places


def shapes(network: str, width: float) -> list[Shape]:
    """The layers with weights, from input to output."""
    a = ARCHITECTURES[network]
    found, inputs, size = [], 3, a.image_size
    for i, outputs in enumerate(_scaled(a.convolutions, width), start=1):
        pooled = i % a.pool_every == 0
        found.append(Shape(f"conv{i}", inputs, outputs, size, pooled))
        inputs, size = outputs, size // 2 if pooled else size
    inputs *= size * size
    for i, outputs in enumerate((*_scaled(a.dense, width), a.classes), start=len(found) + 1):
        found.append(Shape(f"dense{i}", inputs, outputs))
        inputs = outputs
    return found


def _scaled(sizes: tuple[int, ...], width: float) -> list[int]:
    return [max(1, round(width * size)) for size in sizes]


def training_flops(network: str, width: float) -> int:
    """Operations of one image's step: three products a layer, two in the first.

    Nobody asks for the gradient of the images.
    """
    first, *rest = shapes(network, width)
    return 2 * first.flops + 3 * sum(shape.flops for shape in rest)


def forward_flops(network: str, width: float) -> int:
    """Operations of one image's scores."""
    return sum(shape.flops for shape in shapes(network, width))


def made_up(n: int, split: str, device: str = "cpu") -> ImageSet:
    """n images (n, 3, 32, 32) uint8 of noise, with labels; the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(len(CLASSES), (n,), generator=generator)
    return ImageSet(images.to(device), labels.to(device), "made up", split, CLASSES)
