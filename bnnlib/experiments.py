"""One function that runs any experiment, and what it leaves: a `Run`, in a folder on request.

In: an `Experiment` of `catalogue.py`, whose names can be imported from here too. Out: a `Run`.
Next file: `plots.py`.
"""

import json
import platform
import time
import zlib
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bnnlib
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
    smoke,
)
from bnnlib.corruption import gaussian_inputs, random_labels
from bnnlib.data import DRAWN, ImageSet, load
from bnnlib.errors import DataNotFound, InvalidValue, NotRunnable, check_name
from bnnlib.layers import binarize_parameters_, seed_layers
from bnnlib.losses import error_rate
from bnnlib.models import binarynet
from bnnlib.optim import BinaryAdam, parameter_groups
from bnnlib.train import History, fit, learning_rates, whole_or_absent

__all__ = [
    "EVERY_SPLIT",
    "PROFILES",
    "PUBLISHED",
    "RESULTS",
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
    "prepare_data",
    "published",
    "quick",
    "resolve_device",
    "run",
    "smoke",
    "stored_runs",
    "summary",
]

RESULTS = Path(__file__).parents[1] / "results"  # histories of long runs, in the repository


@dataclass
class Run:
    """A finished run: what was asked, what happened, and what was left.

    A run read from a folder that keeps only experiment and history, as those under
    `results/` do, has no model and no labels.
    """

    experiment: Experiment
    history: History
    record: dict[str, Any]  # versions, device, seconds, label hashes, corruptions
    model: nn.Module | None = None
    labels: dict[str, torch.Tensor] | None = None  # (N,) int64 for each split
    folder: Path | None = None


def stream(seed: int, purpose: str) -> int:
    """A seed for one purpose, so that no two random acts of a run share their numbers."""
    entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode())])
    return int(entropy.generate_state(1, np.uint64)[0] >> 1)


