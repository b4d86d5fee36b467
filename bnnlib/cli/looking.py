"""Looking at runs: one by itself, two beside each other, many in a table or figure, one scored."""

import io
import os
import shlex
import time
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnnlib.cli.options import DATA, DEVICE, DOWNLOAD, USE, check_data, run_folder
from bnnlib.cli.texts import as_text
from bnnlib.errors import DataNotFound, InvalidValue, check_name
from bnnlib.experiments.experiment import FIELDS, Experiment
from bnnlib.experiments.profiles import PROFILES, at_profile
from bnnlib.experiments.variants import EXPERIMENTS
from bnnlib.files import Row, atomic_write
from bnnlib.history import History, describe_row, differing_columns
from bnnlib.names import SPLITS
from bnnlib.runs.record import (
    HISTORY,
    LABELS,
    PARAMETERS,
    RECORD,
    as_duration,
    counted,
    read_run,
    trained_on,
)

if TYPE_CHECKING:
    import pandas as pd

EPOCHS_SHOWN = 8  # rows of a table of errors, at most
COLUMNS_SHOWN = 3  # of a history, where two of them differ
ROWS_SHOWN = 40  # of a table of runs
CELL_SHOWN = 30  # characters of a cell of it
WIDTH = 100  # characters of a line of it
BOTH = ("train", "test")
PICTURES = (".png", ".pdf", ".svg")

# ------------------------------------------------------------------------------------ one run


@click.command()
@run_folder("folder")
@USE
def show(folder: Path) -> None:
    """What a run is, how far it is, and its last errors."""
    e, record, history = read_run(folder)
    evaluated = [row for row in history.rows if _errors(row)]
    about = {
        "experiment": f"{e.name}: {e.summary}",
        "made by" if "seconds" in record else "goes on by": _command(e, record, folder),
        "data": record.get("trained_on") or trained_on(e, record["images"]["train"]),
        "images": ", ".join(f"{n:,} in {split}" for split, n in record["images"].items()),
        "state": _state(e, record, history, folder),
        "errors": _at_epoch(evaluated[-1]) if evaluated else "none yet",
        "device": f"{record['device']}, {counted(record['threads'], 'thread')}",
        "versions": ", ".join(f"{name} {v}" for name, v in record["versions"].items()),
        "started": record["started"],
    }
    if continued := record.get("continued"):
        about["continued"] = f"{counted(len(continued), 'time')}, last {continued[-1]['started']}"
    for file, hashes in record.get("uses", {}).items():
        about[f"uses {file}"] = f"SHA-256 {', then '.join(h[:12] + '...' for h in hashes)}"
    width = max(map(len, about)) + 2
    click.echo("\n".join(f"{title:<{width}}{text}" for title, text in about.items()))


def _errors(row: Row) -> dict[str, float]:
    """The errors of an epoch by split, where they were computed."""
    found = {split: row.get(f"{split}_error", nan) for split in SPLITS}
    return {split: error for split, error in found.items() if not isnan(error)}


def _at_epoch(row: Row) -> str:
    return f"{describe_row(row)}  (epoch {row['epoch']:,})"


def _command(e: Experiment, record: dict[str, Any], folder: Path) -> str:
    """The command that makes this run or goes on with it, at the profile that is closest."""
    if e.name not in EXPERIMENTS:
        return "a program: no experiment of bnnlib has this name"
    here, settings = e.spec(), {}
    for profile in PROFILES:
        base = at_profile(EXPERIMENTS[e.name], profile).spec()
        settings[profile] = [f"{k}={as_text(v)}" for k, v in here.items() if v != base[k]]
    profile = min(settings, key=lambda profile: len(settings[profile]))
    options = [word for setting in settings[profile] for word in ("--set", setting)]
    options += [word for file in record.get("uses", ()) for word in ("--use", file)]
    options += [] if "seconds" in record else ["--out", str(folder)]
    return shlex.join(["bnnlib", "run", e.name, "--profile", profile, *options])


