"""Chapters as tasks: each point of a grid gives an executed notebook, by papermill."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from bnnlib.errors import DataNotFound, InvalidValue, NotInstalled
from bnnlib.files import atomic_write
from bnnlib.runs.ledger import results
from bnnlib.sweeps.tasks import Outcome, label

LONGEST_NAME = 100  # characters of parameters in the name of a file
INDEX = "index.html"
QUIET = ["--IPKernelApp.log_level=50"]  # a kernel warns at each start that it listens on a port


@dataclass(frozen=True)
class ChapterTask:
    """One chapter, to be executed with these parameters."""

    chapter: Path  # absolute
    parameters: Mapping[str, Any]
    out: Path  # the executed notebook, absolute
    key: str  # SHA-256 of the chapter's code and the parameters
    name: str
    label: str
    needs: str = ""
    resources: Mapping[str, float] = field(default_factory=dict)

    def is_finished(self) -> bool:
        """Whether it was executed; raises InvalidValue where that was another version of it."""
        if not self.out.is_file():
            return False
        if _notebook(self.out).metadata.get("key") != self.key:
            raise InvalidValue(
                f"{self.out} was executed from another version of {self.chapter.name}; move it away"
            )
        return True

    def begun(self) -> object:
        """When papermill wrote first: it does as the kernel begins."""
        failed = self.out.with_suffix(".failed.ipynb")
        return failed.stat().st_ctime_ns if failed.is_file() else None

    def progress(self) -> object:
        """How many runs it has finished so far."""
        return len(self.runs())

    def runs(self):
        """The rows of the ledger of its runs; none where it keeps none."""
        folder = Path(self.parameters.get("runs_folder") or self.out.with_suffix(""))
        return results(folder) if folder.is_dir() else ()

    def work(self, how: Mapping[str, Any], stop: Callable[[], bool]) -> Outcome:
        """Execute it. One that fails is kept up to the failure, as `NAME.failed.ipynb`."""
        import nbformat
        import papermill

        if stop():
            return Outcome("stopped")
        failed = self.out.with_suffix(".failed.ipynb")
        failed.parent.mkdir(parents=True, exist_ok=True)
        papermill.execute_notebook(
            self.chapter,
            failed,
            parameters=dict(self.parameters),
            kernel_name="python3",
            language="python",
            cwd=self.chapter.parent,
            progress_bar=False,
            extra_arguments=QUIET,
        )
        executed = _notebook(failed)
        executed.metadata["key"] = self.key
        atomic_write(self.out, nbformat.writes(executed).encode())
        failed.unlink()
        return Outcome("finished")


def read_chapter(path: str, beside: Path) -> tuple[Path, dict[str, Any], str]:
    """A chapter's absolute path, its parameters with their defaults, and its code.

    A relative path is looked for here, then beside the grid. Raises DataNotFound, InvalidValue
    where it has no cell of parameters, and NotInstalled.
    """
    from bnnlib.notebook import read_parameters

    found = next((p for p in (Path(path), beside / path) if p.is_file()), None)
    if found is None:
        raise DataNotFound(f"no chapter {path}, here or in {beside}")
    cells = [cell for cell in _notebook(found).cells if cell.cell_type == "code"]
    own = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", ())]
    if len(own) != 1:
        raise InvalidValue(f"{found} has {len(own)} cells with the tag `parameters`, not one")
    return found.absolute(), read_parameters(own[0]), "\n".join(cell.source for cell in cells)


def chapter_task(
    path: Path,
    own: Mapping[str, Any],
    code: str,
    point: Mapping[str, Any],
    root: Path,
    resources: Mapping[str, float],
) -> ChapterTask:
    """The task of a chapter at one point: its parameters stand in the name of its notebook.

    A chapter that can keep its runs keeps them in a folder beside the notebook. Raises
    InvalidValue for a parameter that the chapter lacks, or of another type.
    """
    from bnnlib.notebook import check_values

    check_values(point, own)
    words = re.sub(r"[^\w.=,+-]+", "_", ",".join(f"{k}={v}" for k, v in point.items()))
    if len(words) > LONGEST_NAME:
        words = hashlib.sha256(words.encode()).hexdigest()[:16]
    name = f"{path.stem}/{path.stem},{words}.ipynb" if point else f"{path.stem}/{path.stem}.ipynb"
    out, parameters = root / name, dict(point)
    if own.get("runs_folder") == "" and "runs_folder" not in point:
        parameters["runs_folder"] = str(out.with_suffix(""))
    key = hashlib.sha256(json.dumps([code, point]).encode()).hexdigest()
    return ChapterTask(
        path, parameters, out, key, name, label(path.stem, point), "", dict(resources)
    )


def write_index(folder: Path, tasks: Iterable[ChapterTask]) -> Path:
    """A page with a link to each executed notebook, and the last errors of its runs."""
    parts = [_entry(folder, task) for task in tasks if task.out.is_file()]
    title = f"{len(parts)} executed chapters"
    page = f"<!doctype html><meta charset='utf-8'><title>{title}</title><h1>{title}</h1>"
    style = "<style>body{font-family:sans-serif;margin:2em}td,th{padding:2px 1em}</style>"
    atomic_write(folder / INDEX, "\n".join([page, style, *parts]).encode())
    return folder / INDEX


def _entry(folder: Path, task: ChapterTask) -> str:
    link = escape(os.path.relpath(task.out, folder))
    head = f"<h2><a href='{link}'>{escape(task.label)}</a></h2>"
    runs = task.runs()
    if not len(runs):
        return f"{head}<p>It keeps no runs.</p>"
    settings = runs.columns[: runs.columns.get_loc("images")]
    shown = runs[[*settings, "train_error", "test_error"]].copy()
    for name in ("train_error", "test_error"):
        shown[name] = (100 * shown[name]).round(2)
    columns = {"train_error": "train error (%)", "test_error": "test error (%)"}
    return head + shown.rename(columns=columns).to_html(index=False, border=0, na_rep="-")


def _notebook(path: Path) -> Any:
    try:
        import nbformat
    except ImportError:
        raise NotInstalled(
            "to execute chapters, install papermill: pip install '.[sweep]'"
        ) from None
    return nbformat.read(path, as_version=4)
