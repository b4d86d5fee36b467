"""Several processes train as one does: the same numbers, one folder, one voice, one end."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnnlib.batches import Batches
from bnnlib.cli import main, shell
from bnnlib.data.images import ImageSet
from bnnlib.errors import BnnlibError, Interrupted, InvalidValue, RankLost
from bnnlib.experiments.originals import published
from bnnlib.experiments.profiles import smoke
from bnnlib.files import locked
from bnnlib.history import TIMES
from bnnlib.layers import BatchNorm, BinaryLinear, Dropout, check_can_share, seed_layers, sharing
from bnnlib.losses import hinge_loss, l2_penalty, squared_hinge_loss
from bnnlib.models import Architecture, binarynet, penalized_parameters
from bnnlib.names import NETWORKS
from bnnlib.optim import make_optimizer
from bnnlib.parallel import Ranks, Shard
from bnnlib.process import place
from bnnlib.runs.folder import load_run
from bnnlib.runs.record import is_finished
from bnnlib.runs.result import differences
from bnnlib.runs.run import _own_device, run
from bnnlib.training import EvaluationMode, TrainingState, fit, learning_rates

BASE = smoke(published("svhn-random-labels"))
LONG = replace(BASE, epochs=40)  # long enough to be stopped in


def start(work, world, folder, *more):
    """Processes of that many ranks, each of which does `work(ranks, folder, *more)`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "bnnlib.runs.run"])  # is imported once for all
    started = [
        context.Process(target=_connected, args=(work, Ranks(rank, world), folder, *more))
        for rank in range(world)
    ]
    for process in started:
        process.start()
    return started


def _connected(work, ranks, folder, *more):
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet-{work.__name__}-{ranks.world}"
    dist.init_process_group("gloo", meet, rank=ranks.rank, world_size=ranks.world)
    try:
        work(ranks, folder, *more)
    finally:
        dist.destroy_process_group()


def on_ranks(work, world, folder, *more):
    """What `start` starts, to its end; what a rank asserts must hold."""
    started = start(work, world, folder, *more)
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * world


def quietly(experiment, out, **more):
    return run(experiment, out, device="cpu", progress="none", **more)


# -------------------------------------------------------------------------------- same numbers

EPOCHS, BATCH = 17, 20  # of 60 images: 51 steps, on three ranks with 7, 7 and 6 images
CASES = {"dropout": {"dropout": (0.5, 0.2)}, "stochastic": {"weights": "stochastic"}}


