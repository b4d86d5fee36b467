"""The machine's own limit: the products of one training step, each at its best, and nothing else.

In: a `Setting`. Out: seconds of each product in each layout. A training step computes, for each
layer, its outputs, the gradient of its weights and, but for the first, that of its inputs.
On a GPU each time includes a launch, and all is in float32: to compare with, no bound.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.settings import KERNEL, Setting, Shape, shapes

GEMM_SIZES = (1024, 2048)  # of square matrices, for the machine's best rate
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


@dataclass
class Product:
    """One of a layer's products, in every layout it is tried in."""

    layer: str
    kind: str  # "forward", "data gradient" or "weight gradient"
    flops: int  # of a whole batch
    ways: dict[str, Callable[[], Tensor]]


class Limits:
    """The products of a network's training step, ready to be timed."""

    requires = ()
    devices = ("cpu", "cuda")

    def __init__(self, setting: Setting):
        self.steps, self.device = setting.steps, torch.device(setting.device)
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.products = []
        for shape in shapes(setting.network, setting.width):
            make = self._convolution if shape.size else self._dense
            ways = make(shape, setting.batch_size)
            if shape.name == "conv1":
                del ways["data gradient"]
            flops = setting.batch_size * shape.flops
            self.products += [Product(shape.name, kind, flops, w) for kind, w in ways.items()]
        self.gemms = [self._gemm(size) for size in GEMM_SIZES]
        self.measure()  # the first calls include preparations

    def measure(self) -> dict[str, Any]:
        """Seconds of each product in each layout, and the best rate of a GEMM.

        Each layout is timed `setting.steps` times, among the others as in a step; the median
        counts.
        """
        calls = [(i, way) for i, p in enumerate(self.products) for way in p.ways]
        taken: dict[tuple[int, str], list[float]] = {call: [] for call in calls}
        for _ in range(self.steps):
            for i, way in calls:
                taken[i, way].append(self._seconds(self.products[i].ways[way]))
        return {
            "products": [
                {
                    "layer": p.layer,
                    "kind": p.kind,
                    "flops": p.flops,
                    "seconds": {way: median(taken[i, way]) for way in p.ways},
                }
                for i, p in enumerate(self.products)
            ],
            "gemm_flops_per_second": max(2 * n**3 / self._seconds(g) for n, g in self.gemms),
        }

    def _seconds(self, call: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _convolution(self, shape: Shape, batch: int) -> dict[str, dict[str, Callable]]:
        x = self._random(batch, shape.inputs, shape.size, shape.size)
        w = self._random(shape.outputs, shape.inputs, KERNEL, KERNEL)
        g = self._random(batch, shape.outputs, shape.size, shape.size)
        found: dict[str, dict[str, Callable]] = {}
        for name, layout in FORMATS.items():
            xl, wl, gl = (t.contiguous(memory_format=layout) for t in (x, w, g))
            gradient = partial(convolution_gradient, gl, xl, wl)
            found.setdefault("forward", {})[name] = partial(F.conv2d, xl, wl, padding=KERNEL // 2)
            found.setdefault("data gradient", {})[name] = partial(gradient, of="data")
            found.setdefault("weight gradient", {})[name] = partial(gradient, of="weight")
        return found

    def _dense(self, shape: Shape, batch: int) -> dict[str, dict[str, Callable]]:
        x, g = self._random(batch, shape.inputs), self._random(batch, shape.outputs)
        w = self._random(shape.outputs, shape.inputs)
        t = w.t().contiguous()
        return {
            "forward": {"out x in": lambda: x @ w.t(), "in x out": lambda: x @ t},
            "data gradient": {"out x in": lambda: g @ w, "in x out": lambda: g @ t.t()},
            "weight gradient": {"out x in": lambda: g.t() @ x, "in x out": lambda: x.t() @ g},
        }

    def _gemm(self, size: int) -> tuple[int, Callable]:
        return size, partial(torch.mm, self._random(size, size), self._random(size, size))


def convolution_gradient(g: Tensor, x: Tensor, w: Tensor, of: str) -> Tensor:
    """The gradient of a convolution's data x or weight w, from that of its output."""
    pads = [KERNEL // 2] * 2
    which = [of == "data", of == "weight", False]
    grads = torch.ops.aten.convolution_backward(
        g, x, w, None, [1, 1], pads, [1, 1], False, [0, 0], 1, which
    )
    return grads[which.index(True)]
