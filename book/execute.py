"""Chapters in, executed chapters out, each executed only when it has to be.

An executed chapter is stored with a key: a hash of its code, its
parameters, the library, the results and the requirements. As long as the
key is the same, the stored copy is kept. Next file: `together.py`.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from pathlib import Path

import click
import papermill
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from bnnlib.errors import BnnlibError
from bnnlib.notebook import check_values, read_parameters
from notebooks import (
    execution_content,
    merge,
    parameters_source,
    read,
    write,
)

# Seconds a single cell may take; beyond `quick` a cell may train for hours.
CELL_TIMEOUT = {
    "smoke": 600,
    "quick": 3600,
    "reduced": None,
    "large": None,
    "full": None,
}
KERNEL_ENVIRONMENT = {
    "BNNLIB_BOKEH": "../bokeh/",  # where the pages find its scripts
    "TQDM_DISABLE": "1",  # each refresh of a bar would become a line
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    # Chapters share the cores, and no page depends on how many there are.
    "OMP_NUM_THREADS": "1",
}
# Critical only: at each start the kernel warns that it listens on a local
# port, and when it is stopped it logs the sockets that were closed on it.
KERNEL_ARGUMENTS = ["--IPKernelApp.log_level=50"]


class BookError(click.ClickException, BnnlibError):
    """A book that cannot be built; the text says where and why."""


def inputs_digest(root: Path) -> str:
    """SHA-256 over what every chapter reads besides its own cells."""
    digest = hashlib.sha256()
    for path in _input_files(root):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def chapter_key(notebook: NotebookNode, given: Mapping, inputs: str) -> str:
    """SHA-256 of everything that decides the outputs of a chapter."""
    python = platform.python_version_tuple()[:2]
    runner = Path(__file__).read_text(encoding="utf-8")
    content = execution_content(notebook)
    parts = [content, sorted(given.items()), inputs, python, runner]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def own_parameters(chapter: Path) -> dict:
    """The parameters that a chapter declares, with their defaults."""
    with _naming(chapter):
        return read_parameters(parameters_source(read(chapter)))


def profile_parameters(chapter: Path, profile: str) -> dict:
    """What to inject for `profile`: nothing where it is the default.

    So the page of a chapter run with its own values shows no second
    parameters cell.
    """
    default = own_parameters(chapter).get("profile")
    return {} if default in (None, profile) else {"profile": profile}


def stored_key(path: Path) -> str | None:
    """The key of the executed chapter at `path`, None if there is none."""
    return read(path).metadata.get("key") if path.exists() else None


def execute(
    chapter: Path,
    out: Path,
    given: Mapping[str, object],
    timeout: float | None = None,
    key: str = "",
) -> None:
    """Run a chapter with the given parameters and write it to `out`.

    `timeout` is in seconds for one cell. A chapter that fails raises
    `BookError` and leaves `out` as it was; its cells up to the failure
    are kept beside it as `*.failed.ipynb`.
    """
    with _naming(chapter):
        check_values(given, own_parameters(chapter))
    source, failed = read(chapter), failed_copy(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    executed = _run(chapter, failed, given, timeout)
    merged = merge(source, executed)
    merged.metadata.key = key
    write(merged, out)
    failed.unlink()


def failed_copy(out: Path) -> Path:
    """Where the cells of a chapter are kept up to one that failed."""
    return out.with_name(f"{out.stem}.failed.ipynb")


def _run(
    chapter: Path, log: Path, given: Mapping, timeout: float | None
) -> NotebookNode:
    started: list[NotebookNode] = []
    try:
        with kernels_at(chapter.parent):
            return papermill.execute_notebook(
                chapter,
                log,
                parameters=dict(given),
                kernel_name="python3",
                cwd=chapter.parent,
                progress_bar=False,
                execution_timeout=timeout,
                extra_arguments=KERNEL_ARGUMENTS,
                on_cell_start=lambda cell, **_: started.append(cell),
            )
    except papermill.PapermillExecutionError as error:
        what = f"failed: {error.ename}: {error.evalue}"
    except CellTimeoutError:
        what = f"ran past {timeout} s"
    except DeadKernelError:
        what = "ended the kernel; was there enough memory?"
    raise BookError(
        f"{chapter.name}: {_last_cell(started)} {what}\n"
        f"The cells up to there: {log}"
    )


def _last_cell(started: list[NotebookNode]) -> str:
    cells = [
        c for c in started if c.cell_type == "code" and c.source.strip()
    ]
    if not cells:
        return "its first cell"
    first_line = cells[-1].source.splitlines()[0]
    return f"cell In [{len(cells)}] ({first_line})"


def _input_files(root: Path) -> list[Path]:
    found = [root / "requirements.txt"]
    for folder in ("bnnlib", "results", "benchmarks/results"):
        paths = (root / folder).rglob("*")
        found += [p for p in paths if not _is_cache(p, root)]
    return sorted(path for path in found if path.is_file())


def _is_cache(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return any(p.startswith(".") or p == "__pycache__" for p in parts)


@contextmanager
def _naming(chapter: Path) -> Iterator[None]:
    """Turn a refused parameter into an error that names the chapter."""
    try:
        yield
    except BnnlibError as error:
        raise BookError(f"{chapter.name}: {error}") from None


@contextmanager
def kernels_at(folder: Path) -> Iterator[None]:
    """Kernels that start inside have this folder and `KERNEL_ENVIRONMENT`.

    Both are those of the whole process, and papermill changes the folder
    too. Where several threads execute chapters, one such block around all
    of them makes each of theirs change nothing.
    """
    before = {name: os.environ.get(name) for name in KERNEL_ENVIRONMENT}
    os.environ.update(KERNEL_ENVIRONMENT)
    try:
        with chdir(folder):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
