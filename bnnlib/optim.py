"""Optimizers of latent weights: rates scaled layer by layer, and weights kept in [-1, 1].

The original's Adam, Bop, and whatever `torch.optim` has.
"""

from collections.abc import Iterable, Sequence
from inspect import unwrap
from math import inf

import torch
from torch import Tensor, nn

from bnnlib.errors import InvalidValue
from bnnlib.layers import binary_layers
from bnnlib.names import OPTIMIZERS
from bnnlib.quantizers import sign


def parameter_groups(model: nn.Module) -> list[dict]:
    """One group for each latent weight, with its `lr_scale` and the clip, and one for the rest."""
    latent = binary_layers(model)
    groups = [{"params": [m.weight], "lr_scale": m.lr_scale, "clip": 1.0} for m in latent]
    taken = {id(m.weight) for m in latent}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [*groups, {"params": rest, "lr_scale": 1.0, "clip": None}]


class _Optimizer(torch.optim.Optimizer):
    """PyTorch's, made without its compiler, whose import takes longer than a short run.

    These four methods import it at their first call, only to be left out of compiled code.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)


class BinaryAdam(_Optimizer):
    """Adam in Lasagne's form; a group may scale its rate and clip its parameters.

    With a_t = lr * lr_scale * sqrt(1 - beta2^t) / (1 - beta1^t), each step is
    p <- p - a_t * m / (sqrt(v) + eps), then p <- clip(p, -clip, clip).
    Here eps is not divided by the bias correction, as it is in `torch.optim.Adam`.
    The original moves W to clip(W + s (Adam(W) - W)), which is this with lr_scale = s.

    `params`: `parameter_groups(model)`, or anything an optimizer takes. Raises InvalidValue for
    a negative `lr` or `eps`, and for a beta outside [0, 1).
    Source: Kingma & Ba 2015, end of section 2; Lasagne `updates.py:612-630`;
    `binary_net_random_labels.py:198-213` of the original.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **more: float,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "lr_scale": 1.0, "clip": None}
        super().__init__(params, defaults | more)

    # Derived from the groups, so copies and pickles leave them out and begin with these.
    _read: Sequence[tuple[float, ...]] = ()  # lr * lr_scale, beta1, beta2 of each group
    _settings: Tensor | None = None  # the same, where the parameters are
    _infinity: Tensor | None = None  # beside them

    def add_param_group(self, param_group: dict) -> None:
        """Take one more group; raises InvalidValue for a setting with which no step is defined."""
        group = self.defaults | param_group
        for name, value in (("lr", group["lr"]), ("eps", group["eps"])):
            if not 0 <= value < inf:
                raise InvalidValue(f"{name} must be a number, 0 or more, got {value}")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise InvalidValue(
                f"betas must be two numbers, at least 0 and below 1, got {group['betas']}"
            )
        super().add_param_group(param_group)

    @property
    def updates(self) -> Tensor:
        """Steps so far: () float64, where the parameters are."""
        first = self.param_groups[0]
        if "step" not in first:
            device = first["params"][0].device
            first["step"] = torch.zeros((), dtype=torch.float64, device=device)
        return first["step"]

    @torch.no_grad()
    def step(self, closure=None):
        """Move all parameters that have a gradient; returns the closure's loss, if given one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.read_settings()
        for group, rate in zip(self.param_groups, self._next_rates(), strict=True):
            self._step_group(group, rate)
        return loss

    def read_settings(self) -> None:
        """Copy the rates of the groups to the device, where they have changed.

        A step that was captured as a CUDA graph reads them there, and never looks at the groups.
        """
        read = [(g["lr"] * g["lr_scale"], *g["betas"]) for g in self.param_groups]
        if read == self._read:
            return
        settings = torch.tensor(read, dtype=torch.float64)
        if self._settings is None or len(read) != len(self._read):
            self._settings = settings.to(self.updates.device)
            self._infinity = torch.full((), inf, device=self.updates.device)
        else:
            self._settings.copy_(settings)
        self._read = read

    def _next_rates(self) -> tuple[Tensor, ...]:
        """a_t of each group for the step that comes, as a tensor of no dimension."""
        t = self.updates.add_(1)
        scaled, beta1, beta2 = self._settings.unbind(1)
        rates = scaled * (1 - beta2**t).sqrt() / (1 - beta1**t)
        return (rates.float() if rates.is_cuda else rates).unbind()  # as the kernel reads it

    def _step_group(self, group: dict, rate: Tensor) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        states = [self.moments(p) for p in params]
        torch._fused_adam_(
            params,
            [_laid_out_like(p.grad, p) for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            # PyTorch's own bias corrections are 1 at step infinity: ours is in the rate.
            [self._infinity] * len(params),
            lr=rate,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        if group["clip"] is not None:
            for p in params:
                p.clamp_(-group["clip"], group["clip"])

    def moments(self, p: Tensor) -> dict[str, Tensor]:
        """The running averages m and v of a parameter's gradient, zero before its first step."""
        state = self.state[p]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return state


