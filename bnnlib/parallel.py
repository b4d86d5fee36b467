"""One training on several processes: the ranks that `torchrun` starts, and what they exchange.

Each rank takes its rows of every batch. What depends on the whole batch is a sum over the ranks,
which is the same on each, to the last bit; so their parameters stay the same, too.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bnnlib.errors import BnnlibError, InvalidValue, RankLost
from bnnlib.process import place


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many; one by itself exchanges nothing.

    What is exchanged must be asked for by all ranks, in the same order. Raises RankLost where
    one does not answer.
    """

    rank: int = 0
    world: int = 1
    here: tuple[int, ...] = ()  # the processes of ranks that this one sees beside itself

    @property
    def leads(self) -> bool:
        """Whether this rank writes and speaks for all."""
        return self.rank == 0

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, in its place."""
        if self.world > 1:
            with self._noticing():
                if x.is_cuda:
                    dist.all_reduce(x)
                else:
                    self._wait(dist.all_reduce(x, async_op=True))
        return x

    def _wait(self, work: dist.Work) -> None:
        """Wait for an exchange, in turns: gloo does not always notice that a rank has ended."""
        while True:
            try:
                work.wait(TURN)
                return
            except RuntimeError as error:
                if work.is_completed():
                    raise
                if not all(Path(f"/proc/{process}").exists() for process in self.here):
                    raise RuntimeError("its process is gone") from error

    def beside(self, x: Tensor) -> Tensor:
        """The x of every rank: (...) -> (world, ...)."""
        table = x.new_zeros(self.world, *x.shape)
        table[self.rank] = x
        return self.total(table)

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return number if self.world == 1 else int(self.beside(torch.tensor(number)).max())

    def told(self, value: Any) -> Any:
        """The value of rank 0, which can be pickled, on all."""
        said = [value]
        if self.world > 1:
            with self._noticing():
                dist.broadcast_object_list(said)
        return said[0]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """All ranks leave the `with` block together: by an error of ours, if one of them met one.

        So nobody waits for a rank that has given up. Inside of it nothing else is exchanged.
        """
        error = None
        try:
            yield
        except BnnlibError as met:
            error = met
        errors = [error] * self.world
        if self.world > 1:
            with self._noticing():
                dist.all_gather_object(errors, error)
        for first in filter(None, (error, *errors)):  # its own has the traceback
            raise first

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Inside the `with` block an error of the connection becomes RankLost."""
        try:
            yield
        except RuntimeError as error:
            reason = re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0].strip()
            raise RankLost(
                f"rank {self.rank} of {self.world} has lost another one, which ended or cannot be "
                f"reached ({reason}); a run in a folder goes on from its last checkpoint when it "
                "is called again, on any number of ranks"
            ) from error


ALONE = Ranks()
TURN = timedelta(seconds=1)


@contextmanager
def launched() -> Iterator[Ranks]:
    """Inside the `with` block the ranks that `torchrun` started are connected.

    One rank where it started none, or a single one. A process group of PyTorch that is there
    already is taken as it is; it must know tensors on the CPU, beside those on a GPU.
    """
    rank, world = place()
    if dist.is_available() and dist.is_initialized():
        yield _beside(Ranks(dist.get_rank(), dist.get_world_size()))
        return
    if world == 1:
        yield ALONE
        return
    if not dist.is_available():
        raise InvalidValue("this PyTorch is built without torch.distributed; use one process")
    ranks = Ranks(rank, world)
    with ranks._noticing():
        store, *_ = next(dist.rendezvous("env://"))
        turn = store.add(f"bnnlib {rank}", 1)  # a second group must not read what the first left
        kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        own = dist.PrefixStore(f"bnnlib {turn}", store)
        dist.init_process_group(kinds, store=own, rank=rank, world_size=world)
        ranks = _beside(ranks)
    lost = False
    try:
        yield ranks
    except RankLost:
        lost = True  # what is left of the exchange with it may wait for ever
        raise
    finally:
        with suppress(KeyboardInterrupt):  # from `torchrun`, whose ranks end one after the other
            if not lost:
                dist.destroy_process_group()


def _beside(ranks: Ranks) -> Ranks:
    """The same with the processes that it sees: on Linux those of one kernel and its namespace."""
    kernel, names = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    own = (kernel.read_text(), str(names.readlink())) if names.exists() else None
    all_of_them: list[Any] = [None] * ranks.world
    dist.all_gather_object(all_of_them, (own, os.getpid()))
    here = (process for where, process in all_of_them if own and where == own)
    return replace(ranks, here=tuple(here))


