"""The rules that every chapter keeps, and each chapter executed at its smallest size."""

import ast
import re
import sys
from pathlib import Path

import build
import pytest
from execute import CELL_TIMEOUT, execute, own_parameters, profile_parameters
from notebooks import code_cells, read, tags
from strip import is_stripped

from bnnlib.notebook import NUMBERS, TEXTS, read_parameters

BOOK = Path(__file__).parents[2] / "book"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.stem[0].isdigit()]
LIBRARIES = {"benchmarks", "bnnlib", "matplotlib", "numpy", "pandas", "scipy", "torch"}
READS = {"open", "read_csv", "read_json", "read_text", "read_bytes", "imread", "urlopen"}
READS |= {"loadtxt", "genfromtxt", "read_pickle", "fromfile"}
TAGS = {"parameters", "injected-parameters", "hide-input", "hide-cell", "remove-cell"}
TAGS |= {"remove-input", "remove-output"}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def prose(notebook):
    return "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def nodes(notebook, kind):
    """The syntax of this kind in the code; a magic or a shell line does not parse."""
    trees = [ast.parse(cell.source) for cell in code_cells(notebook)]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, kind)]


def imports(notebook):
    """(module, name) of each import."""
    for node in nodes(notebook, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
    for node in nodes(notebook, ast.ImportFrom):
        yield from ((node.module, alias.name) for alias in node.names)


def calls(notebook):
    """The last name of each call: `read_csv` of `pd.read_csv(path)`."""
    functions = [node.func for node in nodes(notebook, ast.Call)]
    return {getattr(f, "attr", getattr(f, "id", "")) for f in functions}


def test_contents_and_folder_agree():
    pages = {f"book/{path.stem}" for path in BOOK.iterdir() if path.suffix in (".md", ".ipynb")}
    assert set(build.contents(BOOK.parent)) == pages


@each_notebook
def test_committed_without_outputs(path):
    assert is_stripped(path), "run `make strip`"


@each_notebook
def test_tags_are_known(path):
    assert {tag for cell in read(path).cells for tag in tags(cell)} <= TAGS


@each_notebook
def test_cells_fit_a_page(path):
    for cell in code_cells(read(path)):
        lines = cell.source.splitlines()
        assert len(lines) <= 15, cell.source
        assert max(map(len, lines), default=0) <= 76, cell.source


@each_notebook
def test_imports_are_public_and_explicit(path):
    for module, name in imports(read(path)):
        assert module.partition(".")[0] in LIBRARIES | sys.stdlib_module_names
        assert name != "*"
        assert not any(part.startswith("_") for part in [*module.split("."), name])


def test_the_pages_that_time_something_run_alone():
    timers = {"time_steps", "time_calls"}
    timing = [path.stem for path in NOTEBOOKS if timers & calls(read(path))]
    assert sorted(build.TIMED) == [f"book/{name}" for name in sorted(timing)]


@each_notebook
def test_figures_and_numbers_come_from_the_library_or_the_page_itself(path):
    notebook = read(path)
    assert not READS & calls(notebook)  # stored runs are read by `bnnlib`
    assert not any(cell.get("attachments") for cell in notebook.cells)
    shown = r"!\[|<img|\{(?:figure|image|table|csv-table)\}|^\|"
    assert not re.search(shown, prose(notebook), re.MULTILINE)


@each_notebook
def test_one_cell_of_commented_literal_parameters_checked_in_the_next(path):
    cells = code_cells(read(path))
    own = [number for number, cell in enumerate(cells) if "parameters" in tags(cell)]
    assert len(own) == 1 or path not in CHAPTERS
    for number in own:
        source = cells[number].source
        parameters = read_parameters(source)
        assert 1 <= len(parameters) == len(source.splitlines()) <= 10
        assert set(parameters) <= {*NUMBERS, *TEXTS}  # each has a range
        assert all(re.search(r"  # \S", line) for line in source.splitlines())
        assert "check_parameters(In)" in cells[number + 1].source


@each_chapter
def test_chapter_ends_with_summary_questions_and_three_exercises(path):
    text = prose(read(path))
    ends = re.findall(r"^## (.+)$", text, re.MULTILINE)[-3:]
    assert ends == ["Summary", "Check yourself", "Exercises"]
    _, _, rest = text.rpartition("## Check yourself")
    questions, _, exercises = rest.partition("## Exercises")
    titles = re.findall(r"^`{3,}\{dropdown\} (.+)$", questions, re.MULTILINE)
    assert 3 <= len(titles) <= 5
    assert all(title.endswith("?") for title in titles)
    assert len(re.findall(r"\{exercise(?:-start)?\}", exercises)) == 3


@each_chapter
def test_each_exercise_has_a_solution_with_code_in_the_same_order(path):
    cells = read(path).cells
    text = prose(read(path))
    labels = re.findall(r"\{exercise(?:-start)?\}[^:]*\n:label: (\S+)", text)
    begin = r"\{solution-start\} (\S+)"
    starts = [i for i, cell in enumerate(cells) if re.search(begin, cell.source)]
    ends = [i for i, cell in enumerate(cells) if "{solution-end}" in cell.source]
    assert [re.search(begin, cells[i].source)[1] for i in starts] == labels
    assert len(ends) == len(starts)
    for start, end in zip(starts, ends, strict=True):
        assert any(cell.cell_type == "code" for cell in cells[start:end])


def test_each_figure_has_a_caption_and_a_name_of_its_own():
    cells = [cell for path in NOTEBOOKS for cell in code_cells(read(path))]
    figures = [c.metadata.mystnb.figure for c in cells if "figure" in c.metadata.get("mystnb", {})]
    assert all(figure["caption"].rstrip().endswith(".") for figure in figures)
    names = [figure["name"] for figure in figures]
    assert len(set(names)) == len(names)
    text = "\n".join(prose(read(path)) for path in NOTEBOOKS)
    assert [name for name in names if f"{{numref}}`{name}`" not in text] == []


@each_notebook
def test_runs_at_smoke_without_a_warning(path, tmp_path):
    given = profile_parameters(path, "smoke")
    execute(path, tmp_path / path.name, given, CELL_TIMEOUT["smoke"])
    outputs = [out for cell in code_cells(read(tmp_path / path.name)) for out in cell.outputs]
    assert [out.text for out in outputs if out.get("name") == "stderr"] == []


@each_chapter
def test_quick_is_what_a_chapter_runs_by_itself(path):
    assert own_parameters(path)["profile"] == "quick"
