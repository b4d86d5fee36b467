"""What happened in each epoch of a training: a table with named columns, kept as a CSV file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from pathlib import Path

from bnnlib.errors import DamagedFile, unknown_name
from bnnlib.files import Row, parse_columns, parse_table, read_text, write_table

TIMES = ("seconds", "cpu_seconds")  # what no two runs have alike


@dataclass
class History:
    """What happened in each epoch, one dict a row; a value that a row lacks is NaN.

    Errors are shares between 0 and 1. `train_mode_error` is that of the training batches as
    they were fitted; the other errors are those of the model after the epoch, and NaN in
    epochs without evaluation. `seconds` is the time of the epoch, evaluation included, and
    `cpu_seconds` what all threads of the process took of their processors in it.
    """

    rows: list[Row] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> list[float]:
        """One column, a value for each epoch; an unknown name is an InvalidValue."""
        if self.rows and not any(column in row for row in self.rows):
            raise unknown_name("history column", column, self.columns)
        return [row.get(column, nan) for row in self.rows]

    @property
    def columns(self) -> list[str]:
        """The names of all columns, in the order in which they first appear."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def last(self, column: str) -> float:
        """The value after the last epoch; NaN where there was none."""
        return self[column][-1] if self.rows else nan

    @property
    def chance(self) -> float:
        """Error of a blind guess among the classes, counted by the columns of their errors.

        A history without such columns is taken to be of ten classes.
        """
        names = {name.rpartition("_class_")[2] for name in self.columns if "_error_class_" in name}
        return 1 - 1 / (len(names) or 10)

    def save(self, path: str | Path, exact: bool = False) -> None:
        """Write a CSV file with a header, whole or not at all; `exact`: to the last bit."""
        write_table(path, self.rows, self.columns, exact)

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """Read what `save` wrote; empty cells are NaN, epochs are whole numbers."""
        return cls.parse(read_text(path), path)

    @classmethod
    def parse(cls, text: str, source: object) -> "History":
        """The history that a CSV text describes; `source` names the text in errors."""
        rows = parse_table(text, source)
        for row in rows:
            row["epoch"] = _epoch(row.get("epoch", nan), source)
        return cls(rows)


def parse_epochs(text: str, source: object, names: Iterable[str]) -> dict[str, list[float]]:
    """The epochs and these columns of a history, as `History.parse` gives them, but quickly."""
    columns = parse_columns(text, source, ("epoch", *names))
    return columns | {"epoch": [_epoch(number, source) for number in columns["epoch"]]}


def _epoch(number: float, source: object) -> int:
    if abs(number) < 2**53 and number.is_integer():
        return int(number)
    raise DamagedFile(f"{source} is no history: a row has no epoch, a whole number")


def epochs_to_reach(
    history: History | Mapping[str, list[float]],
    limits: Sequence[float] = (0.5, 0.1, 0.01),
    column: str = "train_error",
) -> list[int | None]:
    """The first evaluated epoch with an error of at most each limit; None where there is none."""
    rows = list(zip(history["epoch"], history[column], strict=True))  # NaN <= limit is False
    return [next((e for e, error in rows if error <= limit), None) for limit in limits]


def differing_columns(one: History, other: History) -> list[str]:
    """The columns, times aside, that differ in a bit of any row; NaN is equal to NaN."""

    def same(name: str) -> bool:
        if len(one) != len(other) or not (name in one.columns and name in other.columns):
            return False
        pairs = zip(one[name], other[name], strict=True)
        return all(a == b or (isnan(a) and isnan(b)) for a, b in pairs)

    names = dict.fromkeys((*one.columns, *other.columns))
    return [name for name in names if name not in TIMES and not same(name)]


def describe_row(row: Row) -> str:
    """One epoch in a few words, without the errors that were not computed."""
    loss = [f"loss {row['train_loss']:.3f}"] if "train_loss" in row else []
    errors = [(k, row.get(f"{k}_error", nan)) for k in ("train", "valid", "test")]
    return "  ".join([*loss, *(f"{k} error {100 * e:.1f} %" for k, e in errors if not isnan(e))])
