"""The training loop, in plain sight: a step, an epoch, an evaluation, `fit`."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import ceil, isfinite, nan

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bnnlib.batches import Batches
from bnnlib.errors import InvalidValue, NotFinite, check_name
from bnnlib.files import Row
from bnnlib.history import History, describe_row
from bnnlib.kernels.graphs import GraphedStep
from bnnlib.layers import (
    Activation,
    binary_layers,
    derive_seed,
    evaluating,
    random_generator,
    sharing,
)
from bnnlib.losses import Loss, mistakes, squared_hinge_loss
from bnnlib.names import EVALUATION_CLASSES, SCHEDULES
from bnnlib.optim import BinaryAdam, clip_latent_weights, set_rate
from bnnlib.parallel import ALONE, Ranks, Shard

# Images at once. On a CPU few, so that it takes no more memory than training did.
EVALUATION_BATCH = {"cpu": 50, "cuda": 2000}
SAMPLED_BATCH = 500  # images for which stochastic weights are drawn once, on every device
_ADVICE = "a smaller learning rate may help"

Penalty = Callable[[], Tensor | float]


def learning_rates(schedule: str, start: float, final: float, epochs: int) -> list[float]:
    """One rate for each epoch, falling from `start` towards `final`.

    - "exponential": start * (final / start)^(e / epochs), the original's; the last epoch is
      one factor above `final` (`binary_net_random_labels.py:302,371`).
    - "linear": start + (final - start) * e / epochs.
    """
    check_name("schedule", schedule, SCHEDULES)
    shares = [e / epochs for e in range(epochs)]
    if schedule == "linear":
        return [start + (final - start) * share for share in shares]
    return [start * (final / start) ** share for share in shares]


# -------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class EvaluationMode:
    """How a model is tested: its weights and statistics as in `layers.evaluating`.

    `classes`: whether the error of a class comes from the "mixed" batches of the whole set, or,
    "apart", from batches that hold this class alone, as in the original
    (`binary_net_random_labels.py:322-338`). That makes a difference where statistics are those of
    the batch.
    """

    weights: str | None = None  # None: as in training
    statistics: str = "running"
    samples: int = 1  # passes whose scores are averaged, each with its own stochastic weights
    seed: int = 0  # of those weights
    classes: str = "mixed"

    def afresh(self, purpose: str) -> "EvaluationMode":
        """The mode with another seed, for this purpose alone."""
        return replace(self, seed=derive_seed(self.seed, purpose))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Errors of a model on one set, each between 0 and 1."""

    error: float
    class_errors: tuple[float, ...]  # NaN for a class that the set does not hold
    mistakes: Tensor  # (N,) bool, in the order of the set
    predicted: Tensor  # (N,) int64, the classes of the largest scores


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Batches,
    mode: EvaluationMode | None = None,
    after_batch: Callable[[], object] = lambda: None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Error over every image of the set, and of each class, in `mode`.

    One pass gives both; where classes are "apart", a pass over each of them follows. The model is
    the same afterwards, its averages and generators included, also where `after_batch`, called
    after each batch, raises. With statistics of the batch no batch is larger than in training,
    and all but the last are of one size. Several `ranks` share the batches; where weights are
    drawn each computes all, or the draws would be others.
    """
    mode, labels = mode or EvaluationMode(), batches.labels
    check_name("classes", mode.classes, EVALUATION_CLASSES)
    with evaluating(model, mode.weights, mode.statistics, mode.seed):

        def classified(rows: Tensor) -> Tensor:
            return _classified(model, batches, rows, mode, after_batch, ranks)

        predicted = classified(torch.arange(len(labels), device=labels.device))
        by_class = predicted.clone()
        for i in labels.unique() if mode.classes == "apart" else ():
            rows = (labels == i).nonzero().flatten()
            by_class[rows] = classified(rows)
    wrong, wrong_by_class = ((found != labels).cpu() for found in (predicted, by_class))
    error = wrong.double().mean().item()
    return Evaluation(error, _class_errors(wrong_by_class, batches), wrong, predicted.cpu())


def _classified(
    model: nn.Module,
    batches: Batches,
    rows: Tensor,
    mode: EvaluationMode,
    after_batch: Callable[[], object],
    ranks: Ranks,
) -> Tensor:
    """The classes of the largest scores of the images at `rows`, in batches of these alone."""
    predicted = torch.zeros_like(rows)
    size = _evaluation_batch(model, len(rows), batches, mode.statistics)
    sharers = ALONE if _draws(model) else ranks
    for begin in range(0, len(rows), size * sharers.world):  # a batch for each of them
        own = slice(begin + size * sharers.rank, begin + size * (sharers.rank + 1))
        if len(rows[own]):
            x, _ = batches.take(rows[own])
            predicted[own] = sum(model(x) for _ in range(mode.samples)).argmax(1)
        after_batch()
    return sharers.total(predicted)


def _evaluation_batch(model: nn.Module, n: int, batches: Batches, statistics: str) -> int:
    """Of n images, those at once, for a model that is in the mode it is evaluated in."""
    if statistics == "batch":
        return ceil(n / ceil(n / batches.batch_size))
    if _draws(model):
        return SAMPLED_BATCH
    return EVALUATION_BATCH.get(batches.labels.device.type, SAMPLED_BATCH)


def _draws(model: nn.Module) -> bool:
    """Whether weights are drawn, for a model in the mode it is evaluated in."""
    return any(layer.used_quantizer()[1] for layer in binary_layers(model))


def _class_errors(wrong: Tensor, batches: Batches) -> tuple[float, ...]:
    labels, zero = batches.labels.cpu(), torch.zeros(batches.classes, dtype=torch.float64)
    total = zero.index_add(0, labels, wrong.double())
    count = zero.index_add(0, labels, torch.ones_like(total)[labels])
    return tuple((total / count).tolist())  # 0 / 0 is NaN


# --------------------------------------------------------------------------- state and step


@dataclass
class TrainingState:
    """All that changes while a network is trained, so all that `fit` needs to go on.

    What follows `generator` says how far the training has come, in the middle of an epoch too.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # of the order of the batches, on the CPU
    history: History = field(default_factory=History)  # of the epochs that are over
    epoch_start: Tensor | None = None  # state of `generator` as the epoch under way began
    done: int = 0  # batches of that epoch
    losses: Tensor = field(default_factory=lambda: torch.zeros(0))  # of each, float32
    wrong: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # mistakes
    started: float = 0.0  # of the epoch, on the clock `time.perf_counter`
    cpu_started: float = 0.0  # the same on `time.process_time`
    signs: dict[str, Tensor] = field(default_factory=dict)  # as it began, for the probe "flips"
    steps: int = 0  # in all epochs

    @property
    def where(self) -> str:
        """How far this is, for messages."""
        return self.at(self.done) if self.done else f"epoch {len(self.history)}"

    def at(self, step: int) -> str:
        """A step of the epoch under way, counted from 1, for messages."""
        return f"step {step} of epoch {len(self.history) + 1}"

    def check_finite(self) -> None:
        """Raise NotFinite where a loss of this epoch, a weight, an average or a moment is not.

        A NaN inside the network need not reach the loss: its sign counts as +1.
        """
        losses, tensors = self.losses[: self.done], dict(self.model.state_dict())
        for name, p in self.model.named_parameters():
            moments = self.optimizer.state.get(p, {}).items()
            tensors |= {f"{k} of {name}": v for k, v in moments if isinstance(v, Tensor)}
        # One number to wait for: of tensors with a NaN or an infinity the sum is one, too.
        if sum(t.sum() for t in (losses, *tensors.values())).isfinite():
            return
        source = next((name for name, t in tensors.items() if not t.isfinite().all()), None)
        lost = (~losses.isfinite()).nonzero().flatten()
        if len(lost):
            first = lost[0].item()
            raise _loss_not_finite(losses[first].item(), self.at(first + 1), source)
        if source:
            raise NotFinite(f"{source} is not finite after {self.where}; {_ADVICE}")


