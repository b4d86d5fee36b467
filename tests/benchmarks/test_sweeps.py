"""The parts of the benchmark of sweeps at their smallest, and what it kept is read as it was."""

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
from click.testing import CliRunner

from benchmarks import overhead, scaling, storage, storm, sweeps
from benchmarks.overhead import TINY, many, run_tasks
from bnnlib.errors import BnnlibError
from bnnlib.experiments.originals import published
from bnnlib.experiments.profiles import smoke
from bnnlib.experiments.variants import named
from bnnlib.files import write_json
from bnnlib.runs.record import HISTORY, PARAMETERS, RECORD
from bnnlib.runs.run import run
from bnnlib.sweeps.grid import read_grid
from bnnlib.sweeps.tasks import RunTask

HOUR = 3600


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of runs with two of the smallest."""
    out = tmp_path_factory.mktemp("runs")
    for task in run_tasks(many(TINY, 2), out):
        task.work({"device": "cpu"}, lambda: False)
    return out


# ------------------------------------------------------------------------------- the measuring


def test_a_sweep_and_a_plain_loop_make_the_same_runs(tmp_path):
    tasks = run_tasks(many(TINY, 2), tmp_path / "sweep")
    row = overhead.swept(tasks, 1, tmp_path / "sweep")
    assert (row["runs"], row["workers"]) == (2, 1)
    assert 0 < row["seconds"] < row["start_seconds"]
    assert row["client_bytes"] >= row["imports_bytes"] > 0
    overhead._loop(many(TINY, 2), tmp_path / "loop")
    for task in tasks:
        assert overhead.same(task.folder, tmp_path / "loop" / task.name)


def test_a_task_of_a_file_is_finished_once_it_is_written(tmp_path):
    (task,) = overhead.file_tasks(1, tmp_path)
    assert not task.is_finished()
    assert task.work({}, lambda: False).state == "finished"
    assert task.is_finished()


def test_each_size_is_measured_in_every_way_as_often_as_asked(monkeypatch):
    monkeypatch.setattr(overhead, "_overhead", lambda way, n, workers, out: {"runs": n})
    rows = list(overhead.overhead((2, 4), most_looped=2, rounds={2: 2}))
    counts = Counter((row["way"], row["runs"]) for row in rows)
    assert counts[overhead.SWEEP, 2] == counts[overhead.FILES, 2] == 2
    assert counts[overhead.LOOPS, 2] == 4  # with one process and with two
    assert counts[overhead.SWEEP, 4] == 1
    assert counts[overhead.LOOPS, 4] == 0


def test_copies_of_the_stored_runs_are_as_many_rows(tmp_path):
    overhead.copy_stored(3, tmp_path)
    seconds, peak, imported = overhead.timed_results(tmp_path, 3)
    assert seconds > 0
    assert peak >= imported
    with pytest.raises(RuntimeError, match="3 rows for 4 runs"):
        overhead.timed_results(tmp_path, 4)


# --------------------------------------------------------------------------------- the storage


def test_the_sizes_of_a_folder_are_those_of_a_run(tmp_path):
    e = replace(smoke(named("svhn-random-labels")), epochs=2)
    folder = run(e, tmp_path / "run", device="cpu", progress="none").folder
    row = storage.sizes(e)
    found = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert row["files"].keys() == found.keys()
    assert row["files"][PARAMETERS] == found[PARAMETERS]
    assert row["files"][HISTORY] == pytest.approx(found[HISTORY], rel=0.2)
    assert row["files"][RECORD] == pytest.approx(found[RECORD], rel=0.2)


def test_probes_make_a_checkpoint_larger_and_a_history_wider():
    e = replace(smoke(named("svhn-random-labels")), epochs=2)
    plain, probed = (storage.sizes(x) for x in (e, replace(e, probes=("flips", "saturation"))))
    assert plain["checkpoint_bytes"] < probed["checkpoint_bytes"]
    assert plain["files"][HISTORY] < probed["files"][HISTORY]


@pytest.mark.skipif(storage.missing() is not None, reason="strace is not installed")
def test_the_kept_formula_counts_the_requests_of_another_run():
    lines = [
        {kind: n for kind, n in row.items() if kind != "what"}
        for row in scaling.load_sweeps()["requests"]["rows"][:4]
    ]
    epochs, times = 6, (1, 5, 6, 1)  # begin to end, further histories, checkpoints, once
    expected = {
        kind: sum(n * line[kind] for n, line in zip(times, lines, strict=True))
        for kind in storage.KINDS
    }
    found = storage._of_a_run(epochs, histories=True, checkpoints=True)
    assert {kind: found[kind] for kind in storage.KINDS} == expected


def test_a_line_of_strace_has_one_system_call():
    line = '8785  openat(AT_FDCWD</>, ""..., O_RDONLY|O_CLOEXEC) = 3</tmp/a>'
    assert storage.CALL.match(line)[1] == "openat"
    assert storage.CALL.match("8785  <... fsync resumed>) = 0") is None


# ----------------------------------------------------------------------------------- the kills


def test_a_worker_is_hit_and_not_what_else_a_client_starts():
    spawned = "import sys; input() # spawn_main"
    start = "import subprocess, sys; p = [subprocess.Popen([sys.executable, '-c', c]) for c in"
    code = f"{start} ({spawned!r}, 'input()')]; print('on', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as client:
        client.stdout.readline()
        rng = random.Random(1)  # which begins with no client
        assert len(storm._workers(client.pid)) in (0, 1)
        while not storm._workers(client.pid):
            pass
        assert storm._strike(client, rng) == ["worker"]
        client.communicate(b"\n\n\n")


def test_a_record_that_is_written_again_is_seen(tmp_path, finished):
    known = {}
    assert storm._written_again(finished, known) == set()
    assert len(known) == 2
    path = next(iter(known))
    known[path] -= 1
    assert storm._written_again(finished, known) == {path}


def test_the_grid_has_as_many_runs_as_are_asked_for(tmp_path):
    grid = tmp_path / "grid.toml"
    grid.write_text(storm.GRID.format(last=19, epochs=7))
    tasks, twice = read_grid(grid, tmp_path)
    assert (len(tasks), twice) == (40, 0)
    assert {task.experiment.epochs for task in tasks} == {7}


def test_runs_are_as_long_as_the_kills_take(monkeypatch):
    clock = iter([0.0, 20.0])  # ten seconds for each of two trials
    monkeypatch.setattr(storm.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(RunTask, "work", lambda *args: None)
    monkeypatch.setattr(storm, "warm_up", lambda: None)
    monkeypatch.setattr(storm, "MARGIN", 1.0)
    assert storm.long_enough(kills=100, runs=40) == storm.TRIAL_EPOCHS  # 400 s in 40 runs


def test_of_what_a_command_said_its_last_words_are_kept():
    lines = ["Traceback (most recent call last):", "  File x", "Error: it", "", "Error: it"]
    assert storm._last_words([*lines, "done 2   running 1"]) == ["Error: it"]


@pytest.mark.parametrize(
    ("wrong", "broken"), [({}, False), ({"equal": 3}, True), ({"written_again": 1}, True)]
)
def test_a_promise_that_is_broken_is_seen(wrong, broken):
    row = {"runs": 4, "finished": 4, "rows": 4, "equal": 4, "running": 0, "written_again": 0}
    assert sweeps.is_as_promised("kills", [row | wrong]) != broken


# --------------------------------------------------------------------------------- the command


def test_a_part_that_is_measured_again_leaves_the_others_as_they_were(tmp_path, monkeypatch):
    out = tmp_path / "sweeps.json"
    write_json(out, {"kills": {"rows": [{"kills": 7}]}})
    monkeypatch.setattr(sweeps, "folders", lambda: iter([{"profile": "quick"}]))
    done = CliRunner().invoke(sweeps.main, ["--quick", "--only", "folders", "--out", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["kills"] == {"rows": [{"kills": 7}]}
    assert found["folders"]["rows"] == [{"profile": "quick"}]
    assert found["folders"]["machine"]["device"] == "cpu"


def test_an_unknown_part_is_named():
    done = CliRunner().invoke(sweeps.main, ["--quick", "--only", "kill"])
    assert done.exit_code == 1
    assert "did you mean 'kills'?" in done.output


# ------------------------------------------------------------------------------ what was kept


def test_the_kept_file_has_all_parts_and_what_was_promised():
    parts = scaling.load_sweeps()
    assert all(sweeps.is_as_promised(name, part["rows"]) for name, part in parts.items())
    assert [row["part"] for row in scaling.machines(parts)] == list(scaling.PARTS)


def test_the_kept_file_is_of_the_full_size():
    rows = {name: part["rows"] for name, part in scaling.load_sweeps().items()}
    assert max(row["runs"] for row in rows["overhead"]) >= 10_000
    assert max(row["runs"] for row in rows["ledger"]) >= 10_000
    (killed,) = rows["kills"]
    assert killed["kills"] >= 100
    assert killed["runs"] >= 40
    assert killed["clients_killed"] > 0


def test_a_file_without_a_part_is_refused(tmp_path):
    path = tmp_path / "sweeps.json"
    parts = {name: {"rows": [{}]} for name in scaling.PARTS}
    write_json(path, parts | {"kills": {"rows": []}})
    with pytest.raises(BnnlibError, match="no part 'kills'"):
        scaling.load_sweeps(path)


def test_middles_and_slope_and_lines():
    rows = [
        {"way": w, "runs": n, "bytes": b}
        for w, n, b in [("a", 10, 5), ("a", 10, 7), ("a", 10, 100), ("a", 110, 57), ("b", 10, 1)]
    ]
    middles = scaling.middles(rows, "way", "runs")
    assert middles[0] == {"way": "a", "runs": 10, "bytes": 7}
    assert len(middles) == 3
    assert scaling.slope(middles[:2], "bytes") == pytest.approx(0.5)
    ax = scaling.plot_by_runs(middles[:2], plt.figure().subplots(), "bytes", "train", 2)
    assert ax.lines[0].get_xydata().tolist() == [[10, 14], [110, 114]]


def test_hours_of_a_gpu_follow_operations_and_those_of_a_core_steps():
    e = published("cifar10-random-labels")
    assert scaling.gpu_hours(e, e, 3.0) == pytest.approx(500 * 3 / HOUR)
    twice = replace(e, epochs=2 * e.epochs)
    assert scaling.gpu_hours(twice, e, 3.0) == pytest.approx(2 * 500 * 3 / HOUR)
    small = scaling.gpu_hours(published("svhn-random-labels"), e, 3.0)
    assert 0 < small < scaling.gpu_hours(e, e, 3.0)
    assert scaling.core_hours(e, 0.5) == pytest.approx(450_000 * 0.5 / HOUR)
