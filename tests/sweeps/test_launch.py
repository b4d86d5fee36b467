"""The command: planned before it begins, killed and repeated, looked at, without Dask."""

import importlib.util
import subprocess
import sys
import time
from dataclasses import replace
from math import nan
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from click.testing import CliRunner

from bnnlib.cli import main
from bnnlib.errors import DataNotFound, InvalidValue
from bnnlib.experiments.originals import published
from bnnlib.experiments.profiles import smoke
from bnnlib.files import locked, read_json
from bnnlib.runs.folder import load_run
from bnnlib.runs.ledger import results
from bnnlib.runs.record import RECORD, read_record
from bnnlib.runs.run import run
from bnnlib.sweeps import clusters, cost, where
from bnnlib.sweeps.books import Books, state_of
from bnnlib.sweeps.chapters import write_index
from bnnlib.sweeps.grid import read_grid
from bnnlib.sweeps.launch import status_lines
from bnnlib.sweeps.plan import planned_grid
from bnnlib.sweeps.progress import Progress, showing
from bnnlib.sweeps.state import begin
from bnnlib.sweeps.tasks import Outcome, attempt
from bnnlib.sweeps.where import Where

GRID = """
profile = "smoke"
[[runs]]
experiments = ["svhn-random-labels"]
seeds = "0-2"
set = { epochs = 60, evaluate_every = 30 }
"""
LOCAL = Where(workers=2, device="cpu")


def call(*arguments):
    return CliRunner().invoke(main, arguments, prog_name="python -m bnnlib")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a grid of three runs of about a second each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.toml").write_text(GRID)
    return tmp_path


# ------------------------------------------------------------------------------- the command

COMMAND = ("sweep", "grid.toml", "--workers", "2", "--device", "cpu", "--checkpoint-every", "0.1")


def test_a_client_that_is_killed_leaves_nothing_running_and_its_command_goes_on(here):
    command = [sys.executable, "-m", "bnnlib", *COMMAND]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(here.glob("runs/*/*/checkpoints/*")):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    end = time.monotonic() + 300
    while "running 0" not in (said := status_lines(here / "runs")[0]):
        assert time.monotonic() < end, said
        time.sleep(0.1)
    finished = {path: path.stat().st_mtime_ns for path in here.glob("runs/*/*/parameters*")}
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stdout.splitlines()[-1]) == (0, "3 runs in runs, 0 failed")
    for path, time_before in finished.items():
        assert path.stat().st_mtime_ns == time_before
    records = [read_record(path.parent)[1] for path in here.glob(f"runs/*/*/{RECORD}")]
    assert len(records) == 3
    assert any("continued" in record for record in records)
    assert status_lines(here / "runs")[0].startswith("done 3   running 0   failed 0")
    assert (here / "runs" / "ledger.parquet").is_file()
    before = (here / "runs" / "ledger.parquet").stat().st_size
    assert call(*COMMAND).stdout.endswith("3 runs in runs, 0 failed\n")  # nothing is left to do
    assert (here / "runs" / "ledger.parquet").stat().st_size == before


def test_a_dry_run_shows_what_it_costs_and_writes_nothing(here, monkeypatch):
    monkeypatch.setattr(cost, "_measure", lambda e, device: 3.0)
    shown = call("sweep", "grid.toml", "--dry-run", "--workers", "2")
    assert shown.exit_code == 0
    head, row, total = shown.stdout.splitlines()
    assert head.split("  ")[-1].strip() == "core time"
    assert row.split() == ["svhn-random-labels", "3", "3", "360", "3", "18", "min", "0", "s"]
    assert total == "about 9 min 0 s on 2 workers, training alone"
    assert [path.name for path in here.iterdir()] == ["grid.toml"]


def test_a_step_is_measured_once_for_each_kind(here, monkeypatch):
    asked = []
    monkeypatch.setattr(cost, "_measure", lambda e, device: asked.append(e) or 1.0)
    (here / "grid.toml").write_text(GRID + "product = { width = [0.125, 0.25], n_test = [0, 50] }")
    planned = planned_grid("grid.toml", here / "runs", None, LOCAL, None)
    assert sorted(e.width for e in asked) == [0.125, 0.25]
    assert set(planned.costs.values()) == {120.0}


