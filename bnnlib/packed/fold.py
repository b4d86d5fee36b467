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


def pixel_thresholds(
    t: NDArray[np.float32], terms: Sequence[int]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Thresholds of the integer S = sum of (2 p - 255) w that decide as the float sum f does.

    f is the sum, in float32 and in any order, of `scale_pixels`(p) w, where w is +1 or -1; in real
    numbers it were S / 255. `t`: those f from which on the answer is another, see `switches`.
    `terms`: how many pixels an f may have, at the borders of the image as well.

    Also returned: for which channels nothing can be said, because an integer that S can be lies so
    close to 255 t that rounding decides. S has the parity of its terms, as 2 p - 255 is odd.
    """
    exact = 255 * t.astype(np.float64)  # 8 + 24 bits
    doubtful = np.zeros(len(t), bool)
    for n in terms:
        within = np.abs(exact) <= 255.0 * n + 256
        near = np.where(within, exact, 0)
        s = np.clip(2 * np.round((near - n) / 2) + n, -255 * n, 255 * n)  # the nearest of parity n
        doubtful |= within & (np.abs(s - near) <= 255 * pixel_error(n, np.abs(s) / 255))
    largest = 255 * max(terms)
    return np.clip(np.ceil(exact), -largest, largest + 1).astype(np.int32), doubtful


def pixel_error(terms: int, total: NDArray[np.float64]) -> NDArray[np.float64]:
    """A bound on |f - S / 255| for sums of so many pixels where |S / 255| is `total`."""
    p = torch.arange(256, dtype=torch.uint8)
    scaling = (scale_pixels(p).double() - (2 * p.double() - 255) / 255).abs().max().item()
    step = max(1, terms // 16)  # few different totals, rounded up
    totals = step * np.ceil((total + terms * scaling) / step).astype(int)
    found, place = np.unique(totals, return_inverse=True)
    return np.array([addition_error(terms, int(x)) for x in found])[place] + terms * scaling


@cache
def addition_error(terms: int, total: int) -> float:
    """A bound on the error of a float32 sum of scaled pixels, in whatever order it is taken.

    Scaled pixels are at most 1 and multiples of 2^-24. Adding in any order is a binary tree whose
    leaves are the terms. Above k leaves lies a number p of at most k, and of at most terms - k +
    total, as the rest must bring it back to the total. Its rounding moves it by at most half the
    distance of float32 numbers around p; `worst` is the largest sum of these over all trees.
    """
    k = np.arange(terms + 1)
    p = np.minimum(k, terms - k + total) + terms**2 * 2.0**-23  # the errors so far: less than that
    rounding = 2.0 ** (np.floor(np.log2(np.maximum(p, 1))) - 24)
    worst = np.zeros(terms + 1)
    for n in range(2, terms + 1):
        left = np.arange(1, n // 2 + 1)
        worst[n] = rounding[n] + (worst[left] + worst[n - left]).max()
    return float(worst[terms])
