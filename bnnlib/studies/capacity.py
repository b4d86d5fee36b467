"""How many bits of labels a weight holds, from a table of runs with the probe "bits".

The labels of `patterns` are independent of each other and of the images, so the weights hold at
least the bits that the predictions tell of them.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from bnnlib.models import build_network, usual_inputs

if TYPE_CHECKING:
    import pandas as pd


def count_weights(model: nn.Module) -> int:
    """Weights of a network, without biases and normalizations."""
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


def bits_per_weight(table: "pd.DataFrame") -> "pd.Series":
    """Memorized bits for each weight, of every row of a table that `results` gives.

    The table has the columns `memorized_bits`, `network` and `width`.
    """
    sizes = {}
    for network, width in {*zip(table["network"], table["width"], strict=True)}:
        with torch.device("meta"):  # sizes alone
            model = build_network(network, usual_inputs(network), None, width=width)
        sizes[network, width] = count_weights(model)
    weights = [sizes[key] for key in zip(table["network"], table["width"], strict=True)]
    return table["memorized_bits"] / weights
