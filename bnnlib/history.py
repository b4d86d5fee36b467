"""What happened in each epoch, as a table that a CSV file keeps.

In: one dict of numbers an epoch. Out: columns, and a file. Next file: `train.py`.
"""

import csv
import io
from dataclasses import dataclass, field
from math import isnan, nan
from numbers import Integral
from pathlib import Path

from bnnlib.errors import DamagedFile, shown, unknown_name
from bnnlib.files import check_length, read_text, whole_or_absent


def read_table(path: str | Path) -> list[dict[str, float]]:
    """The rows of a CSV file of numbers with a header; empty cells are NaN.

    Raises DamagedFile where a row is longer or shorter than the header, or no row of numbers.
    """
    text = read_text(path)
    check_length(text, path)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(lines, [])
        if len(set(header)) < len(header):
            raise ValueError("two columns have one name")
        if strange := [name for name in header if not is_column(name)]:
            raise ValueError(f"a column has the name {shown(strange[0])}")
        return [_row(header, cells, lines.line_num) for cells in lines]
    except (csv.Error, ValueError) as error:
        raise DamagedFile(f"{path} is not a table of numbers: {error}") from error


def is_column(name: str) -> bool:
    """Whether this may be the name of a column: short, and safe to show."""
    return 0 < len(name) <= 100 and name.isprintable()


def _row(header: list[str], cells: list[str], line: int) -> dict[str, float]:
    if len(cells) != len(header):
        raise ValueError(f"line {line} has {len(cells)} cells, the header {len(header)}")
    try:
        return {name: _number(cell) for name, cell in zip(header, cells, strict=True)}
    except ValueError as error:
        raise ValueError(f"line {line}: {shown(str(error))}") from None


def _number(cell: str) -> float:
    """A float, or an int where that would be another number, such as a large seed."""
    number = float(cell or "nan")
    return int(cell) if abs(number) >= 2**53 and cell.isdecimal() else number


def _cell(value: float, exact: bool) -> str:
    """All digits of a whole number; nine of another, or all if `exact`; nothing for NaN."""
    if isinstance(value, Integral):
        return str(int(value))
    if isnan(value):
        return ""
    return repr(float(value)) if exact else f"{value:.9g}"


@dataclass
class History:
    """What happened in each epoch, one dict a row; a value that a row lacks is NaN.

    Errors are shares between 0 and 1. `train_mode_error` is that of the training batches as
    they were fitted; the other errors are those of the model after the epoch, and NaN in
    epochs without evaluation. `seconds` is the time of the epoch, evaluation included.
    """

    rows: list[dict[str, float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> list[float]:
        """One column, a value for each epoch; an unknown name is an InvalidValue."""
        if self.rows and column not in self.columns:
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
        with whole_or_absent(Path(path)) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.columns)
            writer.writeheader()
            writer.writerows({k: _cell(v, exact) for k, v in row.items()} for row in self.rows)

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """Read what `save` wrote; empty cells are NaN, epochs are whole numbers."""
        rows = read_table(path)
        for row in rows:
            if not row.get("epoch", nan).is_integer():
                raise DamagedFile(f"{path} is no history: a row has no epoch, a whole number")
            row["epoch"] = int(row["epoch"])
        return cls(rows)
