"""The machine's own limits: its best rates, and the products of one training step by themselves.

In: a `Setting`. Out: rates, and seconds of each product in each way. A training step computes, for
each layer, its outputs, the gradient of its weights and, but for the first, that of its inputs.
On a GPU each time includes a launch, and all is in float32: to compare with, no bound.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import Entrant
from benchmarks.settings import KERNEL, Setting, Shape, shapes
from bnnlib.kernels import bits
from bnnlib.kernels.compiled import library
from bnnlib.kernels.definitions import WORD
from bnnlib.kernels.geometry import Geometry
from bnnlib.quantizers import sign

GEMM_SIZES = (1024, 2048)  # of square matrices
COPIED = 2**25  # float32 numbers, more than any cache holds
INPUTS, OUTPUTS = 2048, 64  # of a layer whose weights stay in the first cache, as words
PIXELS = (128, 1, 32)  # that it is applied to
TRIES = 3  # the best of so many is a rate
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
WORDS = "words"  # the way of the kernels, beside the formats


class Rates(Entrant):
    """The most that the machine does in a second, each in a loop of its own."""

    def __init__(self, setting: Setting):
        self.steps, self.device = setting.steps, torch.device(setting.device)
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.gemms = [self._gemm(size) for size in GEMM_SIZES]
        self.copied = [torch.zeros(COPIED, device=self.device) for _ in range(2)]
        self.layer = self._layer() if self.device.type == "cpu" and library() else None
        self.measure()  # the first calls include preparations

    def measure(self) -> dict[str, Any]:
        """The rates, by name."""
        return {"rates": self.rates()}

    def rates(self) -> dict[str, float]:
        """Operations of float32 and bytes a second, and on a processor operations of words.

        - "floats": in a product of two large square matrices.
        - "bytes": read and written, in copying what no cache holds.
        - "words": in a binary layer that compares and counts words whose weights lie in the first
          cache, so that hardly anything but the instructions takes time. The difference of two
          signs and adding it are two operations, as multiplying and adding are.
        """
        source, target = self.copied
        found = {
            "floats": max(2 * n**3 / self._least(gemm) for n, gemm in self.gemms),
            "bytes": 2 * source.nbytes / self._least(lambda: target.copy_(source)),
        }
        if self.layer:
            products = INPUTS * OUTPUTS * PIXELS[0] * PIXELS[2]
            found["words"] = 2 * products / self._least(self.layer)
        return found

    def _least(self, call: Callable[[], Any]) -> float:
        return min(self._seconds(call) for _ in range(TRIES))

    def _seconds(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _gemm(self, size: int) -> tuple[int, Callable]:
        return size, partial(torch.mm, self._random(size, size), self._random(size, size))

    def _layer(self) -> Callable:
        words = partial(np.random.default_rng(0).integers, 2**64, dtype=np.uint64)
        weight = bits.Weights(words(size=(OUTPUTS, 1, 1, INPUTS // WORD)), INPUTS)
        x, thresholds = words(size=(*PIXELS, INPUTS // WORD)), np.zeros(OUTPUTS, np.int32)
        return partial(bits.at_least, x, weight, -1, thresholds, Geometry())


@dataclass
class Product:
    """One of a layer's products, in every way it is tried in."""

    layer: str
    kind: str  # "forward", "data gradient" or "weight gradient"
    flops: int  # of a whole batch
    bytes: dict[str, int]  # that its factors and its value have, as "floats" and as "words"
    ways: dict[str, Callable[[], Tensor]]


