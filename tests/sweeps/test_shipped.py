"""The files in `sweeps/`: grids expand and are what they say; SLURM's are what recipes need."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dask.utils import parse_timedelta

import bnnlib
from bnnlib.runs.record import RESULTS
from bnnlib.sweeps.clusters import job_script, read_slurm
from bnnlib.sweeps.grid import read_grid

SWEEPS = Path(__file__).parents[2] / "sweeps"
ON_SLURM = SWEEPS / "slurm.toml"
ONE_RUN = SWEEPS / "slurm-one-run.sh"
GRIDS = sorted(path for path in SWEEPS.glob("*.toml") if path != ON_SLURM)


def experiments(name, tmp_path):
    tasks, named_twice = read_grid(SWEEPS / name, tmp_path)
    assert named_twice == 0
    return [task.experiment for task in tasks]


def decides(spec):
    """What decides a run, but for where an evaluation finds the run that it scores."""
    return {name: value for name, value in spec.items() if name != "run_folder"}


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_grid_begins_with_a_comment_and_expands(path, tmp_path):
    assert path.open().readline().startswith("# ")
    assert experiments(path.name, tmp_path)


def test_book_makes_the_stored_runs_and_no_others(tmp_path):
    made = [decides(e.spec()) for e in experiments("book.toml", tmp_path)]
    stored = [decides(run.experiment.spec()) for run in bnnlib.stored_runs()]
    assert len(made) == len(stored)
    assert all(spec in made for spec in stored)


def test_book_has_the_digests_of_the_stored_runs(tmp_path):
    trained = [e.digest() for e in experiments("book.toml", tmp_path) if not e.evaluates]
    stored = bnnlib.results(RESULTS).query("profile == 'reduced' and evaluates == ''")
    assert sorted(trained) == sorted(stored["digest"])


def test_stored_runs_that_are_not_reduced_are_of_large(tmp_path):
    made = {e.digest() for e in experiments("large.toml", tmp_path)}
    stored = bnnlib.results(RESULTS).query("profile != 'reduced'")
    assert {*stored["profile"]} <= {"large"}
    assert {*stored["digest"]} <= made


@pytest.mark.parametrize("name", ["recipes", "capacity", "chaos", "images"])
def test_a_stored_table_has_the_runs_of_its_grid_and_no_others(name, tmp_path):
    made = [e.digest() for e in experiments(f"{name}.toml", tmp_path)]
    assert sorted(made) == sorted(bnnlib.stored_table(name)["digest"])


def test_recipes_are_chosen_on_seeds_that_the_capacity_is_not_measured_on(tmp_path):
    seeds = [
        {(e.seed, e.data_seed) for e in experiments(f"{name}.toml", tmp_path)}
        for name in ("recipes", "capacity")
    ]
    assert not seeds[0] & seeds[1]
    assert all(seed == data_seed for part in seeds for seed, data_seed in part)


def test_noise_varies_the_share_of_random_labels_alone(tmp_path):
    found = experiments("noise.toml", tmp_path)
    assert sorted({e.random_labels for e in found}) == [0, 0.25, 0.5, 0.75, 1]
    assert {e.seed for e in found} == {e.corruption_seed for e in found} == set(range(5))
    assert len(found) == 25
    alike = {"name", "random_labels", "random_label_splits", "probes", "seed", "corruption_seed"}
    rest = [{k: v for k, v in e.spec().items() if k not in alike} for e in found]
    assert all(other == rest[0] for other in rest)


# -------------------------------------------------------------------------------------- SLURM


def test_a_worker_of_slurm_leaves_before_its_time_is_up():
    settings, jobs = read_slurm(ON_SLURM)
    options = settings["worker_extra_args"]
    given = dict(zip(options[::2], options[1::2], strict=True))
    hours, minutes, seconds = map(int, settings["walltime"].split(":"))
    latest = sum(parse_timedelta(given[name]) for name in ("--lifetime", "--lifetime-stagger"))
    assert latest + 300 <= 3600 * hours + 60 * minutes + seconds
    assert given["--memory-limit"] == "0"
    assert jobs > 1


def test_the_script_of_a_worker_asks_for_a_gpu_and_outlives_sigterm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # dask_jobqueue makes folders for logs, where it is told to
    script = job_script(ON_SLURM)
    lines = script.splitlines()
    assert {"#SBATCH --gres=gpu:1", "#SBATCH --no-requeue", "#SBATCH -t 04:00:00"} <= {*lines}
    assert lines.index("trap : TERM") < len(lines) - 1
    worker = lines[-1]
    assert "-m distributed.cli.dask_worker" in worker
    assert "--nthreads 1 " in worker
    assert "--lifetime 225m --lifetime-stagger 5m --memory-limit 0 --resources GPU=1" in worker
    assert list(tmp_path.iterdir()) == []


def test_the_script_of_one_run_asks_for_what_a_long_run_needs():
    asked = set(re.findall(r"^#SBATCH (\S+)", ONE_RUN.read_text(), re.MULTILINE))
    assert asked >= {"--requeue", "--signal=B:USR1@120", "--open-mode=append", "--gres=gpu:1"}
    assert os.access(ONE_RUN, os.X_OK)


# In place of `python`: saves at the first SIGTERM, as a run does, and notices a second.
RUN = """
import signal, sys, time

terms = []
signal.signal(signal.SIGTERM, lambda *_: terms.append(1))
print(*sys.argv[1:], flush=True)
until = time.monotonic() + (0 if "short" in sys.argv else 300)
while not terms and time.monotonic() < until:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(1 if len(terms) > 1 else 130 if terms else 0)
"""


@pytest.fixture
def job(tmp_path):
    """Begins the script as SLURM does, with stand-ins for `python` and `scontrol`."""
    programs = {"python": f"#!{sys.executable}{RUN}", "scontrol": "#!/bin/sh\necho scontrol $*\n"}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "SLURM_JOB_ID": "1234"}

    def begin(*words):
        words = ["bash", ONE_RUN, *words]
        return subprocess.Popen(
            words, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    return begin


def test_a_job_that_ends_by_itself_is_not_asked_for_again(job):
    process = job("short")
    assert process.communicate()[0] == "-m bnnlib run short\n"
    assert process.returncode == 0


def test_a_warning_to_the_shell_reaches_the_run_and_the_job_is_asked_for_again(job):
    process = job("long")
    process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    assert process.communicate()[0] == "scontrol requeue 1234\n"
    assert process.returncode == 130


def test_sigterm_to_all_processes_of_a_job_reaches_the_run_once(job):
    process = job("long")
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate()[0] == "scontrol requeue 1234\n"
    assert process.returncode == 130
