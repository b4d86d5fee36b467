"""One training step, the same code on every device; on a CUDA device it becomes one graph.

In: a model, its optimizer and its batches. Out: the model, moved by one batch; the loss and the
mistakes stay on the device until somebody reads them. On a GPU Python then launches one graph a
step instead of each of its kernels, which at a batch of 50 are short.
Next file: `history.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bnnlib.batches import Batches
from bnnlib.errors import InvalidValue
from bnnlib.layers import random_generator
from bnnlib.losses import mistakes, squared_hinge_loss
from bnnlib.optim import BinaryAdam

WARM_UP = 3  # steps before a capture, in which libraries choose kernels and take memory

Penalty = Callable[[], Tensor | float]


class Step:
    """A training step on the next batch of an epoch, to be called once for each.

    `begin_epoch` says in which order the batches come. What `penalty` returns is added to the
    loss. `before_update`, where given, sees the inputs and the loss before the parameters move.
    The step waits for nothing on the host, unless `before_update` does, and takes nothing from
    there but the order and the learning rate, once an epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        penalty: Penalty | None = None,
        before_update: Callable[[Tensor, Tensor], object] | None = None,
    ):
        self.model, self.optimizer, self.batches = model, optimizer, batches
        self.penalty, self.before_update = penalty, before_update
        device = batches.labels.device
        self.count = batches.steps  # of an epoch
        self.order = torch.zeros(self.count, batches.batch_size, dtype=torch.int64, device=device)
        self.next = torch.zeros(1, dtype=torch.int64, device=device)  # the step that comes
        self.losses = torch.zeros(self.count, device=device)
        self.wrong = torch.zeros(self.count, dtype=torch.int64, device=device)
        # Other optimizers count and compute on the host, where a graph would not see it.
        self.captures = device.type == "cuda" and isinstance(optimizer, BinaryAdam)
        self.beside = torch.cuda.Stream(device) if self.captures else None  # not the default one
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warmed_up = 0

    def begin_epoch(self, order: Tensor, losses: Tensor, wrong: Tensor) -> None:
        """Take the images of each step, (steps, batch) int64, and what the first steps left.

        `losses` (k,) float32 and `wrong` (k,) int64 are those of k steps that are not done again.
        """
        done = len(losses)
        if done > self.count:
            raise InvalidValue(f"{done} steps are done of an epoch that has {self.count}")
        self.order.copy_(order)
        self.next.fill_(done)
        self.losses[:done] = losses
        self.wrong[:done] = wrong
        self.model.train()
        if isinstance(self.optimizer, BinaryAdam):
            self.optimizer.read_settings()

    def __call__(self) -> None:
        """Train on one batch; its loss and its count of mistakes go to `losses` and `wrong`."""
        if not self.captures:
            self._step()
            return
        if self.graph is None and self.warmed_up == WARM_UP:
            self._capture()
        if self.graph is None:
            self._step_beside()
            self.warmed_up += 1
        else:
            self.graph.replay()

    def _step(self) -> None:
        self.optimizer.zero_grad()  # so that the last gradients leave room for the activations
        x, labels = self.batches.take(self.order.index_select(0, self.next)[0])
        logits = self.model(x)
        loss = squared_hinge_loss(logits, labels)
        if self.penalty:
            loss = loss + self.penalty()
        if self.before_update:
            self.before_update(x, loss)
        loss.backward()
        self.optimizer.step()  # moves the latent weights and clips them to [-1, 1]
        self.losses.index_copy_(0, self.next, loss.detach().float().view(1))
        self.wrong.index_copy_(0, self.next, mistakes(logits.detach(), labels).sum().view(1))
        self.next.add_(1)

    def _step_beside(self) -> None:
        """A step on the stream of the capture, which must have seen some before."""
        here = torch.cuda.current_stream(self.next.device)
        self.beside.wait_stream(here)
        with torch.cuda.stream(self.beside):
            self._step()
        here.wait_stream(self.beside)

    def _capture(self) -> None:
        """Record a step without doing it. Random layers go on drawing from their generator."""
        self.graph = torch.cuda.CUDAGraph()
        generator = random_generator(self.model)
        if generator is not None:
            self.graph.register_generator_state(generator)
        self.optimizer.zero_grad()  # the gradients are to lie in the memory of the graph
        device = torch.cuda.device(self.next.device)
        with device, torch.cuda.graph(self.graph, stream=self.beside):
            self._step()
