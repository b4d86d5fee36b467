"""What a run leaves: a record, in a folder that can be read again and is never overwritten.

In: an experiment, its data, model and history. Out: a `Run`, and its folder.
Next file: `experiments.py`.
"""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bnnlib
from bnnlib.assembly import build_model
from bnnlib.catalogue import PROFILES, Experiment, at_profile
from bnnlib.data import ImageSet
from bnnlib.errors import DataNotFound, InvalidValue, check_name
from bnnlib.files import whole_or_absent, write_json
from bnnlib.history import History
from bnnlib.variants import named

RESULTS = Path(__file__).parents[1] / "results"  # histories of long runs, in the repository


@dataclass
class Run:
    """A finished run: what was asked, what happened, and what was left.

    A run read from a folder that keeps only experiment and history, as those under
    `results/` do, has no model and no labels.
    """

    experiment: Experiment
    history: History
    record: dict[str, Any]  # versions, device, seconds, corruptions, hashes
    model: nn.Module | None = None
    labels: dict[str, torch.Tensor] | None = None  # (N,) int64 for each split
    folder: Path | None = None


def describe(e: Experiment, sets: dict[str, ImageSet], device: torch.device) -> dict[str, Any]:
    """What an experiment does not say and a reader of its results must know."""
    return {
        "experiment_sha256": e.digest(),
        **environment(device),
        "images": {split: len(data) for split, data in sets.items()},
        "corruptions": {split: list(data.provenance) for split, data in sets.items()},
        "image_sha256": {split: data.image_hash() for split, data in sets.items()},
        "label_sha256": {split: data.label_hash() for split, data in sets.items()},
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, threads and the time of the start."""
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
    }


def parameter_hash(model: nn.Module) -> str:
    """SHA-256 of all parameters and averages, with their names, as saved by `save_model`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------- folders


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


def open_folder(folder: Path, experiment: Experiment, record: dict, labels: dict) -> None:
    """Make the folder of a run that begins; raises InvalidValue for one that is in use."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidValue(f"{folder} exists and holds no finished run; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidValue(f"{folder} cannot be made: {error.strerror}") from error
    write_json(folder / "experiment.json", {"experiment": asdict(experiment), **record})
    with whole_or_absent(folder / "labels.npz") as part, part.open("wb") as file:
        np.savez_compressed(file, **{k: v.numpy() for k, v in labels.items()})


def close_folder(result: Run) -> None:
    """Write the history and, with the time it took, the mark of a finished run."""
    result.history.save(result.folder / "history.csv")
    result.record["seconds"] = round(sum(result.history["seconds"]), 3)
    content = {"experiment": asdict(result.experiment), **result.record}
    write_json(result.folder / "experiment.json", content)


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


# ------------------------------------------------------------------------------ looking at runs


def profile_of(experiment: Experiment) -> str:
    """The profile whose form of the named experiment this is, whatever its seeds; or "own"."""
    seeds = {"seed": 0, "corruption_seed": 0, "data_seed": 0, "run_folder": ""}
    here = replace(experiment, **seeds).decisive()
    original = named(experiment.name)
    own = (p for p in PROFILES if at_profile(original, p).decisive() == here)
    return next(own, "own")


def summary(finished: Run) -> dict[str, Any]:
    """One row of a table of runs; errors are those after the last epoch, in percent."""
    e, history = finished.experiment, finished.history
    return {
        "experiment": e.name,
        "profile": profile_of(e),
        "data": e.dataset,
        "images": finished.record["images"]["train"],
        "width": e.width,
        "epochs": e.epochs,
        "seed": e.seed,
        "train error (%)": round(100 * history.last("train_error"), 2),
        "test error (%)": round(100 * _test_error(history), 1),
        "device": finished.record["device"],
    }


def _test_error(history: History) -> float:
    """NaN for a run that tested nothing, as the evaluation of a saved memorizer does."""
    return history.last("test_error") if "test_error" in history.columns else nan


def distance_from_a_guess(finished: Run) -> float:
    """How far the last test error is from a blind guess's, in standard deviations of the guess.

    A guess among ten classes is wrong nine times in ten, with the binomial's spread.
    """
    spread = (0.9 * 0.1 / finished.record["images"]["test"]) ** 0.5
    return abs(finished.history.last("test_error") - 0.9) / spread


def is_guessing(finished: Run) -> bool:
    """Whether the last test error is within four standard deviations of a blind guess's."""
    return distance_from_a_guess(finished) < 4
