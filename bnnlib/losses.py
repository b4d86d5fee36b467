"""What is minimized and what is counted, from scores (B, classes) and labels (B,)."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]  # scores (B, C), labels (B,) -> a scalar


def squared_hinge_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """mean over batch and classes of max(0, 1 - t y)^2, with t = +1 for the label, else -1.

    In: logits (B, C) float, labels (B,) int64. Out: a scalar tensor. A constant output of
    -0.8 on ten classes gives 0.36, the loss of a network that has learned nothing.
    Source: `svhn_random_labels.py:340` of the original.
    """
    return F.relu(1 - _targets(logits, labels) * logits).square().mean()


def hinge_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """mean over batch and classes of max(0, 1 - t y), with t as in `squared_hinge_loss`.

    Source: Cortes & Vapnik 1995, for each class against the others.
    """
    return F.relu(1 - _targets(logits, labels) * logits).mean()


def _targets(logits: Tensor, labels: Tensor) -> Tensor:
    """+1 for the label, -1 for the other classes: (B, C).

    In float32 at least, and so is the loss, as PyTorch's own losses are under autocast.
    """
    kind = torch.promote_types(logits.dtype, torch.float32)
    return torch.full_like(logits, -1, dtype=kind).scatter(1, labels.unsqueeze(1), 1)


def l2_penalty(parameters: Iterable[Tensor]) -> Tensor | float:
    """Sum of all squares, without the factor 1/2; of no parameters it is 0.

    Source: Lasagne `regularization.py` (`l2`, `regularize_layer_params_weighted`).
    """
    return sum(p.square().sum() for p in parameters)


def mistakes(logits: Tensor, labels: Tensor) -> Tensor:
    """True where the largest score is not the label's: logits (B, C), labels (B,) -> (B,) bool."""
    return logits.argmax(dim=1) != labels


def error_rate(logits: Tensor, labels: Tensor) -> float:
    """Share of mistakes, between 0 and 1."""
    return mistakes(logits, labels).cpu().double().mean().item()
