"""What a user adds in one line works with everything else: folders, exact resume, probes, scores.

`fixtures/my_module.py` is such a user's file. It is imported as `--use` imports it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bnnlib import (
    LOSSES,
    NETWORKS,
    OPTIMIZERS,
    QUANTIZERS,
    InvalidValue,
    binary_layers,
    build_model,
    differences,
    load_run,
    names,
    published,
    run,
    smoke,
    use,
)
from bnnlib.errors import DataNotFound
from bnnlib.files import sha256
from bnnlib.runs.checkpoint import Checkpoints

MINE = Path(__file__).with_name("fixtures") / "my_module.py"
OPEN = (names.ACTIVATIONS, names.DATASETS, LOSSES, NETWORKS, OPTIMIZERS, QUANTIZERS)


@pytest.fixture(scope="module", autouse=True)
def mine():
    """The user's file, imported for these tests alone."""
    before = [dict(registry.data) for registry in OPEN]
    use(MINE)
    yield
    names.USED.clear()
    for registry, known in zip(OPEN, before, strict=True):
        registry.data = known


BASE = replace(smoke(published("svhn-random-labels")), n_test=50)
EXTENDED = {
    "network": {"network": "mine", "width": 1.0},
    "network of grey images": {"network": "mine", "width": 1.0, "dataset": "grey"},
    "quantizer": {"weights": "tenfold"},
    "quantizer that learns": {"weights": "learned"},
    "quantizer that draws": {"weights": "noisy"},
    "activation": {"activation": "cubed"},
    "activation that learns": {"activation": "prelu"},
    "activation of the twin": {"activation": "cubed", "binary": False},
    "loss": {"loss": "focal"},
    "optimizer": {"optimizer": "momentum"},
    "optimizer of one's own": {"optimizer": "signed"},
    "data": {"dataset": "grey"},
    "much at once": {
        "dataset": "grey",
        "network": "binary_resnet18",
        "weights": "learned",
        "activation": "prelu",
        "loss": "focal",
        "optimizer": "signed",
        "probes": ("saturation", "flips", "critical"),
        "width": 1 / 16,
    },
    **{f"shipped {name}": {"weights": name} for name in QUANTIZERS.shipped},
    **{f"shipped {name}": {"loss": name} for name in LOSSES.shipped},
    **{f"shipped {name}": {"optimizer": name} for name in OPTIMIZERS.shipped},
    "shipped bop": {"optimizer": "eager_bop"},
    "shipped approx_sign": {"activation": "approx_sign", "weights": "approx_sign"},
    "shipped approx_step": {"activation": "approx_step"},
    "shipped straight_through": {"activation": "straight_through"},
    "shipped mlp": {"network": "mlp", "width": 1 / 256, "dataset": "grey"},
    "shipped residual network": {"network": "binary_resnet18", "width": 1 / 16},
    "shipped residual twin": {"network": "binary_resnet18", "width": 1 / 16, "binary": False},
}


class Killed(BaseException):
    """As sudden as a power cut: nothing catches it."""


def quietly(experiment, out=None, **how):
    return run(experiment, out, device="cpu", progress="none", **how)


@pytest.mark.parametrize("changes", EXTENDED.values(), ids=EXTENDED.keys())
def test_a_killed_run_goes_on_as_the_same_run_and_is_read_again(changes, tmp_path, monkeypatch):
    experiment = replace(BASE, **changes)
    whole = quietly(experiment)
    with monkeypatch.context() as patch:

        def save_then_die(checkpoints):
            checkpoints.save()
            if checkpoints.state.steps == 3:
                raise Killed

        patch.setattr(Checkpoints, "save_if_due", save_then_die)
        with pytest.raises(Killed):
            quietly(experiment, tmp_path)
    assert not differences(whole, quietly(experiment, tmp_path))
    read = load_run(tmp_path)  # which compares what it reads with the hash
    assert read.record["parameter_sha256"] == whole.record["parameter_sha256"]


THE_USUAL = ("deterministic", "squared_hinge", "binary_adam", "clipped")  # |W| <= 1: clips nothing


@pytest.mark.parametrize("changes", EXTENDED.values(), ids=EXTENDED.keys())
def test_it_and_nothing_else_changes_the_training(changes, usual):
    same = any(value in THE_USUAL for value in changes.values())
    assert ("train_loss" in differences(quietly(replace(BASE, **changes)), usual)) is not same


@pytest.fixture(scope="module")
def usual():
    return quietly(BASE)


def command(*arguments, **how):
    called = [sys.executable, "-m", "bnnlib", "run", "svhn-random-labels", "--profile", "smoke"]
    return subprocess.Popen([*called, *map(str, arguments)], **how)


