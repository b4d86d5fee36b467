"""The book's machinery on a book of one chapter, which counts its own executions."""

import re
import shutil
from functools import partial
from pathlib import Path

import build
import papermill
import pytest
from build import check_pages, execute_chapters, render, stage
from click.testing import CliRunner
from execute import BookError, chapter_key, execute, inputs_digest, profile_parameters
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from notebooks import KERNELSPEC, code_cells, merge, read, write
from strip import strip_folder

ONE = "book/one.ipynb"
PROJECT = Path(__file__).parents[2]
COUNT = 'with open("runs.txt", "a") as file:\n    file.write("x")\nprint(profile, epochs)'
PARAMETERS = 'profile = "quick"  # size\nepochs = 3  # passes'


def chapter(*sources, prose="# One"):
    own = new_code_cell(PARAMETERS, id="own", metadata={"tags": ["parameters"]})
    cells = [new_code_cell(source, id=f"code-{k}") for k, source in enumerate(sources)]
    prose = new_markdown_cell(prose, id="prose")
    return new_notebook(cells=[prose, own, *cells], metadata={"kernelspec": KERNELSPEC})


def runs(root):
    """How often the chapter has been executed."""
    return len((root / "book/runs.txt").read_text())


def write_text(path, text="1"):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path):
    """A project with one chapter, `book/one`."""
    write_text(tmp_path / "bnnlib/layers.py", "width = 1\n")
    write_text(tmp_path / "requirements.txt", "numpy\n")
    toc = "format: jb-book\nroot: book/intro\nchapters: [{file: book/one}]\n"
    write_text(tmp_path / "_toc.yml", toc)
    write_text(tmp_path / "book/intro.md", "# Intro\n\n$x^2$\n")
    (tmp_path / "book/references.bib").write_text("")
    for name in build.evidence.FILES:
        write_text(tmp_path / "results" / name)
    shutil.copy(PROJECT / "_config.yml", tmp_path)
    shutil.copytree(PROJECT / "book/_static", tmp_path / "book/_static")
    write(chapter(COUNT), tmp_path / ONE)
    return tmp_path


@pytest.fixture
def execute_one(root):
    return partial(execute_chapters, root, "quick", ["book/one"])


@pytest.fixture
def run_main(root, monkeypatch):
    monkeypatch.setattr(build, "ROOT", root)
    monkeypatch.setattr(build.evidence, "write", lambda folder: None)  # there are no runs
    return lambda *options: CliRunner().invoke(build.main, options)


def test_unchanged_code_is_kept_and_takes_todays_prose_and_captions(root, execute_one, capsys):
    execute_one()
    today = chapter(COUNT, prose="# One, reworded")
    today.cells.insert(2, new_markdown_cell("Between."))
    today.cells[3].metadata = {"mystnb": {"figure": {"caption": "New."}}}
    write(today, root / ONE)
    execute_one()
    assert runs(root) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[1/1\] book/one +\d+\.\d s", first)
    assert re.fullmatch(r"\[1/1\] book/one +kept", second)

    page = read(stage(root, "quick") / ONE)
    assert [page.cells[i].source for i in (0, 2)] == ["# One, reworded", "Between."]
    assert page.cells[3].outputs[0].text == "quick 3\n"
    assert page.cells[3].metadata.mystnb.figure.caption == "New."


def test_changed_library_executes_again_and_so_does_force(root, execute_one):
    execute_one()
    (root / "bnnlib/layers.py").write_text("width = 2\n")
    execute_one()
    assert runs(root) == 2
    execute_one(force=True)
    assert runs(root) == 3


@pytest.mark.parametrize(
    "name", ["bnnlib/new.py", "bnnlib/assets/a.npz", "results/a.csv", "requirements.txt"]
)
def test_key_covers_each_input_file(root, name):
    before = inputs_digest(root)
    write_text(root / name)
    assert inputs_digest(root) != before


def test_key_leaves_out_caches_and_other_files(root):
    before = inputs_digest(root)
    for name in ("bnnlib/__pycache__/layers.pyc", "bnnlib/.cache/a", "README.md"):
        write_text(root / name)
    assert inputs_digest(root) == before


def test_key_covers_code_parameters_and_given_values():
    untagged = chapter(COUNT)
    untagged.cells[1].metadata.tags = []
    keys = {
        chapter_key(chapter(COUNT), {}, "inputs"),
        chapter_key(chapter(COUNT), {}, "other inputs"),
        chapter_key(chapter(COUNT), {"profile": "smoke"}, "inputs"),
        chapter_key(chapter(COUNT + " "), {}, "inputs"),
        chapter_key(untagged, {}, "inputs"),
    }
    assert len(keys) == 5


def test_profile_is_injected_only_where_it_differs(root):
    assert profile_parameters(root / ONE, "quick") == {}
    assert profile_parameters(root / ONE, "full") == {"profile": "full"}
    write(new_notebook(cells=[new_code_cell("1 + 1")]), root / "plain.ipynb")
    assert profile_parameters(root / "plain.ipynb", "full") == {}


