"""One function that runs any experiment: build a trial, open its folder, restore, fit, finish."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnnlib.batches import Batches
from bnnlib.data.images import ImageSet
from bnnlib.errors import Interrupted, InvalidValue, check_fills_batch, shown
from bnnlib.experiments.build import (
    build_model,
    inputs_of,
    prepare_data,
    resolve_device,
)
from bnnlib.experiments.experiment import Experiment
from bnnlib.experiments.scored import as_scored
from bnnlib.files import as_folder, locked
from bnnlib.history import TIMES, History
from bnnlib.kernels.precision import resolve_precision
from bnnlib.layers import check_can_share, derive_seed
from bnnlib.losses import l2_penalty
from bnnlib.models import penalized_parameters
from bnnlib.names import LOSSES
from bnnlib.optim import make_optimizer
from bnnlib.parallel import Ranks, Shard, launched
from bnnlib.probes import Recorder, mode_errors
from bnnlib.process import keep_freed_memory
from bnnlib.runs.checkpoint import Checkpoints, restore
from bnnlib.runs.evaluation import evaluate_run
from bnnlib.runs.folder import begin, finish, load_run
from bnnlib.runs.interrupts import deferred_interrupts
from bnnlib.runs.record import HISTORY, counted, folder_to_score, holds_finished, trained_on
from bnnlib.runs.result import Run, environment, make_record, parameter_hash
from bnnlib.training import (
    EvaluationMode,
    TrainingState,
    fit,
    learning_rates,
    resolve_progress,
)

HISTORY_EVERY = 5.0  # seconds between two writings of `history.csv`, at least


def run(
    experiment: Experiment,
    out: str | Path | None = None,
    *,
    device: str = "auto",
    root: str | Path | None = None,
    download: bool = False,
    progress: str = "auto",
    checkpoint_every: float = 300.0,
    precision: str = "auto",
    stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Train as `experiment` says and, where `out` is given, keep everything in that folder.

    The folder holds `experiment.json` (the experiment, versions, device, hashes),
    `history.csv` (so far), `labels.npz`, `parameters.safetensors` and, until the
    run is finished, its last two checkpoints, saved every `checkpoint_every` seconds. A folder
    with an unfinished run of the same experiment is continued, one with a finished run is
    read and left alone; nothing else is ever written to. `root` and `download` are those of
    `data.load`, `precision` is that of `resolve_precision`. An experiment that `evaluates`
    trains nothing: it scores the run in its `run_folder` and has the settings of that run.

    Processes that `torchrun` started together train as one, each on its rows of every batch; the
    first writes and speaks. A run goes on with another number of them, too.

    With a folder, a first Ctrl-C or SIGTERM, or `stop`, asked after each step, finishes the step,
    saves, and raises Interrupted. Raises InvalidValue for a folder with another experiment, for an
    evaluation that asks for other settings than the scored run has, and for a network that several
    processes cannot share, FolderInUse for a folder in use, DamagedFile for one that was altered,
    DataNotFound for missing data, CannotWrite where the disk does not suffice, NotFinite where the
    numbers are no longer finite, and RankLost where another process has ended; the last good
    checkpoint is kept.
    """
    _check_arguments(experiment, checkpoint_every)
    folder = None if out is None else as_folder("out", out)
    root = None if root is None else as_folder("root", root)
    with launched() as ranks:
        style = resolve_progress(progress if ranks.leads else "none")
        with ranks.agreeing():
            where = _own_device(device, ranks)
            how = {"device": where, "precision": resolve_precision(precision, where)}
            source = None
            if experiment.evaluates:
                source = load_run(folder_to_score(experiment, folder))
                experiment = as_scored(experiment, source.experiment)
            finished = folder and holds_finished(folder, experiment)
        _check_same(experiment, ranks)
        if finished:
            if style != "none":
                print(f"{folder} holds this run, finished; nothing is run again", file=sys.stderr)
            return load_run(folder)
        if source:  # which is quick, so each rank does all of it
            own = folder if ranks.leads else None
            return _score(experiment, source, own, root, download, style, **how)
        with ranks.agreeing():
            if download and ranks.leads and ranks.world > 1:  # or each would fetch it
                prepare_data(experiment, root, download)
        with ranks.agreeing():
            trial = _build_trial(experiment, root, download, ranks, **how)
        with _own_random_numbers(experiment, where):
            if folder is None:
                return _train(trial, style)
            return _train_in_folder(trial, folder, style, checkpoint_every, stop)


