"""Scoring a saved memorizer, with the settings with which it was trained.

Source: `SVHN/svhn_evaluation_random_labels.py` of the original.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bnnlib.batches import Batches
from bnnlib.data import ImageSet
from bnnlib.errors import InvalidValue, shown
from bnnlib.experiments.build import build_model, prepare_data
from bnnlib.experiments.experiment import DEFAULTS, Experiment
from bnnlib.experiments.originals import PUBLISHED
from bnnlib.experiments.profiles import PROFILES, at_profile
from bnnlib.layers import binarize_parameters_
from bnnlib.runs.folder import is_finished, load_run
from bnnlib.runs.result import Run, parameter_hash
from bnnlib.training import EvaluationMode, evaluate

# What an evaluation decides itself; all else was decided by the run that it scores.
EVALUATION_FIELDS = ("name", "summary", "script", "evaluates", "evaluation_rows", "run_folder")


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
    bases = [DEFAULTS | {"epochs": 0}]
    if (original := PUBLISHED.get(e.name)) and original.evaluates:
        bases = [vars(at_profile(original, profile)) for profile in PROFILES]
    chosen = (
        {k: v for k, v in vars(e).items() if k not in EVALUATION_FIELDS and v != base[k]}
        for base in bases
    )
    return min(chosen, key=len)


def evaluate_run(
    finished: Run,
    rows: int | None = 7000,
    root: str | Path | None = None,
    *,
    download: bool = False,
    device: torch.device | str = "cpu",
    precision: str = "float32",
) -> float:
    """Error of a saved memorizer, with binarized weights, on its first training rows.

    All `rows` images (or fewer, if there are fewer; None: all) go through the network with its
    stored averages, in the batches of `training.evaluate`: their size changes nothing but the
    memory. `root` and `download` are those of `data.load`, `device` and `precision` those of
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
    model = build_model(e, device, precision)  # a copy: the run's own model stays as it is
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
