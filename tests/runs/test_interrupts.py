"""Ctrl-C in a shell, in a notebook, in a thread."""

import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from jupyter_client.manager import start_new_kernel

from bnnlib.errors import Interrupted
from bnnlib.experiments.originals import published
from bnnlib.experiments.profiles import smoke
from bnnlib.runs.folder import load_run
from bnnlib.runs.interrupts import SIGNALS, deferred_interrupts
from bnnlib.runs.record import is_finished
from bnnlib.runs.result import differences
from bnnlib.runs.run import run

EPOCHS = 80  # long enough to be interrupted in
EXPERIMENT = replace(smoke(published("svhn-random-labels")), epochs=EPOCHS)


def wait_for(path, process_is_alive):
    """Until a file is there; fails where the process ends first."""
    while not path.exists():
        assert process_is_alive(), f"ended before {path.name} was written"
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_waits_for_the_check_and_a_ctrl_c_after_it_does_not(number):
    with deferred_interrupts() as check:
        check()
        signal.raise_signal(number)
        with pytest.raises(Interrupted, match=f"stopped by {number.name}"):
            check()
        signal.raise_signal(signal.SIGTERM)  # which clusters repeat
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_nobody_asked_for_is_delivered_at_the_end():
    with pytest.raises(KeyboardInterrupt) as caught, deferred_interrupts():
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(caught.value, Interrupted)


def test_handlers_come_back_whatever_happens():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), deferred_interrupts():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with deferred_interrupts() as check:
            signal.raise_signal(signal.SIGINT)
            check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_in_a_thread_is_trained_too(finished, tmp_path):
    how = {"device": "cpu", "progress": "none"}
    work = threading.Thread(target=run, args=(finished.experiment, tmp_path / "out"), kwargs=how)
    work.start()
    work.join()
    assert is_finished(tmp_path / "out")


# ------------------------------------------------------------------------ a shell, a notebook


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    run(EXPERIMENT, out, device="cpu", progress="none")
    return load_run(out)


def test_in_a_shell_ctrl_c_saves_and_says_how_to_go_on(uninterrupted, tmp_path):
    command = [sys.executable, "-m", "bnnlib", "run", "svhn-random-labels", "--profile", "smoke"]
    command += ["--set", f"epochs={EPOCHS}", "--out", "out", "--device", "cpu"]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    wait_for(tmp_path / "out" / "history.csv", lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (130, "")
    stopped, how = stderr.splitlines()[-2:]
    assert stopped.startswith("stopped by SIGINT after step ")
    assert how == f"to go on: python -m bnnlib {' '.join(command[3:])}"
    assert "Traceback" not in stderr
    again = subprocess.run(command, cwd=tmp_path, **pipes)
    assert again.returncode == 0, again.stderr
    assert "out: going on after step" in again.stderr
    assert differences(uninterrupted, load_run(tmp_path / "out")) == []


def reply_to(client, request):
    """Its content; replies to the questions with which the kernel was awaited come first."""
    while (message := client.get_shell_msg(timeout=300))["parent_header"]["msg_id"] != request:
        pass
    return message["content"]


def test_in_a_notebook_an_interrupted_cell_goes_on_when_it_is_run_again(uninterrupted, tmp_path):
    cell = f"""
import torch
from dataclasses import replace
from bnnlib import published, run, smoke
torch.set_num_threads(1)
experiment = replace(smoke(published("svhn-random-labels")), epochs={EPOCHS})
result = run(experiment, {str(tmp_path / "out")!r}, device="cpu", progress="none")
"""
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        first = client.execute(cell, stop_on_error=False)  # else it may refuse the next one
        wait_for(tmp_path / "out" / "history.csv", manager.is_alive)
        manager.interrupt_kernel()
        reply = reply_to(client, first)
        assert (reply["status"], reply["ename"]) == ("error", "Interrupted")
        assert "stopped by SIGINT after step " in reply["evalue"]
        assert not is_finished(tmp_path / "out")
        assert reply_to(client, client.execute(cell))["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert differences(uninterrupted, load_run(tmp_path / "out")) == []