def _check_arguments(experiment: Experiment, checkpoint_every: float) -> None:
    """Raise InvalidValue for an argument of `run` of another kind than it takes."""
    if not isinstance(experiment, Experiment):
        raise InvalidValue(
            f"run takes an Experiment, such as named('svhn-l2'); got {shown(experiment)}"
        )
    if not isinstance(checkpoint_every, Real) or not checkpoint_every >= 0:  # NaN is not
        raise InvalidValue(
            f"checkpoint_every must be 0 seconds or more, got {shown(checkpoint_every)}"
        )


def _check_same(e: Experiment, ranks: Ranks) -> None:
    """Raise InvalidValue where the ranks were given different experiments."""
    asked = ranks.told(e.digest())
    with ranks.agreeing():
        if asked != e.digest():
            raise InvalidValue(f"rank {ranks.rank} was given another experiment than rank 0")


def _own_device(name: str, ranks: Ranks) -> torch.device:
    """The device of this rank: of several on one machine's GPUs each takes its own."""
    if ranks.world == 1:
        return resolve_device(name)
    if str(name).startswith("cuda:"):
        raise InvalidValue(f"{ranks.world} ranks cannot share {name!r}; use 'cuda' or 'cpu'")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        name = f"cuda:{os.environ.get('LOCAL_RANK', ranks.rank)}"
    return resolve_device(name)


