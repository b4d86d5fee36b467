"""Chapters as notebook objects: read, strip, compare, merge.

In: `nbformat` notebooks. Out: the same. Nothing is executed here.
Next file: `execute.py`.
"""

import json
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from bnnlib.files import atomic_write, make_folder

KERNELSPEC = {
    "display_name": "Python 3",
    "language": "python",
    "name": "python3",
}
INJECTED = "injected-parameters"  # papermill's tag for its own cell
KEPT_METADATA = ("tags", "mystnb")  # what a chapter's author writes


def read(path: Path) -> NotebookNode:
    """The notebook at `path`, as nbformat 4."""
    return nbformat.read(path, as_version=4)


def text_of(notebook: NotebookNode) -> str:
    """The notebook as it stands in a file, one source line to a line."""
    return nbformat.writes(notebook) + "\n"


def write(notebook: NotebookNode, path: Path) -> None:
    """Write the notebook, whole or not at all."""
    make_folder(path.parent)
    atomic_write(path, text_of(notebook).encode())


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell, which may have none."""
    return cell.metadata.get("tags", [])


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The author's code cells, in order: not what papermill injected."""
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and INJECTED not in tags(cell)
    ]


def parameters_source(notebook: NotebookNode) -> str:
    """The source of the parameters cell, or '' if there is none."""
    cells = [c for c in code_cells(notebook) if "parameters" in tags(c)]
    return cells[0].source if cells else ""


def strip(notebook: NotebookNode) -> NotebookNode:
    """The notebook as it is kept in git: sources, tags, figure captions."""
    cells = [
        _strip_cell(cell)
        for cell in notebook.cells
        if INJECTED not in tags(cell)
    ]
    metadata = {"kernelspec": KERNELSPEC}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def execution_content(notebook: NotebookNode) -> str:
    """All that decides the outputs, as text: code and parameters cell.

    Prose and display metadata are left out, so that a corrected word does
    not cost a training run.
    """
    cells = code_cells(notebook)
    content = [(cell.source, "parameters" in tags(cell)) for cell in cells]
    return json.dumps(content)


def merge(source: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """Today's prose and metadata with the outputs of an earlier execution.

    The two must have the same `execution_content`.
    """
    merged = NotebookNode({**source, "cells": []})
    ran = iter(code_cells(executed))
    for cell in source.cells:
        merged.cells.append(cell)
        if cell.cell_type == "code":
            done = next(ran)
            outputs = {
                "outputs": done.outputs,
                "execution_count": done.execution_count,
            }
            merged.cells[-1] = NotebookNode({**cell, **outputs})
        if "parameters" in tags(cell):
            merged.cells.extend(_injected_cells(executed))
    return merged


def _strip_cell(cell: NotebookNode) -> NotebookNode:
    kept = {k: v for k in KEPT_METADATA if (v := cell.metadata.get(k))}
    stripped = NotebookNode({**cell, "metadata": NotebookNode(kept)})
    if cell.cell_type == "code":
        stripped.outputs, stripped.execution_count = [], None
    return stripped


def _injected_cells(executed: NotebookNode) -> list[NotebookNode]:
    injected = [cell for cell in executed.cells if INJECTED in tags(cell)]
    for cell in injected:
        cell.id = INJECTED  # papermill draws a random one
        cell.metadata = NotebookNode(tags=[INJECTED])
    return injected
