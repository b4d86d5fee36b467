"""Binary layers, batch normalization and dropout, each against PyTorch's or NumPy's own."""

import copy

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnnlib.errors import InvalidValue
from bnnlib.layers import (
    BatchNorm,
    BinaryConv2d,
    BinaryLinear,
    Dropout,
    binarize_parameters_,
    binary_layers,
    evaluating,
    seed_layers,
)
from bnnlib.models import binarynet
from bnnlib.quantizers import sign

MODES = ["deterministic", "stochastic", "real"]


def linear(mode="deterministic", seed=0):
    return BinaryLinear(7, 5, generator=torch.Generator().manual_seed(seed), mode=mode)


def conv(mode="deterministic", pad_value=0.0, kernel_size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return BinaryConv2d(3, 4, kernel_size, pad_value, generator=generator, mode=mode)


def batch_for(layer):
    shape = (6, 7) if isinstance(layer, BinaryLinear) else (6, 3, 5, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def with_weight(layer, weight, x):
    """What PyTorch's own layer gives with this weight and the layer's bias."""
    if isinstance(layer, BinaryLinear):
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, padding=layer.padding)


# ----------------------------------------------------------------- layers with latent weights


@pytest.mark.parametrize("make", [linear, conv])
class TestBinaryLayers:
    def test_weights_start_uniform_in_minus_one_to_one_and_biases_at_zero(self, make):
        layer, again, other = make(), make(), make(seed=1)
        assert -1 <= layer.weight.min() < -0.8
        assert 0.8 < layer.weight.max() <= 1
        assert not layer.bias.any()
        assert torch.equal(layer.weight, again.weight)
        assert not torch.equal(layer.weight, other.weight)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("mode", ["deterministic", "real"])
    def test_it_is_pytorchs_layer_of_signs_or_latent_weights(self, make, mode, memory_format):
        layer = make(mode)
        x = batch_for(layer)
        if x.dim() == 4:
            layer, x = layer.to(memory_format=memory_format), x.to(memory_format=memory_format)
        layer.bias.data.copy_(torch.linspace(-1, 1, len(layer.bias)))
        weight = layer.weight.detach()
        weight = (sign(weight) if mode == "deterministic" else weight).requires_grad_()
        ours, theirs = layer(x.requires_grad_()), with_weight(layer, weight, x)
        assert torch.equal(ours, theirs)
        found = torch.autograd.grad(ours.square().sum(), (x, layer.weight, layer.bias))
        expected = torch.autograd.grad(theirs.square().sum(), (x, weight, layer.bias))
        assert all(map(torch.equal, found[:2], expected[:2]))
        torch.testing.assert_close(found[2], expected[2])  # summed in another order

    def test_stochastic_weights_are_samples_of_the_seeded_generator(self, make):
        layer = make(mode="stochastic")
        x = batch_for(layer)
        first, second = seed_layers(layer, 3)(x), layer(x)
        assert not torch.equal(first, second)
        assert torch.equal(seed_layers(layer, 3)(x), first)
        assert not torch.equal(seed_layers(layer, 4)(x), first)
        assert set(layer.effective_weight().flatten().tolist()) == {-1.0, 1.0}

    def test_random_weights_without_a_generator_are_refused(self, make):
        layer = make(mode="stochastic")
        with pytest.raises(InvalidValue, match="seed_layers"):
            layer(batch_for(layer))

    def test_unknown_mode_is_refused_with_the_nearest(self, make):
        with pytest.raises(InvalidValue, match="'stochastics'; did you mean 'stochastic'"):
            make(mode="stochastics")

    def test_description_says_shape_and_mode(self, make):
        assert f"{tuple(make().weight.shape)}, mode='real'" in repr(make(mode="real"))


@pytest.mark.parametrize("pad_value", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_border_is_filled_with_the_pad_value(pad_value, kernel_size):
    layer = conv(pad_value=pad_value, kernel_size=kernel_size)
    x, border = batch_for(layer), (kernel_size // 2,) * 2
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), border, border), constant_values=pad_value)
    expected = F.conv2d(torch.from_numpy(padded), sign(layer.weight), layer.bias)
    assert layer(x).shape == (6, 4, 5, 5)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kernel_size", [2, 4])
def test_an_even_kernel_is_refused(kernel_size):
    with pytest.raises(InvalidValue, match=f"odd .*got {kernel_size}"):
        conv(kernel_size=kernel_size)


# --------------------------------------------------------------------- batch normalization


@pytest.fixture
def norm(generator):
    layer = BatchNorm(4).double()
    nn.init.uniform_(layer.weight, 0.5, 2, generator=generator)
    nn.init.uniform_(layer.bias, -1, 1, generator=generator)
    return layer


def by_numpy(norm, x, mean, inv_std):
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    return plain.norm(x, weight, bias, mean, inv_std)[0]


