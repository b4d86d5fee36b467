"""The ledger: one table of all runs under a folder, a row a run.

It needs no PyTorch. `ledger.parquet` keeps the rows for the next time; it is only a copy: where a
file of a run has another size or time than it says, and where it is missing, the run is read.
"""

import csv
import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_origin

from bnnlib.errors import (
    BnnlibError,
    BnnlibWarning,
    DamagedFile,
    DataNotFound,
    InvalidValue,
    NotInstalled,
    check_name,
    nearest,
    shown,
)
from bnnlib.experiments.experiment import FIELDS
from bnnlib.experiments.profiles import PROFILES
from bnnlib.files import as_folder, atomic_write, check_columns, read_text, reading
from bnnlib.history import TIMES, History, epochs_to_reach, parse_epochs
from bnnlib.runs.record import (
    HISTORY,
    RECORD,
    RESULTS,
    as_cell,
    form,
    forms,
    read_run,
    read_texts,
)

if TYPE_CHECKING:
    import pandas as pd

    from bnnlib.runs.result import Run

LEDGER = "ledger.parquet"
FORMAT = b"3"  # of it; raised when a column comes to mean something else
AHEAD = 16  # runs that are read at the same time
NAMED = 3  # runs in a warning

Row = dict[str, Any]
T = TypeVar("T")

# What the columns hold. A tuple is text; `int | None` may be missing, and a float may be NaN.
_STAMPS = {"record_bytes": int, "record_time": int, "history_bytes": int, "history_time": int}
_FIRST = {"experiment": str, "profile": str, "seed": int}
_SETTINGS = {
    name: str if get_origin(hint) is tuple else hint
    for name, hint in FIELDS.items()
    if name not in ("name", "summary", "script", "seed")
}
_OUTCOME = {
    "images": int,  # in the training set
    **dict.fromkeys(("train_error", "test_error", "best_train_error", "best_test_error"), float),
    **dict.fromkeys(("epochs_to_50", "epochs_to_10", "epochs_to_1"), int | None),
    "memorized_bits": float,
    "epochs_done": int,
    "seconds": float,
    "cpu_seconds": float,
    "device": str,
    "threads": int,
    **dict.fromkeys(("version", "started", "uses", "digest"), str),
}
_KINDS = {"run": str, **_STAMPS, **_FIRST, **_SETTINGS, **_OUTCOME, "finished": bool}
_DTYPES = {int: "int64", float: "float64", bool: "bool", int | None: "Int64"}  # text: pandas' own


def results(folder: str | Path = RESULTS, *, unfinished: bool = False) -> "pd.DataFrame":
    """A table of the finished runs under a folder, at any depth; of all, where `unfinished`.

    Its index is the path of a run within the folder. Of the experiment's fields it has name,
    profile, seed, and those in which the rows differ. `train_error` and `test_error` are those of
    the last evaluated epoch, shares between 0 and 1, NaN where there is none; `epochs_to_10` is
    the first evaluated epoch with a training error of at most 10 %, missing where there is none;
    `memorized_bits` is the last that the probe "bits" counted, NaN without it;
    `digest` is the experiment's. A run that cannot be read is left out, and a BnnlibWarning names
    it. Raises DataNotFound where there is no such folder.
    """
    import pandas as pd

    folder = as_folder("folder", folder)
    rows = [row for row in _rows(folder) if unfinished or row["finished"]]
    differing = [name for name in _SETTINGS if len({row[name] for row in rows}) > 1]
    columns = [*_FIRST, *differing, *_OUTCOME, *["finished"] * unfinished]
    index = pd.Index([row["run"] for row in rows], name="run", dtype=None if rows else "object")
    table = pd.DataFrame(
        {
            name: pd.Series([row[name] for row in rows], index, _DTYPES.get(_KINDS[name]))
            for name in columns
        },
        index,
    )
    table.attrs["folder"] = str(folder)
    return table


def write_ledger(folder: str | Path) -> Path:
    """Keep the rows of a folder in its `ledger.parquet`; returns the path.

    Raises NotInstalled without pyarrow, and what `results` raises.
    """
    pyarrow, parquet = _arrow()
    folder = as_folder("folder", folder)
    content = io.BytesIO()
    table = pyarrow.Table.from_pylist(_rows(folder), _schema())
    parquet.write_table(table, content, write_page_checksum=True)
    atomic_write(folder / LEDGER, content.getvalue())
    return folder / LEDGER


def as_parquet(table: "pd.DataFrame") -> bytes:
    """A Parquet file of a table of `results`; raises NotInstalled without pyarrow."""
    _arrow()
    return table.to_parquet()


# --------------------------------------------------------------------------- the runs of rows


