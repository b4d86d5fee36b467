"""The whole set on the device; a batch is an index."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bnnlib.data.images import ImageSet, scale_pixels
from bnnlib.errors import InvalidValue, check_fills_batch, check_whole


class Batches:
    """An `ImageSet` held once on `device`, read in mini-batches of `batch_size`.

    Raises InvalidValue where the set is empty or the batch size is not positive.
    """

    def __init__(self, data: ImageSet, batch_size: int, device: torch.device | str = "cpu"):
        if len(data) == 0:
            raise InvalidValue(f"{data.name} {data.split}: no images to make batches of")
        self.images = data.images.to(device)
        self.labels = data.labels.to(device)
        self.classes = len(data.class_names)
        self.batch_size = check_whole("batch_size", batch_size, 1)

    def __len__(self) -> int:
        """Images in the set."""
        return len(self.labels)

    @property
    def n_batches(self) -> int:
        """Full batches in the set."""
        return len(self) // self.batch_size

    def order(self, generator: torch.Generator) -> Tensor:
        """The images of each full batch of an epoch, drawn anew: (n_batches, batch_size) int64.

        Images that are left over are dropped. The original drops them too, by Python 2's
        integer division (`binary_net_random_labels.py:282`). `generator` is a CPU generator,
        and so is the result: the order is the same on every device.
        """
        check_fills_batch(len(self), self.batch_size)
        order = torch.randperm(len(self), generator=generator)
        return order[: self.n_batches * self.batch_size].view(self.n_batches, self.batch_size)

    def shuffled(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of full batches in the order drawn from `generator`."""
        for index in self.order(generator).to(self.labels.device):
            yield self.take(index)

    def in_order(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in the order of the set; the last batch may be smaller."""
        size = batch_size or self.batch_size
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def take(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """The images at `index`, as a network takes them, and their labels."""
        x = scale_pixels(self.images[index])
        return x.contiguous(memory_format=torch.channels_last), self.labels[index]
