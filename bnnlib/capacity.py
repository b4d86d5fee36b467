"""How many bits of labels a network stores, and in how many weights.

In: a grid of runs on `patterns`, whose labels are drawn by lot. Out: one row for each run, kept
as a table. Next file: `claims.py`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import product
from math import log, log2
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bnnlib.batches import Batches
from bnnlib.catalogue import Experiment
from bnnlib.errors import DataNotFound, InvalidValue
from bnnlib.experiments import prepare_data, resolve_device, run
from bnnlib.files import write_json
from bnnlib.folders import RESULTS
from bnnlib.history import History, read_table
from bnnlib.layers import evaluating
from bnnlib.runs import environment
from bnnlib.train import EVALUATION_BATCH, progress_style
from bnnlib.variants import CAPACITY

STORED = RESULTS / "capacity"
WIDTHS = (0.125, 0.25, 0.5, 1.0)
SIZES = (250, 500, 1000, 2000, 4000)  # training images
STEPS = 4_000  # mini-batches, the same for every size
SEEDS = (0, 1, 2)  # of weights, order, images and labels
KEY = ("width", "n_train", "epochs", "binary", "seed")  # what differs between the points of a grid

Row = dict[str, float]


def mutual_information(predicted: Tensor, labels: Tensor, classes: int = 10) -> float:
    """I(predicted; label) in bits for each image, from labels (N,) int64 and predictions (N,).

    I = sum over i, j of p_ij log2(p_ij / (p_i p_j)) with the observed shares p. Few images
    make this too large by about (m_ij - m_i - m_j + 1) / (2 N ln 2), where m counts the
    shares that are not zero (Miller 1955); so much is taken off. Between 0 and log2(classes).
    """
    pairs = torch.bincount(predicted * classes + labels, minlength=classes**2)
    p = (pairs.double() / len(labels)).reshape(classes, classes).numpy()
    independent = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    seen = p > 0
    information = (p[seen] * np.log2(p[seen] / independent[seen])).sum()
    cells = seen.sum() - seen.any(1).sum() - seen.any(0).sum() + 1
    bias = cells / (2 * len(labels) * log(2))
    return min(max(0.0, float(information - bias)), log2(classes))


def points(
    widths: Iterable[float] = WIDTHS,
    sizes: Iterable[int] = SIZES,
    seeds: Iterable[int] = SEEDS,
    steps: int = STEPS,
) -> list[Experiment]:
    """The runs of a grid, binary and full-precision twin, the small sets first.

    Every run takes about `steps` steps: at equal epochs the small sets would be trained least.
    """
    grid = product(sorted(sizes), widths, (True, False), seeds)
    return [
        replace(
            CAPACITY,
            n_train=n,
            epochs=max(1, round(steps / (n // CAPACITY.batch_size))),
            width=width,
            binary=binary,
            seed=seed,
            data_seed=seed,
        )
        for n, width, binary, seed in grid
    ]


def measure(experiment: Experiment, device: str = "auto") -> Row:
    """Train, and count: one row of the table.

    `weights` is the number of weights, without biases and normalizations; `label_bits` what
    the labels carry, N log2(10); `memorized_bits` N times the mutual information of fitted
    and given labels. The labels are independent and uniform, so the weights hold at least
    `memorized_bits` of them.
    """
    result = run(experiment, device=device, progress="none")
    data = prepare_data(replace(experiment, n_test=0))["train"]
    batches = Batches(data, EVALUATION_BATCH, next(result.model.parameters()).device)
    with torch.inference_mode(), evaluating(result.model):
        predicted = [result.model(x).argmax(1) for x, _ in batches.in_order()]
    information = mutual_information(torch.cat(predicted).cpu(), data.labels)
    return {
        **{name: getattr(experiment, name) for name in KEY},
        "weights": sum(p.numel() for p in result.model.parameters() if p.dim() > 1),
        "train_error": result.history.last("train_error"),
        "label_bits": len(data) * log2(len(data.class_names)),
        "memorized_bits": len(data) * information,
        "seconds": sum(result.history["seconds"]),
    }


def measure_grid(
    experiments: Sequence[Experiment], folder: str | Path, device: str = "auto"
) -> list[Row]:
    """Measure every point, and keep the table in `folder` after each; known points are kept.

    The folder holds `grid.csv` and `grid.json`, which says what all points share. Raises
    InvalidValue where the folder holds a grid of something else.
    """
    folder = Path(folder)
    shared = {name: getattr(CAPACITY, name) for name in (*KEY, "data_seed")}
    base = replace(experiments[0], **shared)
    rows = _open_grid(folder, base, device)
    known = {tuple(row[name] for name in KEY) for row in rows}
    for e in tqdm(experiments, unit="run", disable=progress_style() == "none"):
        if tuple(getattr(e, name) for name in KEY) not in known:
            rows.append(measure(e, device))
            History(rows).save(folder / "grid.csv")
    return rows


def _open_grid(folder: Path, base: Experiment, device: str) -> list[Row]:
    if (folder / "grid.json").is_file():
        digest = json.loads((folder / "grid.json").read_text())["experiment_sha256"]
        if digest != base.digest():
            raise InvalidValue(f"{folder} holds the grid of another experiment")
        return load_grid(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InvalidValue(f"{folder} exists and holds no grid; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    about = {"experiment": asdict(base), "experiment_sha256": base.digest()}
    write_json(folder / "grid.json", about | environment(resolve_device(device)))
    return []


def load_grid(folder: str | Path = STORED) -> list[Row]:
    """The rows of a grid; raises DataNotFound where the folder holds none."""
    path = Path(folder) / "grid.csv"
    if not path.is_file():
        raise DataNotFound(f"{path.parent} holds no grid: there is no grid.csv in it")
    whole, rows = ("n_train", "seed", "weights"), read_table(path)
    return [row | {"binary": row["binary"] == 1} | {k: int(row[k]) for k in whole} for row in rows]
