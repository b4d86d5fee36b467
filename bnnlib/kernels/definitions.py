"""What each kernel computes, in NumPy: short, slow, and what the compiled ones are held against.

A *word* holds 64 channels in its bits: bit i of word j is 1 where channel 64 j + i has the higher
of its two values, +1 of (-1, +1) or 1 of (0, 1); bits past the last channel are 0. Words lie with
the channels last: inputs (N, H, W, words), weights (O, kernel height, kernel width, words). A dense
layer is a convolution of 1x1 over an image of 1x1. Padding is with zeros, so what lies outside the
image takes no part in a sum.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bnnlib.kernels.geometry import Geometry

WORD = 64


def word_count(channels: int) -> int:
    """How many words hold so many channels."""
    return -(-channels // WORD)


def pack_bits(x: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """(..., C) bool -> (..., words)."""
    found = np.packbits(x, axis=-1, bitorder="little")
    if missing := 8 * word_count(x.shape[-1]) - found.shape[-1]:
        wider = np.zeros((*x.shape[:-1], found.shape[-1] + missing), np.uint8)
        wider[..., : found.shape[-1]] = found
        found = wider
    return found.view("<u8")


def unpack_bits(words: NDArray[np.uint64], channels: int) -> NDArray[np.uint8]:
    """(..., words) -> (..., C), each 0 or 1."""
    little = np.ascontiguousarray(words, "<u8").view(np.uint8)
    return np.unpackbits(little, axis=-1, bitorder="little", count=channels)


def pack(x: NDArray) -> NDArray[np.uint64]:
    """Numbers of two values, (..., C), as words: a bit is 1 where x > 0."""
    return pack_bits(x > 0)


def unpack(words: NDArray[np.uint64], channels: int, low: int = -1) -> NDArray[np.int64]:
    """The numbers in words: `low` or 1, (..., words) -> (..., channels)."""
    return np.where(unpack_bits(words, channels), 1, low)


def sums(
    x: NDArray[np.uint64], weight: NDArray[np.uint64], channels: int, low: int, geometry: Geometry
) -> NDArray[np.int64]:
    """The binary layer itself, (N, H', W', O): inputs of `low` or 1 times weights of -1 or 1.

    Of two signs the product is -1 where the bits differ, so a sum of n products is
    n - 2 popcount(x xor w). An input of 0 or 1 takes the weight or leaves it, and the sum is
    2 popcount(x and w) - popcount(x).
    """
    y = np.zeros((*geometry.out_shape(x.shape, weight.shape), len(weight)), np.int64)
    for (ky, kx), out, inside in _taps(x.shape, weight.shape, geometry):
        a, w = x[inside][..., None, :], weight[:, ky, kx]
        if low == -1:
            y[out] += channels - 2 * _ones(a ^ w)
        else:
            y[out] += 2 * _ones(a & w) - _ones(a)
    return y


def weight_gradient(
    x: NDArray[np.uint64], grad: NDArray, shape: tuple[int, ...], low: int, geometry: Geometry
) -> NDArray:
    """The gradient of the weights, (O, kernel height, kernel width, C) = `shape`.

    `grad`: (N, H', W', O). For each tap it is the product of two matrices, one of two values.
    """
    values, found = unpack(x, shape[-1], low), np.zeros(shape, grad.dtype)
    for (ky, kx), out, inside in _taps(x.shape, shape, geometry):
        found[:, ky, kx] = np.einsum("nyxo,nyxc->oc", grad[out], values[inside])
    return found


def input_gradient(
    weight: NDArray[np.uint64], grad: NDArray, shape: tuple[int, ...], geometry: Geometry
) -> NDArray:
    """The gradient of the inputs, (N, H, W, C) = `shape`; `grad`: (N, H', W', O)."""
    values, found = unpack(weight, shape[-1]), np.zeros(shape, grad.dtype)
    for (ky, kx), out, inside in _taps(shape, weight.shape, geometry):
        found[inside] += np.einsum("nyxo,oc->nyxc", grad[out], values[:, ky, kx])
    return found


def _ones(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """popcount over the last axis."""
    return np.bitwise_count(words).sum(-1, dtype=np.int64)


def _taps(x: tuple, weight: tuple, geometry: Geometry) -> Iterator[tuple[tuple, tuple, tuple]]:
    """Each place of the kernel: which outputs it has inputs for, and where those inputs are."""
    for ky in range(weight[1]):
        for kx in range(weight[2]):
            rows, columns = (
                _reach(tap, size, count, step, pad)
                for tap, size, count, step, pad in zip(
                    (ky, kx),
                    x[1:3],
                    geometry.out_shape(x, weight)[1:],
                    geometry.stride,
                    geometry.padding,
                    strict=True,
                )
            )
            yield (ky, kx), (slice(None), rows[0], columns[0]), (slice(None), rows[1], columns[1])


def _reach(tap: int, size: int, count: int, step: int, pad: int) -> tuple[slice, slice]:
    """The outputs i, of `count`, whose input i * step + tap - pad lies in 0 ... size - 1."""
    first = max(0, -((tap - pad) // step))
    last = min(count, (size - 1 - tap + pad) // step + 1)
    start = first * step + tap - pad
    stop = max(start, start + (last - first) * step)
    return slice(first, max(first, last)), slice(start, stop, step)


def pixel_sums(
    x: NDArray[np.uint8],
    weight: NDArray[np.uint64],
    channels: int,
    values: NDArray[np.int32],
    geometry: Geometry,
) -> NDArray[np.int64]:
    """The first layer, (N, H', W', O), on pixels p, (N, H, W, C), that stand for `values[p]`."""
    y = np.zeros((*geometry.out_shape(x.shape, weight.shape), len(weight)), np.int64)
    numbers, signs = values.astype(np.int64)[x], unpack(weight, channels)
    for (ky, kx), out, inside in _taps(x.shape, weight.shape, geometry):
        y[out] += numbers[inside] @ signs[:, ky, kx].T
    return y
