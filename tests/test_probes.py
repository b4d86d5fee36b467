from functools import partial
from math import log2, nan

import numpy as np
import pytest
import torch
from torch import nn

from bnnlib import probes
from bnnlib.batches import Batches
from bnnlib.corruption import random_labels
from bnnlib.errors import InvalidValue
from bnnlib.layers import binary_layers, seed_layers
from bnnlib.models import binarynet
from bnnlib.quantizers import sign
from bnnlib.training import Evaluation, EvaluationMode, TrainingState, evaluate

LAYERS = ("conv1", "conv2", "dense3", "dense4")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def with_signs(model):
    """The model, its latent weights replaced by their signs."""
    for layer in binary_layers(model):
        layer.weight.copy_(sign(layer.weight))
    return model


@pytest.fixture
def model(tiny):
    return seed_layers(binarynet(tiny, generator=seeded(), weights="stochastic"), 7)


# ------------------------------------------------------------------- flips and saturation


@torch.no_grad()
def test_flips_are_counted_by_layer_and_zero_counts_as_plus_one(model):
    model.dense4.weight[1] = 1
    before = probes.binary_weights(model)
    model.conv1.weight[0] *= -1  # 27 of 108
    model.dense4.weight.mul_(0.5)  # changes no sign
    model.dense4.weight[0, :6] = -model.dense4.weight[0, :6]  # 6 of 120
    model.dense4.weight[1, :2] = torch.tensor([0.0, -0.0])
    found = probes.flip_ratio(before, probes.binary_weights(model))
    assert found == {"conv1": 0.25, "conv2": 0, "dense3": 0, "dense4": 0.05}


@torch.no_grad()
def test_saturation_counts_both_ends_of_the_clip(model):
    assert set(probes.saturation(model).values()) == {0.0}
    model.conv1.weight[0], model.conv1.weight[1] = 1, -1
    model.conv1.weight[2] = 0.999
    assert probes.saturation(model) == {"conv1": 0.5, "conv2": 0, "dense3": 0, "dense4": 0}
    assert set(probes.saturation(with_signs(model)).values()) == {1.0}


def test_the_twin_has_no_binary_weights(tiny):
    twin = binarynet(tiny, generator=seeded(), binary=False)
    assert probes.binary_weights(twin) == probes.saturation(twin) == probes.flip_ratio({}, {}) == {}


# ------------------------------------------------------------------------------------ parts


def test_errors_on_true_and_on_false_labels(noise):
    data = noise(n=60)
    corrupted = random_labels(data, 0.5, seed=1)
    wrong = torch.arange(60) % 3 == 0
    found = probes.part_errors(Evaluation(20 / 60, (), wrong, data.labels), corrupted)
    for part, flag in (("clean", False), ("corrupted", True)):
        chosen = [i for i in range(60) if corrupted.corrupted[i] == flag]
        assert found[part] == pytest.approx(sum(i % 3 == 0 for i in chosen) / len(chosen))
    true = probes.part_errors(Evaluation(20 / 60, (), wrong, data.labels), data)
    assert true == pytest.approx({"clean": 1 / 3, "corrupted": nan}, nan_ok=True)


# -------------------------------------------------------------------- critical sample ratio


class Threshold(nn.Module):
    """Predicts class 0 where the darkest pixel is above 0, else class 1; keeps its inputs."""

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        darkest = x.flatten(1).amin(1)
        return torch.stack([darkest, self.zero.expand(len(x)), darkest - 9], dim=1)


def ratio(model, x, radius, steps=20, seed=0):
    return probes.critical_sample_ratio(model, x, radius, steps, generator=seeded(seed))


def test_a_sample_is_critical_where_the_boundary_lies_within_the_radius():
    heights = torch.tensor([0.2, 0.5, 0.9, 1.1, 2.0, -0.5, -1.1, -2.0])
    x = heights.view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    # one pixel must sink for the first three; all three must rise for the sixth
    assert ratio(Threshold(), x, radius=1.0, steps=40) == 4 / 8
    assert ratio(Threshold(), x, radius=3.0, steps=40) == 1
    assert ratio(Threshold(), x, radius=1.0, steps=0) == 0


def test_the_search_stays_in_the_box_and_reaches_its_corners():
    model, x = Threshold(), torch.randn(50, 3, 2, 2, generator=seeded())
    ratio(model, x, radius=0.25)
    moved = torch.stack(model.seen) - x
    assert moved.abs().max().item() == pytest.approx(0.25, abs=1e-6)


def test_the_search_is_decided_by_its_generator(model, noise):
    x = noise(200).images / 127.5 - 1
    with_signs(model)
    first, again, *others = (ratio(model, x, 0.2, steps=3, seed=seed) for seed in (0, 0, 1, 2, 3))
    assert 0 < first < 1
    assert first == again
    assert {first} != set(others)