class Doubles(Batches):
    """Images in float64, in which one process and several differ by rounding alone."""

    def take(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        x, labels = super().take(index)
        return x.double(), labels


def doubles(n, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (n,), generator=generator)
    return Doubles(ImageSet(images, labels, "noise", "train", tuple("0123456789")), BATCH)


def trained(case, ranks):
    """Parameters, averages, loss of each step and history of a training in float64."""
    shape = Architecture((4, 6), pool_every=2, dense=(12,), image_size=8)
    model = binarynet(shape, generator=torch.Generator().manual_seed(0), **CASES[case]).double()
    seed_layers(model, 1)
    optimizer = make_optimizer("binary_adam", model, 1e-2)
    state, losses = TrainingState(model, optimizer, torch.Generator().manual_seed(2)), []
    latent = penalized_parameters(model, "weights" if case == "stochastic" else "nothing")
    plain = hinge_loss if latent else squared_hinge_loss

    def loss(logits, labels):
        losses.append(plain(logits, labels))
        return losses[-1]

    history = fit(
        state,
        doubles(60, seed=3),
        test=doubles(130, seed=4),  # an evaluation of three batches
        rates=learning_rates("linear", 1e-2, 1e-3, EPOCHS),
        loss=loss,
        evaluate_every=8,
        mode=EvaluationMode(statistics="batch" if latent else "running", classes="apart"),
        penalty=(lambda: 1e-3 * l2_penalty(latent)) if latent else None,
        progress="none",
        ranks=ranks,
    )
    found = {k: history[k] for k in history.columns if k not in TIMES}
    found |= model.state_dict() | {"losses": torch.stack(losses).detach()}
    return {name: np.asarray(values) for name, values in found.items()}


def train_each(ranks, folder):
    for case in CASES:
        np.savez(folder / f"{case}-{ranks.rank}.npz", **trained(case, ranks))


@pytest.fixture(scope="module")
def in_one_process():
    return {case: trained(case, Ranks()) for case in CASES}


@pytest.mark.parametrize("world", [2, 3])
def test_after_50_steps_all_numbers_are_those_of_one_process(in_one_process, world, tmp_path):
    on_ranks(train_each, world, tmp_path)
    for case, expected in in_one_process.items():
        assert len(expected["losses"]) == 51
        assert expected["losses"][-1] < expected["losses"][0]
        first, *others = [np.load(tmp_path / f"{case}-{rank}.npz") for rank in range(world)]
        for name, values in expected.items():
            np.testing.assert_allclose(first[name], values, rtol=0, atol=1e-10, err_msg=name)
            for other in others:
                np.testing.assert_array_equal(first[name], other[name], name)


@pytest.mark.parametrize(
    ("rows", "world", "sizes"),
    [(50, 4, [13, 13, 12, 12]), (20, 3, [7, 7, 6]), (6, 2, [3, 3]), (2, 2, [1, 1]), (5, 1, [5])],
)
def test_ranks_take_consecutive_rows_of_nearly_one_number(rows, world, sizes):
    shards = [Shard(Ranks(rank, world), rows) for rank in range(world)]
    assert all(shard.sizes == sizes for shard in shards)
    parts = [torch.arange(rows)[shard.own] for shard in shards]
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts), torch.arange(rows))


def test_a_batch_smaller_than_the_ranks_is_refused():
    with pytest.raises(InvalidValue, match="a batch of 3 cannot be split over 4 ranks"):
        Shard(Ranks(0, 4), 3)


# ------------------------------------------------------------------------ what cannot be split


class Drawing(nn.Module):
    generator = None


UNSPLITTABLE = {
    "BatchNorm1d": (nn.BatchNorm1d(4), "use bnnlib's BatchNorm"),
    "Dropout": (nn.Dropout(0.1), "use bnnlib's Dropout"),
    "RReLU": (nn.RReLU(), "use another activation"),
    "Drawing": (Drawing(), "train in one process"),
}


@pytest.mark.parametrize("kind", UNSPLITTABLE)
def test_a_layer_that_needs_the_whole_batch_is_refused_by_name(kind):
    layer, advice = UNSPLITTABLE[kind]
    inner = nn.Sequential(nn.Linear(4, 4), layer)
    message = f"layer '0.1', a {kind}, needs the whole batch, which several ranks share; {advice}"
    with (
        pytest.raises(InvalidValue, match=re.escape(message)),
        sharing(nn.Sequential(inner), Shard(Ranks(0, 2), 4)),
    ):
        pass


