"""One function that runs any experiment, and one that evaluates what it left.

In: an `Experiment`. Out: a `Run`. The names of `catalogue.py`, `variants.py`, `assembly.py` and
`runs.py` that a reader of the book needs can be imported from here too.
Next file: `capacity.py`.
"""

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bnnlib.assembly import build_model, check_size, prepare_data, resolve_device, stream
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
from bnnlib.data import ImageSet
from bnnlib.errors import InvalidValue
from bnnlib.history import History
from bnnlib.layers import binarize_parameters_
from bnnlib.losses import error_rate, l2_penalty
from bnnlib.models import penalized_parameters
from bnnlib.optim import BinaryAdam, parameter_groups
from bnnlib.probes import Recorder, mode_errors
from bnnlib.runs import (
    RESULTS,
    Run,
    close_folder,
    describe,
    environment,
    is_finished,
    is_guessing,
    load_run,
    open_folder,
    parameter_hash,
    profile_of,
    save_model,
    stored_runs,
    summary,
)
from bnnlib.train import EvaluationMode, fit, learning_rates
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
) -> Run:
    """Train as `experiment` says and, where `out` is given, keep everything in that folder.

    The folder holds `experiment.json` (the experiment, versions, device, label hashes),
    `history.csv` (after every epoch), `labels.npz` and `parameters.safetensors`. A folder
    that holds a finished run of the same experiment is read instead; nothing is ever
    overwritten. `root` and `download` are those of `data.load`.

    Raises InvalidValue for a folder that is in use and DataNotFound for missing data.
    """
    where = resolve_device(device)
    folder = None if out is None else Path(out)
    if folder and is_finished(folder):
        return _finished(experiment, folder)
    if experiment.evaluates:
        return _run_evaluation(experiment, folder, root)
    sets = prepare_data(experiment, root, download)
    check_fills_batch(len(sets["train"]), experiment.batch_size)
    check_size(experiment.network, sets["train"])
    record = describe(experiment, sets, where)
    labels = {split: data.labels for split, data in sets.items()}
    if folder:
        open_folder(folder, experiment, record, labels)
    model, history = _train(experiment, sets, where, progress, folder)
    result = Run(experiment, history, record, model, labels, folder)
    record["parameter_sha256"] = parameter_hash(model)
    if folder:
        save_model(model, folder / "parameters.safetensors")
        close_folder(result)
    return result


def _train(
    e: Experiment,
    sets: dict[str, ImageSet],
    device: torch.device,
    progress: str,
    folder: Path | None,
) -> tuple[nn.Module, History]:
    model = build_model(e, device)
    batches = {split: Batches(data, e.batch_size, device) for split, data in sets.items()}
    penalized = penalized_parameters(model, e.l2_target)
    history = fit(
        model,
        BinaryAdam(parameter_groups(model), lr=e.lr_start),
        **batches,
        rates=learning_rates(e.schedule, e.lr_start, e.lr_final, e.epochs),
        generator=torch.Generator().manual_seed(stream(e.seed, "order of batches")),
        evaluate_every=e.evaluate_every,
        mode=EvaluationMode(
            e.evaluation_weights,
            e.evaluation_statistics,
            e.evaluation_samples,
            stream(e.seed, "evaluation"),
        ),
        penalty=(lambda: e.l2 * l2_penalty(penalized)) if e.l2 else None,
        measure=Recorder(e.probes, model, sets["train"], stream(e.seed, "probes")),
        progress=progress,
        after_epoch=None if folder is None else lambda h: h.save(folder / "history.csv"),
    )
    if "modes" in e.probes and len(history):
        history.rows[-1] |= mode_errors(model, batches)
    return model, history


def _finished(experiment: Experiment, folder: Path) -> Run:
    found = load_run(folder)
    there, asked = found.experiment.decisive(), experiment.decisive()
    differing = [
        f"{field} ({there[field]!r} there, {asked[field]!r} asked for)"
        for field in there
        if there[field] != asked[field]
    ]
    if differing:
        raise InvalidValue(f"{folder} holds another experiment: {', '.join(differing)}")
    return found


# -------------------------------------------------------------- evaluating a saved memorizer


@torch.no_grad()
def evaluate_run(finished: Run, rows: int | None = 7000, root: str | Path | None = None) -> float:
    """Error of a saved memorizer, with binarized weights, on its first training rows.

    All `rows` images (or fewer, if there are fewer; None: all) go through the network as one
    batch, with its stored averages. Returns a share between 0 and 1.
    Raises InvalidValue where images, labels or parameters are not those of the run; the
    original mixed them up in silence.
    Source: `svhn_evaluation_random_labels.py:101-106,321-327` of the original.
    """
    if finished.model is None or finished.labels is None:
        raise InvalidValue("only a run that kept its parameters and labels can be evaluated")
    only_train = replace(finished.experiment, n_valid=0, n_test=0)
    data = prepare_data(only_train, root)["train"]
    data = replace(data, labels=finished.labels["train"])
    _check_belongs(finished, data)
    model = build_model(finished.experiment)  # a copy: the run's own model stays as it is
    model.load_state_dict(finished.model.state_dict())
    binarize_parameters_(model).eval()
    first = data.at_most(rows)
    x, labels = next(Batches(first, len(first)).in_order())
    return error_rate(model(x), labels)


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


def _run_evaluation(e: Experiment, folder: Path | None, root: str | Path | None) -> Run:
    if not e.run_folder:
        raise InvalidValue(
            f"{e.name} evaluates a finished run, of {e.evaluates} or any other; "
            "name its folder in the field run_folder"
        )
    start = time.perf_counter()
    source = load_run(e.run_folder)
    error = evaluate_run(source, e.evaluation_rows, root)
    row = {"epoch": len(source.history), "train_error": error}
    history = History([row | {"seconds": time.perf_counter() - start}])
    record = {k: v for k, v in source.record.items() if k != "seconds"}
    record |= {"experiment_sha256": e.digest(), **environment(torch.device("cpu"))}
    result = Run(e, history, record, folder=folder)
    if folder:
        open_folder(folder, e, record, source.labels)
        close_folder(result)
    return result