def test_without_room_to_move_no_sample_is_critical_even_with_stochastic_weights(model):
    x = torch.rand(50, 3, 8, 8, generator=seeded())
    assert ratio(model, x, radius=0.0) == 0
    nn.init.zeros_(model.norm4.weight)  # nor with a constant prediction
    model.norm4.bias.data[3] = 1
    assert ratio(model, x, radius=2.0) == 0


def entropies(predicted, labels):
    """H(prediction) + H(label) - H(both), an independent way to the plug-in estimate."""

    def entropy(values):
        p = np.unique(values, return_counts=True, axis=0)[1] / len(values)
        return -(p * np.log2(p)).sum()

    pairs = np.stack([predicted, labels], axis=1)
    return entropy(predicted) + entropy(labels) - entropy(pairs)


def test_information_is_the_plug_in_estimate_less_its_bias():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=400)
    predicted = np.where(rng.random(400) < 0.5, labels, rng.integers(4, size=400))
    bias = (16 - 4 - 4 + 1) / (2 * 400 * np.log(2))  # every pair of the four classes occurs
    expected = entropies(predicted, labels) - bias
    found = probes.mutual_information(torch.tensor(predicted), torch.tensor(labels), classes=4)
    assert found == pytest.approx(expected, abs=1e-12)


def test_all_labels_fitted_is_all_bits_and_a_constant_tells_nothing():
    labels = torch.arange(10).repeat(100)
    assert probes.mutual_information(labels, labels) == log2(10)
    # a known mistake tells as much
    assert probes.mutual_information(9 - labels, labels) == log2(10)
    assert probes.mutual_information(torch.zeros_like(labels), labels) == 0


def test_each_set_is_evaluated_in_each_mode(model, noise):
    batches = {"train": Batches(noise(), 20), "test": Batches(noise(seed=1), 20)}
    modes = {
        "sign": EvaluationMode("deterministic", seed=5),
        "real": EvaluationMode("real", seed=5),
        "sample": EvaluationMode("stochastic", seed=5),
        "mean10": EvaluationMode("stochastic", samples=10, seed=5),
        "batch": EvaluationMode("stochastic", statistics="batch", seed=5),
    }
    found = probes.mode_errors(model, batches, seed=5)
    assert found == {
        f"{split}_error_{name}": evaluate(
            model, batches[split], mode.afresh(f"{split} {name}")
        ).error
        for split in batches
        for name, mode in modes.items()
    }


# --------------------------------------------------------------------------------- recorder


@pytest.fixture
def recorded(model, noise):
    """Makes a recorder of the named probes, for 60 images with half of their labels random."""

    def make(*names):
        data = random_labels(noise(), 0.5, seed=1)
        recorder, state = probes.Recorder(names, data, seed=3), TrainingState(model, None, None)
        recorder.begin(state)
        results = {"train": evaluate(model, Batches(data, 20), EvaluationMode("real"))}
        return partial(recorder, state), results

    return make


COLUMNS = {
    "flips": [f"flips_{layer}" for layer in LAYERS],
    "saturation": [f"saturation_{layer}" for layer in LAYERS],
    "parts": ["train_error_clean", "train_error_corrupted"],
    "critical": ["critical_sample_ratio"],
    "modes": [],  # after the last epoch, see `mode_errors`
    "bits": ["memorized_bits"],
}


@pytest.mark.parametrize("names", [*((name,) for name in probes.PROBES), probes.PROBES])
def test_columns_of_the_probes_and_what_needs_an_evaluation(recorded, names):
    recorder, results = recorded(*names)
    always = [c for name in names if name in ("flips", "saturation") for c in COLUMNS[name]]
    assert list(recorder({})) == always
    assert set(recorder(results)) == {column for name in names for column in COLUMNS[name]}


def test_flips_are_those_since_the_epoch_before(recorded, model):
    recorder, _ = recorded("flips")
    assert set(recorder({}).values()) == {0.0}
    model.conv1.weight.data[0] *= -1
    assert recorder({})["flips_conv1"] == 0.25
    assert recorder({})["flips_conv1"] == 0


def test_parts_are_those_of_the_evaluation(recorded):
    recorder, results = recorded("parts")
    parts = probes.part_errors(results["train"], recorder.func.train)
    assert recorder(results) == {f"train_error_{part}": error for part, error in parts.items()}


def test_the_critical_ratio_repeats_and_leaves_the_model(recorded, model):
    with_signs(model)
    recorder, results = recorded("critical")
    random = model.conv1.generator.get_state()
    assert recorder(results) == recorder(results)
    assert torch.equal(model.conv1.generator.get_state(), random)
    assert model.training


def test_an_unknown_probe_is_refused_with_the_nearest(recorded):
    with pytest.raises(InvalidValue, match="unknown probe 'flip'; did you mean 'flips'"):
        recorded("saturation", "flip")
