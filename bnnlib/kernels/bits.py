"""Products of packed words: the compiled kernels, or their definitions where there are none.

What each computes, and how words lie, is in `definitions.py`.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnnlib.kernels import definitions
from bnnlib.kernels.compiled import SETS, Shape, library
from bnnlib.kernels.definitions import WORD, word_count
from bnnlib.kernels.geometry import MOST_PIXELS, Geometry

Words = NDArray[np.uint64]

MOST_TERMS = 2**16 - 1  # of a sum that the kernels count in 16 bits
LEAST_WORK = 2**19  # products; below, calling a kernel takes as long as computing them
GROUP = 4  # images that a table of `gradients.c` is for


def _at(array: Tensor | NDArray | None) -> int | None:
    """The address of an array's first number."""
    if isinstance(array, Tensor):
        return array.data_ptr()
    return None if array is None else array.ctypes.data


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a kernel to write to, whatever PyTorch's defaults are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _shape(x: tuple, weight: tuple, channels: int, low: int, geometry: Geometry) -> Shape:
    """Of inputs (N, H, W, ...) and weights (O, kernel height, kernel width, ...)."""
    return Shape(
        *x[:3],
        channels,
        *weight[:3],
        *geometry.stride,
        *geometry.padding,
        *geometry.out_shape(x, weight)[1:],
        word_count(channels),
        low,
        torch.get_num_threads(),
    )


# ----------------------------------------------------------------------------------- training


def pack(x: Tensor, latent: bool = False) -> tuple[Tensor, int] | None:
    """Words of x, (..., C) -> (..., words) as int64, and the lower of its two values, -1 or 0.

    None where x has other values. `latent`: words of sign(x), of any x without NaN.
    """
    words = _empty(*x.shape[:-1], word_count(x.shape[-1]), dtype=torch.int64)
    rows, threads = prod(x.shape[:-1]), torch.get_num_threads()
    other = library().pack(_at(x), rows, x.shape[-1], latent, threads, _at(words))
    return None if other == 3 else (words, -1 if other != 1 else 0)


def channels_last(x: Tensor) -> Tensor:
    """(A, C[, H, W]) as (A, H, W, C), in this order in the memory; a view where it lies so."""
    x = x.detach()
    return (x[:, None, None] if x.dim() == 2 else x.permute(0, 2, 3, 1)).contiguous()


def pays(shape: Shape) -> bool:
    """Whether a product and its gradients take less time here than PyTorch's."""
    s, least = shape, SETS[library().set]
    if s.c < least.inputs or s.o < least.outputs or (s.n < GROUP and torch.is_grad_enabled()):
        return False
    return s.n * s.oh * s.ow * s.o * s.kh * s.kw * s.c >= LEAST_WORK


class Operands(NamedTuple):
    """The factors of a product as words, for its value and its gradients, in float32."""

    x: Tensor
    weight: Tensor
    shape: Shape

    @classmethod
    def packed(cls, x: Tensor, weight: Tensor, latent: bool, geometry: Geometry):
        """Of images (N, C, H, W) and weights (O, C, height, width), or of matrices (N, C), (O, C).

        None without kernels, where these are slower than PyTorch's, and where a factor has values
        that are no words. `latent`: the weights stand for their signs.
        """
        if library() is None or weight.shape[1:].numel() > MOST_TERMS:
            return None
        (n, c, *size), (o, _, *kernel) = x.shape, weight.shape
        shape = _shape((n, *(size or (1, 1))), (o, *(kernel or (1, 1))), c, -1, geometry)
        if not pays(shape) or (weights := pack(channels_last(weight), latent)) is None:
            return None
        if weights[1] != -1 or (inputs := pack(channels_last(x))) is None:
            return None
        words, shape.low = inputs
        return cls(words, weights[0], shape)

    def sums(self, bias: Tensor | None) -> Tensor:
        """`definitions.sums` and the bias, (N, H', W', O)."""
        s, bias = self.shape, None if bias is None else bias.detach().contiguous()
        y = _empty(s.n, s.oh, s.ow, s.o)
        prepared = _prepared(self.weight, s)
        library().sums(_in_a_row(s), _at(self.x), _at(prepared), _at(y), _at(bias), None, None)
        return y

    def weight_gradient(self, grad: Tensor) -> Tensor:
        """`definitions.weight_gradient`; `grad`: (N, H', W', O), contiguous."""
        s = self.shape
        found = _empty(s.o, s.kh, s.kw, s.c)
        library().weight_gradient(s, _at(self.x), _at(grad), _at(found))
        return found

    @property
    def gives_input_gradient(self) -> bool:
        """The portable kernels have none: without instructions that permute it is slow."""
        return library().set != "portable"

    def input_gradient(self, grad: Tensor) -> Tensor:
        """`definitions.input_gradient`; `grad`: (N, H', W', O), contiguous."""
        s = self.shape
        found = _empty(s.n, s.h, s.w, s.c)
        library().input_gradient(_in_a_row(s), _at(self.weight), _at(grad), _at(found))
        return found