def _state(e: Experiment, record: dict[str, Any], history: History, folder: Path) -> str:
    done = history.rows[-1]["epoch"] if len(history) else 0
    if "seconds" in record:
        what = f"{e.run_folder} scored" if e.evaluates else counted(e.epochs, "epoch")
        return f"finished: {what} in {as_duration(record['seconds'])}"
    file = folder / (HISTORY if os.path.isfile(folder / HISTORY) else RECORD)
    written = f"written {as_duration(max(0, time.time() - file.stat().st_mtime))} ago"
    if done == 0:
        return f"under way: in the first epoch of {e.epochs:,}; {written}"
    taken = sum(row.get("seconds", nan) for row in history.rows)
    left = taken / len(history) * (e.epochs - done)
    return (
        f"under way: epoch {done:,} of {e.epochs:,} after {as_duration(taken)}, "
        f"about {as_duration(left)} left; {written}"
    )


# ----------------------------------------------------------------------------------- two runs


@click.command()
@run_folder("one")
@run_folder("other")
@USE
def compare(one: Path, other: Path) -> None:
    """What differs between two runs, and what is equal.

    Errors are in percent, at up to eight epochs at which both runs were evaluated.
    """
    (e, record, history), (e2, record2, history2) = read_run(one), read_run(other)
    here, there = e.spec(), e2.spec()
    differing = [k for k in here if here[k] != there[k]]
    settings = [(k, as_text(here[k]), as_text(there[k])) for k in differing]
    click.echo(_table([("", "A", "B"), ("folder", str(one), str(other)), *settings]))
    click.echo("\n" + (_table(_curves(history, history2)) or "no epoch was evaluated in both"))
    for name, h in (("A", history), ("B", history2)):
        click.echo(f"{name}: {_at_epoch(h.rows[-1]) if len(h) else 'no epoch yet'}")
    click.echo("\n" + _equal(record, record2, differing_columns(history, history2)))


def _equal(record: dict[str, Any], record2: dict[str, Any], columns: list[str]) -> str:
    """What two runs have in common to the last bit, and which columns of their histories not."""
    equal = [] if columns else ["history, times aside"]
    for what in ("image", "label", "parameter"):
        if (key := f"{what}_sha256") in record and record[key] == record2.get(key):
            equal.append(f"{what}s")
    said = f"equal bit for bit: {', '.join(equal) or 'nothing'}"
    more = f" and {len(columns) - COLUMNS_SHOWN} more" if len(columns) > COLUMNS_SHOWN else ""
    names = ", ".join(columns[:COLUMNS_SHOWN])
    return f"{said}\ncolumns that differ: {names}{more}" if columns else said


def _curves(one: History, other: History) -> list[tuple[str, ...]]:
    """A row of errors in percent for each of some epochs, under a header; [] without any."""
    errors = [
        {row["epoch"]: found for row in h.rows if (found := _errors(row))} for h in (one, other)
    ]
    epochs = sorted(errors[0].keys() & errors[1].keys())
    if len(epochs) > EPOCHS_SHOWN:
        step = (len(epochs) - 1) / (EPOCHS_SHOWN - 1)
        epochs = [epochs[round(i * step)] for i in range(EPOCHS_SHOWN)]
    splits = [s for s in SPLITS if any(s in by[epoch] for by in errors for epoch in epochs)]
    pairs = [(split, by, name) for split in splits for by, name in zip(errors, "AB", strict=True)]
    rows = [
        (f"{epoch:,}", *(_percent(by[epoch].get(split, nan)) for split, by, _ in pairs))
        for epoch in epochs
    ]
    return [("epoch", *(f"{split} {name}" for split, _, name in pairs)), *rows] if rows else []


def _percent(share: float) -> str:
    return "-" if isnan(share) else f"{100 * share:.2f}"


