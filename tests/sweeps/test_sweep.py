"""A sweep on real workers: killed, stopped, failing, held; nothing is lost, nothing made twice."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from math import isnan
from unittest.mock import AsyncMock, Mock

import pytest

pytest.importorskip("distributed")

import dask
from distributed import Client, Scheduler, Status

from bnnlib.errors import NoScheduler
from bnnlib.experiments.originals import published
from bnnlib.experiments.profiles import smoke
from bnnlib.files import locked
from bnnlib.runs.folder import load_run
from bnnlib.runs.record import HISTORY, RECORD, read_record
from bnnlib.runs.result import differences
from bnnlib.runs.run import run
from bnnlib.sweeps import clusters, worker
from bnnlib.sweeps.books import Books, state_of
from bnnlib.sweeps.client import MOST_DEATHS, MOST_LOSSES, _Client, work
from bnnlib.sweeps.state import begin
from bnnlib.sweeps.tasks import Outcome, RunTask, attempt, run_name

SHORT = smoke(published("svhn-random-labels"))
LONG = replace(SHORT, epochs=60, evaluate_every=30)  # about a second
HOW = {"device": "cpu", "checkpoint_every": 0.05}


def task(e, out, **more):
    return RunTask(e, out / run_name(e), run_name(e), f"{e.name} seed={e.seed}", **more)


def tasks_of(e, seeds, out):
    return [task(replace(e, seed=seed), out) for seed in seeds]


def done(sweep):
    return (len(sweep.finished), sweep.failed, sweep.left) == (len(sweep.tasks), {}, set())


def under_way(task):
    return len(list(task.folder.glob("checkpoints/*"))) > 0


@pytest.fixture(scope="module")
def client():
    with clusters.local(2) as client:
        yield client


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of an experiment, made in this process."""
    made = {}

    def get(e):
        if e not in made:
            out = tmp_path_factory.mktemp("alone") / "run"
            run(e, out, progress="none", device="cpu")
            made[e] = load_run(out)
        return made[e]

    return get


def assert_equal(sweep, alone):
    for each in sweep.tasks.values():
        assert differences(load_run(each.folder), alone(each.experiment)) == []


# ------------------------------------------------------------------------------ undisturbed


def test_runs_are_the_same_on_two_workers_on_one_and_without_a_sweep(client, alone, tmp_path):
    two = begin(tasks_of(SHORT, range(6), tmp_path / "two"))
    work(two, client, Books(tmp_path / "two"), HOW)
    assert done(two)
    assert_equal(two, alone)
    one = begin(tasks_of(SHORT, reversed(range(6)), tmp_path / "one"))
    with clusters.local(1) as lonely:
        work(one, lonely, Books(tmp_path / "one"), HOW)
    assert done(one)
    assert_equal(one, alone)


def test_a_second_grid_makes_only_what_the_first_has_not(client, tmp_path):
    first = begin(tasks_of(SHORT, (0, 1), tmp_path))
    work(first, client, Books(tmp_path), HOW)
    before = {t.name: (t.folder / RECORD).stat().st_mtime_ns for t in first.tasks.values()}
    second = begin(tasks_of(SHORT, (1, 2, 0), tmp_path))
    assert len(second.left) == 1
    work(second, client, Books(tmp_path), HOW)
    assert done(second)
    assert second.tries.keys() == second.tasks.keys() - first.tasks.keys()
    after = {name: (tmp_path / name / RECORD).stat().st_mtime_ns for name in before}
    assert after == before


def test_an_evaluation_waits_for_what_it_scores(client, tmp_path):
    source = task(SHORT, tmp_path)
    scored = replace(smoke(published("svhn-evaluation")), run_folder=f"../../{source.name}")
    sweep = begin([task(scored, tmp_path, needs=source.name), source])
    work(sweep, client, Books(tmp_path), HOW)
    assert done(sweep)
    history = load_run(sweep.tasks[run_name(scored)].folder).history
    assert history.last("train_error") == sweep.outcomes[run_name(scored)].train_error


# --------------------------------------------------------------------------------- failures

MINE = """
import bnnlib
def breaks(logits, labels):
    return logits.sum() * float("nan")
def crashes(logits, labels):
    raise RuntimeError("of this loss")
bnnlib.LOSSES["breaks"] = breaks
bnnlib.LOSSES["crashes"] = crashes
"""


