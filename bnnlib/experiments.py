"""One function that runs any experiment, and one that evaluates what it left.

In: an `Experiment`. Out: a `Run`. The names of `catalogue.py`, `variants.py`, `assembly.py` and
`runs.py` that a reader of the book needs can be imported from here too.
Next file: `capacity.py`.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from bnnlib.assembly import (
    build_model,
    check_size,
    prepare_data,
    resolve_device,
    stream,
)
from bnnlib.batches import Batches, check_fills_batch
from bnnlib.catalogue import (
    EVERY_SPLIT,
    PROFILES,
    PUBLISHED,
    Experiment,
    at_profile,
    by_profile,
    full,
    published,
    quick,
    reduced,
    smoke,
)
from bnnlib.checkpoints import Checkpoints, Training
from bnnlib.data import ImageSet
from bnnlib.errors import Interrupted, InvalidValue, shown
from bnnlib.files import check_free_disk, locked, make_folder
from bnnlib.folders import (
    HISTORY,
    PARAMETERS,
    RESULTS,
    begin_folder,
    check_folder,
    close_folder,
    is_finished,
    load_run,
    stored_runs,
)
from bnnlib.history import History
from bnnlib.interrupts import deferred_interrupts
from bnnlib.layers import binarize_parameters_
from bnnlib.limits import defaults_of
from bnnlib.losses import l2_penalty
from bnnlib.memory import check_memory, keep_freed_memory
from bnnlib.models import penalized_parameters
from bnnlib.optim import BinaryAdam, parameter_groups
from bnnlib.precision import uses_half
from bnnlib.probes import Recorder, mode_errors
from bnnlib.runs import (
    Run,
    counted,
    describe,
    differences,
    environment,
    is_guessing,
    parameter_hash,
    profile_of,
    summary,
    trained_on,
)
from bnnlib.tensors import write_tensors
from bnnlib.train import EvaluationMode, evaluate, fit, learning_rates, progress_style
from bnnlib.variants import CAPACITY, VARIANTS, named

__all__ = [
    "CAPACITY",
    "EVERY_SPLIT",
    "PROFILES",
    "PUBLISHED",
    "RESULTS",
    "VARIANTS",
    "Experiment",
    "Run",
    "at_profile",
    "build_model",
    "by_profile",
    "differences",
    "evaluate_run",
    "full",
    "is_finished",
    "is_guessing",
    "load_run",
    "named",
    "prepare_data",
    "profile_of",
    "published",
    "quick",
    "reduced",
    "resolve_device",
    "run",
    "smoke",
    "stored_runs",
    "stream",
    "summary",
]


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
) -> Run:
    """Train as `experiment` says and, where `out` is given, keep everything in that folder.

    The folder holds `experiment.json` (the experiment, versions, device, hashes),
    `history.csv` (so far), `labels.npz`, `parameters.safetensors` and, until the
    run is finished, its last two checkpoints, saved every `checkpoint_every` seconds. A folder
    with an unfinished run of the same experiment is continued, one with a finished run is
    read and left alone; nothing else is ever written to. `root` and `download` are those of
    `data.load`, `precision` is that of `precision.uses_half`. An experiment that `evaluates`
    trains nothing: it scores the run in its `run_folder` and has the settings of that run.

    With a folder, a first Ctrl-C or SIGTERM finishes the step, saves, and raises
    Interrupted. Raises InvalidValue for a folder with another experiment and for an evaluation
    that asks for other settings than the scored run has, FolderInUse for a folder in use,
    DamagedFile for one that was altered, DataNotFound for missing data, TooLarge and CannotWrite
    where memory or disk do not suffice, and NotFinite where the numbers are no longer finite;
    the last good checkpoint is kept.
    """
    _check_arguments(experiment, out, device, root, checkpoint_every)
    where, style = resolve_device(device), progress_style(progress)
    folder = None if out is None else Path(out).expanduser()
    source = None
    if experiment.evaluates:
        source = run_to_score(experiment, folder)
        experiment = as_scored(experiment, source.experiment)
    half = uses_half(precision, where) and experiment.binary and experiment.weights != "real"
    if folder:
        check_folder(folder, experiment)
        if is_finished(folder):
            return _finished(folder, style)
    if source:
        return _run_evaluation(experiment, source, folder, where, half, style, root, download)
    check_memory(experiment, where, half)
    sets = prepare_data(experiment, root, download)
    check_fills_batch(len(sets["train"]), experiment.batch_size)
    check_size(experiment.network, sets["train"])
    record = describe(experiment, sets, where, half)
    labels = {split: data.labels for split, data in sets.items()}
    result = Run(experiment, History(), record, None, labels, folder)
    if folder is None:
        return _train(result, sets, where, half, style)
    make_folder(folder)
    with locked(folder):
        check_folder(folder, experiment)  # as it is by now
        if not is_finished(folder):
            return _train_in_folder(result, sets, where, half, style, checkpoint_every)
    return _finished(folder, style)


def _check_arguments(experiment, out, device, root, checkpoint_every) -> None:
    """Raise InvalidValue for an argument of `run` of another kind than it takes."""
    if not isinstance(experiment, Experiment):
        raise InvalidValue(
            f"run takes an Experiment, such as named('svhn-l2'); got {shown(experiment)}"
        )
    for name, value in (("out", out), ("root", root)):
        if not isinstance(value, str | Path | None) or value == "":  # else Path takes it for "."
            raise InvalidValue(f"{name} must be the path of a folder, got {shown(value)}")
    if not isinstance(device, str):
        raise InvalidValue(f"device must be text, such as 'cpu', got {shown(device)}")
    if not isinstance(checkpoint_every, Real) or not checkpoint_every >= 0:  # NaN is not
        raise InvalidValue(
            f"checkpoint_every must be 0 seconds or more, got {shown(checkpoint_every)}"
        )


def _finished(folder: Path, style: str) -> Run:
    if style != "none":
        print(f"{folder} holds this run, finished; nothing is run again", file=sys.stderr)
    return load_run(folder)


def _announce(result: Run, what: str, style: str) -> None:
    """Say in one line what is about to be done, to what, on what and where."""
    record, where = result.record, f"; in {result.folder}" if result.folder else ""
    if style != "none":
        print(
            f"{result.experiment.name}: {record['trained_on']}; {what} on {record['device']}, "
            f"{counted(record['threads'], 'thread')}{where}",
            file=sys.stderr,
            flush=True,
        )


Sets = dict[str, ImageSet]


def _train(result: Run, sets: Sets, device: torch.device, half: bool, style: str) -> Run:
    training = _training(result.experiment, sets["train"], device, half)
    _fit(result, training, sets, device, style)
    return result


def _train_in_folder(
    result: Run, sets: Sets, device: torch.device, half: bool, style: str, every: float
) -> Run:
    training = _training(result.experiment, sets["train"], device, half)
    checkpoints = Checkpoints(result.folder, training, every)
    goes_on = checkpoints.restore()
    check_free_disk(result.folder, checkpoints.needed)
    begin_folder(result.folder, result.experiment, result.record, result.labels)
    if goes_on and style != "none":
        print(f"{result.folder}: going on after {training.position.text}", file=sys.stderr)
    with deferred_interrupts() as stop_here:

        def after_step() -> None:
            stop_here()
            checkpoints.save_if_due()

        try:
            _fit(result, training, sets, device, style, after_step, stop_here)
        except Interrupted as interrupt:
            checkpoints.save()
            training.position.history.save(result.folder / HISTORY)
            here = f"{training.position.text}; the state is saved in {result.folder}"
            raise Interrupted(f"{interrupt} after {here}, and the same call goes on") from None
        write_tensors(result.folder / PARAMETERS, result.model.state_dict())
        close_folder(result)
        checkpoints.remove()
    return result


def _training(e: Experiment, train: ImageSet, device: torch.device, half: bool) -> Training:
    """A network before its first step."""
    model = build_model(e, device, half)
    return Training(
        e.digest(),
        model,
        BinaryAdam(parameter_groups(model), lr=e.lr_start),
        torch.Generator().manual_seed(stream(e.seed, "order of batches")),
        Recorder(e.probes, model, train, stream(e.seed, "probes")),
    )


def _fit(
    result: Run,
    training: Training,
    sets: Sets,
    device: torch.device,
    style: str,
    after_step: Callable[[], object] = lambda: None,
    after_batch: Callable[[], object] = lambda: None,
) -> None:
    """Train to the end and write model, history and hash into `result`."""
    e, model, folder = result.experiment, training.model, result.folder
    _announce(result, counted(e.epochs, "epoch"), style)
    batches = {split: Batches(data, e.batch_size, device) for split, data in sets.items()}
    keep_freed_memory()
    penalized = penalized_parameters(model, e.l2_target)
    history = fit(
        model,
        training.optimizer,
        **batches,
        rates=learning_rates(e.schedule, e.lr_start, e.lr_final, e.epochs),
        generator=training.order,
        evaluate_every=e.evaluate_every,
        mode=EvaluationMode(
            e.evaluation_weights,
            e.evaluation_statistics,
            e.evaluation_samples,
            stream(e.seed, "evaluation"),
        ),
        penalty=(lambda: e.l2 * l2_penalty(penalized)) if e.l2 else None,
        measure=training.recorder,
        progress=style,
        position=training.position,
        after_step=after_step,
        after_batch=after_batch,
        after_epoch=sparingly(lambda h: h.save(folder / HISTORY) if folder else None),
    )
    if "modes" in e.probes and len(history):
        history.rows[-1] |= mode_errors(model, batches, after_batch)
    result.model, result.history = model, history
    result.record["parameter_sha256"] = parameter_hash(model)


def sparingly(action: Callable[[History], object], share: float = 0.05) -> Callable:
    """`action`, left out whenever it would take more than this share of the time.

    A history of many short epochs takes longer to write than the epoch after it to train.
    """
    ready = 0.0

    def act(history: History) -> None:
        nonlocal ready
        start = time.monotonic()
        if start >= ready:
            action(history)
            end = time.monotonic()
            ready = end + (end - start) / share

    return act


# -------------------------------------------------------------- evaluating a saved memorizer


# What an evaluation decides itself; all else was decided by the run that it scores.
EVALUATION_FIELDS = ("name", "summary", "script", "evaluates", "evaluation_rows", "run_folder")


def as_scored(
    evaluation: Experiment, source: Experiment, asked: Mapping[str, Any] | None = None
) -> Experiment:
    """The evaluation of a run of `source`, with the settings of that run: what is scored.

    Raises InvalidValue where settings in `asked` are others. None: whatever is not as in the
    experiment of the evaluation's name, at the profile that it is closest to.
    """
    own = {name: getattr(evaluation, name) for name in EVALUATION_FIELDS}
    scored = replace(source, **own, epochs=0)
    refused = [
        f"{name} can only be {shown(there)}, got {shown(value)}"
        for name, value in (_asked(evaluation) if asked is None else asked).items()
        if (there := getattr(scored, name)) != value
    ]
    if refused:
        raise InvalidValue(
            f"{evaluation.name} trains nothing and scores the run in {evaluation.run_folder} as "
            f"it was trained, so {', and '.join(refused)}"
        )
    return scored


def _asked(e: Experiment) -> dict[str, Any]:
    """The settings of an evaluation that somebody chose; one of no known name states them all."""
    forms = [defaults_of(e) | {"epochs": 0}]
    if (original := PUBLISHED.get(e.name)) and original.evaluates:
        forms = [vars(at_profile(original, profile)) for profile in PROFILES]
    chosen = (
        {k: v for k, v in vars(e).items() if k not in EVALUATION_FIELDS and v != form[k]}
        for form in forms
    )
    return min(chosen, key=len)


def evaluate_run(
    finished: Run,
    rows: int | None = 7000,
    root: str | Path | None = None,
    *,
    download: bool = False,
    device: torch.device | str = "cpu",
    half: bool = False,
) -> float:
    """Error of a saved memorizer, with binarized weights, on its first training rows.

    All `rows` images (or fewer, if there are fewer; None: all) go through the network with its
    stored averages, in the batches of `train.evaluate`: their size changes nothing but the
    memory. `root` and `download` are those of `data.load`, `device` and `half` those of
    `build_model`. Returns a share between 0 and 1.
    Raises InvalidValue where images, labels or parameters are not those of the run; the
    original mixed them up in silence.
    Source: `svhn_evaluation_random_labels.py:101-106,321-327` of the original, which takes all
    rows as one batch.
    """
    if finished.model is None or finished.labels is None:
        raise InvalidValue("only a run that kept its parameters and labels can be evaluated")
    e = finished.experiment
    data = prepare_data(replace(e, n_valid=0, n_test=0), root, download)["train"]
    data = replace(data, labels=finished.labels["train"])
    _check_belongs(finished, data)
    model = build_model(e, device, half)  # a copy: the run's own model stays as it is
    model.load_state_dict(finished.model.state_dict())
    batches = Batches(data.at_most(rows), e.batch_size, device)
    return evaluate(binarize_parameters_(model), batches, EvaluationMode("deterministic")).error


def _check_belongs(finished: Run, data: ImageSet) -> None:
    """Compare what is there with the hashes that the run wrote down."""
    record = finished.record
    pairs = {
        "images": (data.image_hash(), record["image_sha256"]["train"]),
        "labels": (data.label_hash(), record["label_sha256"]["train"]),
        "parameters": (parameter_hash(finished.model), record["parameter_sha256"]),
    }
    for what, (found, expected) in pairs.items():
        if found != expected:
            raise InvalidValue(
                f"the {what} of this run are not those it was trained with: "
                f"SHA-256 {found[:12]}..., recorded {expected[:12]}..."
            )


def run_to_score(e: Experiment, folder: Path | None) -> Run:
    """The run that an evaluation is about; where it was finished in `folder`, that evaluation.

    It has the same settings, and is read again even where the run has been moved away.
    """
    if folder and is_finished(folder) and (there := load_run(folder)).experiment.evaluates:
        return there
    if not e.run_folder:
        raise InvalidValue(
            f"{e.name} evaluates a finished run, of {e.evaluates} or any other; "
            "name its folder in the field run_folder"
        )
    return load_run(e.run_folder)


def _run_evaluation(
    e: Experiment,
    source: Run,
    folder: Path | None,
    device: torch.device,
    half: bool,
    style: str,
    root: str | Path | None,
    download: bool,
) -> Run:
    left_out = ("seconds", "history_sha256", "continued")
    record = {k: v for k, v in source.record.items() if k not in left_out}
    record |= {"experiment_sha256": e.digest(), **environment(device, half)}
    record["trained_on"] = trained_on(source.experiment, record["images"]["train"])
    result, start = Run(e, History(), record, folder=folder), time.perf_counter()
    rows = "all" if e.evaluation_rows is None else f"at most {e.evaluation_rows:,}"
    _announce(result, f"{e.run_folder} is scored, {rows} rows,", style)
    how = {"download": download, "device": device, "half": half}
    error = evaluate_run(source, e.evaluation_rows, root, **how)
    row = {"epoch": len(source.history), "train_error": error}
    result.history = History([row | {"seconds": time.perf_counter() - start}])
    if folder:
        make_folder(folder)
        with locked(folder):
            check_folder(folder, e)  # as it is by now
            if is_finished(folder):
                return _finished(folder, style)
            begin_folder(folder, e, record, source.labels)
            close_folder(result)
    return result