def load_runs(table: "pd.DataFrame") -> "list[Run]":
    """The runs of the rows of `results`, as `load_run` reads them, in their order."""
    from bnnlib.runs.folder import load_run

    return list(_each(load_run, _folders(table)))


def histories(table: "pd.DataFrame") -> Iterator[tuple[str, History]]:
    """Path and history of each row of `results`; read as they are asked for, a few ahead.

    All at once, by path: `dict(histories(table))`.
    """
    yield from zip(table.index, _each(lambda f: read_run(f)[2], _folders(table)), strict=True)


def stored_runs(
    name: str | None = None, profile: str | None = "reduced", folder: str | Path = RESULTS
) -> "list[Run]":
    """The finished runs under a folder, sorted by path, of one profile; or of any, for None.

    Only those of one experiment, if named. Raises DataNotFound where there is no such folder.
    """
    if profile is not None:
        check_name("profile", profile, (*PROFILES, "own"))
    table = results(folder)
    for column, value in (("experiment", name), ("profile", profile)):
        table = table if value is None else table[table[column] == value]
    return load_runs(table)


def stored_table(name: str, folder: str | Path = RESULTS / "tables") -> "pd.DataFrame":
    """The table NAME.csv, which `bnnlib results --csv` wrote of runs that are not kept themselves.

    Its columns are of the types that `results` gives them, and others of those that they seem to
    have. Raises DataNotFound where there is no such table, DamagedFile where it cannot be read.
    """
    folder = as_folder("folder", folder)
    files = {path.stem: path for path in sorted(folder.glob("*.csv"))}
    if name not in files:
        raise DataNotFound(
            f"no table {shown(name)} in {folder.absolute()}; {nearest(name, files)}"
            f"(there are: {', '.join(files) or 'none'})"
        )
    text = read_text(files[name])
    try:
        table = _parse_table(text)
    except (csv.Error, ValueError) as error:
        raise DamagedFile(f"{files[name]} is no table of runs: {shown(str(error))}") from error
    return table.set_index("run") if "run" in table else table


def _parse_table(text: str) -> "pd.DataFrame":
    """Raises ValueError or csv.Error where a row, a name or a cell cannot be."""
    import pandas as pd

    head, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    check_columns(head)
    if not rows or any(len(row) != len(head) for row in rows):
        raise ValueError("it has no rows, or a row is longer or shorter than the header")
    types = {name: _DTYPES.get(_KINDS[name], "str") for name in head if name in _KINDS}
    empty = {name: [""] for name in head if types.get(name) != "str"}  # there it is a text
    return pd.read_csv(io.StringIO(text), dtype=types, keep_default_na=False, na_values=empty)


def _folders(table: "pd.DataFrame") -> list[Path]:
    folder = table.attrs.get("folder")
    if folder is None or table.index.name != "run":
        raise InvalidValue(
            "this table does not say where its runs are; take rows of `results(folder)` by loc, "
            "query or a mask, which keep its index `run` and its attrs['folder']"
        )
    return [Path(folder) / run for run in table.index]