def test_a_file_named_on_the_command_line_is_recorded_and_survives_a_kill(tmp_path):
    out, changes = tmp_path / "run", {"network": "mine", "width": 1.0, "epochs": 15}
    settings = [f"--set={name}={value}" for name, value in changes.items()]
    called = ("--use", MINE, *settings, "--out", out, "--checkpoint-every", "0", "--device", "cpu")
    process = command(*called)
    while process.poll() is None and len(list(out.glob("checkpoints/*.safetensors"))) < 2:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "parameters.safetensors").exists()  # it was killed on its way
    assert command(*called).wait() == 0
    found = load_run(out)
    whole = quietly(replace(smoke(published("svhn-random-labels")), **changes))
    assert found.record["parameter_sha256"] == whole.record["parameter_sha256"]
    hashes = json.loads((out / "experiment.json").read_text())["uses"]
    assert hashes == {"my_module.py": [sha256(MINE)]} == found.record["uses"]


def test_a_folder_never_makes_anything_be_imported_and_says_what_it_needs(tmp_path):
    quietly(replace(BASE, network="mine", width=1.0), tmp_path)
    script = "import sys, bnnlib\ntry:\n    bnnlib.load_run(sys.argv[1])\n"
    script += "except bnnlib.InvalidValue as error:\n    print(error)"
    called = [sys.executable, "-c", script, tmp_path]
    told = subprocess.run(called, capture_output=True, text=True, check=True, cwd=MINE.parent)
    assert "unknown network 'mine'" in told.stdout
    assert "--use" in told.stdout
    assert "my_module.py" in told.stdout


def test_a_changed_file_is_told_and_both_hashes_are_kept(tmp_path, monkeypatch):
    experiment = replace(BASE, loss="focal")
    with monkeypatch.context() as patch:

        def die(checkpoints):
            raise Killed

        patch.setattr(Checkpoints, "save_if_due", die)
        with pytest.raises(Killed):
            quietly(experiment, tmp_path)
    monkeypatch.setitem(names.USED, "my_module.py", "0" * 64)
    with pytest.warns(match="my_module.py has changed"):
        again = quietly(experiment, tmp_path)
    assert again.record["uses"] == {"my_module.py": [sha256(MINE), "0" * 64]}


def test_a_network_gets_what_it_takes_and_what_it_cannot_obey_is_refused():
    seen = {}

    def build(classes, width, generator):
        seen.update(classes=classes, width=width, generator=type(generator))
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, classes))

    NETWORKS["takes some"] = build
    build_model(replace(BASE, network="takes some", width=0.5))
    assert seen == {"classes": 10, "width": 0.5, "generator": torch.Generator}
    with pytest.raises(InvalidValue, match="network 'takes some' takes no dropout"):
        build_model(replace(BASE, network="takes some", dropout=(0.5,)))
    NETWORKS["no network"] = lambda: "text"
    with pytest.raises(InvalidValue, match=r"must be built as an nn\.Module, got 'text'"):
        build_model(replace(BASE, network="no network", width=1.0))


def test_layers_of_torch_nn_begin_as_the_seed_says_and_the_users_generator_stays():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same = (build_model(replace(BASE, network="mine", width=1.0)) for _ in range(2))
    other = build_model(replace(BASE, network="mine", width=1.0, seed=1))
    assert torch.equal(one.first.weight, same.first.weight)
    assert not torch.equal(one.first.weight, other.first.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_optimizer_that_cannot_train_the_network_is_told_in_one_line():
    OPTIMIZERS["muon"] = torch.optim.Muon
    with pytest.raises(
        InvalidValue, match="'muon' cannot train this network: Muon only supports 2D"
    ):
        quietly(replace(BASE, optimizer="muon"))
    with pytest.raises(InvalidValue, match="unknown optimizer 'adam'; did you mean 'Adam'"):
        replace(BASE, optimizer="adam")
    with pytest.raises(InvalidValue, match="Bop needs binary weights"):
        quietly(replace(BASE, optimizer="bop", binary=False))


def test_a_missing_file_is_told():
    with pytest.raises(DataNotFound, match=r"no file .*none\.py to use"):
        use("none.py")


@pytest.mark.parametrize("name", OPTIMIZERS.shipped)
def test_latent_weights_stay_within_one_whatever_moves_them(name):
    model = quietly(replace(BASE, optimizer=name, lr_start=20.0, lr_final=20.0)).model
    assert max(layer.weight.abs().max() for layer in binary_layers(model)) == 1