def _table(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their longest entry."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


# ---------------------------------------------------------------------------------- many runs


def _new_file(name: str, help: str):
    """An option that takes the path of a file to be made."""
    kind = click.Path(path_type=Path)
    return click.option(name, type=kind, metavar="FILE", show_default="no file", help=help)


@click.command()
@run_folder("folder", default="runs", metavar="[FOLDER]")
@_new_file("--csv", "Write the whole table, all its columns, into a new file.")
@_new_file("--parquet", "The same as Parquet.")
@click.option("--ledger", is_flag=True, help="Keep the rows in FOLDER/ledger.parquet, to be quick.")
@USE
def results(folder: Path, csv: Path | None, parquet: Path | None, ledger: bool) -> None:
    """The finished runs under a folder, in one table.

    Errors are in percent, but shares between 0 and 1 in the files. A file that is there already
    is left alone; the ledger is only a copy of what the folders say, and is replaced.
    """
    files = {option: path for option, path in (("--csv", csv), ("--parquet", parquet)) if path}
    for option, path in files.items():
        _check_new(path, option)
    from bnnlib.runs.ledger import as_parquet, results, write_ledger

    if ledger:
        click.echo(write_ledger(folder))
        if not files:
            return
    table = results(folder)
    for option, path in files.items():
        content = table.to_csv().encode() if option == "--csv" else as_parquet(table)
        atomic_write(path, content)
        click.echo(path)
    if not files:
        click.echo("\n".join(_lines(table)) if len(table) else f"no finished run in {folder}")


def _lines(table: "pd.DataFrame") -> list[str]:
    """The first rows of a ledger in at most `WIDTH` columns, and what there is no room for.

    Of the settings there are those in which runs of one experiment and profile differ.
    """
    several = table.groupby(["experiment", "profile"]).nunique(dropna=False).max() > 1
    settings = [name for name in FIELDS if several.get(name, False)]
    alike = table.get("corruption_seed", table["seed"]).equals(table["seed"])
    unshown = {"seed", "run_folder", *["corruption_seed"] * alike}
    settings = [name for name in settings if name not in unshown]
    rows = table.sort_values(["experiment", "profile", "seed"], kind="stable").head(ROWS_SHOWN)
    columns = {n: _texts(rows[n], "none") for n in ("experiment", "profile", "seed", *settings)}
    columns |= {f"{split} %": list(map(_percent, rows[f"{split}_error"])) for split in BOTH}
    columns["to 10 %"] = _texts(rows["epochs_to_10"], "-")
    columns["time"] = list(map(as_duration, rows["seconds"]))
    left_out = []
    while settings and sum(max(map(len, (n, *c))) + 2 for n, c in columns.items()) - 2 > WIDTH:
        left_out.insert(0, settings.pop())
        del columns[left_out[0]]
    lines = [_table([tuple(columns), *zip(*columns.values(), strict=True)])]
    if len(table) > ROWS_SHOWN:
        lines.append(f"and {counted(len(table) - ROWS_SHOWN, 'run')} more: --csv FILE has all")
    if left_out:
        lines.append(f"no room for {', '.join(left_out)}: --csv FILE has them")
    return lines


def _texts(column: "pd.Series", missing: str) -> list[str]:
    values = column.astype(object).where(column.notna(), missing)
    return [as_text(value)[:CELL_SHOWN] for value in values]


# --------------------------------------------------------------------------- figures and scores


def _out(default: str, help: str):
    """The option --out of a command that writes a new file."""
    return click.option(
        "--out",
        default=default,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help=help,
    )


def _check_picture(path: Path) -> None:
    check_name("ending of --out", path.suffix, PICTURES)
    _check_new(path)


def _check_new(path: Path, option: str = "--out") -> None:
    if os.path.lexists(path):
        raise InvalidValue(f"{path} is there already; name another file with {option}")
    if not path.parent.is_dir():
        raise DataNotFound(f"no folder {path.parent} to write {path.name} in")


@click.command()
@run_folder("folders", nargs=-1, required=True, metavar="RUN...")
@_out("errors.png", f"A new file: {', '.join(PICTURES)}.")
@USE
def plot(folders: tuple[Path, ...], out: Path) -> None:
    """Draw the training and test errors of runs.

    In percent, against the epoch. A file that is there already is left alone.
    """
    _check_picture(out)
    histories = {str(folder): read_run(folder)[2] for folder in folders}
    for folder, history in histories.items():
        if not any(map(_errors, history.rows)):
            raise InvalidValue(f"the run in {folder} has no errors yet")
    atomic_write(out, _drawn(histories, out.suffix[1:]))
    click.echo(out)


def _drawn(histories: dict[str, History], kind: str) -> bytes:
    """A figure with a colour for each history, solid in training, dashed in the test."""
    from matplotlib.figure import Figure

    from bnnlib.plots import plot_errors, use_book_style

    use_book_style()
    figure = Figure(facecolor="white")
    ax = figure.subplots()
    for i, (label, history) in enumerate(histories.items()):
        known = [s for s in ("train", "test") if any(s in _errors(row) for row in history.rows)]
        plot_errors(history, ax, known, label, color=f"C{i}")
    ax.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format=kind, facecolor="white")
    return content.getvalue()


