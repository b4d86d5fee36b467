"""The training loop, in plain sight.

In: a model, an optimizer and batches. Out: the model, trained in place, and its `History`.
Next file: `probes.py`.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, isfinite, isnan, nan

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bnnlib.batches import Batches
from bnnlib.errors import NotFinite, check_name
from bnnlib.history import History
from bnnlib.layers import binary_layers, evaluating
from bnnlib.losses import mistakes
from bnnlib.steps import Penalty, Step

SCHEDULES = ("exponential", "linear")
# Images at once. On a CPU few, so that it takes no more memory than training did.
EVALUATION_BATCH = {"cpu": 50, "cuda": 2000}
SAMPLED_BATCH = 500  # images for which stochastic weights are drawn once, on every device
_ADVICE = "a smaller learning rate may help"


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
def evaluate(
    model: nn.Module,
    batches: Batches,
    mode: EvaluationMode | None = None,
    after_batch: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Error over every image of the set, and of each class, from one pass in `mode`.

    The model is the same afterwards, its averages and generators included, also where
    `after_batch`, called after each batch, raises. With statistics of the batch no batch is
    larger than in training, and all but the last are of one size.
    """
    mode = mode or EvaluationMode()
    with evaluating(model, mode.weights, mode.statistics, mode.seed):
        wrong = []
        for x, labels in batches.in_order(_evaluation_batch(model, batches, mode.statistics)):
            wrong.append(mistakes(sum(model(x) for _ in range(mode.samples)), labels))
            after_batch()
    wrong = torch.cat(wrong).cpu()
    return Evaluation(wrong.double().mean().item(), _class_errors(wrong, batches), wrong)


def _evaluation_batch(model: nn.Module, batches: Batches, statistics: str) -> int:
    """Images at once, for a model that is in the mode it is evaluated in."""
    if statistics == "batch":
        return ceil(len(batches) / ceil(len(batches) / batches.batch_size))
    if any(layer.mode == "stochastic" for layer in binary_layers(model)):
        return SAMPLED_BATCH
    return EVALUATION_BATCH.get(batches.labels.device.type, SAMPLED_BATCH)


def _class_errors(wrong: Tensor, batches: Batches) -> tuple[float, ...]:
    labels, zero = batches.labels.cpu(), torch.zeros(batches.classes, dtype=torch.float64)
    total = zero.index_add(0, labels, wrong.double())
    count = zero.index_add(0, labels, torch.ones_like(total)[labels])
    return tuple((total / count).tolist())  # 0 / 0 is NaN


@dataclass
class Position:
    """How far a training has come.

    Beside the model, the optimizer and the generators it is all that `fit` needs to go on, in
    the middle of an epoch too.
    """

    history: History = field(default_factory=History)  # of the epochs that are over
    order: Tensor | None = None  # state of the order's generator as the epoch under way began
    done: int = 0  # steps of that epoch
    losses: Tensor = field(default_factory=lambda: torch.zeros(0))  # of each step, float32
    wrong: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # mistakes
    started: float = 0.0  # of the epoch, on the clock `time.perf_counter`

    def begin_epoch(self, step: Step, generator: torch.Generator) -> None:
        """Begin an epoch of calls to `step`, or go on with the one under way."""
        if self.order is None:
            self.order, self.started = generator.get_state(), time.perf_counter()
        else:
            generator.set_state(self.order)
        order = step.batches.order(generator)
        step.begin_epoch(order, self.losses[: self.done], self.wrong[: self.done])
        self.losses, self.wrong = step.losses, step.wrong  # filled step by step

    def end_epoch(self, row: dict[str, float]) -> None:
        """Write the epoch into the history."""
        self.history.rows.append(row)
        self.order, self.done = None, 0

    @property
    def text(self) -> str:
        """Where this is, for messages."""
        return self.at(self.done) if self.done else f"epoch {len(self.history)}"

    def at(self, step: int) -> str:
        """A step of the epoch under way, counted from 1, for messages."""
        return f"step {step} of epoch {len(self.history) + 1}"


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    position: Position,
    penalty: Penalty | None = None,
) -> Step:
    """The `Step` that raises NotFinite instead of a step on a loss that is no finite number.

    On a CPU, that is: a GPU would have to wait for each loss, and is looked at once an epoch.
    """

    def look(x: Tensor, loss: Tensor) -> None:
        if not isfinite(loss.item()):
            raise loss_not_finite(
                loss.item(), position.at(position.done + 1), first_not_finite(model, x)
            )

    on_cpu = batches.labels.device.type == "cpu"
    return Step(model, optimizer, batches, penalty, look if on_cpu else None)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    generator: torch.Generator,
    penalty: Penalty | None = None,
) -> tuple[float, float]:
    """One pass over the shuffled batches; returns mean loss and error, both in training mode.

    What `penalty` returns is added to the loss.
    Raises NotFinite when the loss, a weight or an average is no longer a finite number.
    """
    position = Position()
    step = training_step(model, optimizer, batches, position, penalty)
    return _pass(step, position, generator)