def test_page_of_a_chapter_edited_while_it_ran_shows_what_ran(root, execute_one):
    execute_one()
    write(chapter("print('edited')"), root / ONE)
    page = read(stage(root, "quick") / ONE)
    assert page.cells[2].source == COUNT
    assert page.cells[2].outputs[0].text == "quick 3\n"


def test_injected_run_is_reproducible_to_the_byte_and_stripped_of_it(root):
    out, other = root / "a/one.ipynb", root / "b/one.ipynb"
    for path in (out, other):
        execute(root / ONE, path, {"profile": "smoke"})
    assert out.read_bytes() == other.read_bytes()
    injected, counted = read(out).cells[2:4]
    assert injected.source == '# Parameters\nprofile = "smoke"\n'
    assert counted.outputs[0].text == "smoke 3\n"
    assert strip_folder(out.parent) == [out]
    assert out.read_bytes() == (root / ONE).read_bytes()
    assert strip_folder(out.parent) == []


def test_merge_leaves_the_source_as_it_was():
    today, executed = chapter("1"), chapter("1")
    code_cells(executed)[1].execution_count = 2
    assert code_cells(merge(today, executed))[1].execution_count == 2
    assert code_cells(today)[1].execution_count is None


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        (PARAMETERS, {"epoch": 3}, "unknown parameter 'epoch'; did you mean 'epochs'?"),
        ("epochs = 3\nhalf = epochs / 2", {}, "parameter 'half' must be a literal"),
    ],
)
def test_wrong_parameter_is_refused_before_the_run_with_the_chapters_name(
    root, own, given, message
):
    wrong = chapter(COUNT)
    wrong.cells[1].source = own
    write(wrong, root / ONE)
    with pytest.raises(BookError, match=re.escape(f"one.ipynb: {message}")):
        execute(root / ONE, root / "out.ipynb", given)
    assert not (root / "book/runs.txt").exists()


def test_papermill_alone_fails_on_a_mistyped_parameter(tmp_path):
    check = "from bnnlib.notebook import check_parameters\ncheck_parameters(In)"
    write(chapter(check), tmp_path / "in.ipynb")
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'epochs'"):
        papermill.execute_notebook(
            tmp_path / "in.ipynb", tmp_path / "out.ipynb", {"epoch": 3}, progress_bar=False
        )


def test_failing_cell_is_named_and_the_stored_chapter_stays(root, execute_one, run_main):
    execute_one()
    stored = root / "_build/executed/quick/book/one.ipynb"
    before = stored.read_bytes()
    write(chapter("a = 1", "1 / (a - 1)"), root / ONE)
    done = run_main("--only", "one")
    assert done.exit_code == 1
    failed = "one.ipynb: cell In [3] (1 / (a - 1)) failed: ZeroDivisionError: division by zero"
    assert failed in done.output
    assert stored.read_bytes() == before
    assert stored.with_name("one.failed.ipynb").exists()


@pytest.mark.parametrize(
    ("source", "timeout", "ended"),
    [
        ("import time\ntime.sleep(60)", 1, "cell In [2] (import time) ran past 1 s"),
        ("import os\nos._exit(1)", None, "cell In [2] (import os) ended the kernel"),
    ],
)
def test_cell_past_its_time_or_without_its_kernel_is_named(root, source, timeout, ended):
    write(chapter(source), root / ONE)
    with pytest.raises(BookError, match=re.escape(ended)):
        execute(root / ONE, root / "out.ipynb", {}, timeout)


def test_unknown_chapter_gets_the_nearest_name_and_a_missing_one_its_own(root, run_main):
    done = run_main("--only", "on")
    assert done.exit_code == 1
    assert "unknown chapter 'on'; did you mean 'one'?" in done.output
    (root / ONE).unlink()
    with pytest.raises(BookError, match="book/one"):
        build.contents(root)


def test_book_renders_whole_or_not_at_all(root, run_main):
    done = run_main()
    site = root / "_build/html"
    assert done.output.endswith(f"The book: {site / 'index.html'}\n")
    check_pages(site, ["book/intro", "book/one"])
    with pytest.raises(BookError, match="book/two"):
        check_pages(site, ["book/one", "book/two"])
    assert "quick 3" in (site / "book/one.html").read_text()
    intro = (site / "book/intro.html").read_text()
    script = re.search(r'src="([^"]*tex-svg\.js)', intro).group(1)
    assert (site / "book" / script).is_file()

    (root / "book/intro.md").write_text("# Intro\n\n{ref}`nowhere`\n")
    with pytest.raises(BookError, match=r"book/intro\.md:3: WARNING: .*'nowhere'"):
        render(root, stage(root, "quick"))
    assert (site / "book/intro.html").read_text() == intro
