"""Scoring a saved memorizer, with the settings with which it was trained.

Source: `SVHN/svhn_evaluation_random_labels.py` of the original.
"""

from dataclasses import replace
from pathlib import Path

import torch

from bnnlib.batches import Batches
from bnnlib.data.images import ImageSet
from bnnlib.errors import InvalidValue
from bnnlib.experiments.build import build_model, prepare_data
from bnnlib.losses import mistakes
from bnnlib.packed.network import PackedNetwork
from bnnlib.packed.packing import pack
from bnnlib.runs.result import Run, inputs_of_run, parameter_hash
from bnnlib.training import EVALUATION_BATCH, EvaluationMode, evaluate


def evaluate_run(
    finished: Run,
    rows: int | None = 7000,
    root: str | Path | None = None,
    *,
    download: bool = False,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    packed: bool = False,
) -> float:
    """Error of a saved memorizer, with binarized weights, on its first training rows.

    All `rows` images (or fewer, if there are fewer; None: all) go through the network with its
    stored averages, in the batches of `training.evaluate`: their size changes nothing but the
    memory. `root` and `download` are those of `data.load`, `device` and `precision` those of
    `build_model`. `packed`: with the `PackedNetwork` of the run, on the CPU, which gives the same
    scores there. Returns a share between 0 and 1.
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
    if packed:
        return _packed_error(pack(finished.model), data.at_most(rows))
    inputs = inputs_of_run(e, finished.record)
    model = build_model(e, device, precision, inputs)  # a copy: the run's own stays as it is
    model.load_state_dict(finished.model.state_dict())
    batches = Batches(data.at_most(rows), e.batch_size, device)
    return evaluate(model, batches, EvaluationMode("deterministic")).error


def _packed_error(network: PackedNetwork, data: ImageSet) -> float:
    """The error in the batches, and the memory format, of `training.evaluate` on a CPU."""
    wrong = []
    for start in range(0, len(data), size := EVALUATION_BATCH["cpu"]):
        x = data.images[start : start + size].contiguous(memory_format=torch.channels_last)
        wrong.append(mistakes(network(x), data.labels[start : start + size]))
    return torch.cat(wrong).double().mean().item()


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