def resolve_device(name: str = "auto") -> torch.device:
    """A CUDA device where there is one, else the CPU, for "auto"; other names are PyTorch's."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidValue(f"device {name!r} cannot be used here: {reason}") from error
    return device


def prepare_data(
    experiment: Experiment, root: str | Path | None = None, download: bool = False
) -> dict[str, ImageSet]:
    """The splits of an experiment, corrupted as it says: "train" and, unless 0, the others."""
    e, sets = experiment, {}
    for split, n in (("train", e.n_train), ("valid", e.n_valid), ("test", e.n_test)):
        if n == 0:
            continue
        drawn = n if e.dataset in DRAWN else None  # a real set is read whole, then cut
        data = load(e.dataset, split, root, download, drawn, e.data_seed)
        data = data.at_most(n)
        if e.gaussian_variance and split in e.gaussian_splits:
            seed = stream(e.corruption_seed, f"Gaussian {split}")
            data = gaussian_inputs(data, e.gaussian_variance, seed=seed)
        if e.random_labels and split in e.random_label_splits:
            seed = stream(e.corruption_seed, f"labels {split}")
            data = random_labels(data, e.random_labels, seed=seed)
        sets[split] = data
    return sets


def build_model(experiment: Experiment, device: torch.device | str = "cpu") -> nn.Module:
    """The experiment's network with its initial weights, which are the same on every device."""
    e = experiment
    model = binarynet(
        e.network,
        generator=torch.Generator().manual_seed(stream(e.seed, "initial weights")),
        width=e.width,
        binary=e.binary,
        activation=e.activation,
        weights=e.weights,
        dropout=e.dropout,
    )
    model = model.to(device, memory_format=torch.channels_last)
    return seed_layers(model, stream(e.seed, "random layers"))


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

    Raises InvalidValue for a folder that is in use, DataNotFound for missing data,
    NotRunnable for an experiment that this version cannot run.
    """
    if experiment.missing:
        raise NotRunnable(f"{experiment.name} cannot run yet: {experiment.missing}")
    where = resolve_device(device)
    folder = None if out is None else Path(out)
    if folder and is_finished(folder):
        return _finished(experiment, folder)
    if experiment.evaluates:
        return _run_evaluation(experiment, folder, root)
    sets = prepare_data(experiment, root, download)
    check_fills_batch(len(sets["train"]), experiment.batch_size)
    record = _record(sets, where)
    labels = {split: data.labels for split, data in sets.items()}
    if folder:
        _open_folder(folder, experiment, record, labels)
    model, history = _train(experiment, sets, where, progress, folder)
    result = Run(experiment, history, record, model, labels, folder)
    if folder:
        save_model(model, folder / "parameters.safetensors")
        _close_folder(result)
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
    history = fit(
        model,
        BinaryAdam(parameter_groups(model), lr=e.lr_start),
        **batches,
        rates=learning_rates(e.schedule, e.lr_start, e.lr_final, e.epochs),
        generator=torch.Generator().manual_seed(stream(e.seed, "order of batches")),
        evaluate_every=e.evaluate_every,
        progress=progress,
        after_epoch=None if folder is None else lambda h: h.save(folder / "history.csv"),
    )
    return model, history


def _record(sets: dict[str, ImageSet], device: torch.device) -> dict[str, Any]:
    """What an experiment does not say and a reader of its results must know."""
    on_gpu = device.type == "cuda"
    return {
        "versions": {
            "bnnlib": bnnlib.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": {split: len(data) for split, data in sets.items()},
        "corruptions": {split: list(data.provenance) for split, data in sets.items()},
        "label_sha256": {split: data.label_hash() for split, data in sets.items()},
    }


# ------------------------------------------------------------------------- folders of runs


def is_finished(folder: str | Path) -> bool:
    """Whether the folder holds a run that went to its end."""
    return (Path(folder) / "experiment.json").is_file() and "seconds" in _read_record(Path(folder))


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / "experiment.json"
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise InvalidValue(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("experiment"), dict):
        raise InvalidValue(f"{path} describes no experiment")
    return record


def _finished(experiment: Experiment, folder: Path) -> Run:
    found = load_run(folder)
    there, asked = vars(found.experiment), vars(experiment)
    differing = [
        f"{field} ({there[field]!r} there, {asked[field]!r} asked for)"
        for field in there
        if there[field] != asked[field]
    ]
    if differing:
        raise InvalidValue(f"{folder} holds another experiment: {', '.join(differing)}")
    return found


def _open_folder(folder: Path, experiment: Experiment, record: dict, labels: dict) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidValue(f"{folder} exists and holds no finished run; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidValue(f"{folder} cannot be made: {error.strerror}") from error
    _write_json(folder / "experiment.json", {"experiment": asdict(experiment), **record})
    with whole_or_absent(folder / "labels.npz") as part, part.open("wb") as file:
        np.savez_compressed(file, **{k: v.numpy() for k, v in labels.items()})


def _close_folder(result: Run) -> None:
    """Write the history and, with the time it took, the mark of a finished run."""
    result.history.save(result.folder / "history.csv")
    result.record["seconds"] = round(sum(result.history["seconds"]), 3)
    content = {"experiment": asdict(result.experiment), **result.record}
    _write_json(result.folder / "experiment.json", content)


def _write_json(path: Path, content: dict) -> None:
    with whole_or_absent(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def save_model(model: nn.Module, path: Path) -> None:
    """All parameters and averages of `model`, by name, as a safetensors file."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with whole_or_absent(path) as part:
        save_file(tensors, part)


def load_run(folder: str | Path) -> Run:
    """Read a run's folder; its model and labels too, where they were kept.

    Raises DataNotFound where the folder holds no run.
    """
    folder = Path(folder)
    for name in ("experiment.json", "history.csv"):
        if not (folder / name).is_file():
            raise DataNotFound(f"{folder} holds no run: there is no {name} in it")
    record = _read_record(folder)
    experiment = _experiment_from(record.pop("experiment"))
    result = Run(experiment, History.load(folder / "history.csv"), record, folder=folder)
    if (folder / "parameters.safetensors").is_file():
        result.model = build_model(experiment)
        result.model.load_state_dict(load_file(folder / "parameters.safetensors"))
    if (folder / "labels.npz").is_file():
        with np.load(folder / "labels.npz", allow_pickle=False) as file:
            result.labels = {split: torch.from_numpy(file[split]) for split in file.files}
    return result


