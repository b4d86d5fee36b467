import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnnlib.errors import InvalidValue
from bnnlib.layers import (
    BatchNorm,
    BinaryConv2d,
    BinaryLinear,
    BinarySigmoid,
    BinaryTanh,
    Dropout,
    binarize_parameters_,
    binary_layers,
    evaluating,
    seed_layers,
)
from bnnlib.models import binarynet
from bnnlib.quantizers import binary_sigmoid, binary_tanh, sign

MODES = ["deterministic", "stochastic", "real"]


def linear(mode="deterministic", seed=0):
    return BinaryLinear(7, 5, generator=torch.Generator().manual_seed(seed), mode=mode)


def conv(mode="deterministic", pad_value=0.0, kernel_size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return BinaryConv2d(3, 4, kernel_size, pad_value, generator=generator, mode=mode)


@pytest.fixture
def batch(generator):
    """Makes one batch that fits the layer."""

    def make(layer):
        shape = (6, 7) if isinstance(layer, BinaryLinear) else (6, 3, 5, 5)
        return torch.randn(shape, generator=generator)

    return make


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

    def test_deterministic_is_pytorchs_layer_fed_the_signs(self, make, batch):
        layer = make()
        nn.init.uniform_(layer.bias)
        x = batch(layer)
        assert torch.equal(layer(x), with_weight(layer, sign(layer.weight), x))

    def test_real_is_pytorchs_layer_fed_the_latent_weight(self, make, batch):
        layer = make(mode="real")
        x = batch(layer)
        assert torch.equal(layer(x), with_weight(layer, layer.weight, x))

    def test_gradient_of_the_latent_weight_is_that_of_its_sign(self, make, batch):
        layer = make()
        x, signs = batch(layer), sign(layer.weight.detach()).requires_grad_()
        layer(x).square().sum().backward()
        with_weight(layer, signs, x).square().sum().backward()
        assert torch.equal(layer.weight.grad, signs.grad)

    def test_stochastic_weights_are_samples_of_the_seeded_generator(self, make, batch):
        layer = make(mode="stochastic")
        x = batch(layer)
        first, second = seed_layers(layer, 3)(x), layer(x)
        assert not torch.equal(first, second)
        assert torch.equal(seed_layers(layer, 3)(x), first)
        assert not torch.equal(seed_layers(layer, 4)(x), first)
        assert set(layer.effective_weight().flatten().tolist()) == {-1.0, 1.0}

    def test_stochastic_weights_that_are_saturated_are_deterministic(self, make, batch):
        layer = binarize_parameters_(seed_layers(make(mode="stochastic"), 3))
        x = batch(layer)
        assert all(torch.equal(layer.effective_weight(), layer.weight) for _ in range(50))
        assert torch.equal(layer(x), with_weight(layer, layer.weight, x))

    def test_stochastic_weights_without_a_generator_are_refused(self, make, batch):
        layer = make(mode="stochastic")
        with pytest.raises(InvalidValue, match="seed_layers"):
            layer(batch(layer))

    def test_unknown_mode_is_refused_with_the_nearest(self, make):
        with pytest.raises(InvalidValue, match="'stochastics'; did you mean 'stochastic'"):
            make(mode="stochastics")

    def test_description_says_shape_and_mode(self, make):
        assert str(tuple(make().weight.shape)) in repr(make(mode="real"))
        assert "real" in repr(make(mode="real"))


@pytest.mark.parametrize(
    ("layer", "fan_in", "fan_out"),
    [(linear(), 7, 5), (conv(), 9 * 3, 9 * 4), (conv(kernel_size=5), 25 * 3, 25 * 4)],
)
def test_learning_rate_is_scaled_by_the_inverse_of_glorots_bound(layer, fan_in, fan_out):
    assert layer.lr_scale == pytest.approx(((fan_in + fan_out) / 1.5) ** 0.5)


@pytest.mark.parametrize("pad_value", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_border_is_filled_with_the_pad_value(pad_value, kernel_size, batch):
    layer = conv(pad_value=pad_value, kernel_size=kernel_size)
    x, border = batch(layer), (kernel_size // 2,) * 2
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), border, border), constant_values=pad_value)
    expected = F.conv2d(torch.from_numpy(padded), sign(layer.weight), layer.bias)
    assert layer(x).shape == (6, 4, 5, 5)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kernel_size", [2, 4])
