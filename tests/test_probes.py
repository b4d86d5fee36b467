from itertools import chain
from math import nan

import pytest
import torch
from torch import nn

from bnnlib.batches import Batches
from bnnlib.corruption import random_labels
from bnnlib.errors import InvalidValue
from bnnlib.history import History
from bnnlib.layers import binarize_parameters_, seed_layers
from bnnlib.models import binarynet
from bnnlib.probes import (
    EVALUATION_MODES,
    PROBES,
    Recorder,
    binary_weights,
    critical_sample_ratio,
    epochs_to_reach,
    flip_ratio,
    mode_errors,
    part_errors,
    saturation,
)
from bnnlib.train import Evaluation, EvaluationMode, evaluate

LAYERS = ("conv1", "conv2", "dense3", "dense4")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model(tiny):
    return seed_layers(binarynet(tiny, generator=seeded(), weights="stochastic"), 7)


# -------------------------------------------------------------------------- time to memorize


def test_epochs_to_reach_are_the_first_evaluated_ones_at_or_under_each_limit():
    errors = [0.9, nan, 0.5, nan, 0.08, 0.3, 0.02]
    history = History([{"epoch": i, "train_error": e} for i, e in enumerate(errors, start=1)])
    assert epochs_to_reach(history) == [3, 5, None]
    assert epochs_to_reach(history, (0.02, 0.95)) == [7, 1]
    assert epochs_to_reach(History()) == [None] * 3


def test_epochs_to_reach_in_another_column():
    history = History([{"epoch": 4, "train_error": 0.9, "test_error": 0.1}])
    assert epochs_to_reach(history, (0.5,), "test_error") == [4]
    with pytest.raises(InvalidValue, match="did you mean 'test_error'"):
        epochs_to_reach(history, (0.5,), "tets_error")


# ------------------------------------------------------------------- flips and saturation


@torch.no_grad()
def test_flips_are_counted_by_layer(model):
    before = binary_weights(model)
    assert list(before) == list(LAYERS)
    model.conv1.weight[0] *= -1  # 27 of 108
    model.dense4.weight.mul_(0.5)  # changes no sign
    model.dense4.weight[0, :6] = -model.dense4.weight[0, :6]  # 6 of 120
    found = flip_ratio(before, binary_weights(model))
    assert found == {"conv1": 0.25, "conv2": 0, "dense3": 0, "dense4": 0.05}


@torch.no_grad()
def test_zero_counts_as_plus_one(model):
    model.dense4.weight.fill_(1)
    before = binary_weights(model)
    model.dense4.weight[0] = 0.0
    model.dense4.weight[1] = -0.0
    assert flip_ratio(before, binary_weights(model))["dense4"] == 0


@torch.no_grad()
def test_saturation_counts_both_ends_of_the_clip(model):
    assert set(saturation(model).values()) == {0.0}
    model.conv1.weight[0], model.conv1.weight[1] = 1, -1
    model.conv1.weight[2] = 0.999
    assert saturation(model) == {"conv1": 0.5, "conv2": 0, "dense3": 0, "dense4": 0}
    assert set(saturation(binarize_parameters_(model)).values()) == {1.0}


def test_the_twin_has_no_binary_weights(tiny):
    twin = binarynet(tiny, generator=seeded(), binary=False)
    assert binary_weights(twin) == saturation(twin) == flip_ratio({}, {}) == {}


# ------------------------------------------------------------------------------------ parts


def test_errors_on_true_and_on_false_labels(noise):
    data = noise(n=60)
    corrupted = random_labels(data, 0.5, seed=1)
    counts = corrupted.corrupted.tolist()
    wrong = torch.tensor([i % 3 == 0 for i in range(60)])
    found = part_errors(Evaluation(20 / 60, (), wrong), corrupted)
    for part, flag in (("clean", False), ("corrupted", True)):
        chosen = [i for i in range(60) if counts[i] is flag]
        assert found[part] == pytest.approx(sum(i % 3 == 0 for i in chosen) / len(chosen))
    true = part_errors(Evaluation(20 / 60, (), wrong), data)
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


def test_a_sample_is_critical_where_the_boundary_lies_within_the_radius():
    heights = torch.tensor([0.2, 0.5, 0.9, 1.1, 2.0, -0.5, -1.1, -2.0])
    x = heights.view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    # one pixel must sink for the first three; all three must rise for the sixth
    ratio = critical_sample_ratio(Threshold(), x, radius=1.0, steps=40, generator=seeded())
    assert ratio == 4 / 8
    assert critical_sample_ratio(Threshold(), x, radius=3.0, steps=40, generator=seeded()) == 1
    assert critical_sample_ratio(Threshold(), x, radius=1.0, steps=0, generator=seeded()) == 0


