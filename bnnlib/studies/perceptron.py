"""The simplest network with binary weights, whose capacity is known: one neuron, sign(w . x).

Its inputs and labels are coin tosses, so nothing can be told about them but what is stored. Every
method takes patterns x (P, N) and labels y (P,), both of +1 and -1 in float32, and returns the
weights (N,); `steps` is how long it may search, `seed` what it draws from. Those that search for
+1 and -1 return the weights with the fewest errors that they met; `train` the last, as `fit` does.
The load is P / N.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import log, pi, sqrt
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import log_ndtr
from torch import Tensor

from bnnlib.errors import InvalidValue, check_name, check_whole
from bnnlib.files import atomic_write
from bnnlib.optim import BinaryAdam
from bnnlib.probes import mutual_information
from bnnlib.quantizers import binarize, real, sign

if TYPE_CHECKING:
    import pandas as pd

# Labels for each weight, at most, of random patterns stored without an error, as N grows.
KRAUTH_MEZARD = 0.833  # binary: by the replica method of physics, Krauth & Mezard 1989
UPPER_BOUND = 0.847  # binary: proved, Altschuler & Tikhomirov 2024
ALGORITHMIC = 0.776  # binary: where fast algorithms are thought to fail, Stojnic 2025
COVER = 2.0  # real: Cover 1965

HEBB_LIMIT = 2 / (pi**2 * log(2))  # bits a weight, see `hebb`

BATCH = 50  # patterns in a training step, as in the experiments

Method = Callable[..., Tensor]


def draw_patterns(n_inputs: int, n_patterns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Coin tosses: patterns (P, N) and labels (P,), +1 and -1 in float32.

    Raises InvalidValue unless N is odd: then a sum of N signs is never 0.
    """
    if check_whole("n_inputs", n_inputs, 1) % 2 == 0:
        raise InvalidValue(f"n_inputs must be odd, got {n_inputs}")
    rng = np.random.default_rng([check_whole("seed", seed), n_inputs])
    tosses = rng.integers(0, 2, (check_whole("n_patterns", n_patterns, 1), n_inputs + 1))
    signs = torch.from_numpy(2 * tosses - 1).float()
    return signs[:, :-1].contiguous(), signs[:, -1].contiguous()


# ------------------------------------------------------------------------------ five methods


def hebb(x: Tensor, y: Tensor, steps: int = 1, seed: int = 0) -> Tensor:
    """w = sign(sum over the patterns of y x), in one shot: no step, nothing drawn. A tie is +1.

    What it stores is known. Each product y x_i w_i has the mean sqrt(2 / (pi P)), so the sum of N
    of them, divided by sqrt(N), is normal with the mean sqrt(2 / (pi load)) and variance 1, and a
    label is right with probability q = Phi(sqrt(2 / (pi load))). That makes load (1 - H(q)) bits
    for each weight, H the entropy of a coin. At a large load q is 1/2 + 1 / (pi sqrt(load)), and
    1 - H(1/2 + d) is 2 d^2 / ln 2: so the bits tend to 2 / (pi^2 ln 2) = 0.292, from below.
    Also takes many neurons at once: x (..., P, N), y (..., P) -> (..., N).
    Source: the rule of Hebb 1949, clipped as in Sompolinsky 1986.
    """
    return sign((x * y[..., None]).sum(-2))


