"""The original's Adam: a Glorot-scaled rate for each binary layer, then a clip to [-1, 1].

In: a model with gradients. Out: its parameters, moved. Next file: `history.py`.
"""

from collections.abc import Iterable
from math import sqrt

import torch
from torch import nn

from bnnlib.errors import InvalidValue
from bnnlib.layers import binary_layers


def parameter_groups(model: nn.Module) -> list[dict]:
    """One group for each latent weight, with its `lr_scale` and the clip, and one for the rest."""
    latent = binary_layers(model)
    groups = [{"params": [m.weight], "lr_scale": m.lr_scale, "clip": 1.0} for m in latent]
    taken = {id(m.weight) for m in latent}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [*groups, {"params": rest, "lr_scale": 1.0, "clip": None}]


class BinaryAdam(torch.optim.Optimizer):
    """Adam in Lasagne's form; a group may scale its rate and clip its parameters.

    With a_t = lr * lr_scale * sqrt(1 - beta2^t) / (1 - beta1^t), each step is
    p <- p - a_t * m / (sqrt(v) + eps), then p <- clip(p, -clip, clip).
    Here eps is not divided by the bias correction, as it is in `torch.optim.Adam`.
    The original moves W to clip(W + s (Adam(W) - W)), which is this with lr_scale = s.

    `params`: `parameter_groups(model)`, or anything an optimizer takes.
    Source: Kingma & Ba 2015, end of section 2; Lasagne `updates.py:612-630`;
    `binary_net_random_labels.py:198-213` of the original.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        if lr < 0:
            raise InvalidValue(f"lr must not be negative, got {lr}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "lr_scale": 1.0, "clip": None}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """Move all parameters that have a gradient; returns the closure's loss, if given one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        grads = [p.grad for p in params]
        states = [self.moments(p) for p in params]
        m, v = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        t = group["step"] = group.get("step", 0) + 1
        beta1, beta2 = group["betas"]

        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(v)
        torch._foreach_add_(denominator, group["eps"])
        rate = group["lr"] * group["lr_scale"] * sqrt(1 - beta2**t) / (1 - beta1**t)
        torch._foreach_addcdiv_(params, m, denominator, -rate)
        if group["clip"] is not None:
            torch._foreach_clamp_max_(params, group["clip"])
            torch._foreach_clamp_min_(params, -group["clip"])

    def moments(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        """The running averages m and v of a parameter's gradient, zero before its first step."""
        state = self.state[p]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return state