def test_the_search_stays_in_the_box_and_reaches_its_corners():
    model, x = Threshold(), torch.randn(50, 3, 2, 2, generator=seeded())
    critical_sample_ratio(model, x, radius=0.25, generator=seeded())
    moved = torch.stack(model.seen) - x
    assert moved.abs().max().item() == pytest.approx(0.25, abs=1e-6)


def test_the_search_is_decided_by_its_generator(model, noise):
    x = noise(200).images / 127.5 - 1
    ratios = [
        critical_sample_ratio(binarize_parameters_(model), x, 0.2, steps=3, generator=seeded(s))
        for s in (0, 0, 1, 2, 3)
    ]
    assert 0 < ratios[0] < 1
    assert ratios[0] == ratios[1]
    assert len(set(ratios)) > 1


def test_a_constant_prediction_has_no_critical_samples(tiny):
    model = binarynet(tiny, generator=seeded())
    nn.init.zeros_(model.norm4.weight)
    model.norm4.bias.data[3] = 1
    x = torch.rand(20, 3, 8, 8, generator=seeded())
    assert critical_sample_ratio(model, x, radius=2.0, generator=seeded()) == 0


def test_without_room_to_move_no_sample_is_critical_even_with_stochastic_weights(model):
    x = torch.rand(50, 3, 8, 8, generator=seeded())
    assert critical_sample_ratio(model, x, radius=0.0, generator=seeded()) == 0


# -------------------------------------------------------------------- evaluation modes


def test_the_modes_are_those_of_the_two_scripts_and_three_corrected_ones():
    assert {name: (m.weights, m.statistics, m.samples) for name, m in EVALUATION_MODES.items()} == {
        "sign": ("deterministic", "running", 1),
        "real": ("real", "running", 1),
        "sample": ("stochastic", "running", 1),
        "mean10": ("stochastic", "running", 10),
        "batch": ("stochastic", "batch", 1),
    }


def test_each_set_is_evaluated_in_each_mode(model, noise):
    batches = {"train": Batches(noise(), 20), "test": Batches(noise(seed=1), 20)}
    found = mode_errors(model, batches)
    names = ("sign", "real", "sample", "mean10", "batch")
    assert list(found) == [f"{split}_error_{name}" for split in batches for name in names]
    for split in batches:
        real = evaluate(model, batches[split], EvaluationMode("real"))
        assert found[f"{split}_error_real"] == real.error
    assert len(set(found.values())) > 2


# --------------------------------------------------------------------------------- recorder


@pytest.fixture
def recorded(model, noise):
    """Makes a recorder of the named probes, for 60 images with half of their labels random."""

    def make(*names):
        data = random_labels(noise(), 0.5, seed=1)
        recorder = Recorder(names, model, data, seed=3)
        return recorder, {"train": evaluate(model, Batches(data, 20), EvaluationMode("real"))}

    return make


COLUMNS = {
    "flips": [f"flips_{layer}" for layer in LAYERS],
    "saturation": [f"saturation_{layer}" for layer in LAYERS],
    "parts": ["train_error_clean", "train_error_corrupted"],
    "critical": ["critical_sample_ratio"],
    "modes": [],  # after the last epoch, see `mode_errors`
}


def test_columns_of_each_probe_and_what_needs_an_evaluation(recorded, model):
    assert set(COLUMNS) == set(PROBES)
    for name, columns in COLUMNS.items():
        recorder, results = recorded(name)
        each_epoch = columns if name in ("flips", "saturation") else []
        assert list(recorder(model, {})) == each_epoch
        assert list(recorder(model, results)) == columns
    recorder, results = recorded(*PROBES)
    assert set(recorder(model, results)) == set(chain(*COLUMNS.values()))


def test_flips_are_those_since_the_epoch_before(recorded, model):
    recorder, _ = recorded("flips")
    assert set(recorder(model, {}).values()) == {0.0}
    model.conv1.weight.data[0] *= -1
    assert recorder(model, {})["flips_conv1"] == 0.25
    assert recorder(model, {})["flips_conv1"] == 0


def test_parts_are_those_of_the_evaluation(recorded, model):
    recorder, results = recorded("parts")
    row, flags = recorder(model, results), recorder.train.corrupted
    counts = (int((~flags).sum()), int(flags.sum()))
    wrong = row["train_error_clean"] * counts[0] + row["train_error_corrupted"] * counts[1]
    assert wrong == pytest.approx(60 * results["train"].error)


def test_the_critical_ratio_repeats_and_leaves_the_model(recorded, model):
    binarize_parameters_(model)
    recorder, results = recorded("critical")
    random = model.conv1.generator.get_state()
    assert recorder(model, results) == recorder(model, results)
    assert torch.equal(model.conv1.generator.get_state(), random)
    assert model.training


def test_an_unknown_probe_is_refused_with_the_nearest(recorded):
    with pytest.raises(InvalidValue, match="unknown probe 'flip'; did you mean 'flips'"):
        recorded("saturation", "flip")
