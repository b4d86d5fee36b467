"""The training loop, in plain sight.

In: a model, an optimizer and batches. Out: the model, trained in place, and its `History`.
Next file: `probes.py`.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite, isnan, nan

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bnnlib.batches import Batches
from bnnlib.errors import InvalidValue, check_name
from bnnlib.history import History
from bnnlib.layers import evaluating
from bnnlib.losses import mistakes, squared_hinge_loss

SCHEDULES = ("exponential", "linear")
EVALUATION_BATCH = 500  # images; drawn weights are drawn once for so many


def learning_rates(schedule: str, start: float, final: float, epochs: int) -> list[float]:
    """One rate for each epoch, falling from `start` towards `final`.

    - "exponential": start * (final / start)^(e / epochs), the original's; the last epoch is
      one factor above `final` (`binary_net_random_labels.py:302,371`).
    - "linear": start + (final - start) * e / epochs.
    """
    check_name("schedule", schedule, SCHEDULES)
    steps = [e / epochs for e in range(epochs)]
    if schedule == "linear":
        return [start + (final - start) * step for step in steps]
    return [start * (final / start) ** step for step in steps]


@dataclass(frozen=True)
class EvaluationMode:
    """How a model is tested: its weights and statistics as in `layers.evaluating`."""

    weights: str | None = None  # None: as in training
    statistics: str = "running"
    samples: int = 1  # passes whose scores are averaged, each with its own stochastic weights
    seed: int = 0  # of those weights


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Errors of a model on one set, each between 0 and 1."""

    error: float
    class_errors: tuple[float, ...]  # NaN for a class that the set does not hold
    mistakes: Tensor  # (N,) bool, in the order of the set


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches, mode: EvaluationMode | None = None) -> Evaluation:
    """Error over every image of the set, and of each class, from one pass in `mode`.

    The model is the same afterwards, its averages and generators included. With statistics
    of the batch no batch is larger than in training, and all but the last are of one size.
    """
    mode = mode or EvaluationMode()
    size = EVALUATION_BATCH
    if mode.statistics == "batch":
        size = ceil(len(batches) / ceil(len(batches) / batches.batch_size))
    with evaluating(model, mode.weights, mode.statistics, mode.seed):
        wrong = [
            mistakes(sum(model(x) for _ in range(mode.samples)), labels)
            for x, labels in batches.in_order(size)
        ]
    wrong = torch.cat(wrong).cpu()
    return Evaluation(wrong.double().mean().item(), _class_errors(wrong, batches), wrong)


def _class_errors(wrong: Tensor, batches: Batches) -> tuple[float, ...]:
    labels, zero = batches.labels.cpu(), torch.zeros(batches.classes, dtype=torch.float64)
    total = zero.index_add(0, labels, wrong.double())
    count = zero.index_add(0, labels, torch.ones_like(total)[labels])
    return tuple((total / count).tolist())  # 0 / 0 is NaN


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    generator: torch.Generator,
    after_batch: Callable[[], object] = lambda: None,
    penalty: Callable[[], Tensor | float] | None = None,
) -> tuple[float, float]:
    """One pass over the shuffled batches; returns mean loss and error, both in training mode.

    `after_batch` is called once for each batch; what `penalty` returns is added to the loss.
    Raises InvalidValue when the loss is no longer a finite number.
    """
    model.train()
    losses, wrong = [], []
    for x, labels in batches.shuffled(generator):
        logits = model(x)
        loss = squared_hinge_loss(logits, labels)
        if penalty:
            loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # moves the latent weights and clips them to [-1, 1]
        losses.append(loss.detach())
        wrong.append(mistakes(logits.detach(), labels))
        after_batch()
    loss = torch.stack(losses).mean().item()
    if not isfinite(loss):
        raise InvalidValue(f"the training loss became {loss}; a smaller learning rate may help")
    return loss, torch.cat(wrong).cpu().double().mean().item()


