"""A run that was stopped, in whatever way, goes on as if nothing had happened.

SIGTERM, and a state that is not finite, are tried by `benchmarks/faults.py` and its tests.
"""

import json
import shutil
import signal
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from benchmarks.kills import EXPERIMENT, kill_until_done
from benchmarks.mutations import name_by_content
from bnnlib import training
from bnnlib.batches import Batches
from bnnlib.errors import BnnlibWarning, CannotWrite, DamagedFile, InvalidValue
from bnnlib.history import TIMES
from bnnlib.layers import seed_layers
from bnnlib.models import binarynet
from bnnlib.optim import BinaryAdam, make_optimizer
from bnnlib.runs import checkpoint
from bnnlib.runs import run as run_module
from bnnlib.runs.checkpoint import Checkpoints
from bnnlib.runs.folder import load_run
from bnnlib.runs.interrupts import SIGNALS
from bnnlib.runs.record import is_finished
from bnnlib.runs.result import differences
from bnnlib.runs.run import run
from bnnlib.tensors import read_tensors, tensor_bytes
from bnnlib.training import TrainingState, fit

# Three epochs of five steps, with every kind of state and a penalty.
SHORT = replace(EXPERIMENT, epochs=3, evaluate_every=2, l2=1e-3, l2_target="weights")
quietly = partial(run, device="cpu", progress="none", checkpoint_every=0.0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """SHORT, run in one go; tests may read it, not write."""
    return quietly(SHORT, tmp_path_factory.mktemp("whole") / "out", checkpoint_every=300)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def interrupt(experiment, out, call, owner=BinaryAdam, name="step"):
    """How a run ends whose process gets SIGINT at the given call of a function."""
    function, calls = getattr(owner, name), count(1)

    def counted(*args, **kwargs):
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **kwargs)

    with patch.object(owner, name, counted), pytest.raises(KeyboardInterrupt) as caught:
        quietly(experiment, out)
    return caught.value


def counting_steps(experiment, out=None):
    """The run, and how many steps of the optimizer it took from here."""
    with patch.object(BinaryAdam, "step", autospec=True, side_effect=BinaryAdam.step) as step:
        return quietly(experiment, out), step.call_count


def checkpoints(out):
    return sorted((out / "checkpoints").glob("*.safetensors"))


def saved_steps(out):
    return [int(path.name.split("-")[1]) for path in checkpoints(out)]


# -------------------------------------------------------------------------- kills, interrupts


def test_a_run_that_is_killed_again_and_again_is_the_same_run(tmp_path):
    e = replace(EXPERIMENT, epochs=5)
    lives = kill_until_done(e, tmp_path / "killed", seed=0)
    killed = [life for life in lives if life.exit_code == -signal.SIGKILL]
    assert len(killed) >= 30
    assert sum(life.during_a_save for life in killed) >= 10
    quietly(e, tmp_path / "whole", checkpoint_every=300)
    assert differences(load_run(tmp_path / "whole"), load_run(tmp_path / "killed")) == []
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    assert names == {path.name for path in (tmp_path / "whole").iterdir()}


@pytest.mark.parametrize("step", [1, 4, 5, 6, 10, 15])
def test_after_an_interrupt_at_any_step_the_run_goes_on(step, uninterrupted, out):
    message = str(interrupt(SHORT, out, step))
    epoch, within = divmod(step - 1, 5)
    assert f"stopped by SIGINT after step {within + 1} of epoch {epoch + 1}" in message
    assert str(out) in message
    assert not is_finished(out)
    assert len(load_run(out).history) == epoch
    resumed, steps = counting_steps(SHORT, out)
    assert steps == 15 - step
    assert differences(uninterrupted, resumed) == []
    assert differences(load_run(uninterrupted.folder), load_run(out)) == []
    assert not (out / "checkpoints").exists()


def test_every_kind_of_run_goes_on(each_kind, out):
    interrupt(each_kind, out, 3)
    whole, all_steps = counting_steps(each_kind)
    resumed, steps = counting_steps(each_kind, out)
    assert steps == all_steps - 3 > 0
    assert differences(whole, resumed) == []