@pytest.mark.parametrize("name", ["cuda:0", "cuda"])
def test_a_rank_has_a_device_of_its_own(name, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(InvalidValue, match="cannot share 'cuda:0'" if name[4:] else "'cuda:3'"):
        _own_device(name, Ranks(1, 2))
    assert _own_device("cpu", Ranks(1, 2)) == torch.device("cpu")


def test_layers_know_their_rows_inside_of_sharing_alone():
    model = nn.Sequential(BinaryLinear(4, 4), BatchNorm(4), Dropout(0.5), nn.LayerNorm(4))
    check_can_share(model)
    shard = Shard(Ranks(0, 2), 4)
    with sharing(model, shard):
        assert model[1].shard == model[2].shard == shard
    assert model[1].shard is model[2].shard is None


class OwnAverage(nn.Module):
    """Subtracts an average of all batches, of which a rank sees only its rows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(()))

    def forward(self, x):
        self.average.lerp_(x.detach().mean(), 0.1)
        return x - self.average


def network_with_an_average():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), OwnAverage())


def meet_what_cannot_be(ranks, folder):
    """Errors of one rank, or of all, are met by all, and leave the ranks able to go on."""
    NETWORKS["own average"] = network_with_an_average
    own = replace(BASE, network="own average", width=1.0)
    refused = {
        "cannot be split over 2": (replace(BASE, batch_size=1), folder / "small"),
        "another process is writing": (BASE, folder / "locked"),  # only the first rank looks
        "holds another experiment": (BASE, folder / "other"),
        "was given another experiment": (replace(BASE, seed=ranks.rank), folder / "seeds"),
        "hold different 2.average after": (own, folder / "own"),
    }
    for text, (experiment, out) in refused.items():
        with pytest.raises(BnnlibError, match=text):
            quietly(experiment, out)
    assert not (folder / "small").exists()
    quietly(BASE, folder / "after all")


def test_an_error_of_one_rank_is_that_of_all(finished, tmp_path):
    quietly(replace(BASE, epochs=1), tmp_path / "other")
    with locked(tmp_path / "locked"):
        on_ranks(meet_what_cannot_be, 2, tmp_path)
    found, expected = load_run(tmp_path / "after all"), load_run(finished.folder)
    assert found.record["device"] == expected.record["device"] + ", 2 ranks"
    assert set(differences(found, expected)) <= {"train_loss", *expected.model.state_dict()}
    losses = found.history["train_loss"]
    assert losses == pytest.approx(expected.history["train_loss"], rel=1e-5)


# --------------------------------------------------------------- stopped, and on other ranks


def asked_at(call):
    """A `stop` that says so when it is asked for that time."""
    calls = count(1)
    return lambda: next(calls) == call


def train_in_turns(ranks, folder, experiment):
    """Two runs that are one; and one that one process began, which the second rank stops."""
    first, again = (quietly(experiment, folder / name) for name in ("first", "again"))
    assert differences(first, again) == []
    assert is_finished(folder / "first")  # on every rank, as soon as `run` returns
    stop = asked_at(9) if ranks.rank else lambda: False
    with pytest.raises(Interrupted, match=r"stopped on request after step [12] of epoch 3"):
        quietly(experiment, folder / "begun", stop=stop)


def finish_it(ranks, folder, experiment):
    quietly(experiment, folder / "begun")


def test_runs_are_repeated_to_the_bit_and_go_on_with_other_numbers_of_ranks(tmp_path):
    experiment = replace(BASE, epochs=6, binary=False)  # small differences stay small
    whole = quietly(experiment, None)
    with pytest.raises(Interrupted):
        quietly(experiment, tmp_path / "begun", stop=asked_at(3))
    on_ranks(train_in_turns, 2, tmp_path, experiment)
    on_ranks(finish_it, 3, tmp_path, experiment)
    for name in ("first", "begun"):
        losses = load_run(tmp_path / name).history["train_loss"]
        assert losses == pytest.approx(whole.history["train_loss"], rel=1e-5), name
    record = load_run(tmp_path / "begun").record
    devices = [record["device"], *(each["device"] for each in record["continued"])]
    assert [device.partition("kernels")[2] for device in devices] == ["", ", 2 ranks", ", 3 ranks"]


# ------------------------------------------------------------------------------- the command

RUN = ["-m", "bnnlib", "run", "svhn-random-labels", "--profile", "smoke", "--device", "cpu"]
RUN += ["--set", f"epochs={LONG.epochs}", "--out", "out"]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launched(folder, *more):
    """`torchrun` with two ranks, in its own session."""
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([*LAUNCH, *RUN, *more], cwd=folder, **pipes)


def wait_for(folder, pattern, process):
    while not list((folder / "out").glob(pattern)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def pid_of(rank, process):
    """The process of a rank among the children of `torchrun`."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no rank {rank}")


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="Linux's /proc")


