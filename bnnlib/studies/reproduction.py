"""Stored runs, drawn by lot, made again: are they the runs that were stored?

On the same kind of processor, with the same versions and number of threads, they must be, bit for
bit. Elsewhere sums are rounded in another order, and a run drifts away from its twin as from one of
another seed; so there its errors must lie where another seed's would.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from bnnlib.errors import DataNotFound, InvalidValue, nearest
from bnnlib.history import History, differing_columns
from bnnlib.runs.record import SURROUNDINGS, read_run
from bnnlib.studies.claims import interval

if TYPE_CHECKING:
    import pandas as pd

ERRORS = ("train_error", "test_error")


@dataclass(frozen=True)
class Reproduction:
    """What came out: whether the run is reproduced, and in words how it compares."""

    reproduced: bool
    text: str


def draw(table: "pd.DataFrame", lot: int, name: str | None = None) -> "pd.DataFrame":
    """One run of each experiment of a table of `results`, by lot; of one alone, if named.

    `name` is an experiment, or a run by its path in the table. Raises InvalidValue where it is
    neither, DataNotFound where there are no runs.
    """
    if name in table.index:
        return table.loc[[name]]
    if not len(table):
        raise DataNotFound(f"there is no finished run in {table.attrs['folder']}")
    if name is not None:
        names = table["experiment"].unique()
        if name not in names:
            raise InvalidValue(
                f"no run of {name!r} is stored; {nearest(name, names)}(there are: "
                f"{', '.join(names)}, and each run by its path, such as {table.index[0]!r})"
            )
        table = table[table["experiment"] == name]
    return table.groupby("experiment", sort=False).sample(1, random_state=lot)


def compare(stored: Path, again: Path, table: "pd.DataFrame") -> Reproduction:
    """A stored run, and the folder in which it was made again.

    `table` has its seeds: the rows of its experiment and profile in `results`.
    Raises what `read_run` raises.
    """
    (_, there, old), (_, here, new) = read_run(stored), read_run(again)
    for what in ("image_sha256", "label_sha256"):
        if there[what] != here[what]:
            return Reproduction(False, f"made with other data: its {what} differ")
    differing = differing_columns(old, new)
    if there.get("parameter_sha256") != here.get("parameter_sha256"):
        differing.append("parameter_sha256")
    if not differing:
        return Reproduction(True, "equal, bit for bit")
    moved = [k for k in SURROUNDINGS if k != "started" and there[k] != here[k]]
    if not moved:
        return Reproduction(False, f"not equal, though made alike: {', '.join(differing)}")
    images = {f"{split}_error": n for split, n in there["images"].items()}
    known = [error for error in ERRORS if table[error].notna().all()]  # an evaluation has one
    found = [_outside(error, new, table[error], 1 / images[error]) for error in known]
    outside = [text for text in found if text]
    said = "; ".join(outside) or "its errors are where those of another seed would be"
    return Reproduction(not outside, f"other {', '.join(moved)}: {said}")


def _outside(error: str, history: History, seeds: Iterable[float], step: float) -> str:
    """Where an error lies outside the interval of one more seed; "" where it does not.

    That is mean ± t(n - 1) s sqrt(1 + 1/n) of n seeds, widened by `step`, the share of one image.
    """
    values = list(seeds)
    if len(values) < 2:
        return f"{error} cannot be judged by the one stored seed"
    low, high = interval(values)
    middle, half = (low + high) / 2, (high - low) / 2 * sqrt(len(values) + 1) + step
    found = history.last(error)
    if abs(found - middle) <= half:
        return ""
    return (
        f"{error} {100 * found:.2f} %, outside {100 * max(0, middle - half):.2f} to "
        f"{100 * (middle + half):.2f} %"
    )
