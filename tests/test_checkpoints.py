"""A run that was stopped, in whatever way, goes on as if nothing had happened."""

import json
import re
import signal
from dataclasses import replace

import pytest
import torch

import bnnlib.train
from benchmarks.kills import EXPERIMENT, kill_until_done, live
from bnnlib import experiments
from bnnlib.catalogue import smoke
from bnnlib.checkpoints import Checkpoints, Training
from bnnlib.errors import (
    BnnlibWarning,
    CannotWrite,
    DamagedFile,
    Interrupted,
    InvalidValue,
    NotFinite,
)
from bnnlib.experiments import is_finished, load_run, run
from bnnlib.files import sha256
from bnnlib.optim import BinaryAdam
from bnnlib.runs import differences
from bnnlib.variants import named

SHORT = replace(EXPERIMENT, epochs=3, evaluate_every=2)  # of five steps
OTHERS = {  # what SHORT has not: another optimizer's groups, no generator, float inputs, a penalty
    "float": replace(smoke(named("cifar10-float")), width=0.1, epochs=3, probes=("parts",)),
    "penalty": replace(smoke(named("svhn-l2-weights-5e-4")), width=0.1, epochs=3),
    "stochastic": replace(smoke(named("svhn-stochastic")), width=0.1, epochs=3),
    "noise": replace(smoke(named("cifar10-gaussian-inputs")), width=0.1, epochs=3),
}


def quietly(experiment, out=None, every=0.0):
    return run(experiment, out, device="cpu", progress="none", checkpoint_every=every)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """SHORT, run in one go; tests may read it, not write."""
    return quietly(SHORT, tmp_path_factory.mktemp("whole") / "out", every=300)


@pytest.fixture
def stop_at(monkeypatch):
    """Makes the process send itself a signal at the given call of a method."""

    def prepare(owner, name, call, number=signal.SIGINT):
        function, calls = getattr(owner, name), 0

        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                signal.raise_signal(number)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    return prepare


def interrupted(experiment, out, monkeypatch, stop_at, step):
    """Run `experiment` in the folder `out` until it is interrupted in a step."""
    with monkeypatch.context() as patches:
        stop_at(BinaryAdam, "step", step)
        with pytest.raises(Interrupted) as caught:
            quietly(experiment, out)
        patches.undo()
    return str(caught.value)


def steps_of(action):
    """What `action` returns, and how many steps of the optimizer it took."""
    with pytest.MonkeyPatch.context() as patches:
        step, taken = BinaryAdam.step, []
        patches.setattr(BinaryAdam, "step", lambda *args: taken.append(1) or step(*args))
        return action(), len(taken)


def checkpoints(out):
    return sorted((out / "checkpoints").glob("*.safetensors"))


# ------------------------------------------------------------------------------------- kills


def test_a_run_that_is_killed_again_and_again_is_the_same_run(tmp_path):
    e = replace(EXPERIMENT, epochs=5)
    lives = kill_until_done(e, tmp_path / "killed", seed=0)
    killed = [life for life in lives if life.exit_code == -signal.SIGKILL]
    assert len(killed) >= 30
    assert sum(life.during_a_save for life in killed) >= 10
    quietly(e, tmp_path / "whole", 300)
    assert differences(load_run(tmp_path / "whole"), load_run(tmp_path / "killed")) == []
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    assert names == {path.name for path in (tmp_path / "whole").iterdir()}


# -------------------------------------------------------------------------------- interrupts


@pytest.mark.parametrize("step", range(1, 16))
def test_after_an_interrupt_at_any_step_the_run_goes_on(
    step, uninterrupted, tmp_path, monkeypatch, stop_at
):
    out = tmp_path / "out"
    message = interrupted(SHORT, out, monkeypatch, stop_at, step)
    epoch, within = divmod(step - 1, 5)
    assert f"stopped by SIGINT after step {within + 1} of epoch {epoch + 1}" in message
    assert str(out) in message
    assert not is_finished(out)
    resumed, steps = steps_of(lambda: quietly(SHORT, out))
    assert steps == 15 - step
    assert differences(uninterrupted, resumed) == []
    assert differences(load_run(uninterrupted.folder), load_run(out)) == []


@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_of_run_goes_on(name, tmp_path, monkeypatch, stop_at):
    e, out = OTHERS[name], tmp_path / "out"
    interrupted(e, out, monkeypatch, stop_at, step=3)
    whole, all_steps = steps_of(lambda: quietly(e))
    resumed, steps = steps_of(lambda: quietly(e, out))
    assert steps == all_steps - 3 > 0
    assert differences(whole, resumed) == []


