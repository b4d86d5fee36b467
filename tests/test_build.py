"""The book's machinery on a book of one chapter, which counts its own executions."""

import re
import shutil
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

PROJECT = Path(__file__).parents[1]
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


@pytest.fixture
def root(tmp_path):
    """A project with one chapter, `book/one`."""
    for folder in ("bnnlib", "results", "book"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bnnlib/layers.py").write_text("width = 1\n")
    (tmp_path / "requirements.txt").write_text("numpy\n")
    toc = "format: jb-book\nroot: book/intro\nchapters: [{file: book/one}]\n"
    (tmp_path / "_toc.yml").write_text(toc)
    (tmp_path / "book/intro.md").write_text("# Intro\n\n$x^2$\n")
    (tmp_path / "book/references.bib").write_text("")
    shutil.copy(PROJECT / "_config.yml", tmp_path)
    shutil.copytree(PROJECT / "book/_static", tmp_path / "book/_static")
    write(chapter(COUNT), tmp_path / "book/one.ipynb")
    return tmp_path


@pytest.fixture
def run_main(root, monkeypatch):
    monkeypatch.setattr(build, "ROOT", root)
    return lambda *options: CliRunner().invoke(build.main, options)


def test_unchanged_chapter_is_kept_and_takes_todays_prose(root, capsys):
    one = root / "book/one.ipynb"
    execute_chapters(root, "quick", ["book/one"])
    write(chapter(COUNT, prose="# One, reworded"), one)
    execute_chapters(root, "quick", ["book/one"])
    assert runs(root) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[1/1\] book/one +\d+\.\d s", first)
    assert re.fullmatch(r"\[1/1\] book/one +kept", second)

    page = read(stage(root, "quick") / "book/one.ipynb")
    assert page.cells[0].source == "# One, reworded"
    assert page.cells[2].outputs[0].text == "quick 3\n"


def test_changed_library_executes_again_and_so_does_force(root):
    execute_chapters(root, "quick", ["book/one"])
    (root / "bnnlib/layers.py").write_text("width = 2\n")
    execute_chapters(root, "quick", ["book/one"])
    assert runs(root) == 2
    execute_chapters(root, "quick", ["book/one"], force=True)
    assert runs(root) == 3


@pytest.mark.parametrize(
    "name", ["bnnlib/new.py", "bnnlib/assets/a.npz", "results/a.csv", "requirements.txt"]
)
def test_key_covers_each_input_file(root, name):
    before = inputs_digest(root)
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("1")
    assert inputs_digest(root) != before


@pytest.mark.parametrize("name", ["bnnlib/__pycache__/layers.pyc", "bnnlib/.cache/a", "README.md"])
def test_key_leaves_out_caches_and_other_files(root, name):
    before = inputs_digest(root)
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("1")
    assert inputs_digest(root) == before


def test_key_covers_code_parameters_and_given_values():
    untagged = chapter(COUNT)
    untagged.cells[1].metadata.tags = []
    keys = [
        chapter_key(chapter(COUNT), {}, "inputs"),
        chapter_key(chapter(COUNT), {}, "other inputs"),
        chapter_key(chapter(COUNT), {"profile": "smoke"}, "inputs"),
        chapter_key(chapter(COUNT + " "), {}, "inputs"),
        chapter_key(untagged, {}, "inputs"),
    ]
    assert len(set(keys)) == len(keys)


def test_key_leaves_out_prose_and_captions():
    other = chapter(COUNT, prose="# Other words")
    other.cells[2].metadata = {"tags": ["hide-input"], "mystnb": {"figure": {"caption": "New."}}}
    other.cells.insert(1, new_markdown_cell("One more paragraph."))
    assert chapter_key(other, {}, "") == chapter_key(chapter(COUNT), {}, "")


def test_profile_is_injected_only_where_it_differs(root):
    assert profile_parameters(root / "book/one.ipynb", "quick") == {}
    assert profile_parameters(root / "book/one.ipynb", "full") == {"profile": "full"}
    write(new_notebook(cells=[new_code_cell("1 + 1")]), root / "plain.ipynb")
    assert profile_parameters(root / "plain.ipynb", "full") == {}


def test_computed_parameter_is_refused_with_the_chapters_name(root):
    computed = chapter(COUNT)
    computed.cells[1].source += "\nhalf = epochs / 2"
    write(computed, root / "book/one.ipynb")
    with pytest.raises(BookError, match=r"one\.ipynb: parameter 'half' must be a literal"):
        execute_chapters(root, "quick", ["book/one"])


def test_page_of_a_chapter_edited_while_it_ran_shows_what_ran(root):
    execute_chapters(root, "quick", ["book/one"])
    write(chapter("print('edited')"), root / "book/one.ipynb")
    page = read(stage(root, "quick") / "book/one.ipynb")
    assert page.cells[2].source == COUNT
    assert page.cells[2].outputs[0].text == "quick 3\n"


def test_injected_run_is_reproducible_to_the_byte(root):
    outs = [root / "a.ipynb", root / "b.ipynb"]
    for out in outs:
        execute(root / "book/one.ipynb", out, {"profile": "smoke"})
    assert outs[0].read_bytes() == outs[1].read_bytes()
    injected, counted = read(outs[0]).cells[2:4]
    assert injected.source == '# Parameters\nprofile = "smoke"\n'
    assert counted.outputs[0].text == "smoke 3\n"


def test_strip_undoes_an_execution(root):
    source, out = root / "book/one.ipynb", root / "out/one.ipynb"
    execute(source, out, {"epochs": 1})
    assert out.read_bytes() != source.read_bytes()
    assert strip_folder(out.parent) == [out]
    assert out.read_bytes() == source.read_bytes()
    assert strip_folder(out.parent) == []


def test_merge_matches_outputs_to_code_cells_not_to_positions():
    executed = chapter("1", "2")
    for count, cell in enumerate(code_cells(executed), start=1):
        cell.execution_count = count
    today = chapter("1", "2")
    today.cells.insert(3, new_markdown_cell("Between."))
    merged = merge(today, executed)
    assert [cell.get("execution_count") for cell in merged.cells] == [None, 1, 2, None, 3]
    assert code_cells(today)[0].execution_count is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, "one.ipynb: unknown parameter 'epoch'; did you mean 'epochs'?"),
        ({"epochs": "3"}, "one.ipynb: parameter 'epochs' must be int, like 3; got '3'"),
    ],
)
def test_wrong_parameter_stops_before_the_run(root, given, message):
    with pytest.raises(BookError, match=re.escape(message)):
        execute(root / "book/one.ipynb", root / "out.ipynb", given)
    assert not (root / "book/runs.txt").exists()