def _pass(
    step: Step,
    position: Position,
    generator: torch.Generator,
    after_step: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """The steps of the epoch at `position` that are not done yet; mean loss and error of all."""
    position.begin_epoch(step, generator)
    while position.done < step.count:
        step()
        position.done += 1
        after_step()
    check_finite(step.model, step.optimizer, position)
    return step.losses.mean().item(), step.wrong.sum().item() / step.order.numel()


def check_finite(model: nn.Module, optimizer: torch.optim.Optimizer, position: Position) -> None:
    """Raise NotFinite where a loss of this epoch, a weight, an average or a moment is not finite.

    A NaN inside the network need not reach the loss: its sign counts as +1.
    """
    losses, tensors = position.losses[: position.done], dict(model.state_dict())
    for name, p in model.named_parameters():
        tensors |= {f"{k} of {name}": v for k, v in optimizer.state.get(p, {}).items()}
    # One number to wait for: of tensors with a NaN or an infinity the sum is one, too.
    if sum(t.sum() for t in (losses, *tensors.values())).isfinite():
        return
    source = next((name for name, t in tensors.items() if not t.isfinite().all()), None)
    lost = (~losses.isfinite()).nonzero().flatten()
    if len(lost):
        first = lost[0].item()
        raise loss_not_finite(losses[first].item(), position.at(first + 1), source)
    if source:
        raise NotFinite(f"{source} is not finite after {position.text}; {_ADVICE}")


def loss_not_finite(loss: float, where: str, source: str | None = None) -> NotFinite:
    """The error for a loss that is NaN or infinite, to be raised by the caller."""
    first = f", first in {source}" if source else ""
    return NotFinite(f"the training loss became {loss} at {where}{first}; {_ADVICE}")


@torch.no_grad()
def first_not_finite(model: nn.Module, x: Tensor) -> str | None:
    """The first layer, in the order of computation, with an output that is not finite.

    "the input" where x is not; None where all are finite. Averages move as in training.
    """
    if not x.isfinite().all():
        return "the input"
    found: list[str] = []

    def look(name: str, output: Tensor) -> None:
        if not output.isfinite().all():
            found.append(f"layer {name}")

    leaves = [(name, m) for name, m in model.named_modules() if not any(m.children())]
    hooks = [m.register_forward_hook(lambda *a, n=name: look(n, a[2])) for name, m in leaves]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


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
    penalty: Penalty | None = None,
    measure: Measure = lambda model, results: {},
    progress: str = "auto",
    position: Position | None = None,
    after_step: Callable[[], object] = lambda: None,
    after_batch: Callable[[], object] = lambda: None,
    after_epoch: Callable[[History], object] = lambda history: None,
) -> History:
    """Train for one epoch at each learning rate in `rates`; returns the `History`.

    `generator` (CPU) draws the order of the batches. Errors are computed every
    `evaluate_every` epochs and after the last, in `mode`. What `penalty` returns is added to
    the loss. `measure` is given the model and the evaluations of each epoch, by split, and
    returns more columns. `progress` is "bar", "lines", "none" or "auto", see
    `progress_style`. `position` is where to begin, and moves with the training.
    `after_step` is called after each training step, `after_batch` after each evaluated batch
    and `after_epoch`, with the history so far, after each epoch. What they raise ends the
    training, which can go on later from `position`.
    """
    sets = {"train": train, "valid": valid, "test": test}
    style, position = progress_style(progress), position or Position()
    step = training_step(model, optimizer, train, position, penalty)
    bar = _bar(style, position, step.count, len(rates))

    def tick() -> None:
        bar.update()
        after_step()

    with bar:
        for epoch in range(len(position.history) + 1, len(rates) + 1):
            lr = rates[epoch - 1]
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, error = _pass(step, position, generator, tick)
            row = {"epoch": epoch, "learning_rate": lr, "train_loss": loss}
            row["train_mode_error"] = error
            due = epoch % evaluate_every == 0 or epoch == len(rates)
            tested = {name: batches for name, batches in sets.items() if batches and due}
            results = {k: evaluate(model, b, mode, after_batch) for k, b in tested.items()}
            for name in sets:
                row |= _error_columns(name, results.get(name), train.classes)
            row |= measure(model, results)
            row["seconds"] = time.perf_counter() - position.started
            position.end_epoch(row)
            after_epoch(position.history)
            _report(row, len(rates), evaluate_every, style, bar)
    return position.history


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


def _bar(style: str, position: Position, steps: int, epochs: int) -> tqdm:
    """A bar of all steps, `steps` an epoch, that begins at `position`; silent but for "bar"."""
    done = len(position.history) * steps + position.done
    hidden, total = style != "bar", steps * epochs
    return tqdm(total=total, initial=done, unit="step", disable=hidden, mininterval=0.3)


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