def test_an_evaluation_is_given_up_and_done_again(uninterrupted, tmp_path, monkeypatch, stop_at):
    out = tmp_path / "out"
    with monkeypatch.context():
        stop_at(bnnlib.train, "mistakes", 1)  # the first evaluation, after two epochs
        with pytest.raises(Interrupted, match="after step 5 of epoch 2"):
            quietly(SHORT, out)
    monkeypatch.undo()
    assert [path.name[11:20] for path in checkpoints(out)] == ["000000009", "000000010"]
    assert differences(uninterrupted, quietly(SHORT, out)) == []


def test_sigterm_is_answered_like_ctrl_c(uninterrupted, tmp_path):
    life = live(SHORT, tmp_path / "out", ("step of the optimizer", 7), signal.SIGTERM, every=300)
    assert life.exit_code == 130
    assert len(checkpoints(tmp_path / "out")) == 1
    assert live(SHORT, tmp_path / "out").exit_code == 0
    assert differences(load_run(uninterrupted.folder), load_run(tmp_path / "out")) == []


def test_a_second_interrupt_stops_at_once(tmp_path, monkeypatch):
    def twice(self, closure=None):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(BinaryAdam, "step", twice)
    with pytest.raises(KeyboardInterrupt) as caught:
        quietly(SHORT, tmp_path / "out")
    assert not isinstance(caught.value, Interrupted)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_without_a_folder_an_interrupt_is_python_s_own(stop_at):
    stop_at(BinaryAdam, "step", 2)
    with pytest.raises(KeyboardInterrupt) as caught:
        quietly(SHORT)
    assert not isinstance(caught.value, Interrupted)


def test_handlers_of_signals_are_given_back(uninterrupted, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    quietly(SHORT, tmp_path / "out")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_record_says_how_often_the_run_went_on(tmp_path, monkeypatch, stop_at):
    for step in (2, 4):
        interrupted(SHORT, tmp_path / "out", monkeypatch, stop_at, step)
    record = quietly(SHORT, tmp_path / "out").record
    assert [set(again) for again in record["continued"]] == [
        {"versions", "device", "threads", "started"}
    ] * 2
    assert record["started"] <= record["continued"][0]["started"]
    assert load_run(tmp_path / "out").record == record


# ------------------------------------------------------------------------------ damaged files


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    elif how == "a flipped bit":
        content[-1000] ^= 4
    else:
        content.clear()
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "a flipped bit", "emptied"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    how, uninterrupted, tmp_path, monkeypatch, stop_at
):
    out = tmp_path / "out"
    interrupted(SHORT, out, monkeypatch, stop_at, 8)
    older, newest = checkpoints(out)
    damaged(newest, how)
    with pytest.warns(BnnlibWarning, match=f"{newest.name} is damaged.*the state before it"):
        resumed, steps = steps_of(lambda: quietly(SHORT, out))
    assert steps == 15 - 7
    assert differences(uninterrupted, resumed) == []
    assert not (out / "checkpoints").exists()
    assert older != newest


def test_without_a_whole_checkpoint_the_run_begins_anew(
    uninterrupted, tmp_path, monkeypatch, stop_at
):
    out = tmp_path / "out"
    interrupted(SHORT, out, monkeypatch, stop_at, 8)
    for path in checkpoints(out):
        damaged(path, "truncated")
    with pytest.warns(BnnlibWarning) as warned:
        resumed, steps = steps_of(lambda: quietly(SHORT, out))
    assert steps == 15
    assert differences(uninterrupted, resumed) == []
    then = [str(warning.message).rpartition("; ")[2] for warning in warned]
    assert then == ["the state before it is used", "the run begins anew"]


def test_the_state_of_another_experiment_is_refused(tmp_path, monkeypatch, stop_at):
    for seed in (0, 1):
        e = replace(SHORT, seed=seed)
        interrupted(e, tmp_path / str(seed), monkeypatch, stop_at, 3)
    for path in checkpoints(tmp_path / "0"):
        path.unlink()
    stranger = checkpoints(tmp_path / "1")[-1]
    stranger.rename(tmp_path / "0" / "checkpoints" / stranger.name)
    with pytest.raises(DamagedFile, match="is the state of another experiment"):
        quietly(SHORT, tmp_path / "0")