@pytest.mark.parametrize("shape", [(6, 4), (5, 4, 3, 2)])
class TestBatchNorm:
    def test_output_and_averages_agree_with_numpy(self, norm, shape):
        rng = np.random.default_rng(0)
        averages = {"running_mean": np.zeros(4), "running_inv_std": np.ones(4)}  # at the start
        for scale in (3.0, 0.01, 5.0):
            x = scale * rng.standard_normal(shape) + 2
            y, moments = norm(torch.from_numpy(x)), plain.moments(x)
            np.testing.assert_allclose(y.detach(), by_numpy(norm, x, *moments), rtol=1e-10)
            for name, moment in zip(averages, moments, strict=True):
                averages[name] = 0.9 * averages[name] + 0.1 * moment
        found = dict(norm.named_buffers())
        assert set(found) == set(averages)
        for name, average in averages.items():
            assert not found[name].requires_grad
            np.testing.assert_allclose(found[name], average, rtol=1e-12)

    @pytest.mark.parametrize("statistics", ["running", "batch"])
    def test_evaluation_uses_the_statistics_asked_for_and_leaves_them(
        self, norm, shape, statistics
    ):
        norm.running_mean.copy_(torch.tensor([0.0, 1, 2, 3]))
        norm.running_inv_std.copy_(torch.tensor([1.0, 2, 0.5, 0.1]))
        before = copy.deepcopy(norm.state_dict())
        x = 3 * np.random.default_rng(0).standard_normal(shape) + 2
        with evaluating(norm, statistics=statistics):
            y = norm(torch.from_numpy(x)).detach()
        averages = norm.running_mean.numpy(), norm.running_inv_std.numpy()
        used = averages if statistics == "running" else plain.moments(x)
        np.testing.assert_allclose(y, by_numpy(norm, x, *used), rtol=1e-10)
        assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


# --------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_dropout_zeroes_a_share_p_decided_by_the_seed_and_scales_the_rest(p):
    model, x = nn.Sequential(Dropout(p), nn.Linear(1, 1)), torch.ones(40_000)
    y, other = seed_layers(model, 3)[0](x), model[0](x)
    assert torch.equal(seed_layers(model, 3)[0](x), y)
    assert not torch.equal(y, other)
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    assert abs((y == 0).double().mean().item() - p) < 5 * (p * (1 - p) / 40_000) ** 0.5


@pytest.mark.parametrize("layer", [Dropout(0.5).eval(), Dropout(0.0)])
def test_nothing_is_dropped_in_evaluation_or_with_probability_0(layer):
    x = torch.ones(4, 50)
    assert layer(x) is x


def test_dropout_without_a_generator_or_a_probability_is_refused():
    with pytest.raises(InvalidValue, match="seed_layers"):
        Dropout(0.5)(torch.ones(3))
    for p in (-0.1, 1, float("nan")):
        with pytest.raises(InvalidValue, match=rf"\[0, 1\), got {p}"):
            Dropout(p)


# ---------------------------------------------------------------------------- whole networks


@pytest.fixture
def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mixed(tiny, generator):
    """A network with dropout and generators whose layers are all in different states."""
    model = binarynet(tiny, generator=generator, weights="stochastic", dropout=(0.5,))
    seed_layers(model, 7)
    model.conv2.mode, model.norm1.statistics = "real", "batch"
    model.norm2.eval()
    return model


def states(model):
    """All that `evaluating` may change, of every module, and where each generator stands."""
    names = ("training", "mode", "statistics", "generator")
    found = [[getattr(module, name, None) for name in names] for module in model.modules()]
    return [(*values, values[-1] and values[-1].get_state().tolist()) for values in found]


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("weights", [None, *MODES])
def test_evaluating_holds_inside_the_block_and_is_undone_also_by_an_error(
    mixed, weights, statistics, images
):
    before, parameters = states(mixed), copy.deepcopy(mixed.state_dict())
    with evaluating(mixed, weights, statistics) as same:
        assert same is mixed
        assert not any(module.training for module in mixed.modules())
        as_before = ["stochastic", "real", "stochastic", "stochastic"]
        modes = [layer.mode for layer in binary_layers(mixed)]
        assert modes == ([weights] * 4 if weights else as_before)
        assert {mixed.norm1.statistics, mixed.norm4.statistics} == {statistics}
        mixed(images)
    assert states(mixed) == before
    with pytest.raises(ZeroDivisionError), evaluating(mixed, weights, statistics):
        1 / 0  # noqa: B018
    assert states(mixed) == before
    assert all(torch.equal(p, parameters[key]) for key, p in mixed.state_dict().items())


def test_stochastic_evaluation_is_decided_by_its_seed_and_samples_at_each_pass(mixed, images):
    def passes(seed):
        with evaluating(mixed, "stochastic", seed=seed):
            return torch.stack([mixed(images), mixed(images)])

    first, second = passes(3)
    assert not torch.equal(first, second)
    torch.rand(9, generator=mixed.conv1.generator)  # training goes on
    assert torch.equal(passes(3), torch.stack([first, second]))
    assert not torch.equal(passes(4), passes(3))


@pytest.mark.parametrize(
    ("settings", "nearest"),
    [({"weights": "determinist"}, "deterministic"), ({"statistics": "bach"}, "batch")],
)
def test_unknown_ways_to_evaluate_are_refused_with_the_nearest(mixed, settings, nearest):
    refused = pytest.raises(InvalidValue, match=f"did you mean '{nearest}'")
    with refused, evaluating(mixed, **settings):
        pytest.fail("the block must not be entered")


def test_binarizing_the_parameters_replaces_weights_only_and_changes_no_output(
    tiny, generator, images
):
    model = binarynet(tiny, generator=generator)
    model(images)  # moves the averages away from their start
    model.eval()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, :2] = torch.tensor([0.0, -0.0])
    before, y = copy.deepcopy(model.state_dict()), model(images)
    assert binarize_parameters_(model) is model
    assert torch.equal(model(images), y)
    assert model.conv1.weight[0, 0, 0, :2].tolist() == [1, 1]
    latent = {f"{name}.weight" for name in ("conv1", "conv2", "dense3", "dense4")}
    for key, value in model.state_dict().items():
        assert torch.equal(value, sign(before[key]) if key in latent else before[key])