def test_an_evaluation_is_given_up_and_done_again(uninterrupted, out):
    error = interrupt(SHORT, out, 1, training, "evaluate")  # the first one, after two epochs
    assert "after step 5 of epoch 2" in str(error)
    assert saved_steps(out) == [9, 10]
    assert differences(uninterrupted, quietly(SHORT, out)) == []


def test_a_second_interrupt_and_one_without_a_folder_stop_at_once(out, monkeypatch):
    def twice(self, closure=None):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = [signal.getsignal(number) for number in SIGNALS]
    monkeypatch.setattr(BinaryAdam, "step", twice)
    for folder in (out, None):
        with pytest.raises(KeyboardInterrupt) as caught:
            quietly(SHORT, folder)
        assert type(caught.value) is KeyboardInterrupt
    assert not (out / "checkpoints").exists()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_an_interrupt_at_the_very_end_comes_after_the_run_is_finished(out):
    error = interrupt(SHORT, out, 1, run_module, "finish")
    assert type(error) is KeyboardInterrupt  # there is nothing to go on with
    assert is_finished(out)


# ------------------------------------------------------------------------------ damaged files


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
def test_a_damaged_checkpoint_is_named_put_aside_and_the_one_before_is_used(
    damage, uninterrupted, out
):
    interrupt(SHORT, out, 8)
    _, newest = checkpoints(out)
    damage(newest)
    with pytest.warns(BnnlibWarning, match=f"{newest.name} is damaged.*the state before it"):
        error = interrupt(SHORT, out, 1)
    assert "after step 3 of epoch 2" in str(error)  # the eighth again
    aside = newest.with_suffix(".damaged")
    assert [path.name for path in aside.parent.glob("*.damaged")] == [aside.name]
    assert saved_steps(out) == [7, 8]
    resumed, steps = counting_steps(SHORT, out)
    assert (differences(uninterrupted, resumed), steps) == ([], 7)
    assert not (out / "checkpoints").exists()


def test_without_a_whole_checkpoint_the_run_begins_anew(uninterrupted, out):
    interrupt(SHORT, out, 8)
    for path in checkpoints(out):
        truncate(path)
    with pytest.warns(BnnlibWarning) as warned:
        resumed, steps = counting_steps(SHORT, out)
    assert (differences(uninterrupted, resumed), steps) == ([], 15)
    then = [str(warning.message).rpartition("; ")[2] for warning in warned]
    assert then == ["the state before it is used", "the run begins anew"]


def test_a_state_goes_on_on_another_device_only_where_no_random_number_is_drawn(
    finished, out, tmp_path, monkeypatch
):
    describe, own = checkpoint._describe, checkpoint.pytorchs_own
    twin, cuda = replace(finished.experiment, binary=False), {"cuda": torch.Generator()}
    monkeypatch.setattr(checkpoint, "_describe", lambda *s: describe(*s) | {"device": "cuda"})
    interrupt(SHORT, tmp_path / "random", 3)
    with pytest.raises(InvalidValue, match="on 'cuda'; its random numbers go on only there, not"):
        quietly(SHORT, tmp_path / "random")
    assert saved_steps(tmp_path / "random") == [2, 3]
    for there, here in (cuda, {}), ({}, cuda):  # who has a generator of a GPU
        monkeypatch.setattr(checkpoint, "pytorchs_own", lambda s, there=there: own(s) | there)
        interrupt(twin, out, 3)
        monkeypatch.setattr(checkpoint, "pytorchs_own", lambda s, here=here: own(s) | here)
        assert differences(quietly(twin, out), quietly(twin)) == []
        shutil.rmtree(out)


# ------------------------------------------------------------------------------ its formats


@pytest.fixture
def newest(out):
    """The tensors and texts of the last state of SHORT, stopped in its eighth step."""
    interrupt(SHORT, out, 8)
    return read_tensors(checkpoints(out)[-1])


def write_anew(out, tensors, about):
    """Replace the last state by another one, under the name that says that it is whole."""
    *_, path = checkpoints(out)
    path.write_bytes(tensor_bytes(tensors, {"bnnlib": json.dumps(about)}))
    name_by_content(path)