def test_a_measured_step_takes_time_on_every_network(monkeypatch):
    monkeypatch.setattr(cost, "MEASURED_FOR", 0.0)
    names = ("svhn-l2-weights-5e-4", "svhn-stochastic", "cifar10-dropout", "capacity", "svhn-float")
    from bnnlib.experiments.variants import named

    experiments = [smoke(named(name)) for name in names]
    paces = cost.seconds_a_step(experiments)
    assert paces.keys() == set(map(cost.kind, experiments))
    assert all(0 < seconds < 60 for seconds in paces.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("no.toml",), "no grid no.toml"),
        (("grid.toml", "more"), "sweep takes one grid, got 'grid.toml' and 'more'"),
        (("grid.toml", "--profile", "quik"), "did you mean 'quick'"),
        (("grid.toml", "--workers", "2", "--scheduler", "tcp://x:1"), "exclude each other"),
        (("grid.toml", "--workers", "0"), "--workers"),
        (("grid.toml", "--device", "gpu"), "unknown device 'gpu'"),
        (("status", "."), "holds no sweep"),
        (("status",), "there is no folder runs"),
        (("grid.toml", "--scheduler", "nonsense"), "scheduler must be an address such as tcp:"),
        (("grid.toml", "--out", "grid.toml"), "grid.toml is not a folder"),
        (("grid.toml", "--slurm", "no.toml"), "no file no.toml that describes a SLURM cluster"),
    ],
)
def test_mistakes_are_told_in_a_line_before_anything_is_done(here, words, said):
    result = call("sweep", *words)
    assert result.exit_code in (1, 2)
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in here.iterdir()] == ["grid.toml"]


def test_what_no_worker_here_can_take_is_told_before_anything_is_done(here):
    (here / "grid.toml").write_text(GRID + "resources = { GPU = 1 }")
    result = call(*COMMAND)
    assert "seed=0 asks for GPU=1, and a worker here offers 0" in result.stderr
    assert (result.exit_code, result.stdout) == (2, "")


def test_the_steps_of_a_set_in_a_file_are_counted_where_it_is(here, monkeypatch, npz):
    images = np.zeros((120, 3, 32, 32), np.uint8)
    path = npz(train_images=images, train_labels=np.arange(120) % 10)
    e = replace(smoke(published("svhn-random-labels")), dataset=str(path), n_test=0, epochs=3)
    each = {"all": replace(e, n_train=None), "some": replace(e, n_train=70)}
    each["missing"] = replace(e, dataset="nowhere.npz", n_train=None)
    assert cost.steps_in_all(each) == {"all": 6, "some": 3}


def without_dask(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "distributed" else there(name)
    )


def test_without_dask_a_sweep_says_so_in_a_line(here, monkeypatch):
    without_dask(monkeypatch)
    result = call(*COMMAND)
    assert result.exit_code == 1
    assert result.stderr == "Error: a sweep needs Dask: pip install '.[sweep]'\n"


def test_without_dask_seeds_run_one_after_the_other_and_a_line_says_so(here, monkeypatch):
    without_dask(monkeypatch)
    result = call("run", "svhn-l2", "--profile", "smoke", "--seeds", "0,1")
    assert result.exit_code == 0
    assert "without Dask (pip install '.[sweep]') the seeds run one after" in result.stderr
    assert len(results(here / "runs")) == 2