def train(
    x: Tensor, y: Tensor, steps: int, seed: int, binary: bool = True, lr: float = 1e-3
) -> Tensor:
    """The recipe of the experiments: Adam on latent weights, whose signs compute.

    Squared hinge loss of a learned gain times w . x, mini-batches of 50, a rate that falls to 0 in
    a straight line; latent weights start as U(-1, 1), are clipped and have their rate scaled, all
    by the library's own parts. `binary` False: real weights, which start as Glorot's, smaller, and
    are neither clipped nor scaled.
    Also takes many neurons at once, as `hebb` does; they see their patterns in one order.
    Source: Hubara et al. 2016, algorithm 1.
    """
    z = x * y[..., None]  # a label is right where z . w is positive
    *neurons, patterns, n = z.shape
    generator = torch.Generator().manual_seed(seed)
    start = 1.0 if binary else sqrt(6 / (n + 1))
    weight = torch.empty(*neurons, n).uniform_(-start, start, generator=generator).requires_grad_()
    gain = torch.full((*neurons, 1), n**-0.5, requires_grad=True)
    latent = {"lr_scale": sqrt((n + 1) / 1.5), "clip": 1.0} if binary else {}
    optimizer = BinaryAdam([{"params": [weight], **latent}, {"params": [gain]}], lr)
    quantizer = binarize if binary else real
    order = torch.empty(0, dtype=torch.int64)
    for step in range(check_whole("steps", steps, 1)):
        if len(order) < min(BATCH, patterns):
            order = torch.randperm(patterns, generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        sums = (z.index_select(-2, rows) @ quantizer(weight)[..., None])[..., 0]
        (1 - gain * sums).relu().square().mean(-1).sum().backward()  # each neuron its own loss
        optimizer.step()
    return quantizer(weight.detach())


def sbpi(x: Tensor, y: Tensor, steps: int, seed: int, p_s: float = 0.3, bound: int = 0) -> Tensor:
    """Stochastic belief-propagation-inspired learning: w = sign(h), h odd and |h| <= `bound`.

    Pattern by pattern, in a new order in each of at most `steps` passes:
    - wrong: h <- h + 2 y x;
    - right by the smallest margin, y w . x = 1: with probability `p_s` the weights that helped,
      those with w = y x, go one state deeper, h <- h + 2 w; none of them turns.

    `bound` 0 is the odd number near 4 sqrt(N); it and `p_s` were chosen on other seeds.
    Source: Baldassi, Braunstein, Brunel & Zecchina, PNAS 104, 2007.
    """
    z = (x * y[:, None]).numpy()
    patterns, n = z.shape
    bound = bound or 2 * round(2 * sqrt(n)) + 1
    rng = np.random.default_rng([seed, n, 1])  # other numbers than the patterns
    h = np.where(rng.random(n) < 0.5, np.float32(-1), np.float32(1))
    best = _Best(z)
    for _ in range(check_whole("steps", steps, 1)):
        w = np.sign(h)
        if best.offer(w) == 0:
            break
        for row in z[rng.permutation(patterns)]:
            stability = row @ w
            if stability < 0:
                h = np.clip(h + 2 * row, -bound, bound)
                w = np.sign(h)
            elif stability == 1 and rng.random() < p_s:
                h = np.clip(h + 2 * row * (row == w), -bound, bound)
    best.offer(np.sign(h))
    return torch.from_numpy(best.weights)


def reinforced_bp(x: Tensor, y: Tensor, steps: int, seed: int = 0, gamma: float = 0.995) -> Tensor:
    """Reinforced belief propagation: what all solutions say of a weight, made more certain.

    Each step of `beliefs` gives every weight a field; a share 1 - gamma^t of its last one is added,
    until the signs of the fields store all labels. Nothing is drawn.
    Source: Braunstein & Zecchina, Phys. Rev. Lett. 96, 030201, 2006, with the messages summed up
    as in approximate message passing (Donoho, Maleki & Montanari 2009).
    """
    z = (x * y[:, None]).numpy()
    field, pull = np.zeros(z.shape[1]), np.zeros(len(z))
    best = _Best(z)
    for t in range(check_whole("steps", steps, 1)):
        own, pull = beliefs(z, field, pull)
        field = own + (1 - gamma**t) * field
        if best.offer(np.where(field < 0, np.float32(-1), np.float32(1))) == 0:
            break
    return torch.from_numpy(best.weights)


def beliefs(z: np.ndarray, field: np.ndarray, pull: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One step of approximate message passing: z = y x (P, N), field (N,), pull (P,) -> both.

    The mean of weight i is tanh(field_i). `pull` says how far each label draws the sum z . w that
    it constrains to be positive: at a sum with mean s and variance v, phi(s / sqrt(v)) / (sqrt(v)
    Phi(s / sqrt(v))). Each part leaves out what it has said itself in the step before.
    """
    n = z.shape[1]
    mean = np.tanh(field)
    variance = max(1 - (mean**2).mean(), 1e-9)  # of the sum, divided by sqrt(N)
    centre = z @ mean / sqrt(n) - variance * pull
    ratio = centre / sqrt(variance)
    pull = np.exp(-(ratio**2) / 2 - log_ndtr(ratio)) / sqrt(2 * pi * variance)
    slope = pull * (pull + centre / variance)
    return pull @ z / sqrt(n) + mean * slope.sum() / n, pull


class _Best:
    """The weights with the fewest errors among those that were offered."""

    def __init__(self, z: np.ndarray):
        self.z, self.errors = z, len(z) + 1

    def offer(self, weights: np.ndarray) -> int:
        errors = int((self.z @ weights < 0).sum())
        if errors < self.errors:
            self.errors, self.weights = errors, weights
        return errors


METHODS: Mapping[str, Method] = {
    "hebb": hebb,
    "train": train,
    "train_fast": partial(train, lr=1e-2),
    "float": partial(train, binary=False),
    "float_fast": partial(train, binary=False, lr=1e-2),
    "sbpi": sbpi,
    "reinforced_bp": reinforced_bp,
}

# ------------------------------------------------------------------------------- measurement


def bits_per_weight(weights: Tensor, x: Tensor, y: Tensor) -> float:
    """How many bits of the labels the weights hold, for each of them: w (N,), x (P, N), y (P,).

    P / N times the mutual information of sign(w . x) and y, see `probes.mutual_information`. The
    labels are independent of each other and of the patterns, so the weights hold no fewer.
    """
    predicted, labels = (x @ weights >= 0).long(), (y > 0).long()
    return len(x) / len(weights) * mutual_information(predicted, labels, classes=2)


def measure(
    method: str, n_inputs: int, loads: Iterable[float], seeds: Sequence[int], steps: int
) -> list[dict[str, Any]]:
    """One row for each load and seed: what a method of `METHODS` stores, and whether all labels.

    `seed` draws patterns, labels, and what the method draws; `seconds` are those of the processor.
    Those that train do so with the neurons of all seeds side by side, and draw their weights from
    the first. Raises InvalidValue for what is unknown or out of range.
    """
    check_name("method", method, METHODS)
    rows = []
    for load in loads:
        patterns = [draw_patterns(n_inputs, round(load * n_inputs), seed) for seed in seeds]
        start = process_time()
        if method.startswith(("train", "float")):
            x, y = (torch.stack(part) for part in zip(*patterns, strict=True))
            weights = METHODS[method](x, y, steps, seeds[0])
        else:
            pairs = zip(seeds, patterns, strict=True)
            weights = [METHODS[method](*pattern, steps, seed) for seed, pattern in pairs]
        seconds = (process_time() - start) / len(seeds)
        for seed, w, (x, y) in zip(seeds, weights, patterns, strict=True):
            row = {"method": method, "n_inputs": n_inputs, "load": load, "steps": steps}
            row |= {"seed": seed, "bits": bits_per_weight(w, x, y)}
            rows.append(row | {"solved": int((y * (x @ w) > 0).all()), "seconds": seconds})
    return rows


LOADS = tuple(i / 10 for i in range(3, 13))
MIDDLE = (0.4, 0.5, 0.6, 0.7, 0.8)  # where training is at its best
FLOAT_LOADS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4)
SEEDS = (0, 1, 2, 3, 4)
GRID = (
    *(("hebb", n, LOADS, SEEDS, 1) for n in (101, 501, 1001)),
    *(("sbpi", n, LOADS, SEEDS, 1_000) for n in (101, 501, 1001)),
    *(("reinforced_bp", n, LOADS, SEEDS, 1_000) for n in (101, 501, 1001)),
    *(("train", n, LOADS, SEEDS, 4_000) for n in (101, 501, 1001)),
    ("train_fast", 1001, LOADS, SEEDS, 4_000),
    *(("train", 1001, MIDDLE, SEEDS, steps) for steps in (16_000, 64_000)),
    *((method, 1001, FLOAT_LOADS, SEEDS, 4_000) for method in ("float", "float_fast")),
    ("float", 1001, (1.6, 1.8, 2.0), SEEDS, 16_000),
)


def measure_grid(path: str | Path, grid: Iterable[tuple] = GRID) -> None:
    """Write the rows of many calls of `measure` to a CSV file, anew after each call.

    `runs.ledger.stored_table("perceptron")` reads the one that is stored.
    """
    import pandas as pd

    rows = []
    for arguments in grid:
        rows += measure(*arguments)
        text = pd.DataFrame(rows).to_csv(index=False, float_format="%.6g")
        atomic_write(path, text.encode())


def most_bits(table: "pd.DataFrame") -> "pd.Series":
    """The most bits a weight over the loads, for each method, n_inputs, steps and seed."""
    return table.groupby(["method", "n_inputs", "steps", "seed"])["bits"].max()
