"""The record of a run, what is read off its result, and what tells two runs apart."""

import json
from dataclasses import asdict, replace
from math import nan

import pytest
import torch

from bnnlib.experiments.build import prepare_data
from bnnlib.experiments.profiles import reduced, smoke
from bnnlib.experiments.variants import named
from bnnlib.history import History
from bnnlib.kernels import compiled
from bnnlib.runs.folder import load_run
from bnnlib.runs.record import profile_of
from bnnlib.runs.result import differences, environment, parameter_hash


def test_the_record_says_what_a_reader_must_know(finished):
    record = json.loads((finished.folder / "experiment.json").read_text())
    assert record["format"] == 1
    assert record["experiment"] == json.loads(json.dumps(asdict(finished.experiment)))
    assert set(record["versions"]) == {"bnnlib", "python", "torch", "numpy"}
    assert record["versions"]["torch"] == torch.__version__
    assert record["images"] == {"train": 100, "test": 100}
    assert record["inputs"] == {"in_channels": 3, "image_size": 32, "classes": 10}
    assert record["seconds"] > 0
    for split, data in prepare_data(finished.experiment).items():
        assert record["label_sha256"][split] == data.label_hash()
        assert record["corruptions"][split] == list(data.provenance)
        assert record["image_sha256"][split] == data.image_hash()
    assert record["experiment_sha256"] == finished.experiment.digest()
    assert record["parameter_sha256"] == parameter_hash(finished.model)
    assert {"device", "threads", "started"} <= set(record)


def test_the_hash_of_the_parameters_changes_with_each_of_them(finished):
    model = load_run(finished.folder).model
    assert parameter_hash(model) == parameter_hash(finished.model)
    hashes = {parameter_hash(model)}
    for tensor in (model.conv1.weight, model.norm3.bias, model.norm1.running_inv_std):
        tensor.data[0] += 0.5
        hashes.add(parameter_hash(model))
    assert len(hashes) == 4


@pytest.mark.parametrize("profile", [smoke, reduced])
@pytest.mark.parametrize("name", ["svhn-stochastic", "cifar10-noise-25", "svhn-evaluation"])
def test_the_profile_of_an_experiment_is_found_whatever_its_seeds(name, profile):
    e = profile(named(name))
    seeds = {"seed": 3, "corruption_seed": 4, "data_seed": 5}
    seeds |= {"run_folder": "somewhere"} if e.evaluates else {}
    assert profile_of(replace(e, **seeds)) == profile.__name__
    assert profile_of(replace(e, width=0.3)) == profile_of(replace(e, name="mine")) == "own"
    assert profile_of(named(name)) == "full"


def test_a_run_differs_in_nothing_from_itself_read_again_and_by_name_from_what_was_changed(
    finished,
):
    one, other = load_run(finished.folder), load_run(finished.folder)
    assert differences(one, other) == []
    other.history.rows[1]["train_loss"] += 1e-7
    other.history.rows[0]["seconds"] += 1
    other.labels["test"][3] += 1
    with torch.no_grad():
        other.model.norm2.bias[0] += 1e-7
    assert differences(one, other) == ["train_loss", "test", "norm2.bias"]
    del other.labels["train"], other.history.rows[1:]
    assert {"train", "test", "epoch", "test_error"} <= set(differences(one, other))


def test_nan_is_nan_and_zero_is_zero_in_a_comparison(finished):
    runs = [replace(finished, history=History([{"a": value}])) for value in (nan, nan, 0.0)]
    assert differences(runs[0], runs[1]) == []
    assert differences(runs[0], runs[2]) == ["a"]


def test_a_record_names_the_kernels_that_rounded_its_gradients(kernels):
    for name, expected in (("off", " CPU"), (compiled.sets_here()[0], " kernels")):
        kernels(name)
        assert environment(torch.device("cpu"))["device"].endswith(expected)