def test_workers_here_share_out_cores_and_gpus(monkeypatch):
    monkeypatch.setattr(where, "cores", lambda: 8)
    assert [Where(device="cpu", threads=n).count(100) for n in (1, 3, 16)] == [8, 2, 1]
    assert Where(device="cpu").count(3) == 3  # no more than there is to do
    assert Where(device="cpu", workers=5).count(100) == 5
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert (Where().count(100), Where(device="cpu").gpus()) == (2, 0)
    seen = [clusters._worker_options(i, 3, 1, 2) for i in range(3)]
    assert [each["env"]["CUDA_VISIBLE_DEVICES"] for each in seen] == ["0", "1", "0"]
    assert seen[0]["env"]["OMP_NUM_THREADS"] == "1"
    assert {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"} <= seen[0]["env"].keys()


# ------------------------------------------------------------------------------------- SLURM


def test_a_slurm_file_gives_a_job_script(tmp_path):
    file = tmp_path / "slurm.toml"
    file.write_text('jobs = 3\nqueue = "gpu"\nmemory = "8GB"\nwalltime = "01:00:00"\n')
    assert clusters.read_slurm(file)[1] == 3
    script = clusters.job_script(file)
    assert "#SBATCH -p gpu" in script
    assert "--nthreads 1" in script


def test_a_slurm_cluster_leaves_ctrl_c_as_it_was():
    code = "import signal; from bnnlib.sweeps.clusters import jobqueue; jobqueue().SLURMCluster; "
    code += "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "True\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jobs = 0", "jobs must be a whole number"),
        ("cores = 4", "gives a worker several threads"),
        ("a b", "is not TOML"),
        ('memory = "8GB"\nmemmory = "8GB"', "SLURMCluster refuses this"),
    ],
)
def test_a_slurm_file_with_a_mistake_is_refused(tmp_path, text, said):
    (tmp_path / "slurm.toml").write_text(text)
    with pytest.raises(InvalidValue, match=said):
        clusters.job_script(tmp_path / "slurm.toml")
    with pytest.raises(DataNotFound, match="describes a SLURM cluster"):
        clusters.read_slurm(tmp_path / "no.toml")


# ------------------------------------------------------------------------------------ status


def test_the_folders_alone_tell_the_state_of_each_task(here):
    tasks, _ = read_grid("grid.toml", here / "runs")
    books = Books(here / "runs")
    books.plan(tasks)
    done, running, failed = tasks
    run(smoke(published("svhn-random-labels")), done.folder, progress="none", device="cpu")
    books.failed(failed, Outcome("failed", "E: why", "trace"), "a worker")
    with locked(running.folder):
        states = [state_of(books.folder, task.name, task is failed) for task in tasks]
        lines = status_lines(here / "runs")
    assert states == ["done", "running", "failed"]
    assert lines[0] == "done 1   running 1   failed 1   stopped 0   waiting 0"
    assert "running: svhn-random-labels seed=1" in lines
    assert lines[-1] == "failed: svhn-random-labels seed=2: E: why"
    assert state_of(books.folder, running.name, False) == "stopped"  # its lock died
    assert read_json(books.note(failed.name))["traceback"] == "trace"
    books.forget(failed)
    assert state_of(books.folder, failed.name, False) == "waiting"


def test_status_needs_neither_pytorch_nor_dask(here):
    tasks, _ = read_grid("grid.toml", here / "runs")
    Books(here / "runs").plan(tasks)
    code = "import sys; from bnnlib.cli import main\ntry: main(['sweep', 'status', 'runs'])\n"
    code += "except SystemExit: pass\n"
    code += "print([n for n in ('torch', 'distributed') if n in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert said.splitlines() == ["done 0   running 0   failed 0   stopped 0   waiting 3", "[]"]


# ---------------------------------------------------------------------------------- progress


def a_sweep(here):
    sweep = begin(read_grid("grid.toml", here / "runs")[0])
    first, second, _ = sweep.tasks
    sweep.finished = {first}
    sweep.outcomes[first] = Outcome("finished", train_error=0.25, test_error=0.875)
    sweep.failed = {second: Outcome("failed", "E: why")}
    sweep.running, sweep.workers = 1, 2
    return sweep


def test_progress_counts_and_names_the_best_and_the_worst(here):
    sweep = a_sweep(here)
    *_, third = sweep.tasks
    progress = Progress("grid.toml: 3 runs", {}, {third: (0.5, nan), "another": (0.1, 0.1)})
    title, counts, best, worst = progress.table(sweep)
    assert (title, best) == (
        "grid.toml: 3 runs",
        "best    svhn-random-labels seed=0: train error 25.00 %, test error 87.50 %",
    )
    assert worst == "worst   svhn-random-labels seed=2: train error 50.00 %, test error -"
    assert counts.startswith("done 1   running 1   failed 1   waiting 0   about ")
    sweep.workers, sweep.dashboard = 0, "http://here/status"
    assert progress.table(sweep)[2] == "dashboard   http://here/status"
    assert progress.table(sweep)[-1] == "waiting for a worker"
    sweep.workers, sweep.unmet = 1, "GPU=1"
    assert "that offers GPU=1" in progress.table(sweep)[-1]