@contextmanager
def _own_random_numbers(e: Experiment, device: torch.device) -> Iterator[None]:
    """Inside the `with` block PyTorch's own generators have a seed of this run.

    No layer of ours draws from them; one of `torch.nn`, in somebody's network, may.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(e.seed, "PyTorch's own generators"))
        yield


@dataclass(frozen=True, eq=False)
class Trial:
    """An experiment with all that it needs to be trained."""

    experiment: Experiment
    sets: dict[str, ImageSet]
    batches: dict[str, Batches]  # of the same splits, on the device
    state: TrainingState
    penalized: list[Tensor]  # what the L2 penalty reaches
    record: dict[str, Any]
    ranks: Ranks


def _build_trial(
    e: Experiment,
    root: str | Path | None,
    download: bool,
    ranks: Ranks,
    device: torch.device,
    precision: str,
) -> Trial:
    if not e.binary or e.weights == "real":
        precision = "float32"  # there is nothing to take in half
    sets = prepare_data(e, root, download)
    check_fills_batch(len(sets["train"]), e.batch_size)
    model = build_model(e, device, precision, inputs_of(sets["train"]))
    order = torch.Generator().manual_seed(derive_seed(e.seed, "order of batches"))
    state = TrainingState(model, make_optimizer(e.optimizer, model, e.lr_start), order)
    batches = {split: Batches(data, e.batch_size, device) for split, data in sets.items()}
    _recorder(e, sets["train"]).begin(state)
    penalized = penalized_parameters(model, e.l2_target)
    record = make_record(e, sets, device, precision)
    if ranks.world > 1:
        check_can_share(model)
        Shard(ranks, e.batch_size)  # refuses a batch that is too small
        record["device"] += f", {ranks.world} ranks"
    return Trial(e, sets, batches, state, penalized, record, ranks)


def _recorder(e: Experiment, train: ImageSet) -> Recorder:
    return Recorder(e.probes, train, derive_seed(e.seed, "probes"))


def _train_in_folder(
    trial: Trial, folder: Path, style: str, every: float, stop: Callable[[], bool]
) -> Run:
    """Train, or go on; the leading rank alone holds the folder and writes to it."""
    state, ranks = trial.state, trial.ranks
    with ExitStack() as held:
        with ranks.agreeing():
            checkpoints = None
            if ranks.leads:
                held.enter_context(locked(folder))
                trial, checkpoints = _open(trial, folder, every)
        _restore(trial, checkpoints, folder, style)
        with deferred_interrupts(stop, ranks.most) as stop_here:

            def after_step() -> None:
                stop_here()
                if checkpoints:
                    checkpoints.save_if_due()

            own = folder if ranks.leads else None
            try:
                result = _train(trial, style, own, after_step, stop_here)
            except Interrupted as interrupt:
                with ranks.agreeing():  # nobody ends before the state is kept
                    if checkpoints:
                        checkpoints.save()
                        state.history.save(folder / HISTORY)
                here = f"{state.where}; the state is saved in {folder}"
                raise Interrupted(f"{interrupt} after {here}, and the same call goes on") from None
            with ranks.agreeing():
                if checkpoints:
                    result = finish(folder, result)
                    checkpoints.remove()
        return replace(result, record=ranks.told(result.record), folder=folder)


def _open(trial: Trial, folder: Path, every: float) -> tuple[Trial, Checkpoints]:
    """The trial with the record of the folder, and the states that are kept in it."""
    e = trial.experiment
    labels = {split: data.labels for split, data in trial.sets.items()}
    record = begin(folder, e, trial.record, labels)
    return replace(trial, record=record), Checkpoints(folder, trial.state, e.digest(), every)


def _restore(trial: Trial, checkpoints: Checkpoints | None, folder: Path, style: str) -> None:
    """Bring all ranks to the state that the leading one finds in its folder."""
    ranks, path = trial.ranks, None
    with ranks.agreeing():
        if checkpoints:
            path = checkpoints.restore()
    path = ranks.told(path)
    with ranks.agreeing():
        if path and not checkpoints:
            restore(trial.state, path, trial.experiment.digest())
    if path and style != "none":
        print(f"{folder}: going on after {trial.state.where}", file=sys.stderr)


def _train(
    trial: Trial,
    style: str,
    folder: Path | None = None,
    after_step: Callable[[], object] = lambda: None,
    after_batch: Callable[[], object] = lambda: None,
) -> Run:
    """Train to the end; the history is kept in `folder` meanwhile."""
    e, state = trial.experiment, trial.state
    _announce(e, trial.record, counted(e.epochs, "epoch"), folder, style)
    keep_freed_memory()
    history = fit(
        state,
        **trial.batches,
        rates=learning_rates(e.schedule, e.lr_start, e.lr_final, e.epochs),
        loss=LOSSES[e.loss],
        evaluate_every=e.evaluate_every,
        mode=EvaluationMode(
            e.evaluation_weights,
            e.evaluation_statistics,
            e.evaluation_samples,
            derive_seed(e.seed, "evaluation"),
            e.evaluation_classes,
        ),
        penalty=(lambda: e.l2 * l2_penalty(trial.penalized)) if e.l2 else None,
        measure=_recorder(e, trial.sets["train"]),
        progress=style,
        after_step=after_step,
        after_batch=after_batch,
        after_epoch=_at_intervals(lambda h: h.save(folder / HISTORY) if folder else None),
        ranks=trial.ranks,
    )
    if "modes" in e.probes and len(history):
        seed = derive_seed(e.seed, "evaluation")
        history.rows[-1] |= mode_errors(state.model, trial.batches, after_batch, seed)
    record = trial.record | {"parameter_sha256": parameter_hash(state.model)}
    labels = {split: data.labels for split, data in trial.sets.items()}
    return Run(e, history, record, state.model, labels, folder)


def _announce(e: Experiment, record: dict, what: str, folder: Path | None, style: str) -> None:
    """Say in one line what is about to be done, to what, on what and where."""
    if style != "none":
        print(
            f"{e.name}: {record['trained_on']}; {what} on {record['device']}, "
            f"{counted(record['threads'], 'thread')}{f'; in {folder}' if folder else ''}",
            file=sys.stderr,
            flush=True,
        )


def _at_intervals(action: Callable[[History], object]) -> Callable[[History], None]:
    """`action`, left out where the last one ended less than `HISTORY_EVERY` seconds ago.

    A history of many short epochs takes longer to write than the epoch after it to train.
    """
    ended = -HISTORY_EVERY

    def act(history: History) -> None:
        nonlocal ended
        if time.monotonic() - ended >= HISTORY_EVERY:
            action(history)
            ended = time.monotonic()

    return act


def _score(
    e: Experiment,
    source: Run,
    folder: Path | None,
    root: str | Path | None,
    download: bool,
    style: str,
    device: torch.device,
    precision: str,
) -> Run:
    """The evaluation of a finished run as a run of its own, of one row."""
    left_out = (*TIMES, "history_sha256", "continued")
    record = {k: v for k, v in source.record.items() if k not in left_out}
    record |= {"experiment_sha256": e.digest(), **environment(device, precision)}
    record["trained_on"] = trained_on(source.experiment, record["images"]["train"])
    start, cpu_start = time.perf_counter(), time.process_time()
    rows = "all" if e.evaluation_rows is None else f"at most {e.evaluation_rows:,}"
    _announce(e, record, f"{e.run_folder} is scored, {rows} rows,", folder, style)
    where = {"download": download, "device": device, "precision": precision}
    error = evaluate_run(source, e.evaluation_rows, root, **where)
    row = {"epoch": len(source.history), "train_error": error}
    taken = (time.perf_counter() - start, time.process_time() - cpu_start)
    history = History([row | dict(zip(TIMES, taken, strict=True))])
    if folder is None:
        return Run(e, history, record)
    with locked(folder):
        record = begin(folder, e, record, source.labels)
        return finish(folder, Run(e, history, record, folder=folder))