def test_papermill_alone_fails_on_a_mistyped_parameter(tmp_path):
    check = "from bnnlib.chapters import check_parameters\ncheck_parameters(In)"
    write(chapter(check), tmp_path / "in.ipynb")
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'epochs'"):
        papermill.execute_notebook(
            tmp_path / "in.ipynb", tmp_path / "out.ipynb", {"epoch": 3}, progress_bar=False
        )


def test_failing_cell_is_named_and_the_stored_chapter_stays(root, run_main):
    execute_chapters(root, "quick", ["book/one"])
    stored = root / "_build/executed/quick/book/one.ipynb"
    before = stored.read_bytes()
    write(chapter("a = 1", "1 / (a - 1)"), root / "book/one.ipynb")
    done = run_main("--only", "one")
    assert done.exit_code == 1
    failed = "one.ipynb: cell In [3] (1 / (a - 1)) failed: ZeroDivisionError: division by zero"
    assert failed in done.output
    assert stored.read_bytes() == before
    assert stored.with_name("one.failed.ipynb").exists()


def test_cell_past_its_time_is_named(root):
    write(chapter("import time\ntime.sleep(60)"), root / "book/one.ipynb")
    with pytest.raises(BookError, match=r"cell In \[2\] \(import time\) ran past 1 s"):
        execute(root / "book/one.ipynb", root / "out.ipynb", {}, timeout=1)


def test_dead_kernel_is_named(root):
    write(chapter("import os\nos._exit(1)"), root / "book/one.ipynb")
    with pytest.raises(BookError, match=r"cell In \[2\] \(import os\) ended the kernel"):
        execute(root / "book/one.ipynb", root / "out.ipynb", {})


def test_interrupt_ends_with_one_line_and_130(run_main, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "execute", interrupted)
    done = run_main("--only", "one")
    assert done.exit_code == 130
    assert done.output.splitlines() == ["Stopped; the chapters executed so far are kept."]


def test_unknown_chapter_gets_the_nearest_name(run_main):
    done = run_main("--only", "on")
    assert done.exit_code == 1
    assert "unknown chapter 'on'; did you mean 'one'?" in done.output


def test_contents_name_a_missing_file(root):
    (root / "book/one.ipynb").unlink()
    with pytest.raises(BookError, match="book/one"):
        build.contents(root)


def test_book_renders_whole_or_not_at_all(root, run_main):
    done = run_main()
    site = root / "_build/html"
    assert done.output.endswith(f"The book: {site / 'index.html'}\n")
    check_pages(site, ["book/intro", "book/one"])
    assert "quick 3" in (site / "book/one.html").read_text()
    intro = (site / "book/intro.html").read_text()
    script = re.search(r'src="([^"]*tex-svg\.js)', intro).group(1)
    assert (site / "book" / script).is_file()

    (root / "book/intro.md").write_text("# Intro\n\n{ref}`nowhere`\n")
    with pytest.raises(BookError, match=r"book/intro\.md:3: WARNING: .*'nowhere'"):
        render(root, stage(root, "quick"))
    assert (site / "book/intro.html").read_text() == intro


def test_missing_page_is_named(tmp_path):
    (tmp_path / "index.html").touch()
    with pytest.raises(BookError, match="book/one"):
        check_pages(tmp_path, ["book/one"])
