"""What a packed network does, step by step; each step is called with what the one before gives.

Between steps flows either a tensor of real numbers, as PyTorch has it, or words: bits of
activations, (N, H, W, words) as in `kernels.definitions`, and (N, 1, 1, words) between dense
layers. The fields of a step are what a file keeps of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnnlib.data.images import scale_pixels
from bnnlib.errors import InvalidValue, shown
from bnnlib.kernels import bits
from bnnlib.kernels.bits import Words
from bnnlib.kernels.definitions import WORD, pack_bits, unpack_bits, word_count
from bnnlib.kernels.geometry import Geometry
from bnnlib.layers import BatchNorm, BinaryConv2d, BinaryLinear
from bnnlib.packed.fold import pixel_values

Pair = tuple[int, int]


def _check(right: object, what: str, value: object) -> None:
    if not right:
        raise InvalidValue(f"{what}, got {shown(value)}")


def _is_array(x: object, kind: type, *shape: int) -> bool:
    return isinstance(x, np.ndarray) and x.dtype == kind and x.shape == shape


def _is_pair(value: object, low: int) -> bool:
    numbers = isinstance(value, tuple) and [low <= v < 2**15 for v in value if type(v) is int]
    return bool(numbers) and len(value) == 2 and numbers == [True, True]


# ------------------------------------------------------------------------------ binary layers


@dataclass(frozen=True, eq=False)
class Weighted:
    """The weights of a binary layer, and how they move over an image.

    A dense layer is a convolution of 1x1 whose channels are the columns of its weight matrix: in
    the order (C, H, W) where it is the first layer, in (H, W, C) after a map of words.
    """

    words: Words  # (O, kernel height, kernel width, words of C)
    channels: int  # C
    dense: bool
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    pad_value: int = 0  # what lies around the image: 0, 1 or -1

    def __post_init__(self) -> None:
        _check(type(self.channels) is int and self.channels > 0, "channels", self.channels)
        ok = isinstance(self.words, np.ndarray) and self.words.dtype == np.uint64
        ok = ok and self.words.ndim == 4 and self.words.size and self.words.flags.c_contiguous
        _check(ok, "words must be uint64 (O, h, w, words)", self.words)
        shape = self.words.shape
        _check(shape[3] == word_count(self.channels), f"words of {self.channels} channels", shape)
        taps = self.channels * shape[1] * shape[2]
        _check(taps < 2**23, "sums have at most 8 million terms, which float32 holds exactly", taps)
        rest = self.channels % WORD
        past = rest and (self.words[..., -1] >> np.uint64(rest)).any()
        _check(not past, "bits past the last channel must be 0", "others")
        _check(_is_pair(self.stride, 1), "stride must be two numbers", self.stride)
        _check(_is_pair(self.padding, 0), "padding must be two numbers", self.padding)
        ok = type(self.pad_value) is int and self.pad_value in (-1, 0, 1)
        _check(ok, "pad_value must be -1, 0 or 1", self.pad_value)
        _check(type(self.dense) is bool, "dense must be true or false", self.dense)
        plain = (self.stride, self.padding, shape[1:3]) == ((1, 1), (0, 0), (1, 1))
        _check(plain or not self.dense, "a dense layer has a kernel of 1x1", shape)

    @property
    def out(self) -> int:
        return len(self.words)

    @cached_property
    def weight(self) -> bits.Weights:
        return bits.Weights(self.words, self.channels)

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry(self.stride, (0, 0) if self.pad_value else self.padding)

    def _bordered(self, x: NDArray, value: NDArray) -> NDArray:
        """`x`, (N, H, W, ...), with `value` around it, where the border is not of zeros."""
        (v, h), (n, height, width, last) = self.padding, x.shape
        found = np.empty((n, height + 2 * v, width + 2 * h, last), x.dtype)
        found[:] = value
        found[:, v : v + height, h : h + width] = x
        return found


@dataclass(frozen=True, eq=False)
class _Inner(Weighted):
    """A binary layer that is fed with words of `low` or 1."""

    low: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.low in (-1, 0), "low must be -1 or 0", self.low)
        possible = self.low <= self.pad_value
        _check(possible, f"a border of words of {self.low} and 1", self.pad_value)

    @cached_property
    def border(self) -> Words:
        """The words of a pixel around the image."""
        return pack_bits(np.full(self.channels, self.pad_value == 1))

    def prepared(self, x: Words) -> Words:
        _, height, width, last = x.shape
        if last != self.words.shape[3] or (self.dense and (height, width) != (1, 1)):
            raise InvalidValue("the network takes images of another size")
        return self._bordered(x, self.border) if self.pad_value else x


@dataclass(frozen=True, eq=False)
class Layer(_Inner):
    """Words -> words: 1 where a sum reaches the threshold of its channel."""

    thresholds: NDArray[np.int32] | None = None  # (O,), in units of the sum

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = _is_array(self.thresholds, np.int32, self.out)
        _check(ok, f"thresholds must be {self.out} of int32", self.thresholds)

    def __call__(self, x: Words) -> Words:
        x = self.prepared(x)
        return bits.at_least(x, self.weight, self.low, self.thresholds, self.geometry)


@dataclass(frozen=True, eq=False)
class Sums(_Inner):
    """Words -> the sums themselves and the bias, (N, O, H', W'), or (N, O) of a dense layer."""

    bias: NDArray[np.float32] | None = None  # (O,)

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = self.bias is None or _is_array(self.bias, np.float32, self.out)
        _check(ok, f"bias must be {self.out} of float32", self.bias)

    def __call__(self, x: Words) -> Tensor:
        y = bits.sums(self.prepared(x), self.weight, self.low, self.geometry)
        y = y if self.bias is None else y + self.bias
        y = torch.from_numpy(y)
        return y.flatten(1) if self.dense else y.permute(0, 3, 1, 2)


@dataclass(frozen=True, eq=False)
class First(Weighted):
    """The first binary layer, fed with 8-bit pixels or with real numbers: -> words.

    - `pixels`: integer sums of `fold.pixel_values` against `thresholds`; None where these would
      have too many terms.
    - `real`: the plain layer in float32, on the whole batch, against `switches`. Without them its
      real numbers are passed on.
    """

    bias: NDArray[np.float32] | None = None  # (O,)
    switches: NDArray[np.float32] | None = None  # (O,), of the layer's output with the bias
    thresholds: NDArray[np.int32] | None = None  # (O,)
    channels_last: bool = False  # the memory format of the plain layer's weight

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (
            ("bias", np.float32),
            ("switches", np.float32),
            ("thresholds", np.int32),
        ):
            value = getattr(self, name)
            ok = value is None or _is_array(value, kind, self.out)
            _check(ok, f"{name} must be {self.out} of {kind.__name__}", value)
        ok = self.switches is not None or self.thresholds is None
        _check(ok, "thresholds come with switches", self.switches)
        _check(type(self.channels_last) is bool, "channels_last", self.channels_last)

    @cached_property
    def plain(self) -> nn.Module:
        """The layer as it was before it was packed, with weights of +1 and -1."""
        signs = unpack_bits(self.words, self.channels).astype(np.float32) * 2 - 1
        weight, kernel = torch.from_numpy(signs).permute(0, 3, 1, 2), self.words.shape[1:3]
        has_bias = self.bias is not None
        with torch.device("meta"):
            if self.dense:
                layer, weight = BinaryLinear(self.channels, self.out, has_bias), weight.flatten(1)
            else:
                layer = BinaryConv2d(
                    *(self.channels, self.out, kernel, self.stride, self.padding, has_bias),
                    pad_value=float(self.pad_value),
                )
        state = {"weight": lying(weight, self.channels_last)}
        if has_bias:
            state["bias"] = torch.from_numpy(self.bias)
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(False).eval()

    def counts(self, x: Tensor) -> bool:
        """Whether integers decide about these images."""
        return self.thresholds is not None and x.dtype == torch.uint8

    def pixels(self, x: Tensor) -> Words:
        """(N, C, H, W) uint8 -> words."""
        if self.dense:
            x = x.flatten(1)[:, None, None].numpy()
        else:
            x = x.permute(0, 2, 3, 1).contiguous().numpy()
            if self.pad_value:
                x = self._bordered(x, np.uint8(255 if self.pad_value == 1 else 0))
        values = pixel_values()
        return bits.pixel_sums_at_least(x, self.weight, values, self.thresholds, self.geometry)

    def real(self, x: Tensor) -> Words | Tensor:
        """(N, C, H, W) -> words."""
        y = self.plain(scale_pixels(x).flatten(1) if self.dense else scale_pixels(x))
        if self.switches is None:
            return y
        y = y.reshape(len(y), self.out, *y.shape[2:] or (1, 1)).permute(0, 2, 3, 1)
        return pack_bits(y.numpy() >= self.switches)

    def __call__(self, x: Tensor) -> Words | Tensor:
        if (x[:0].flatten(1) if self.dense else x).shape[1] != self.channels:
            what = "numbers" if self.dense else "channels"
            raise InvalidValue(
                f"the network takes images of {self.channels} {what}, got {tuple(x.shape[1:])}"
            )
        return self.pixels(x) if self.counts(x) else self.real(x)


# ------------------------------------------------------------------------- words and numbers


@dataclass(frozen=True, eq=False)
class Pool:
    """Max-pooling of words, where the larger of two values is the bit 1: a bitwise or."""

    size: Pair
    stride: Pair

    def __post_init__(self) -> None:
        for value in (self.size, self.stride):
            _check(_is_pair(value, 1), "a pool has two numbers", value)

    def __call__(self, x: Words) -> Words:
        for axis, (size, step) in enumerate(zip(self.size, self.stride, strict=True), start=1):
            x = self._along(axis, x, size, step)
        return x

    @staticmethod
    def _along(axis: int, x: Words, size: int, step: int) -> Words:
        """Each `step`-th window of `size` rows, or columns."""
        count = (x.shape[axis] - size) // step + 1
        if count < 1:
            raise InvalidValue(f"a pool of {size} leaves nothing of {x.shape[axis]} pixels")
        before, span = (slice(None),) * axis, step * (count - 1) + 1
        parts = [x[(*before, slice(i, i + span, step))] for i in range(size)]
        if size == 1:
            return np.ascontiguousarray(parts[0])
        found = parts[0] | parts[1]
        for part in parts[2:]:
            found |= part
        return found


@dataclass(frozen=True, eq=False)
class Flip:
    """The other bit in some channels, those whose normalization turns the order around."""

    flips: Words  # (words,)

    def __post_init__(self) -> None:
        ok = isinstance(self.flips, np.ndarray) and self.flips.dtype == np.uint64
        _check(ok and self.flips.ndim == 1, "flips must be words", self.flips)

    def __call__(self, x: Words) -> Words:
        return np.bitwise_xor(x, self.flips, out=x)  # the words of the step before, its own


@dataclass(frozen=True, eq=False)
class Flatten:
    """A map of words as the inputs of a dense layer: (N, H, W, words) -> (N, 1, 1, words)."""

    channels: int

    def __post_init__(self) -> None:
        _check(type(self.channels) is int and self.channels > 0, "channels", self.channels)

    def __call__(self, x: Words) -> Words:
        n, height, width, words = x.shape
        if self.channels % WORD:
            columns = height * width * self.channels
            return pack_bits(unpack_bits(x, self.channels).reshape(n, 1, 1, columns))
        return x.reshape(n, 1, 1, height * width * words)


@dataclass(frozen=True, eq=False)
class Signs:
    """Real numbers -> words: 1 where a number is not negative. (N, C[, H, W])"""

    def __call__(self, x: Tensor) -> Words:
        x = x.reshape(*x.shape[:2], *x.shape[2:] or (1, 1)).permute(0, 2, 3, 1)
        return pack_bits(~(x.numpy() < 0))


@dataclass(frozen=True, eq=False)
class Real:
    """A module of real numbers, as it is."""

    module: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)


@dataclass(frozen=True, eq=False)
class Residual:
    """body(x) + shortcut(x) of real numbers, in the memory format of x."""

    body: tuple = ()
    shortcut: tuple = ()  # none: x itself

    def __call__(self, x: Tensor) -> Tensor:
        y = in_order(self.body, x)
        form = torch.channels_last if is_last(x) else torch.contiguous_format
        return y.contiguous(memory_format=form) + in_order(self.shortcut, x)


def is_last(x: Tensor) -> bool:
    """Whether a tensor has the strides of channels_last, by which PyTorch chooses its kernels.

    `is_contiguous` is true of both formats where there is one channel or one pixel.
    """
    return x.stride() == _outline(x, True).stride() != _outline(x, False).stride()


def lying(x: Tensor, last: bool) -> Tensor:
    """A copy of a tensor with the strides of channels_last, or with the usual ones."""
    return torch.empty_strided(x.shape, _outline(x, last).stride()).copy_(x)


def _outline(x: Tensor, last: bool) -> Tensor:
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(x.shape, device="meta", memory_format=form)


def in_order(steps: Sequence, x):
    """What the steps make of x, one after the other."""
    for step in steps:
        x = step(x)
    return x


# What may stay real, and what a file says of it, by the names that its constructor takes.
REAL = {
    nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups"),
    nn.Linear: ("in_features", "out_features"),
    BatchNorm: ("features", "eps"),
    nn.BatchNorm1d: ("num_features", "eps", "affine"),
    nn.BatchNorm2d: ("num_features", "eps", "affine"),
    nn.MaxPool2d: ("kernel_size", "stride"),
    nn.AvgPool2d: ("kernel_size", "stride", "ceil_mode"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.Flatten: (),
}
STEPS = {kind.__name__.lower(): kind for kind in (Layer, Sums, First, Pool, Flip, Flatten, Signs)}
ON_WORDS = (Layer, Sums, Pool, Flip, Flatten)  # each image by itself, so a batch goes in slices