def test_an_even_kernel_is_refused(kernel_size):
    with pytest.raises(InvalidValue, match=f"odd .*got {kernel_size}"):
        conv(kernel_size=kernel_size)


@pytest.mark.parametrize(
    ("module", "function"), [(BinaryTanh(), binary_tanh), (BinarySigmoid(), binary_sigmoid)]
)
def test_activation_modules_are_their_functions(module, function, generator):
    x = torch.randn(20, generator=generator)
    assert torch.equal(module(x), function(x))


# --------------------------------------------------------------------- batch normalization


def normalized(x, gamma, beta, eps):
    """Output, mean and 1/std by NumPy, with the biased variance."""
    axes = tuple(i for i in range(x.ndim) if i != 1)
    channel = (1, -1) + (1,) * (x.ndim - 2)
    mean, inv_std = x.mean(axes), 1 / np.sqrt(x.var(axes) + eps)
    centred = x - mean.reshape(channel)
    return centred * (inv_std * gamma).reshape(channel) + beta.reshape(channel), mean, inv_std


@pytest.fixture
def norm(generator):
    layer = BatchNorm(4).double()
    nn.init.uniform_(layer.weight, 0.5, 2, generator=generator)
    nn.init.uniform_(layer.bias, -1, 1, generator=generator)
    return layer


@pytest.mark.parametrize("shape", [(6, 4), (5, 4, 3, 2)])
def test_batch_norm_and_its_averages_agree_with_numpy(norm, shape):
    rng = np.random.default_rng(0)
    gamma, beta = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    mean_average, inv_std_average = np.zeros(4), np.ones(4)  # start values
    for scale in (3.0, 0.01, 5.0):
        x = scale * rng.standard_normal(shape) + 2
        y, mean, inv_std = normalized(x, gamma, beta, eps=1e-4)
        np.testing.assert_allclose(norm(torch.from_numpy(x)).detach(), y, rtol=1e-10)
        mean_average = 0.9 * mean_average + 0.1 * mean
        inv_std_average = 0.9 * inv_std_average + 0.1 * inv_std
        np.testing.assert_allclose(norm.running_mean, mean_average, rtol=1e-12)
        np.testing.assert_allclose(norm.running_inv_std, inv_std_average, rtol=1e-12)


@pytest.mark.parametrize("shape", [(6, 4), (5, 4, 3, 2)])
def test_evaluation_uses_the_averages_and_leaves_them(norm, shape, generator):
    norm.running_mean.copy_(torch.tensor([0.0, 1, 2, 3]))
    norm.running_inv_std.copy_(torch.tensor([1.0, 2, 0.5, 0.1]))
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    y = norm.eval()(x)
    channel = (1, 4) + (1,) * (x.dim() - 2)
    mean, inv_std, gamma, beta = (
        t.view(channel) for t in (norm.running_mean, norm.running_inv_std, norm.weight, norm.bias)
    )
    torch.testing.assert_close(y, (x - mean) * inv_std * gamma + beta)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("shape", [(6, 4), (5, 4, 3, 2)])
