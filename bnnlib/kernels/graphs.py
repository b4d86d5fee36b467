"""A training step as one CUDA graph.

On a GPU Python then launches one graph a step instead of each of its kernels, which at a batch
of 50 are short.
"""

from collections.abc import Callable

import torch

WARM_UP = 3  # steps before a capture, in which libraries choose kernels and take memory


class GraphedStep:
    """Calls `step` a few times, then records it once and replays the record.

    `step` must read and write the same tensors each time and wait for nothing on the host.
    `generators` are those it draws from on `device`; they go on drawing. `zero_grad` forgets the
    gradients, which are to lie in the memory of the graph.
    """

    def __init__(
        self,
        step: Callable[[], None],
        device: torch.device,
        generators: list[torch.Generator],
        zero_grad: Callable[[], object],
    ):
        self.step, self.device, self.generators = step, device, generators
        self.zero_grad = zero_grad
        self.stream = torch.cuda.Stream(device)  # a capture needs another than the default one
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warmed_up = 0

    def __call__(self) -> None:
        if self.graph is None and self.warmed_up == WARM_UP:
            self._capture()
        if self.graph is None:
            self._warm_up()
        else:
            self.graph.replay()

    def _warm_up(self) -> None:
        """A step on the stream of the capture, which must have seen some before."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            self.step()
        here.wait_stream(self.stream)
        self.warmed_up += 1

    def _capture(self) -> None:
        """Record a step without doing it."""
        self.graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            self.graph.register_generator_state(generator)
        self.zero_grad()
        with torch.cuda.device(self.device), torch.cuda.graph(self.graph, stream=self.stream):
            self.step()