# ----------------------------------------------------------------------------- rows of a batch


@dataclass(frozen=True)
class Shard:
    """The rows that this rank takes of each batch of `rows`: consecutive ones, as many as others.

    The first ranks have one more where that is not possible. Raises InvalidValue where a rank
    would have none.
    """

    ranks: Ranks
    rows: int

    def __post_init__(self):
        if self.rows < self.ranks.world:
            raise InvalidValue(
                f"a batch of {self.rows} cannot be split over {self.ranks.world} ranks; start at "
                f"most {self.rows}"
            )

    @property
    def sizes(self) -> list[int]:
        """How many rows each rank takes."""
        least, more = divmod(self.rows, self.ranks.world)
        return [least + (rank < more) for rank in range(self.ranks.world)]

    @property
    def own(self) -> slice:
        """The rows of this rank."""
        start = sum(self.sizes[: self.ranks.rank])
        return slice(start, start + self.sizes[self.ranks.rank])

    def whole(self, part: Tensor) -> Tensor:
        """The rows of all ranks from those of each: (own, ...) -> (rows, ...), differentiable.

        Every rank computes one and the same loss from them. The gradient that goes back is the
        sum of all their gradients, `world` times that of the loss; `average` divides it.
        """
        around = (self.own.start, self.rows - self.own.stop)
        return _Sum.apply(F.pad(part, (0, 0) * (part.dim() - 1) + around), self.ranks)

    @torch.no_grad()
    def average(self, model: nn.Module) -> None:
        """Make the gradients of all parameters their mean over the ranks: those of the loss."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        parts = self.ranks.total(flat).div_(self.ranks.world).split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))


class _Sum(torch.autograd.Function):
    """The sum over the ranks; so is its gradient, as what a rank gives is in the loss of all."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.total(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.ranks.total(grad.clone(memory_format=torch.contiguous_format)), None


class _Normalization(torch.autograd.Function):
    """`normalize`, with one exchange on the way forward and one on the way back."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, shard: Shard):
        rows, channel = (0, *range(2, x.dim())), (1, -1) + (1,) * (x.dim() - 2)
        sums = x.sum(rows, dtype=weight.dtype)
        counts = [size * x[0, 0].numel() for size in shard.sizes]
        here, total = counts[shard.ranks.rank], sum(counts)
        squares = (x - (sums / here).view(channel)).square().sum(rows)
        # (world, 2, C), exact for sums of signs: a mean is the same however the batch is split
        of_all = shard.ranks.beside(torch.stack([sums, squares])).double()
        mean = of_all[:, 0].sum(0) / total
        each = torch.tensor(counts, device=x.device).view(-1, 1)
        between = each * (of_all[:, 0] / each - mean).square()
        inv_std = ((of_all[:, 1] + between).sum(0) / total + eps).rsqrt()
        mean, inv_std = mean.to(weight.dtype), inv_std.to(weight.dtype)
        centred = x - mean.view(channel)
        ctx.save_for_backward(centred, weight, inv_std)
        ctx.ranks, ctx.total = shard.ranks, total
        ctx.mark_non_differentiable(mean, inv_std)
        scale = (weight * inv_std).view(channel)
        return torch.addcmul(bias.view(channel), centred, scale), mean, inv_std

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        centred, weight, inv_std = ctx.saved_tensors
        rows, channel = (0, *range(2, grad.dim())), (1, -1) + (1,) * (grad.dim() - 2)
        sums = torch.stack([grad.sum(rows), (grad * centred).sum(rows)])
        grad_bias, grad_weight = sums[0].clone(), sums[1] * inv_std
        means = ctx.ranks.total(sums) / ctx.total
        through_std = (means[1] * inv_std.square()).view(channel)
        grad_x = torch.addcmul(grad - means[0].view(channel), centred, through_std, value=-1)
        return grad_x.mul_((weight * inv_std).view(channel)), grad_weight, grad_bias, None, None


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, shard: Shard
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalization of own rows (own, C[, H, W]) by mean and variance of the whole batch.

    Returns y, mean (C,) and 1 / sqrt(variance + eps) (C,), the same on all ranks; the variance is
    the biased one. First the sums, then the squares around a mean, so that nothing cancels; those
    of the ranks are put together as in Chan, Golub & LeVeque 1983.
    """
    return _Normalization.apply(x, weight, bias, eps, shard)