class Limits(Rates):
    """The products of a network's training step, ready to be timed."""

    def __init__(self, setting: Setting):
        self.products: list[Product] = []
        self.device = torch.device(setting.device)
        self.generator = torch.Generator(self.device).manual_seed(0)
        for shape in shapes(setting.network, setting.width):
            self.products += self._products(shape, setting.batch_size)
        super().__init__(setting)

    def measure(self) -> dict[str, Any]:
        """The rates, and seconds of each product in each way.

        Each way is timed `setting.steps` times, among the others as in a step; the median
        counts.
        """
        calls = [(i, way) for i, p in enumerate(self.products) for way in p.ways]
        taken: dict[tuple[int, str], list[float]] = {call: [] for call in calls}
        for _ in range(self.steps):
            for i, way in calls:
                taken[i, way].append(self._seconds(self.products[i].ways[way]))
        return super().measure() | {
            "products": [
                {
                    "layer": p.layer,
                    "kind": p.kind,
                    "flops": p.flops,
                    "bytes": p.bytes,
                    "seconds": {way: median(taken[i, way]) for way in p.ways},
                }
                for i, p in enumerate(self.products)
            ],
        }

    def _products(self, shape: Shape, batch: int) -> list[Product]:
        """Of a layer fed with +1 and -1, or the first one, which is fed with real numbers."""
        first, size = shape.name == "conv1", (shape.size,) * 2 if shape.size else ()
        x = self._random(batch, shape.inputs, *size)
        x = x if first else sign(x)
        w = self._random(shape.outputs, shape.inputs, *(KERNEL,) * len(size))
        g = self._random(batch, shape.outputs, *size)
        ways = (self._convolution if size else self._dense)(x, sign(w), g)
        if not first and self.device.type == "cpu":
            for kind, way in words_of(x, w, g).items():
                ways[kind][WORDS] = way
        floats = x.nbytes + w.nbytes + g.nbytes
        packed = {"forward": 0, "data gradient": w.nbytes, "weight gradient": x.nbytes}
        return [
            Product(
                *(shape.name, kind, batch * shape.flops),
                {"floats": floats, "words": floats - packed[kind] * 31 // 32},
                ways[kind],
            )
            for kind in ways
            if not (first and kind == "data gradient")
        ]

    def _convolution(self, x: Tensor, w: Tensor, g: Tensor) -> dict[str, dict[str, Callable]]:
        found: dict[str, dict[str, Callable]] = {}
        for name, layout in FORMATS.items():
            xl, wl, gl = (t.contiguous(memory_format=layout) for t in (x, w, g))
            gradient = partial(convolution_gradient, gl, xl, wl)
            found.setdefault("forward", {})[name] = partial(F.conv2d, xl, wl, padding=KERNEL // 2)
            found.setdefault("data gradient", {})[name] = partial(gradient, of="data")
            found.setdefault("weight gradient", {})[name] = partial(gradient, of="weight")
        return found

    def _dense(self, x: Tensor, w: Tensor, g: Tensor) -> dict[str, dict[str, Callable]]:
        t = w.t().contiguous()
        return {
            "forward": {"out x in": lambda: x @ w.t(), "in x out": lambda: x @ t},
            "data gradient": {"out x in": lambda: g @ w, "in x out": lambda: g @ t.t()},
            "weight gradient": {"out x in": lambda: g.t() @ x, "in x out": lambda: x.t() @ g},
        }


def words_of(x: Tensor, w: Tensor, g: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The products as the kernels take them, where those are taken: inputs are packed each time."""
    dense, images, taps = x.dim() == 2, x, w
    if dense:
        images, taps, g = x[:, :, None, None], w[:, :, None, None], g[:, :, None, None]
    images = images.contiguous(memory_format=torch.channels_last)
    taps = taps.contiguous(memory_format=torch.channels_last)
    pads = (0, 0) if dense else (KERNEL // 2,) * 2
    pack = partial(bits.Operands.packed, images, taps, True, Geometry(padding=pads))
    if (words := pack()) is None:
        return {}

    def last(y: Tensor) -> Tensor:
        y = y.permute(0, 3, 1, 2)
        return y.flatten(1) if dense else y

    lying = bits.channels_last(g)
    found = {
        "forward": lambda: last(pack().sums(None)),
        "weight gradient": lambda: last(words.weight_gradient(lying)),
    }
    if words.gives_input_gradient:
        found["data gradient"] = lambda: last(words.input_gradient(lying))
    return found


def convolution_gradient(g: Tensor, x: Tensor, w: Tensor, of: str) -> Tensor:
    """The gradient of a convolution's data x or weight w, from that of its output."""
    pads = [KERNEL // 2] * 2
    which = [of == "data", of == "weight", False]
    grads = torch.ops.aten.convolution_backward(
        g, x, w, None, [1, 1], pads, [1, 1], False, [0, 0], 1, which
    )
    return grads[which.index(True)]