@needs_proc
def test_when_a_rank_dies_all_end_with_one_message_and_one_process_goes_on(tmp_path):
    process = launched(tmp_path, "--checkpoint-every", "0.1")
    wait_for(tmp_path, "checkpoints/*.safetensors", process)
    os.kill(pid_of(1, process), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode != 0
    assert stdout == ""
    assert stderr.count("Error: ") - stderr.count("ChildFailedError: ") == 1
    assert "Error: rank 0 of 2 has lost another one, which ended or cannot be reached" in stderr
    assert "goes on from its last checkpoint" in stderr
    assert len(re.findall(r"exitcode +: -9 ", stderr)) == 1  # the other ended by itself, in time
    with pytest.warns(UserWarning, match="2 ranks' then"):
        result = quietly(LONG, tmp_path / "out")
    assert len(result.history) == LONG.epochs


@needs_proc
def test_a_signal_to_one_rank_stops_and_saves_all_and_the_command_goes_on(tmp_path):
    process = launched(tmp_path)
    wait_for(tmp_path, "history.csv", process)
    os.kill(pid_of(1, process), signal.SIGTERM)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode != 0
    assert stderr.count("stopped by SIGTERM after step ") == 1
    how = f"to go on: torchrun --nproc-per-node 2 -m bnnlib {' '.join(RUN[2:])}"
    assert how in stderr.splitlines()
    again = launched(tmp_path)
    stdout, stderr = again.communicate(timeout=300)
    assert again.returncode == 0, stderr
    assert stderr.count("out: going on after step ") == 1
    last, folder = stdout.splitlines()
    assert last.startswith("loss ")
    assert folder == "out"
    assert len(load_run(tmp_path / "out").history) == LONG.epochs


class Waiting:
    """An exchange that is not over, whatever becomes of the other ranks."""

    waits = 0

    def wait(self, timeout):
        self.waits += 1
        raise RuntimeError("Operation timed out!")

    def is_completed(self):
        return self.waits == 3


def test_a_rank_whose_process_is_gone_is_lost_though_the_exchange_goes_on(monkeypatch):
    gone = subprocess.Popen(["true"])
    gone.wait()
    works = [Waiting(), Waiting()]
    monkeypatch.setattr(dist, "all_reduce", lambda x, async_op: works.pop())
    for here, reason, waits in (((gone.pid,), "its process is gone", 1), ((), "timed out", 3)):
        work = works[-1]
        with pytest.raises(RankLost, match=reason):
            Ranks(0, 2, here).total(torch.ones(2))
        assert work.waits == waits


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (0, 1)),  # said by something else
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, (1, 2)),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, (0, 1)),
    ],
)
def test_a_rank_is_what_torchrun_says(variables, expected, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place() == expected


@pytest.mark.parametrize(
    ("rank", "error", "said"),
    [
        (0, InvalidValue("wrong"), "Error: wrong\n"),
        (1, InvalidValue("wrong"), "Error: rank 1: wrong\n"),
        (0, RankLost("lost"), "Error: lost\n"),
        (1, RankLost("lost"), "Error: lost\n"),
    ],
)
def test_a_rank_says_what_the_first_cannot_have_said(rank, error, said, monkeypatch, capfd):
    told = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    waited = []
    monkeypatch.setattr(shell.time, "sleep", waited.append)
    monkeypatch.setattr(shell, "signals_to", lambda _: (_ for _ in ()).throw(error))
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    monkeypatch.setattr(os, "_exit", sys.exit)  # of a lost rank's neighbour
    with pytest.raises(SystemExit) as end:
        main(["list"])
    assert end.value.code != 0
    assert capfd.readouterr().err.endswith(said)
    assert bool(waited) == (rank == 1 and not isinstance(error, RankLost))