@pytest.mark.parametrize(("updates", "text"), [([8] * 6, ""), ([8] * 5 + [7], "took .* steps")])
def test_a_state_of_format_1_goes_on_with_its_one_count_of_steps(
    updates, text, newest, uninterrupted, out
):
    tensors, texts = newest
    about = json.loads(texts["bnnlib"])
    assert (about["format"], about["updates"], about["steps"]) == (2, 8, 3)
    own = {"generator.torch", "optimizer.group0.step"}
    assert own < tensors.keys()
    del about["optimizer"]
    earlier = {name: tensor for name, tensor in tensors.items() if name not in own}
    write_anew(out, earlier, about | {"format": 1, "updates": updates})
    if text:
        with pytest.raises(DamagedFile, match=f"holds no state of this training: .*{text}"):
            quietly(SHORT, out)
    else:
        resumed, steps = counting_steps(SHORT, out)
        assert (differences(uninterrupted, resumed), steps) == ([], 7)


@pytest.mark.parametrize(
    "change",
    [
        lambda optimizer: optimizer["groups"].pop(),
        lambda optimizer: optimizer["groups"][0].update(clip=2.0),
        lambda optimizer: optimizer["groups"][0].update(clip=None),
        lambda optimizer: optimizer["groups"][1]["betas"].append(0.5),
        lambda optimizer: optimizer["groups"][1].pop("eps"),
        lambda optimizer: optimizer["groups"][1].update(own=1),
        lambda optimizer: optimizer["groups"][0].update(lr="fast"),
        lambda optimizer: optimizer["state"].update(own={}),
        lambda optimizer: optimizer["state"].clear(),
    ],
)
def test_the_settings_of_another_optimizer_are_refused(change, newest, out):
    tensors, texts = newest
    about = json.loads(texts["bnnlib"])
    change(about["optimizer"])
    write_anew(out, tensors, about)
    with pytest.raises(DamagedFile, match="it has the settings of another optimizer"):
        quietly(SHORT, out)


def strides(state):
    """How the tensors that an optimizer keeps of each parameter lie in memory."""
    kept = (state.optimizer.state[p].items() for p in state.model.parameters())
    return [{name: tensor.stride() for name, tensor in tensors} for tensors in kept]


OPTIMIZERS = ["binary_adam", "SGD", "AdamW", "Adagrad", "NAdam", "Rprop"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_state_of_an_optimizer_is_restored_to_the_last_bit(name, layout, tiny, noise, tmp_path):
    def begun(seed):
        model = binarynet(tiny, generator=torch.Generator().manual_seed(seed), dropout=(0.5,))
        model = seed_layers(model.to(memory_format=layout), seed)
        order = torch.Generator().manual_seed(seed)
        state = TrainingState(model, make_optimizer(name, model, 1e-2), order)
        return state, Checkpoints(tmp_path, state, "digest", 0)

    def train(state):
        fit(state, Batches(noise(), 20), rates=[1e-2, 5e-3, 1e-3], progress="none")
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in state.history.rows]
        return str(rows), state.model.state_dict()

    def stop():
        if state.steps == 5:
            raise KeyboardInterrupt

    state, kept = begun(seed=1)
    with pytest.raises(KeyboardInterrupt):
        fit(state, Batches(noise(), 20), rates=[1e-2] * 3, progress="none", after_step=stop)
    kept.save()
    other, restored = begun(seed=2)
    assert restored.restore()
    assert strides(state) == strides(other)
    (rows, parameters), (again, same) = train(state), train(other)
    assert rows == again
    assert all(torch.equal(p, same[key]) for key, p in parameters.items())


# --------------------------------------------------------------------------- what is kept when


def test_states_are_saved_no_more_often_than_asked(tmp_path):
    with patch.object(Checkpoints, "save", autospec=True, side_effect=Checkpoints.save) as save:
        quietly(SHORT, tmp_path / "never", checkpoint_every=300)
        assert save.call_count == 0
        quietly(SHORT, tmp_path / "always", checkpoint_every=0)
        assert save.call_count == 15


def test_a_full_disk_ends_the_run_with_its_last_good_states(uninterrupted, out, monkeypatch):
    def full(path, target):
        if Path(target).name.startswith("checkpoint") and next(writes) == 3:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    rename, writes = Path.replace, count(1)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CannotWrite, match="cannot be written: No space left on device"):
        quietly(SHORT, out)
    monkeypatch.undo()
    assert saved_steps(out) == [1, 2]
    assert not list(out.rglob("*.part"))
    assert differences(uninterrupted, quietly(SHORT, out)) == []
