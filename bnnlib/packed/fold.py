"""Bias, batch normalization and sign as one threshold a channel, found by asking.

A formula for the threshold would round otherwise than the layers do. So the modules themselves are
asked, in evaluation, what becomes of a sum: for every integer that the sum of a binary layer can
be, and for pixels by bisection. Rounding keeps the order of numbers, hence the answer changes once.
"""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnnlib.data.images import scale_pixels
from bnnlib.errors import InvalidValue

Ask = Callable[[Tensor], Tensor]  # sums (R, O) float32 -> (R, O) bool: is the activation 1?
AT_ONCE = 2**20  # sums that are asked for at once
REACH = 2.0**64  # no sum is larger; from here on a normalization may overflow
GRID = 1025  # numbers at which a bisection is checked
UNITS = 2**24  # in 1, of a scaled pixel


def asking(parts: Sequence[nn.Module], bias: Tensor | None, conv: bool) -> Ask:
    """What `parts`, the modules between a layer and the next one, make of a sum and the bias.

    `conv`: the layer is a convolution, whose channels are followed by height and width.
    """

    def ask(values: Tensor) -> Tensor:
        y = values if bias is None else values + bias
        y = y[..., None, None] if conv else y
        for part in parts:
            y = part(y)
        return y.reshape(values.shape) == 1

    return ask


def fold(ask: Ask, channels: int, largest: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The threshold t and the flip f of each channel: it is 1 where (sum >= t) differs from f.

    Asks for all sums from -largest to largest. A channel that is never 1 before the flip has
    t = largest + 1. Raises InvalidValue where an answer changes twice.
    Source: Umuroglu et al., "FINN", FPGA 2017 (arXiv:1612.07119), section 4.2.2, has the threshold
    in closed form.
    """
    ones, changes = (torch.zeros(channels, dtype=torch.int64) for _ in range(2))
    first = last = None
    sums, rows = torch.arange(-largest, largest + 1.0), max(1, AT_ONCE // channels)
    for part in sums.split(rows):
        z = ask(part[:, None].repeat(1, channels))
        first, last = (z[0], z[0]) if first is None else (first, last)
        changes += (z[0] != last) + (z[1:] != z[:-1]).sum(0)
        ones, last = ones + z.sum(0), z[-1]
    if (changes > 1).any():
        raise _not_monotone(changes > 1)
    flips = first & ~last
    ones = torch.where(flips, len(sums) - ones, ones)
    return (largest + 1 - ones).to(torch.int32).numpy(), flips.numpy()


def switches(ask: Ask, channels: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """As `fold`, for sums that are any float32 numbers: t is the smallest that the answer is for.

    It is found by bisection, in 33 questions; infinite where the answer never changes.
    Raises InvalidValue where a few numbers in between are answered otherwise.
    """
    low, high = (np.full(channels, _rank(x), np.int64) for x in (-REACH, REACH))
    first, last = _asked(ask, low), _asked(ask, high)
    flips = first & ~last
    while (high - low > 1).any():
        middle = (low + high) // 2
        above = _asked(ask, middle) ^ flips
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    t = np.where(first == last, np.where(first, -np.inf, np.inf), _number(high))
    t, grid = t.astype(np.float32), np.linspace(-GRID, GRID, GRID, dtype=np.float32)[:, None]
    wrong = ask(torch.from_numpy(grid.repeat(channels, 1))).numpy() != ((grid >= t) ^ flips)
    if wrong.any():
        raise _not_monotone(wrong.any(0))
    return t, flips


def _asked(ask: Ask, ranks: NDArray[np.int64]) -> NDArray[np.bool_]:
    return ask(torch.from_numpy(_number(ranks))[None])[0].numpy()


def _rank(number: float) -> int:
    """The place of a float32 among all of them: 0 is that of 0, a step is the next number."""
    bits = int(np.float32(abs(number)).view(np.int32))
    return bits if number >= 0 else -bits


def _number(ranks: NDArray[np.int64]) -> NDArray[np.float32]:
    """The float32 numbers of these ranks."""
    return np.copysign(np.abs(ranks).astype(np.int32).view(np.float32), ranks).astype(np.float32)


def _not_monotone(channels: NDArray | Tensor) -> InvalidValue:
    return InvalidValue(
        f"the activation of {int(channels.sum())} channels is no threshold of their sum"
    )


# ------------------------------------------------------------------------------------- pixels


@cache
def pixel_values() -> NDArray[np.int32]:
    """`scale_pixels` of 0 ... 255 in units of 2^-24, in which all of them are whole numbers."""
    scaled = scale_pixels(torch.arange(256, dtype=torch.uint8)).double() * UNITS
    return scaled.to(torch.int32).numpy()


def pixel_thresholds(t: NDArray[np.float32], terms: int) -> NDArray[np.int32]:
    """The smallest integer S, a sum of up to so many `pixel_values`, that is t or more in float32.

    In evaluation a first layer of at most `MOST_PIXELS` terms rounds its sum once (see
    `kernels.products`), so that it is S / 2^24 rounded, in whatever order it was added.
    """
    largest = terms * UNITS
    low, high = np.full(len(t), -largest - 1), np.full(len(t), largest + 1)
    while (high - low > 1).any():
        middle = (low + high) // 2
        reached = (middle / UNITS).astype(np.float32) >= t
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return np.maximum(high, -largest).astype(np.int32)  # not lower where all sums are enough
