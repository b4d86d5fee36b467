"""A finished run: what was asked, what happened, what was left, and the record that says so."""

import hashlib
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import bnnlib
from bnnlib.data.images import ImageSet
from bnnlib.experiments.build import inputs_of
from bnnlib.experiments.experiment import Experiment
from bnnlib.history import History, differing_columns
from bnnlib.kernels import bits
from bnnlib.models import Inputs, usual_inputs
from bnnlib.names import USED
from bnnlib.runs.record import trained_on


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run.

    One read from a folder that keeps only experiment and history, as those under `results/`
    do, has no model and no labels.
    """

    experiment: Experiment
    history: History
    record: dict[str, Any]  # versions, device, seconds, corruptions, hashes
    model: nn.Module | None = None
    labels: dict[str, torch.Tensor] | None = None  # (N,) int64 for each split
    folder: Path | None = None


# ------------------------------------------------------------------------------- the record


def make_record(
    e: Experiment, sets: dict[str, ImageSet], device: torch.device, precision: str
) -> dict[str, Any]:
    """What an experiment does not say and a reader of its results must know."""
    return {
        "experiment_sha256": e.digest(),
        **environment(device, precision),
        "trained_on": trained_on(e, len(sets["train"])),
        "images": {split: len(data) for split, data in sets.items()},
        "corruptions": {split: list(data.provenance) for split, data in sets.items()},
        "image_sha256": {split: data.image_hash() for split, data in sets.items()},
        "label_sha256": {split: data.label_hash() for split, data in sets.items()},
        "inputs": inputs_of(sets["train"])._asdict(),
        **({"uses": {file: [sha256] for file, sha256 in USED.items()}} if USED else {}),
    }


def inputs_of_run(e: Experiment, record: dict[str, Any]) -> Inputs:
    """What the network of a run takes; older records do not say, their networks are the usual."""
    return Inputs(**record["inputs"]) if "inputs" in record else usual_inputs(e.network)


def environment(device: torch.device, precision: str = "float32") -> dict[str, Any]:
    """Versions, device with its precision or kernels, threads, and the time of the start."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        kernels = bits.library()
        name = f"{platform.machine()} CPU" + (f", {kernels.set} kernels" if kernels else "")
    return {
        "versions": {
            "bnnlib": bnnlib.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": name + (", half precision" if precision == "half" else ""),
        "threads": torch.get_num_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def parameter_hash(model: nn.Module) -> str:
    """SHA-256 of all parameters and averages, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


# ----------------------------------------------------------------------------- two runs beside


def differences(one: Run, other: Run) -> list[str]:
    """What is not equal, to the last bit, in two runs that should be one: names, none at best.

    Compares the columns of the histories, times aside, labels and parameters, where both
    runs have them.
    """
    pairs = []
    if one.labels and other.labels:
        pairs.append((one.labels, other.labels))
    if one.model and other.model:
        pairs.append((one.model.state_dict(), other.model.state_dict()))
    tensors = [n for a, b in pairs for n in a | b if not _same(a.get(n), b.get(n))]
    return differing_columns(one.history, other.history) + tensors


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors are one, where NaN is equal to NaN."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