def _prepared(weight: Tensor | Words, shape: Shape) -> Tensor:
    """Weights in the order in which the kernel reads them."""
    count = shape.kh * shape.kw * shape.words
    prepared = _empty(library().prepared_bytes(shape.o, count), dtype=torch.uint8)
    library().prepare(_at(weight), shape.o, count, shape.threads, _at(prepared))
    return prepared


def _in_a_row(shape: Shape) -> Shape:
    """Images of one pixel as the pixels of one image: kernels take neighbours together."""
    if (shape.h, shape.w, shape.oh, shape.ow) != (1, 1, 1, 1) or shape.ph or shape.pw:
        return shape
    row = Shape.from_buffer_copy(shape)
    row.n, row.w, row.ow = 1, shape.n, shape.n
    row.sw = 1
    return row


# ---------------------------------------------------------------------------------- inference


@dataclass(frozen=True)
class Weights:
    """Weights of a binary layer, as words (O, kernel height, kernel width, words)."""

    words: Words
    channels: int

    @property
    def terms(self) -> int:
        """How many products a sum has, at most."""
        return self.words.shape[1] * self.words.shape[2] * self.channels

    @cached_property
    def prepared(self) -> Tensor:
        unit = _shape((1, 1, 1), self.words.shape, self.channels, -1, Geometry())
        return _prepared(self.words, unit)

    @cached_property
    def masks(self) -> Tensor:
        """-1 for +1 and 0 for -1, int32 (blocks of 64 outputs, kernel height and width, C, 64)."""
        values = -definitions.unpack(self.words, self.channels, low=0).astype(np.int32)
        padded = np.pad(values, [(0, -len(values) % WORD), (0, 0), (0, 0), (0, 0)])
        blocks = padded.reshape(-1, WORD, *values.shape[1:]).transpose(0, 2, 3, 4, 1)
        return torch.from_numpy(blocks.copy()).clone()  # which lies at a cache line's start


def sums(x: Words, weight: Weights, low: int, geometry: Geometry) -> NDArray[np.float32]:
    """The binary layer: (N, H, W, words) -> (N, H', W', O)."""
    if library() is None or weight.terms > MOST_TERMS:
        found = definitions.sums(x, weight.words, weight.channels, low, geometry)
        return found.astype(np.float32)
    shape = _shape(x.shape, weight.words.shape, weight.channels, low, geometry)
    y = np.empty((shape.n, shape.oh, shape.ow, shape.o), np.float32)
    row = _in_a_row(shape)
    library().sums(row, _at(x), _at(weight.prepared), _at(y), None, None, None)
    return y


def at_least(
    x: Words, weight: Weights, low: int, thresholds: NDArray[np.int32], geometry: Geometry
) -> Words:
    """Where the sums reach the threshold of their output, (O,), as words (N, H', W', words)."""
    if library() is None or weight.terms > MOST_TERMS:
        return definitions.pack(sums(x, weight, low, geometry) >= thresholds)
    shape = _shape(x.shape, weight.words.shape, weight.channels, low, geometry)
    bits = np.zeros((shape.n, shape.oh, shape.ow, word_count(shape.o)), np.uint64)
    row = _in_a_row(shape)
    library().sums(row, _at(x), _at(weight.prepared), None, None, _at(bits), _at(thresholds))
    return bits


def pixel_sums_at_least(
    x: NDArray[np.uint8],
    weight: Weights,
    values: NDArray[np.int32],
    thresholds: NDArray[np.int32],
    geometry: Geometry,
) -> Words:
    """The same for pixels p, (N, H, W, C), that stand for `values[p]`, at most 2^24 each."""
    if library() is None or weight.terms > MOST_PIXELS:
        found = definitions.pixel_sums(x, weight.words, weight.channels, values, geometry)
        return definitions.pack(found >= thresholds)
    shape = _shape(x.shape, weight.words.shape, weight.channels, -1, geometry)
    bits = np.empty((shape.n, shape.oh, shape.ow, word_count(shape.o)), np.uint64)
    addresses = map(_at, (x, weight.masks, values, bits, thresholds))
    library().pixel_sums(shape, *addresses)
    return bits