def _experiment_from(values: dict[str, Any]) -> Experiment:
    """An `Experiment` from JSON, where tuples have become lists."""
    for name in values:
        check_name("field", name, [f.name for f in fields(Experiment)])
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return Experiment(**tuples)
    except TypeError as error:
        raise InvalidValue(f"these fields make no experiment: {error}") from error


def stored_runs(name: str | None = None, root: str | Path = RESULTS) -> list[Run]:
    """The finished runs under `root`, sorted by folder; only those of one experiment if named."""
    folders = sorted(path.parent for path in Path(root).rglob("experiment.json"))
    runs = [load_run(folder) for folder in folders if is_finished(folder)]
    return [r for r in runs if name in (None, r.experiment.name)]


def summary(finished: Run) -> dict[str, Any]:
    """One row of a table of runs; errors are those after the last epoch, in percent."""
    e, history = finished.experiment, finished.history
    return {
        "experiment": e.name,
        "data": e.dataset,
        "images": finished.record["images"]["train"],
        "width": e.width,
        "epochs": e.epochs,
        "seed": e.seed,
        "train error (%)": round(100 * history.last("train_error"), 2),
        "test error (%)": round(100 * history.last("test_error"), 1),
        "device": finished.record["device"],
    }


def is_guessing(finished: Run) -> bool:
    """Whether the last test error is within four standard deviations of a blind guess's.

    A guess among ten classes is wrong nine times in ten, with the binomial's spread.
    """
    spread = (0.9 * 0.1 / finished.record["images"]["test"]) ** 0.5
    return abs(finished.history.last("test_error") - 0.9) < 4 * spread


# -------------------------------------------------------------- evaluating a saved memorizer


@torch.no_grad()
def evaluate_run(finished: Run, rows: int | None = 7000, root: str | Path | None = None) -> float:
    """Error of a saved memorizer, with binarized weights, on its first training rows.

    All `rows` images (or fewer, if there are fewer; None: all) go through the network as one
    batch, with its stored averages. Returns a share between 0 and 1.
    Raises InvalidValue where the labels kept with the run are not those it trained on.
    Source: `svhn_evaluation_random_labels.py:101-106,321-327` of the original.
    """
    if finished.model is None or finished.labels is None:
        raise InvalidValue("only a run that kept its parameters and labels can be evaluated")
    only_train = replace(finished.experiment, n_valid=0, n_test=0)
    data = prepare_data(only_train, root)["train"]
    data = replace(data, labels=finished.labels["train"])
    if data.label_hash() != finished.record["label_sha256"]["train"]:
        raise InvalidValue("the labels of this run are not those it was trained on")
    model = build_model(finished.experiment)  # a copy: the run's own model stays as it is
    model.load_state_dict(finished.model.state_dict())
    binarize_parameters_(model).eval()
    first = data.at_most(rows)
    x, labels = next(Batches(first, len(first)).in_order())
    return error_rate(model(x), labels)


def _run_evaluation(e: Experiment, folder: Path | None, root: str | Path | None) -> Run:
    if not e.run_folder:
        raise InvalidValue(
            f"{e.name} evaluates a finished run of {e.evaluates}; "
            "name its folder in the field run_folder"
        )
    start = time.perf_counter()
    source = load_run(e.run_folder)
    if source.experiment.name != e.evaluates:
        raise InvalidValue(
            f"{e.name} evaluates a run of {e.evaluates}, and {e.run_folder} holds one of "
            f"{source.experiment.name}"
        )
    error = evaluate_run(source, e.evaluation_rows, root)
    row = {"epoch": len(source.history), "train_error": error}
    history = History([row | {"seconds": time.perf_counter() - start}])
    record = {k: v for k, v in source.record.items() if k != "seconds"}
    result = Run(e, history, record, folder=folder)
    if folder:
        _open_folder(folder, e, record, source.labels)
        _close_folder(result)
    return result
