import os
import re
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from bnnlib.__main__ import main, seeds_in
from bnnlib.experiments import is_finished, load_run
from bnnlib.runs import differences
from bnnlib.side_by_side import run_side_by_side

RUN = ["run", "svhn-random-labels", "--profile", "smoke", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_each_seed_is_the_run_that_it_is_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*RUN, "--seeds", "1,2", "--set", "epochs=2"])
    assert ended.value.code == 0
    captured = capfd.readouterr()
    settings = ("epochs=2", "seed=2", "corruption_seed=2")
    alone = [*RUN, "--out", "alone", *(part for text in settings for part in ("--set", text))]
    assert run_side_by_side({"alone": alone}) == {"alone": 0}
    both = [load_run(f"runs/svhn-random-labels/smoke-seed{seed}") for seed in (1, 2)]
    assert differences(load_run("alone"), both[1]) == []
    assert "train_loss" in differences(*both)
    assert both[0].experiment.corruption_seed == 1
    assert {line[:8] for line in captured.out.splitlines()} == {"seed 1: ", "seed 2: "}
    assert "seed 2: epoch 2/2" in captured.err


def test_the_statuses_are_those_of_the_processes(tmp_path, capfd):
    missing = ["--set", "dataset=svhn", "--data", str(tmp_path / "nothing")]
    found = run_side_by_side(
        {"right": ["list"], "wrong": ["describe", "svhn-l3"], "missing": [*RUN, *missing]}
    )
    assert found == {"right": 0, "wrong": 2, "missing": 1}
    assert re.search("wrong: .*did you mean 'svhn-l2'", capfd.readouterr().err)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--seeds", "1,1"], "--seeds names 1 twice"),
        (["--seeds", "0-2,1"], "--seeds names 1 twice"),
        *[
            (["--seeds", text], f"such as 0,1,2 or 0-2,5; got '{text}'")
            for text in ("1,,2", "0,1,", "a", "", "1,-2", "0-", "0-1-2", "1.0", "9" * 20)
        ],
        (["--seeds", "0,5-2"], "--seeds has a range that runs backwards: 5-2"),
        (["--seeds", "0-1000"], "--seeds takes at most 1,000 seeds, got '0-1000'"),
        (["--seeds", "7,1001-2000"], "--seeds takes at most 1,000 seeds"),
        (["--seeds", "9" * 19], "seed must be 0 to 9,223,372,036,854,775,807"),
        (["--seeds", "1", "--set", "seed=2"], "--set gives seed twice"),
        (["--seeds", "1", "--set", "widht=2"], "did you mean 'width'"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(options, text, monkeypatch):
    monkeypatch.setattr("bnnlib.__main__.run_side_by_side", None)
    result = CliRunner().invoke(main, [*RUN, *options])
    assert result.exit_code == 2
    assert text in result.output


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("4", [4]), ("0,1,2", [0, 1, 2]), ("0-2,5", [0, 1, 2, 5]), (" 7 , 2-3", [7, 2, 3])],
)
def test_seeds_are_numbers_and_ranges(text, seeds, monkeypatch):
    started = {}
    monkeypatch.setattr(
        "bnnlib.__main__.run_side_by_side",
        lambda commands: started.update(commands) or dict.fromkeys(commands, 0),
    )
    result = CliRunner().invoke(main, [*RUN, "--seeds", text, "--out", "x", "--set", "width=0.5"])
    assert result.exit_code == 0, result.output
    assert list(started) == [f"seed {seed}" for seed in seeds]
    for seed, arguments in zip(seeds, started.values(), strict=True):
        settings = ("width=0.5", f"seed={seed}", f"corruption_seed={seed}")
        expected = {*RUN, "--out", os.path.join("x", f"seed{seed}"), "--set", *settings}
        assert set(arguments) == expected  # and no option that was not given
    assert seeds_in("0-999") == list(range(1000))


def test_a_signal_to_the_one_process_reaches_all(tmp_path):
    command = [sys.executable, "-m", "bnnlib", *RUN, "--seeds", "0,1", "--out", "out"]
    command += ["--set", "epochs=2000", "--set", "evaluate_every=2000", "--checkpoint-every", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, **pipes
    )
    folders = [tmp_path / "out" / f"seed{seed}" for seed in (0, 1)]
    while not all(list(folder.glob("checkpoints/checkpoint-*-*")) for folder in folders):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.count("stopped by SIGTERM") == 2
    assert not any(map(is_finished, folders))