def test_the_time_left_is_by_the_pace_since_it_began(here):
    sweep = a_sweep(here)
    first, second, third = sweep.tasks
    progress = Progress("", {first: 10.0, second: 50.0, third: 30.0}, {})
    progress.start = time.monotonic() - 5
    assert progress.seconds_left(sweep) == pytest.approx(15, rel=0.05)
    progress.begin(sweep)  # what was finished before says nothing of the pace
    assert progress.seconds_left(sweep) is None


def test_a_log_gets_a_line_at_the_end(here, capsys):
    sweep = a_sweep(here)
    with showing(Progress("", {}, {})) as show:
        show(sweep)
        assert capsys.readouterr().err == ""
        sweep.finished = set(sweep.tasks)
        sweep.failed, sweep.running = {}, 0
        show(sweep)
    assert capsys.readouterr().err.startswith("done 3   running 0   failed 0   waiting 0")


def test_a_notebook_gets_a_table_that_is_renewed(here, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=None))
    handle = SimpleNamespace(update=lambda bundle, raw: shown.append(bundle["text/plain"]))
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: handle)
    with showing(Progress("grid.toml: 3 runs", {}, {})) as show:
        sweep = a_sweep(here)
        sweep.failed = dict.fromkeys(sweep.left | sweep.failed.keys(), Outcome("failed"))
        show(sweep)
    assert "best    svhn-random-labels seed=0" in shown[-1]


def test_a_terminal_gets_a_live_table(here, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with showing(Progress("grid.toml: 3 runs", {}, {})) as show:
        show(a_sweep(here))
    assert "best    svhn-random-labels seed=0" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- chapters

CELLS = (
    'profile = "quick"  # a\nseed = 0  # b\nruns_folder = ""  # c',
    "from bnnlib import run\nfrom bnnlib.notebook import at_parameters, check_parameters\n"
    "check_parameters(In)\n"
    'e = at_parameters("svhn-l2", profile, seed=seed)\n'
    'result = run(e, f"{runs_folder}/{seed}", progress="none")',
)


@pytest.fixture
def chapter(here):
    cells = [nbformat.v4.new_code_cell(text) for text in CELLS]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), here / "some.ipynb")
    (here / "grid.toml").write_text(
        '[[runs]]\nchapter = "some.ipynb"\nprofile = "smoke"\nseeds = [4]'
    )
    return here / "some.ipynb"


def test_a_chapter_is_executed_and_its_runs_stand_on_a_page(chapter, here):
    (task,), _ = read_grid("grid.toml", here / "runs")
    assert attempt(task, {}, lambda: False) == Outcome("finished")
    assert task.is_finished()
    assert read_grid("grid.toml", here / "runs")[0][0].is_finished()
    page = write_index(here / "runs", [task]).read_text()
    assert f"href='some/{task.out.name}'" in page
    error = load_run(here / "runs" / "some" / task.out.stem / "4").history.last("train_error")
    assert f"<td>{100 * error:.1f}</td>" in page
    cells = nbformat.read(chapter, 4)
    cells.cells[1].source += "\nprint(1)"
    nbformat.write(cells, chapter)
    (changed,), _ = read_grid("grid.toml", here / "runs")
    with pytest.raises(InvalidValue, match=r"was executed from another version of some.ipynb"):
        changed.is_finished()


def test_a_chapter_that_fails_is_kept_up_to_its_failure(chapter, here):
    cells = nbformat.read(chapter, 4)
    cells.cells[1].source = "1 / 0"
    nbformat.write(cells, chapter)
    (task,), _ = read_grid("grid.toml", here / "runs")
    outcome = attempt(task, {}, lambda: False)
    assert (outcome.state, outcome.error.split(": ")[1]) == ("failed", "ZeroDivisionError")
    assert not task.out.exists()
    assert task.out.with_suffix(".failed.ipynb").is_file()