def test_a_run_that_fails_by_itself_is_reported_and_stops_no_other(client, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    bad = [replace(SHORT, dataset="nowhere.npz", n_train=None)]
    from bnnlib.names import LOSSES, USED, use, used_files

    monkeypatch.setattr(LOSSES, "data", dict(LOSSES.data))
    monkeypatch.setattr("bnnlib.names.USED", USED)
    use(tmp_path / "mine.py")
    uses = used_files()
    bad += [replace(SHORT, loss=name) for name in ("breaks", "crashes")]
    USED.clear()
    tasks = [*(task(e, tmp_path) for e in bad), *tasks_of(SHORT, range(3), tmp_path)]
    sweep, books = begin(tasks), Books(tmp_path)
    work(sweep, client, books, HOW, uses=uses)
    errors = [sweep.failed[run_name(e)].error for e in bad]
    assert errors[0].startswith("DataNotFound: no file ")
    assert errors[1].startswith("NotFinite: the training loss became nan at step 1 of epoch 1")
    assert errors[2] == "RuntimeError: of this loss"
    assert [sweep.tries[run_name(e)] for e in bad] == [1, 1, 2]  # only a riddle is tried again
    assert len(sweep.finished) == 3
    notes = books.failures()
    assert len(notes) == 3
    assert "in crashes" in notes[books.note(run_name(bad[2])).name]["traceback"]
    again = begin(tasks)  # what failed is tried anew, and not told of as failed meanwhile
    assert again.left == {run_name(e) for e in bad}


def test_what_needs_a_failed_run_fails_too(client, tmp_path):
    bad = task(replace(SHORT, dataset="nowhere.npz", n_train=None), tmp_path)
    scored = replace(smoke(published("svhn-evaluation")), run_folder=f"../../{bad.name}")
    sweep = begin([bad, task(scored, tmp_path, needs=bad.name)])
    work(sweep, client, Books(tmp_path), HOW)
    assert sweep.failed[run_name(scored)].error == f"{bad.name}, which it needs, has failed"


def test_a_file_of_the_users_that_is_another_one_on_the_worker_is_refused(client, tmp_path):
    (tmp_path / "other.py").write_text("x = 1\n")
    sweep = begin(tasks_of(SHORT, (0,), tmp_path))
    work(sweep, client, Books(tmp_path), HOW, uses={str(tmp_path / "other.py"): "0" * 64})
    (outcome,) = sweep.failed.values()
    assert "other.py is another file here" in outcome.error
    assert "in prepare_process" in outcome.trace


def test_a_folder_of_something_else_is_no_reason_to_stop(client, tmp_path):
    spoiled, fine = tasks_of(SHORT, (0, 1), tmp_path)
    spoiled.folder.mkdir(parents=True)
    (spoiled.folder / "mine.txt").write_text("mine")
    sweep = begin([spoiled, fine])
    work(sweep, client, Books(tmp_path), HOW)
    assert "holds something that is no run" in sweep.failed[spoiled.name].error
    assert sweep.finished == {fine.name}
    assert (spoiled.folder / "mine.txt").read_text() == "mine"


# ------------------------------------------------------------------------- workers that end


class Disturbed:
    """Sends a signal to the worker of a task that is under way, once."""

    def __init__(self, client, number):
        self.client, self.number, self.hit = client, number, None

    def __call__(self, sweep):
        ours = [t for t in sweep.tasks.values() if t.name in sweep.left and under_way(t)]
        if self.hit or not ours:
            return
        works = {a: keys for a, keys in self.client.processing().items() if keys}
        found = (a for a, keys in works.items() if keys[0].startswith(ours[0].name))
        if (address := next(found, None)) is None:
            return  # it has just ended
        self.hit = self.client.run(os.getpid, workers=[address])[address]
        os.kill(self.hit, self.number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_ends_is_replaced_and_its_run_goes_on(client, alone, tmp_path, number):
    sweep = begin(tasks_of(LONG, range(2), tmp_path))
    disturbed = Disturbed(client, number)
    work(sweep, client, Books(tmp_path), HOW, show=disturbed)
    assert disturbed.hit
    assert done(sweep)
    assert_equal(sweep, alone)
    records = [read_record(each.folder)[1] for each in sweep.tasks.values()]
    assert any("continued" in record for record in records)  # not begun anew
    assert Books(tmp_path).failures() == {}
    client.wait_for_workers(2, timeout=300)  # for the next test


def test_a_worker_here_that_is_asked_to_go_keeps_its_nanny_which_is_replaced(tmp_path, monkeypatch):
    async def late(self, **how):
        answer = await retire(self, **how)
        await asyncio.sleep(0.5)  # the worker notices all else first
        return answer

    retire = Scheduler.retire_workers
    monkeypatch.setattr(Scheduler, "retire_workers", late)
    with clusters.local(1) as lonely:
        (nanny,) = lonely.cluster.workers.values()
        sweep = begin(tasks_of(LONG, (0,), tmp_path))
        disturbed = Disturbed(lonely, signal.SIGTERM)
        work(sweep, lonely, Books(tmp_path), HOW, show=disturbed)
        assert disturbed.hit
        assert done(sweep)
        assert nanny.status == Status.running
        with dask.config.set({"distributed.deploy.lost-worker-timeout": "0.5s"}):
            lonely.sync(nanny.close)
            sweep = begin(tasks_of(SHORT, (0,), tmp_path))
            work(sweep, lonely, Books(tmp_path), HOW)
        assert done(sweep)


def test_a_worker_waits_only_so_long_for_what_cannot_be_stopped(monkeypatch):
    monkeypatch.setattr(worker, "LEAVES_WITHIN", 0.2)
    attendant, leaving = worker.Attendant("sweep"), AsyncMock(lifetime_restart=True)
    attendant.setup(Mock(nanny=None))
    attendant.busy.acquire()  # a chapter is executed
    asyncio.run(attendant._saved_and_closed(leaving))
    leaving.close.assert_awaited_once_with(nanny=False, reason="SIGTERM")


def test_ctrl_c_lets_the_workers_save_and_the_same_sweep_goes_on(client, alone, tmp_path):
    def interrupt(sweep):
        if any(map(under_way, sweep.tasks.values())):
            raise KeyboardInterrupt

    tasks = tasks_of(LONG, range(2), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        work(begin(tasks), client, Books(tmp_path), HOW, show=interrupt)
    states = [state_of(tmp_path, each.name, failed=False) for each in tasks]
    assert "stopped" in states
    assert "running" not in states  # for ever
    sweep = begin(tasks)
    work(sweep, client, Books(tmp_path), HOW)
    assert done(sweep)
    assert_equal(sweep, alone)


def test_a_folder_that_another_process_holds_is_waited_for(client, tmp_path):
    (held,) = tasks_of(SHORT, (0,), tmp_path)
    start, holder = time.monotonic(), locked(held.folder)
    holder.__enter__()
    let_go = []

    def show(sweep):
        if not let_go and time.monotonic() - start > 2:
            let_go.append(holder.__exit__(None, None, None))

    sweep = begin([held])
    work(sweep, client, Books(tmp_path), HOW, show=show)
    assert done(sweep)
    assert let_go


def test_what_no_worker_offers_is_told(client, tmp_path):
    def look(sweep):
        if sweep.unmet:
            assert sweep.unmet == "GPU=8"
            raise KeyboardInterrupt

    sweep = begin([task(SHORT, tmp_path, resources={"GPU": 8})])
    with pytest.raises(KeyboardInterrupt):
        work(sweep, client, Books(tmp_path), HOW, show=look)


def test_workers_that_die_at_the_same_place_are_the_tasks_fault_in_the_end(tmp_path):
    (each,) = tasks_of(SHORT, (0,), tmp_path)
    sweep = begin([each])
    ours = _Client(sweep, None, Books(tmp_path), None)
    each.folder.mkdir(parents=True)

    def die(n, size):
        """Begun for the nth time, with so long a history."""
        (each.folder / RECORD).write_text("")
        os.utime(each.folder / RECORD, (n, n))
        (each.folder / HISTORY).write_text("x" * size)
        ours.lost(each.name, "a worker")

    for n in range(2 * MOST_LOSSES):  # each time it came further
        die(n, size=n)
    for _ in range(MOST_LOSSES):  # each time before it had begun
        ours.lost(each.name, "a worker")
    assert sweep.failed == {}
    for n in range(1, MOST_LOSSES):
        die(10 * n, size=2 * MOST_LOSSES - 1)
    assert "at the same place" in sweep.failed[each.name].error


def test_workers_that_die_before_anything_begins_are_not_replaced_for_ever(tmp_path):
    (each,) = tasks_of(SHORT, (0,), tmp_path)
    sweep = begin([each])
    ours = _Client(sweep, None, Books(tmp_path), None)
    for _ in range(MOST_DEATHS):
        assert sweep.failed == {}
        ours.lost(each.name, "a worker")
    assert f"its worker died {MOST_DEATHS} times" in sweep.failed[each.name].error


# --------------------------------------------------------- a scheduler and a client that end

QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


@pytest.fixture
def start(tmp_path):
    """Starts a program of Dask, such as `scheduler`; all end with the test."""
    started = []

    def begun(program, *arguments):
        module = f"distributed.cli.dask_{program}"
        command = [sys.executable, "-m", module, *arguments]
        started.append(subprocess.Popen(command, cwd=tmp_path, **QUIET))
        return started[-1]

    yield begun
    for process in reversed(started):
        process.terminate()
    for process in started:
        process.wait()


def scheduler_and_worker(start, tmp_path, name):
    """A scheduler on loopback with one worker; its process and its address."""
    port = str(_free_port())
    here = ("--host", "127.0.0.1", "--port", port, "--no-dashboard")
    process = start("scheduler", *here)
    address = f"tcp://127.0.0.1:{port}"
    start("worker", address, "--nthreads", "1", "--no-dashboard", "--name", name)
    return process, address


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_scheduler_that_is_killed_is_told_and_another_one_goes_on(start, alone, tmp_path):
    process, address = scheduler_and_worker(start, tmp_path, "first")
    tasks = tasks_of(LONG, (0,), tmp_path / "runs")

    def kill(sweep):
        if any(map(under_way, tasks)):
            process.kill()

    sweep = begin(tasks)
    with (
        pytest.raises(NoScheduler, match=r"0 of 1 runs are finished.*the same command goes on"),
        clusters.at_address(address) as client,
    ):
        work(sweep, client, Books(tmp_path / "runs"), HOW, show=kill)
    _, address = scheduler_and_worker(start, tmp_path, "second")
    again = begin(tasks)
    with clusters.at_address(address) as client:
        work(again, client, Books(tmp_path / "runs"), HOW)
    assert done(again)
    assert_equal(again, alone)


def test_an_address_without_a_scheduler_is_told(monkeypatch):
    monkeypatch.setattr(clusters, "ANSWERS_WITHIN", 0.2)
    with (
        pytest.raises(NoScheduler, match=r"no scheduler answers at tcp://127.0.0.1:1"),
        clusters.at_address("tcp://127.0.0.1:1"),
    ):
        pass


def test_jobs_of_a_batch_system_that_are_lost_are_asked_for_again(alone, tmp_path):
    clusters.jobqueue()
    from dask_jobqueue.local import LocalCluster  # jobs as processes, by the same machinery

    sweep = begin(tasks_of(LONG, (0,), tmp_path))
    killed = []

    def kill(sweep):
        if not killed and any(map(under_way, sweep.tasks.values())):
            nannies = client.run(os.getppid)
            killed.extend(nannies.values())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    with (
        dask.config.set(
            {"distributed.deploy.lost-worker-timeout": "0.5s", "distributed.adaptive.interval": 0.5}
        ),
        LocalCluster(cores=1, processes=1, memory="1GB", log_directory=tmp_path) as cluster,
    ):
        clusters.adapt(cluster, lambda: len(sweep.left), minimum_jobs=0, maximum_jobs=1)
        with Client(cluster) as client:
            work(sweep, client, Books(tmp_path), HOW, show=kill)
    assert killed
    assert done(sweep)
    assert_equal(sweep, alone)


def test_more_is_not_handed_out_than_workers_can_take(tmp_path):
    tasks = tasks_of(SHORT, range(4), tmp_path)
    tasks[0] = replace(tasks[0], resources={"GPU": 1})
    tasks[1] = replace(tasks[1], needs=tasks[3].name)
    sweep = begin(tasks)
    ours = _Client(sweep, None, Books(tmp_path), None)
    handed_out = []
    ours.submit = lambda task: handed_out.append(task) or ours.under_way.update({task.name: None})
    ours.offers = [{"GPU": 1, "memory": 8}, {"memory": 8}]
    for _ in range(2):
        ours.submit_what_workers_can_take()
        assert handed_out == [tasks[0], tasks[2]]  # the poorer worker is enough for this one
    ours.under_way.pop(tasks[0].name)
    ours.submit_what_workers_can_take()
    assert handed_out[2:] == [tasks[3]]
    assert ours.waiting == [tasks[1].name]
    ours.offers = [{"memory": 8}]
    ours.waiting = [tasks[0].name]
    assert ours.unmet() == "GPU=1"


def test_a_run_of_no_epochs_is_finished_without_errors(tmp_path):
    outcome = attempt(task(replace(SHORT, epochs=0), tmp_path), HOW, lambda: False)
    assert outcome.state == "finished"
    assert isnan(outcome.train_error)


def test_outcomes_of_a_task_are_settled_one_by_one(tmp_path):
    (each,) = tasks_of(SHORT, (0,), tmp_path)
    sweep = begin([each])
    ours = _Client(sweep, None, Books(tmp_path), None)
    ours.waiting = []
    for state in ("stopped", "held"):
        ours.settle(each.name, Outcome(state), "a worker")
        assert sweep.left == {each.name}
        assert ours.waiting.pop() == each.name
    sweep.tries[each.name] = 1
    ours.settle(each.name, Outcome("failed", "E: why", final=False), "a worker")
    assert sweep.left == {each.name}
    sweep.tries[each.name] = 2
    ours.settle(each.name, Outcome("failed", "E: why", final=False), "a worker")
    assert sweep.failed[each.name].error == "E: why"
