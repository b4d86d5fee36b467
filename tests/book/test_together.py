"""Chapters side by side: who runs beside whom, how a failure is told, and that nothing is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import build
import psutil
import pytest
import together
from notebooks import read, write
from test_build_book import chapter
from together import Progress, run_together

BOOK = Path(together.__file__).parent
# Goes on when the other chapter has come as far, and prints how many threads it computes with.
MEET = """
import os
from time import sleep
from pathlib import Path
Path("OWN.here").touch()
for _ in range(1200):
    sleep(0.05)
    if Path("OTHER.here").exists():
        break
else:
    raise RuntimeError("alone for a minute")
print(os.environ["OMP_NUM_THREADS"], Path.cwd().name)
"""
# Sleeps, and so does a process that it has started; both leave their ids.
SLEEP = f"""
import os, subprocess, sys, time
code = "import time; time.sleep(600)"
child = subprocess.Popen([{sys.executable!r}, "-c", code], stderr=subprocess.DEVNULL)
for pid in (child.pid, os.getpid()):
    open(f"{{pid}}.pid", "w").close()
time.sleep(600)
"""
BUILD = f"""
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what runs behind a shell
sys.path.insert(0, {str(BOOK)!r})
import build
build.ROOT = Path(sys.argv[1])
build.main(["--only", "a", "--only", "b", "--jobs", "1"])
"""


@pytest.fixture
def root(tmp_path):
    """A project without chapters."""
    (tmp_path / "requirements.txt").touch()
    return tmp_path


def write_chapters(root, **cells):
    for name, source in cells.items():
        write(chapter(source), root / f"book/{name}.ipynb")
    names = [f"book/{name}" for name in cells]
    files = "".join(f"- file: {name}\n" for name in names[1:])
    (root / "_toc.yml").write_text(f"format: jb-book\nroot: {names[0]}\nchapters:\n{files}")
    return names


def lives(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def sleepers(root):
    """The ids that `SLEEP` has left; in the end none of them lives."""

    def find():
        return [int(path.stem) for path in root.glob("book/*.pid")]

    yield find
    for pid in filter(lives, find()):
        psutil.Process(pid).kill()


def test_two_chapters_at_once_have_a_thread_each(root, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    cells = {own: MEET.replace("OWN", own).replace("OTHER", other) for own, other in ("ab", "ba")}
    names, here = write_chapters(root, **cells), Path.cwd()
    build.execute_chapters(root, "quick", names, jobs=2)
    assert [line[:5] for line in capsys.readouterr().out.splitlines()] == ["[1/2]", "[2/2]"]
    for name in names:
        (printed,) = read(build._stored(root, "quick", name)).cells[2].outputs
        assert printed.text == "1 book\n"
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert Path.cwd() == here


def test_what_times_something_runs_alone_and_last(root, monkeypatch):
    running, beside, order = set(), {}, []

    def execute(chapter, *_):
        running.add(chapter.stem)
        order.append(chapter.stem)
        time.sleep(0.2)
        beside[chapter.stem] = len(running)
        running.remove(chapter.stem)

    monkeypatch.setattr(build, "execute", execute)
    monkeypatch.setattr(build, "TIMED", ("book/a", "book/c"))
    names = write_chapters(root, a="", b="", c="", d="")
    build.execute_chapters(root, "quick", names, jobs=4)
    assert set(order[:2]) == {"b", "d"}
    assert order[2:] == ["a", "c"]
    assert beside["a"] == beside["c"] == 1
    assert max(beside["b"], beside["d"]) == 2


def test_the_first_failure_stops_the_others_and_is_told(root, sleepers, monkeypatch, capsys):
    wait = 'import time\nfrom pathlib import Path\nwhile len(list(Path().glob("*.pid"))) < 2:'
    write_chapters(
        root, a="import time\ntime.sleep(600)", b=f"{wait}\n    time.sleep(0.05)\n1 / 0", c=SLEEP
    )
    monkeypatch.setattr(build, "ROOT", root)
    with pytest.raises(SystemExit) as caught:
        build.main(["--only", "a", "--only", "b", "--only", "c", "--jobs", "2"])
    assert caught.value.code == 1
    kept = build._stored(root, "quick", "book/b").with_name("b.failed.ipynb")
    assert capsys.readouterr().err.splitlines() == [
        "Error: b.ipynb: cell In [2] (import time) failed: ZeroDivisionError: division by zero",
        f"The cells up to there: {kept}",
    ]
    assert [lives(pid) for pid in sleepers()] == [False, False]
    assert not build._stored(root, "quick", "book/a").exists()  # if it had begun, it was stopped


@pytest.mark.parametrize("ending", ["ctrl-c", "SIGTERM"])
def test_nothing_outlives_a_build(root, sleepers, ending):
    write_chapters(root, a=SLEEP, b=SLEEP)
    running = subprocess.Popen(
        [sys.executable, "-c", BUILD, root],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # the group of a terminal
        text=True,
    )
    wait_until(lambda: len(sleepers()) == 2 or running.poll() is not None)
    if ending == "ctrl-c":
        os.killpg(running.pid, signal.SIGINT)
    else:
        running.terminate()
    output, _ = running.communicate()
    assert output == "Stopped; the chapters executed so far are kept.\n"
    assert running.returncode == 130
    assert [lives(pid) for pid in sleepers()] == [False, False]
    assert not list(root.rglob("*.failed.ipynb"))


def test_what_raises_first_stops_what_waits(capsys):
    done = []
    with pytest.raises(ZeroDivisionError):
        run_together({"a": lambda: 1 / 0, "b": lambda: done.append("b")}, 1, Progress(["a", "b"]))
    assert done == []
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_what_is_under_way(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "28")
    progress = Progress(["book/one", "book/three"])
    progress.under_way({"book/one": 1.2, "book/three": 0.3})
    progress.under_way({"book/one": 1.3, "book/three": 0.4})
    progress.finished("book/one", "1.4 s")
    progress.under_way({"book/three": 10**15})
    clear = "\r\033[K"
    assert capsys.readouterr().out.split(clear) == [
        "",
        "[0/2] one 1 s, three 0 s",
        "[1/2] book/one      1.4 s\n",
        "[1/2] three 100000000000000",
    ]


def test_a_log_has_a_line_for_each_that_is_done_and_no_other(capsys):
    progress = Progress(["book/one"])
    progress.under_way({"book/one": 1})
    progress.finished("book/one", "kept")
    assert capsys.readouterr().out == "[1/1] book/one     kept\n"
