"""How many bits of labels a network stores, and in how many weights.

A grid of runs on `patterns`, whose labels are drawn by lot, becomes a table with a row for each.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from math import log, log2
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bnnlib.batches import Batches
from bnnlib.errors import DamagedFile, DataNotFound, FolderInUse, Interrupted, InvalidValue, shown
from bnnlib.experiments.build import prepare_data, resolve_device
from bnnlib.experiments.experiment import Experiment
from bnnlib.experiments.variants import CAPACITY
from bnnlib.files import LOCK, Row, as_folder, locked, read_json, read_table, write_json
from bnnlib.history import History
from bnnlib.layers import evaluating
from bnnlib.runs.record import RESULTS
from bnnlib.runs.result import environment
from bnnlib.runs.run import run
from bnnlib.training import resolve_progress

STORED = RESULTS / "capacity"
WIDTHS = (0.125, 0.25, 0.5, 1.0)
SIZES = (250, 500, 1000, 2000, 4000)  # training images
STEPS = 4_000  # mini-batches, the same for every size
SEEDS = (0, 1, 2)  # of weights, order, images and labels
ABOUT, TABLE = "grid.json", "grid.csv"
KEY = ("width", "n_train", "epochs", "binary", "seed", "data_seed")  # what differs between points


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


def make_grid(
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


def measure_point(experiment: Experiment, device: str = "auto") -> Row:
    """Train, and count: one row of the table.

    `weights` is the number of weights, without biases and normalizations; `label_bits` what
    the labels carry, N log2(10); `memorized_bits` N times the mutual information of fitted
    and given labels. The labels are independent and uniform, so the weights hold at least
    `memorized_bits` of them.
    """
    result = run(experiment, device=device, progress="none")
    data = prepare_data(replace(experiment, n_test=0))["train"]
    batches = Batches(data, len(data), next(result.model.parameters()).device)
    with torch.inference_mode(), evaluating(result.model):
        x, _ = next(batches.in_order())
        predicted = result.model(x).argmax(1)
    information = mutual_information(predicted.cpu(), data.labels, len(data.class_names))
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
    InvalidValue where they share too little, or the folder holds another grid, FolderInUse where
    it holds something else, Interrupted on Ctrl-C.
    """
    folder = as_folder("out", folder)
    base = _shared(experiments)
    _check_grid(folder, base)
    with locked(folder):
        rows = _open_grid(folder, base, device)
        known = {_key(row) for row in rows}
        try:
            for e in tqdm(experiments, unit="run", disable=resolve_progress() == "none"):
                if _key(vars(e)) not in known:
                    rows.append(measure_point(e, device))
                    known.add(_key(rows[-1]))
                    History(rows).save(folder / TABLE, exact=True)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped; the grid in {folder} is kept; the same command continues it"
            ) from None
    return rows


def _key(point: Mapping[str, Any]) -> tuple:
    return tuple(point[name] for name in KEY)


def _shared(experiments: Sequence[Experiment]) -> Experiment:
    """What all points of a grid share; raises InvalidValue where they differ in more than KEY."""
    alike = {name: getattr(CAPACITY, name) for name in KEY}
    base, *others = [replace(e, **alike) for e in experiments]
    for other in others:
        for name, value in base.spec().items():
            if getattr(other, name) != value:
                raise InvalidValue(
                    f"the points of a grid may differ in {', '.join(KEY)} only; {name} is "
                    f"{shown(value)} in the first and {shown(getattr(other, name))} in another"
                )
    return base


def _check_grid(folder: Path, base: Experiment) -> None:
    if (folder / ABOUT).is_file():
        if read_json(folder / ABOUT).get("experiment_sha256") != base.digest():
            raise InvalidValue(f"{folder} holds the grid of another experiment")
    elif folder.exists() and (not folder.is_dir() or any(p.name != LOCK for p in folder.iterdir())):
        raise FolderInUse(f"{folder} exists and holds no grid; choose another folder")


def _open_grid(folder: Path, base: Experiment, device: str) -> list[Row]:
    if (folder / TABLE).is_file():
        return load_grid(folder)
    about = {"experiment": asdict(base), "experiment_sha256": base.digest()}
    write_json(folder / ABOUT, about | environment(resolve_device(device)))
    return []


def load_grid(folder: str | Path = STORED) -> list[Row]:
    """The rows of a grid; raises DataNotFound where the folder holds none, or DamagedFile."""
    path = Path(folder) / TABLE
    if not path.is_file():
        raise DataNotFound(f"{path.parent} holds no grid: there is no {TABLE} in it")
    whole = ("n_train", "epochs", "seed", "data_seed", "weights")
    rows = read_table(path)
    try:
        rows = [{"data_seed": r["seed"]} | r for r in rows]  # older grids have one seed for both
        if missing := [name for name in KEY if rows and name not in rows[0]]:
            raise LookupError(f"no column {missing[0]}")
        return [r | {"binary": r["binary"] == 1} | {k: int(r[k]) for k in whole} for r in rows]
    except (LookupError, ValueError, OverflowError) as error:
        raise DamagedFile(f"{path} is no table of a grid: {error!r}") from error