def test_evaluation_with_statistics_of_the_batch_agrees_with_numpy(norm, shape):
    norm.running_mean.fill_(7)
    before = copy.deepcopy(norm.state_dict())
    x = 3 * np.random.default_rng(0).standard_normal(shape) + 2
    with evaluating(norm, statistics="batch"):
        y = norm(torch.from_numpy(x)).detach()
    gamma, beta = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    np.testing.assert_allclose(y, normalized(x, gamma, beta, eps=1e-4)[0], rtol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


def test_averages_are_buffers_without_gradient(norm):
    norm(torch.randn(6, 4, dtype=torch.float64)).sum().backward()
    assert {name for name, _ in norm.named_buffers()} == {"running_mean", "running_inv_std"}
    assert not norm.running_mean.requires_grad
    assert not norm.running_inv_std.requires_grad


# --------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_dropout_zeroes_a_share_p_and_scales_the_rest(p):
    layer = Dropout(p)
    layer.generator = torch.Generator().manual_seed(0)
    y = layer(torch.ones(40_000))
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    assert abs((y == 0).double().mean().item() - p) < 5 * (p * (1 - p) / 40_000) ** 0.5


def test_dropped_entries_are_those_of_the_seed():
    model, x = nn.Sequential(nn.Linear(50, 50), Dropout(0.5)), torch.ones(4, 50)
    first, second = seed_layers(model, 3)(x), model(x)
    assert torch.equal(seed_layers(model, 3)(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("layer", [Dropout(0.5).eval(), Dropout(0.0)])
def test_nothing_is_dropped_in_evaluation_or_with_probability_0(layer):
    x = torch.ones(4, 50)
    assert layer(x) is x


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, float("nan")])
def test_a_probability_outside_0_to_1_is_refused(p):
    with pytest.raises(InvalidValue, match=rf"\[0, 1\), got {p}"):
        Dropout(p)


def test_dropout_without_a_generator_is_refused():
    with pytest.raises(InvalidValue, match="seed_layers"):
        Dropout(0.5)(torch.ones(3))


# ---------------------------------------------------------------------------- whole networks


@pytest.fixture
def model(tiny, generator):
    return binarynet(tiny, generator=generator)


def modes(model):
    return [layer.mode for layer in binary_layers(model)]


def test_binary_layers_come_from_input_to_output(model):
    assert binary_layers(model) == [model.conv1, model.conv2, model.dense3, model.dense4]


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
    mixed, weights, statistics, generator
):
    x = torch.randn(5, 3, 8, 8, generator=generator)
    before, parameters = states(mixed), copy.deepcopy(mixed.state_dict())
    with evaluating(mixed, weights, statistics) as same:
        assert same is mixed
        assert not any(module.training for module in mixed.modules())
        expected = ["stochastic", "real", "stochastic", "stochastic"]
        assert modes(mixed) == ([weights] * 4 if weights else expected)
        assert {mixed.norm1.statistics, mixed.norm4.statistics} == {statistics}
        mixed(x)
    assert states(mixed) == before
    with pytest.raises(ZeroDivisionError), evaluating(mixed, weights, statistics):
        1 / 0  # noqa: B018
    assert states(mixed) == before
    assert all(torch.equal(p, parameters[key]) for key, p in mixed.state_dict().items())


def test_stochastic_evaluation_is_decided_by_its_seed_and_samples_at_each_pass(mixed, generator):
    x = torch.randn(5, 3, 8, 8, generator=generator)

    def passes(seed):
        with evaluating(mixed, "stochastic", seed=seed):
            return torch.stack([mixed(x), mixed(x)])

    first, second = passes(3)
    assert not torch.equal(first, second)
    torch.rand(9, generator=mixed.conv1.generator)  # training goes on
    assert torch.equal(passes(3), torch.stack([first, second]))
    assert not torch.equal(passes(4), passes(3))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"weights": "determinist"}, "did you mean 'deterministic'"),
        ({"statistics": "bach"}, "did you mean 'batch'"),
    ],
)
def test_unknown_ways_to_evaluate_are_refused_with_the_nearest(model, settings, text):
    with pytest.raises(InvalidValue, match=text), evaluating(model, **settings):
        pytest.fail("the block must not be entered")


def test_binarizing_the_parameters_replaces_weights_only_and_changes_no_output(model, generator):
    x = torch.randn(5, 3, 8, 8, generator=generator)
    model(x)  # moves the averages away from their start
    model.eval()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, :2] = torch.tensor([0.0, -0.0])
    before, y = copy.deepcopy(model.state_dict()), model(x)
    assert binarize_parameters_(model) is model
    assert torch.equal(model(x), y)
    assert model.conv1.weight[0, 0, 0, :2].tolist() == [1, 1]
    latent = {f"{name}.weight" for name in ("conv1", "conv2", "dense3", "dense4")}
    for key, value in model.state_dict().items():
        assert torch.equal(value, sign(before[key]) if key in latent else before[key])