def _each(read: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """What `read` makes of each item, in order; threads are a few items ahead."""
    with ThreadPoolExecutor(AHEAD) as pool:
        ahead = deque()
        for item in items:
            ahead.append(pool.submit(read, item))
            if len(ahead) == AHEAD:
                yield ahead.popleft().result()
        yield from (future.result() for future in ahead)


# ------------------------------------------------------------------------------------ the rows


def _rows(folder: Path) -> list[Row]:
    """A row for each run under a folder, sorted by path, and a warning for those left out."""
    if not os.path.isdir(folder):
        raise DataNotFound(f"no folder {folder.absolute()} to look for runs in")
    kept, problems = _kept(folder / LEDGER), []
    stamps = dict(_find(folder, problems))
    found = []
    for run in sorted(stamps, key=lambda run: run.split("/")):
        if run in kept and stamps[run] == {name: kept[run][name] for name in _STAMPS}:
            found.append(kept[run])
        else:
            found.append(_read_or_error(folder, run, stamps[run]))
    problems += [str(row) for row in found if isinstance(row, BnnlibError)]
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        _warn(f"left out of the table: {'; '.join(problems[:NAMED])}{more}")
    rows = [row for row in found if isinstance(row, dict)]
    profiles = {name: forms(name) for name in {row["experiment"] for row in rows}}
    return [row | {"profile": profiles[row["experiment"]].get(form(row), "own")} for row in rows]


def _warn(text: str) -> None:
    warnings.warn(text, BnnlibWarning, stacklevel=4)


def _find(folder: Path, problems: list[str]) -> Iterator[tuple[str, Row]]:
    """Path of each run under a folder, with size and time of its two files."""
    for path, inside, files in os.walk(folder, onerror=lambda e: problems.append(str(e))):
        if RECORD not in files:
            continue
        if "checkpoints" in inside:
            inside.remove("checkpoints")
        run = path[len(str(folder)) :].strip(os.sep).replace(os.sep, "/") or "."
        if not run.isprintable():
            problems.append(f"a run in the folder {shown(run)}")
            continue
        both = (*_stamp(f"{path}/{RECORD}"), *_stamp(f"{path}/{HISTORY}"))
        yield run, dict(zip(_STAMPS, both, strict=True))


def _stamp(path: str) -> tuple[int, int]:
    """Size and time of change of a file; zeros without one."""
    try:
        about = os.stat(path)
    except OSError:
        return 0, 0
    return about.st_size, about.st_mtime_ns


def _read_or_error(folder: Path, run: str, stamps: Row) -> Row | BnnlibError:
    try:
        return {"run": run, **stamps, **read_row(folder / run)}
    except BnnlibError as error:
        return error


def read_row(folder: Path) -> Row:
    """What a run's two files say of it, without its profile; raises what `read_run` raises."""
    e, record, text = read_texts(folder)
    finished = "seconds" in record
    columns = ("train_error", "test_error", *(TIMES if not finished else ()))
    columns += ("memorized_bits",) * ("bits" in e.probes)
    history = parse_epochs(text, folder / HISTORY, columns)
    uses = record.get("uses", {}).items()
    return {
        "experiment": e.name,
        **{name: as_cell(getattr(e, name)) for name in ("seed", *_SETTINGS)},
        "images": record["images"]["train"],
        **_errors(history),
        "memorized_bits": (history.get("memorized_bits") or [nan])[-1],
        "epochs_done": history["epoch"][-1] if history["epoch"] else 0,
        **{k: float(record.get(k, nan) if finished else sum(history[k])) for k in TIMES},
        "device": record["device"],
        "threads": record["threads"],
        "version": record["versions"].get("bnnlib", ""),
        "started": record["started"],
        "uses": ", ".join(f"{file}:{sha[:12]}" for file, hashes in uses for sha in hashes),
        "digest": record["experiment_sha256"],
        "finished": finished,
    }


def _errors(history: dict[str, list[float]]) -> Row:
    row: Row = {}
    for split in ("train", "test"):
        errors = [error for error in history[f"{split}_error"] if not isnan(error)]
        row[f"{split}_error"] = errors[-1] if errors else nan
        row[f"best_{split}_error"] = min(errors, default=nan)
    names = ("epochs_to_50", "epochs_to_10", "epochs_to_1")
    return row | dict(zip(names, epochs_to_reach(history), strict=True))


# ----------------------------------------------------------------------------- ledger.parquet


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise NotInstalled("Parquet needs the package pyarrow: pip install '.[sweep]'") from None
    return pyarrow, parquet


def _schema() -> Any:
    pyarrow, _ = _arrow()
    types = {str: "string", int: "int64", float: "float64", bool: "bool", int | None: "int64"}
    fields = [
        pyarrow.field(name, types[kind], nullable=kind == int | None)
        for name, kind in _KINDS.items()
    ]
    return pyarrow.schema(fields, {b"bnnlib": FORMAT})


def _kept(path: Path) -> dict[str, Row]:
    """The rows of a ledger by run; none, and a warning, where it is not one that we wrote."""
    if not os.path.lexists(path):
        return {}
    try:
        return {row["run"]: row for row in _read_ledger(path)}
    except NotInstalled:
        return {}
    except DamagedFile as error:
        _warn(f"{error}; the runs are read instead, and `bnnlib results --ledger` makes a new one")
        return {}


def _read_ledger(path: Path) -> list[Row]:
    """The rows of a file that has our columns, in our types, and text that can be shown."""
    pyarrow, parquet = _arrow()
    with reading(path) as source:
        content = io.BytesIO(source.read())
    try:
        file = parquet.ParquetFile(content, page_checksum_verification=True)
        about = file.schema_arrow.metadata or {}
        ours = about.get(b"bnnlib") == FORMAT and file.schema_arrow.equals(_schema())
        rows = file.read().to_pylist() if ours else []
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise DamagedFile(f"{path} is no Parquet file that can be read: {shown(error)}") from error
    if not ours:
        raise DamagedFile(f"{path} is no ledger of this version of bnnlib")
    texts = {row[name] for row in rows for name, kind in _KINDS.items() if kind is str}
    if not all(map(str.isprintable, texts)):
        raise DamagedFile(f"{path} holds text that cannot be shown")
    return rows