@click.command()
@run_folder("folder")
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="all",
    help="How many of the training images are scored, the first ones.",
)
@click.option("--packed", is_flag=True, help="Score with the packed network, on the CPU.")
@DEVICE
@DATA
@DOWNLOAD
@USE
def evaluate(folder, rows, packed, device, data, download) -> None:
    """Score a finished run on the images that it was trained on.

    Images, labels and parameters are compared with the hashes that the run wrote down.
    """
    e, record = _read_kept(folder, "scored", PARAMETERS, LABELS)
    if packed and not device.startswith(("auto", "cpu")):
        raise InvalidValue(f"--packed computes on the CPU, got --device {device}")
    check_data(e, data, download)
    from bnnlib.experiments.build import resolve_device
    from bnnlib.runs.evaluation import evaluate_run
    from bnnlib.runs.folder import load_run

    device = resolve_device("cpu" if packed else device)
    how = {"download": download, "device": device, "packed": packed}
    error = evaluate_run(load_run(folder), rows, data, **how)
    there = record["images"]["train"]
    images = counted(min(rows or there, there), "image")
    click.echo(f"train error {100 * error:.2f} % on {images}{', packed' * packed}")


def _read_kept(folder: Path, done: str, *needed: str) -> tuple[Experiment, dict[str, Any]]:
    """Experiment and record of a run that is finished and kept the files that are needed."""
    e, record, _ = read_run(folder)
    if "seconds" not in record:
        raise InvalidValue(f"the run in {folder} is not finished; `bnnlib show` says how far it is")
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise InvalidValue(f"the run in {folder} cannot be {done}: it kept no {missing[0]}")
    return e, record


# -------------------------------------------------------------------------------- other forms


@click.command()
@run_folder("folder")
@_out("packed.safetensors", "A new file.")
@USE
def pack(folder: Path, out: Path) -> None:
    """Write the network of a finished run as packed bits.

    A weight takes one bit. The scores are the same, bit for bit; `bnnlib evaluate --packed`
    computes them. A file that is there already is left alone.
    """
    _read_kept(folder, "packed", PARAMETERS)
    _check_new(out)
    from bnnlib.packed.packing import pack
    from bnnlib.runs.folder import load_run

    network = pack(load_run(folder).model)
    size = network.save(out)
    click.echo(f"{counted(size, 'byte')}, first layer in {network.first_layer}\n{out}")


@click.command()
@run_folder("folder")
@_out("model.onnx", "A new file.")
@USE
def export(folder: Path, out: Path) -> None:
    """Write the network of a finished run in the format ONNX.

    In real numbers, for other programs; onnxruntime is asked whether it gives the same. A file
    that is there already is left alone.
    """
    e, record = _read_kept(folder, "exported", PARAMETERS)
    _check_new(out)
    from bnnlib.export import export_onnx
    from bnnlib.runs.folder import load_run
    from bnnlib.runs.result import inputs_of_run

    found = export_onnx(load_run(folder).model, out, inputs_of_run(e, record))
    said = "not checked: there is no onnxruntime"
    if found:
        said = (
            f"onnxruntime: the same class for {found.same_class} of {found.images} images of "
            f"noise, scores differ by {found.largest_difference:.1g} at most"
        )
    click.echo(f"{counted(out.stat().st_size, 'byte')}, {said}\n{out}")