def test_a_later_format_is_refused_by_name(tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr("bnnlib.checkpoints.FORMAT", 2)
    interrupted(SHORT, tmp_path / "out", monkeypatch, stop_at, 3)
    monkeypatch.undo()
    with pytest.raises(DamagedFile, match="has format 2; this bnnlib reads formats 1 to 1"):
        quietly(SHORT, tmp_path / "out")


def test_random_numbers_of_another_device_are_refused_by_name(tmp_path, monkeypatch, stop_at):
    with monkeypatch.context() as patches:
        patches.setattr(Training, "device", torch.device("cuda"))
        interrupted(SHORT, tmp_path / "out", monkeypatch, stop_at, 3)
    with pytest.raises(InvalidValue, match="saved on 'cuda'; its random numbers go on only there"):
        quietly(SHORT, tmp_path / "out")


def test_an_interrupt_at_the_very_end_comes_after_the_run_is_finished(tmp_path, monkeypatch):
    def too_late(result):
        signal.raise_signal(signal.SIGINT)
        close(result)

    close = experiments.close_folder
    monkeypatch.setattr(experiments, "close_folder", too_late)
    with pytest.raises(KeyboardInterrupt):
        quietly(SHORT, tmp_path / "out")
    assert is_finished(tmp_path / "out")


# --------------------------------------------------------------------------- what is kept when


def test_two_checkpoints_are_kept_and_named_by_their_content(tmp_path, monkeypatch, stop_at):
    interrupted(SHORT, tmp_path / "out", monkeypatch, stop_at, 8)
    found = checkpoints(tmp_path / "out")
    names = [re.fullmatch(r"checkpoint-0*(\d+)-(\w{16})\.safetensors", p.name) for p in found]
    assert [int(name[1]) for name in names] == [7, 8]
    assert [name[2] for name in names] == [sha256(path)[:16] for path in found]


def test_states_are_saved_no_more_often_than_asked(tmp_path, monkeypatch):
    saves, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self: saves.append(1) or save(self))
    quietly(SHORT, tmp_path / "never", every=300)
    assert saves == []
    quietly(SHORT, tmp_path / "always", every=0)
    assert len(saves) == 15


@pytest.mark.parametrize("write", [1, 2, 3])
def test_a_full_disk_ends_the_run_with_its_last_good_state(
    write, uninterrupted, tmp_path, monkeypatch
):
    def full(path, *args):
        if path.name.startswith("checkpoint") and len(written) == write:
            raise OSError(28, "No space left on device")
        written.append(path) if path.name.startswith("checkpoint") else None
        return flush(path, *args)

    flush, written, out = bnnlib.files.flush, [], tmp_path / "out"
    monkeypatch.setattr("bnnlib.files.flush", full)
    with pytest.raises(CannotWrite, match="cannot be written: No space left on device"):
        quietly(SHORT, out)
    monkeypatch.undo()
    assert 1 <= len(checkpoints(out)) <= 2
    assert not list(out.rglob("*.part"))
    assert differences(uninterrupted, quietly(SHORT, out)) == []


def test_too_little_disk_is_said_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("psutil.disk_usage", lambda path: type("Usage", (), {"free": 10_000}))
    monkeypatch.setattr(BinaryAdam, "step", None)
    with pytest.raises(CannotWrite, match=r"needs about .* of disk, 10 kB are free"):
        quietly(SHORT, tmp_path / "out")


def test_a_state_that_is_not_finite_is_not_saved(uninterrupted, tmp_path, monkeypatch):
    step, out, steps = BinaryAdam.step, tmp_path / "out", []

    def spoil(self, closure=None):
        step(self, closure)
        steps.append(1)
        if len(steps) == 7:
            self.param_groups[-1]["params"][-1].data[0] = torch.nan

    monkeypatch.setattr(BinaryAdam, "step", spoil)
    with pytest.raises(NotFinite, match="is not finite after step 2 of epoch 2"):
        quietly(SHORT, out)
    monkeypatch.undo()
    assert [path.name[11:20] for path in checkpoints(out)] == ["000000005", "000000006"]
    assert differences(uninterrupted, quietly(SHORT, out)) == []


# ------------------------------------------------------------------------------ other settings


def test_an_unfinished_run_of_another_experiment_is_refused(tmp_path, monkeypatch, stop_at):
    interrupted(SHORT, tmp_path / "out", monkeypatch, stop_at, 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InvalidValue, match=r"another experiment: seed \(0 there, 1 asked for\)"):
        quietly(replace(SHORT, seed=1), tmp_path / "out")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_other_surroundings_are_named(tmp_path, monkeypatch, stop_at):
    out = tmp_path / "out"
    interrupted(SHORT, out, monkeypatch, stop_at, 3)
    record = json.loads((out / "experiment.json").read_text())
    record["threads"] = 7
    (out / "experiment.json").write_text(json.dumps(record))
    with pytest.warns(BnnlibWarning, match="other surroundings.*threads 7 then, 1 now"):
        quietly(SHORT, out)