class Step:
    """A training step on the next batch of an epoch, to be called once for each.

    `begin_epoch` says in which order the batches come. What `penalty` returns is added to
    `loss(scores, labels)`. The step takes nothing from the host but the order and the learning
    rate, once an epoch, and leaves loss and mistakes on the device, until somebody reads them. On
    a GPU it becomes one graph, and waits for nothing, where all that it calls is known to allow
    that; on a CPU it raises NotFinite instead of a step on a loss that is no finite number.

    With a `shard`, inside of `sharing`, it is one step of several ranks: each takes its rows of
    the batch, and all have the same scores, loss, penalty and mistakes of the whole one.
    """

    def __init__(
        self,
        state: TrainingState,
        batches: Batches,
        penalty: Penalty | None = None,
        loss: Loss = squared_hinge_loss,
        shard: Shard | None = None,
    ):
        self.state, self.batches, self.penalty, self.loss = state, batches, penalty, loss
        self.shard = shard
        device, count = batches.labels.device, batches.n_batches
        self.order = torch.zeros(count, batches.batch_size, dtype=torch.int64, device=device)
        self.next = torch.zeros(1, dtype=torch.int64, device=device)  # the batch that comes
        self.losses = torch.zeros(count, device=device)
        self.wrong = torch.zeros(count, dtype=torch.int64, device=device)
        self.looks = device.type == "cpu"  # at each loss; a GPU would have to be waited for
        self._call = self._train
        if device.type == "cuda" and shard is None and _can_be_captured(state, loss):
            generator = random_generator(state.model)
            generators = [] if generator is None else [generator]
            zero_grad = state.optimizer.zero_grad
            self._call = GraphedStep(self._train, device, generators, zero_grad)

    def begin_epoch(self) -> None:
        """Begin an epoch, or go on with the one that is under way in the state."""
        state = self.state
        if state.epoch_start is None:
            state.epoch_start = state.generator.get_state()
            state.started, state.cpu_started = time.perf_counter(), time.process_time()
        else:
            state.generator.set_state(state.epoch_start)
        order = self.batches.order(state.generator)
        if state.done > len(order):
            raise InvalidValue(f"{state.done} steps are done of an epoch that has {len(order)}")
        self.order.copy_(order)
        self.next.fill_(state.done)
        self.losses[: state.done] = state.losses[: state.done]
        self.wrong[: state.done] = state.wrong[: state.done]
        state.losses, state.wrong = self.losses, self.wrong  # filled step by step
        state.model.train()
        if isinstance(state.optimizer, BinaryAdam):
            state.optimizer.read_settings()

    def __call__(self) -> None:
        """Train on one batch; its loss and its count of mistakes go to the state."""
        self._call()
        self.state.done += 1
        self.state.steps += 1

    def _train(self) -> None:
        with _repeatable(self.order.device):
            self._train_once()

    def _train_once(self) -> None:
        model, optimizer = self.state.model, self.state.optimizer
        optimizer.zero_grad()  # so that the last gradients leave room for the activations
        x, labels, logits = self._scores(self.order.index_select(0, self.next)[0])
        loss = self.loss(logits, labels)
        if self.penalty:
            loss = loss + self.penalty()
        if self.looks and not isfinite(loss.item()):
            where = self.state.at(self.state.done + 1)
            raise _loss_not_finite(loss.item(), where, first_not_finite(model, x))
        loss.backward()
        if self.shard:
            self.shard.average(model)
        optimizer.step()  # moves the latent weights, and ours clip them to [-1, 1]
        if not isinstance(optimizer, BinaryAdam):
            clip_latent_weights(optimizer)
        self.losses.index_copy_(0, self.next, loss.detach().float().view(1))
        self.wrong.index_copy_(0, self.next, mistakes(logits.detach(), labels).sum().view(1))
        self.next.add_(1)

    def _scores(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the images at `rows`: those of this rank, and the labels and scores of all."""
        if self.shard is None:
            x, labels = self.batches.take(rows)
            return x, labels, self.state.model(x)
        x, _ = self.batches.take(rows[self.shard.own])
        return x, self.batches.labels[rows], self.shard.whole(self.state.model(x))

    def check_alike(self) -> None:
        """Raise InvalidValue where the ranks hold different parameters or averages.

        So it is where a layer of somebody else's depends on the whole batch.
        """
        held = {k: v.double().abs().sum() for k, v in self.state.model.state_dict().items()}
        table = self.shard.ranks.beside(torch.stack([*held.values()]))
        differs = ~torch.isclose(table, table[:1], rtol=1e-5).all(0)
        if differs.any():
            raise InvalidValue(
                f"the ranks hold different {[*held][differs.int().argmax()]} after "
                f"{self.state.where}: it depends on which rows a rank takes; train in one process"
            )


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Inside the `with` block cuDNN adds in the same order each time.

    By default it takes kernels, for the gradient of some weights, whose threads add as they come.
    """
    before = torch.backends.cudnn.deterministic
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _can_be_captured(state: TrainingState, loss: Loss) -> bool:
    """Whether a step can become a CUDA graph, which knows nothing of what happens on the host.

    Other optimizers count there, and the code of others may look at a number.
    """
    modules = list(state.model.modules())
    parts = [loss, *map(type, modules), *(layer.quantizer for layer in binary_layers(state.model))]
    parts += [module.function for module in modules if isinstance(module, Activation)]
    if any(getattr(module, "on_host", False) for module in modules):
        return False
    ours = all(getattr(p, "__module__", "").split(".")[0] in ("bnnlib", "torch") for p in parts)
    return ours and type(state.optimizer) is BinaryAdam


def _loss_not_finite(loss: float, where: str, source: str | None) -> NotFinite:
    first = f", first in {source}" if source else ""
    return NotFinite(f"the training loss became {loss} at {where}{first}; {_ADVICE}")


@torch.no_grad()
def first_not_finite(model: nn.Module, x: Tensor) -> str | None:
    """The first layer, in the order of computation, with an output that is not finite.

    "the input" where x is not; None where all are finite. Averages move as in training.
    """
    found = [] if x.isfinite().all() else ["the input"]

    def look(name: str, output: object) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(f"layer {name}")

    leaves = [(name, m) for name, m in model.named_modules() if not any(m.children())]
    hooks = [m.register_forward_hook(lambda *a, n=name: look(n, a[2])) for name, m in leaves]
    model(x)
    for hook in hooks:
        hook.remove()
    return found[0] if found else None


# ---------------------------------------------------------------------------------- the loop


def train_epoch(step: Step, after_step: Callable[[], object] = lambda: None) -> tuple[float, float]:
    """One pass over the shuffled batches; returns mean loss and error, both in training mode.

    Goes on where an epoch is under way. Raises NotFinite when the loss, a weight or an average
    is no longer a finite number.
    """
    step.begin_epoch()
    while step.state.done < len(step.order):
        step()
        after_step()
    step.state.check_finite()
    if step.shard:
        step.check_alike()
    return step.losses.mean().item(), step.wrong.sum().item() / step.order.numel()


Measure = Callable[[TrainingState, Mapping[str, Evaluation]], Row]


def fit(
    state: TrainingState,
    train: Batches,
    valid: Batches | None = None,
    test: Batches | None = None,
    *,
    rates: Sequence[float],
    loss: Loss = squared_hinge_loss,
    evaluate_every: int = 1,
    mode: EvaluationMode | None = None,
    penalty: Penalty | None = None,
    measure: Measure = lambda state, results: {},
    progress: str = "auto",
    after_step: Callable[[], object] = lambda: None,
    after_batch: Callable[[], object] = lambda: None,
    after_epoch: Callable[[History], object] = lambda history: None,
    ranks: Ranks = ALONE,
) -> History:
    """Train for one epoch at each learning rate in `rates`; returns the `History`.

    Begins where `state` is, and moves it. Errors are computed every `evaluate_every` epochs and
    after the last, in `mode`; stochastic weights are drawn afresh for each epoch and split, from
    seeds that follow from its own. `loss` is any function of scores (B, C) and labels (B,) to a
    scalar; what `penalty` returns is added to it. `measure` is given
    the state and the evaluations of each epoch, by split, and returns more columns. `progress`
    is "bar", "lines", "none" or "auto", see `resolve_progress`.
    `after_step` is called after each training step, `after_batch` after each evaluated batch
    and `after_epoch`, with the history so far, after each epoch. What they raise ends the
    training, which can go on later from `state`.
    Several `ranks` train as one process does, each on its rows of every batch, from equal states
    to equal states. Raises InvalidValue for what cannot be split, see `layers.sharing`.
    """
    sets = {"train": train, "valid": valid, "test": test}
    shard = Shard(ranks, train.batch_size) if ranks.world > 1 else None
    style, step = resolve_progress(progress), Step(state, train, penalty, loss, shard)
    mode = mode or EvaluationMode()
    with sharing(state.model, shard), _bar(style, state, len(step.order), len(rates)) as bar:
        for epoch in range(len(state.history) + 1, len(rates) + 1):
            lr = rates[epoch - 1]
            set_rate(state.optimizer, lr)
            mean, error = train_epoch(step, lambda: (bar.update(), after_step()))
            row = {"epoch": epoch, "learning_rate": lr, "train_loss": mean}
            row["train_mode_error"] = error
            due = epoch % evaluate_every == 0 or epoch == len(rates)
            tested = {name: batches for name, batches in sets.items() if batches and due}
            results = {
                k: evaluate(state.model, b, mode.afresh(f"{k} {epoch}"), after_batch, ranks)
                for k, b in tested.items()
            }
            for name in sets:
                row |= _error_columns(name, results.get(name), train.classes)
            row |= measure(state, results)
            row["seconds"] = time.perf_counter() - state.started
            row["cpu_seconds"] = time.process_time() - state.cpu_started
            state.history.rows.append(row)
            state.epoch_start, state.done = None, 0
            after_epoch(state.history)
            _report(row, len(rates), evaluate_every, style, bar)
    return state.history


def _error_columns(name: str, result: Evaluation | None, classes: int) -> Row:
    """`name_error` and, but for the validation set, `name_error_class_i`; NaN without result."""
    errors = result.class_errors if result else (nan,) * classes
    row = {f"{name}_error": result.error if result else nan}
    if name != "valid":
        row |= {f"{name}_error_class_{i}": e for i, e in enumerate(errors)}
    return row


# -------------------------------------------------------------------------------- progress


def resolve_progress(progress: str = "auto") -> str:
    """What "auto" is here: a bar for a person (terminal or notebook), lines for a log.

    The environment variable TQDM_DISABLE makes it "none". Other styles stay as they are.
    """
    check_name("progress", progress, ("auto", "bar", "lines", "none"))
    if progress != "auto":
        return progress
    if os.environ.get("TQDM_DISABLE"):
        return "none"
    return "bar" if sys.stderr.isatty() or "ipykernel" in sys.modules else "lines"


def _bar(style: str, state: TrainingState, batches: int, epochs: int) -> tqdm:
    """A bar of all steps that begins where the state is; silent but for "bar"."""
    done = len(state.history) * batches + state.done
    hidden, total = style != "bar", batches * epochs
    return tqdm(total=total, initial=done, unit="step", disable=hidden, mininterval=0.3)


def _report(row: Row, epochs: int, evaluate_every: int, style: str, bar: tqdm) -> None:
    """Show one epoch. In lines: the first, the last, and at most ten evaluated ones between."""
    text = f"epoch {row['epoch']}/{epochs}  {describe_row(row)}"
    bar.set_postfix_str(text, refresh=False)
    stride = ceil(epochs / 10 / evaluate_every) * evaluate_every
    if style == "lines" and (row["epoch"] in (1, epochs) or row["epoch"] % stride == 0):
        print(text, file=sys.stderr, flush=True)