Measure = Callable[[nn.Module, Mapping[str, Evaluation]], dict[str, float]]


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Batches,
    valid: Batches | None = None,
    test: Batches | None = None,
    *,
    rates: Sequence[float],
    generator: torch.Generator,
    evaluate_every: int = 1,
    mode: EvaluationMode | None = None,
    penalty: Callable[[], Tensor | float] | None = None,
    measure: Measure = lambda model, results: {},
    progress: str = "auto",
    after_epoch: Callable[[History], None] | None = None,
) -> History:
    """Train for one epoch at each learning rate in `rates`; returns the `History`.

    `generator` (CPU) draws the order of the batches. Errors are computed every
    `evaluate_every` epochs and after the last, in `mode`. What `penalty` returns is added to
    the loss. `measure` is given the model and the evaluations of each epoch, by split, and
    returns more columns. `progress` is "bar", "lines", "none" or "auto", see
    `progress_style`. `after_epoch` is given the history so far.
    """
    sets = {"train": train, "valid": valid, "test": test}
    style, history = progress_style(progress), History()
    steps = len(rates) * (len(train) // train.batch_size)
    with tqdm(total=steps, unit="step", disable=style != "bar", mininterval=0.3) as bar:
        for epoch, lr in enumerate(rates, start=1):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, error = train_epoch(model, optimizer, train, generator, bar.update, penalty)
            row = {"epoch": epoch, "learning_rate": lr, "train_loss": loss}
            row["train_mode_error"] = error
            due = epoch % evaluate_every == 0 or epoch == len(rates)
            results = {k: evaluate(model, b, mode) for k, b in sets.items() if b and due}
            for name in sets:
                row |= _error_columns(name, results.get(name), train.classes)
            row |= measure(model, results)
            row["seconds"] = time.perf_counter() - start
            history.rows.append(row)
            if after_epoch:
                after_epoch(history)
            _report(row, len(rates), evaluate_every, style, bar)
    return history


def _error_columns(name: str, result: Evaluation | None, classes: int) -> dict[str, float]:
    """`name_error` and, but for the validation set, `name_error_class_i`; NaN without result."""
    errors = result.class_errors if result else (nan,) * classes
    row = {f"{name}_error": result.error if result else nan}
    if name != "valid":
        row |= {f"{name}_error_class_{i}": e for i, e in enumerate(errors)}
    return row


# -------------------------------------------------------------------------------- progress


def progress_style(progress: str = "auto") -> str:
    """What "auto" is here: a bar for a person (terminal or notebook), lines for a log.

    The environment variable TQDM_DISABLE makes it "none". Other styles stay as they are.
    """
    check_name("progress", progress, ("auto", "bar", "lines", "none"))
    if progress != "auto":
        return progress
    if os.environ.get("TQDM_DISABLE"):
        return "none"
    return "bar" if sys.stderr.isatty() or "ipykernel" in sys.modules else "lines"


def _report(row: dict[str, float], epochs: int, evaluate_every: int, style: str, bar: tqdm) -> None:
    """Show one epoch. In lines: the first, the last, and at most ten evaluated ones between."""
    text = f"epoch {row['epoch']}/{epochs}  {describe_row(row)}"
    bar.set_postfix_str(text, refresh=False)
    stride = ceil(epochs / 10 / evaluate_every) * evaluate_every
    if style == "lines" and (row["epoch"] in (1, epochs) or row["epoch"] % stride == 0):
        print(text, file=sys.stderr, flush=True)


def describe_row(row: dict[str, float]) -> str:
    """One epoch in a few words, without the errors that were not computed."""
    loss = [f"loss {row['train_loss']:.3f}"] if "train_loss" in row else []
    errors = [(k, row.get(f"{k}_error", nan)) for k in ("train", "valid", "test")]
    return "  ".join([*loss, *(f"{k} error {100 * e:.1f} %" for k, e in errors if not isnan(e))])
