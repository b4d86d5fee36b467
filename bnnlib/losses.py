"""What is minimized and what is counted, from scores (B, classes) and labels (B,)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_hinge_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """mean over batch and classes of max(0, 1 - t y)^2, with t = +1 for the label, else -1.

    In: logits (B, C) float, labels (B,) int64. Out: a scalar tensor. A constant output of
    -0.8 on ten classes gives 0.36, the loss of a network that has learned nothing.
    Source: `svhn_random_labels.py:340` of the original.
    """
    targets = torch.full_like(logits, -1).scatter_(1, labels.unsqueeze(1), 1)  # (B, C) +-1
    return F.relu(1 - targets * logits).square().mean()


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