def _laid_out_like(grad: Tensor, p: Tensor) -> Tensor:
    """`grad` in the memory format of `p`; the fused kernel takes both to be in the same order."""
    return grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)


class Bop(BinaryAdam):
    """The binary optimizer: binary weights flip, and there are no latent ones.

    With the gradient g of a binary weight w, m <- (1 - gamma) m + gamma g, and w flips where
    |m| > threshold and m has the sign of w. The weights that `parameter_groups` marks start as
    their signs and stay +1 or -1; all other parameters move as in `BinaryAdam`, at `lr`.
    A schedule that lowers the rate lowers gamma in proportion; the paper lowers gamma in steps.

    Raises InvalidValue for a gamma outside (0, 1], a negative threshold, groups without binary
    weights, and as `BinaryAdam`.
    Source: Helwegen et al., "Latent Weights Do Not Exist", NeurIPS 2019 (arXiv:1906.02107),
    algorithm 1.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        gamma: float = 5e-3,
        threshold: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        defaults = {"gamma": gamma, "threshold": threshold, "initial_lr": lr}
        super().__init__(params, lr, betas, eps, **defaults)
        if all(group["clip"] is None for group in self.param_groups):
            raise InvalidValue("Bop needs binary weights; give it parameter_groups(model)")

    @torch.no_grad()
    def add_param_group(self, param_group: dict) -> None:
        """As `BinaryAdam`'s; binary weights become their signs."""
        group = self.defaults | param_group
        if not 0 < group["gamma"] <= 1 or not 0 <= group["threshold"] < inf:
            raise InvalidValue(
                "gamma must be above 0 and at most 1, and threshold 0 or more, got "
                f"{group['gamma']} and {group['threshold']}"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"] if group["clip"] is not None else ():
            p.copy_(sign(p))

    def _step_group(self, group: dict, rate: Tensor) -> None:
        if group["clip"] is None:
            return super()._step_group(group, rate)
        gamma = group["gamma"] * group["lr"] / group["initial_lr"] if group["lr"] else 0.0
        for p in group["params"]:
            if p.grad is None:
                continue
            m = self.moments(p)["exp_avg"].lerp_(p.grad, gamma)
            flips = (m * p).gt_(group["threshold"])  # m p is |m| where their signs agree
            p.mul_(1 - 2 * flips)

    def moments(self, p: Tensor) -> dict[str, Tensor]:
        """The running average m of a binary weight's gradient; of others as in `BinaryAdam`."""
        state = self.state[p]
        if not state and self._is_binary(p):
            state["exp_avg"] = torch.zeros_like(p)
        return state or super().moments(p)

    def _is_binary(self, p: Tensor) -> bool:
        groups = (group for group in self.param_groups if group["clip"] is not None)
        return any(p is binary for group in groups for binary in group["params"])


# ------------------------------------------------------------------------ optimizers by name


def make_optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer of this name in `OPTIMIZERS`, for all parameters of a model.

    `BinaryAdam` and `Bop` keep latent weights in [-1, 1]; for others `clip_latent_weights` does,
    after each step. Their rates are scaled by `set_rate`.
    Raises InvalidValue where it cannot take these parameters.
    """
    make = OPTIMIZERS[name]
    try:
        optimizer = make(parameter_groups(model), lr=lr)
    except (TypeError, ValueError) as error:
        raise InvalidValue(f"optimizer {name!r} cannot train this network: {error}") from error
    set_rate(optimizer, lr)
    return optimizer


@torch.no_grad()
def clip_latent_weights(optimizer: torch.optim.Optimizer) -> None:
    """Clip parameters to the `clip` of their group: what `fit` does after a step of others."""
    for group in optimizer.param_groups:
        if group.get("clip") is not None:
            for p in group["params"]:
                p.clamp_(-group["clip"], group["clip"])


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Train at the rate `lr` from now on, times the `lr_scale` of each group that has one."""
    scales_itself = isinstance(optimizer, BinaryAdam)
    for group in optimizer.param_groups:
        group["lr"] = lr if scales_itself else lr * group.get("lr_scale", 1.0)
