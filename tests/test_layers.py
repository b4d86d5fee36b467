"""Binary layers, batch normalization and dropout, each against PyTorch's or NumPy's own."""

import copy
from functools import partial

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
    binary_layers,
    derive_seed,
    evaluating,
    seed_layers,
)
from bnnlib.models import binarynet
from bnnlib.quantizers import (
    approx_sign,
    binarize,
    binarize_stochastic,
    binary_tanh,
    hard_sigmoid,
    real,
    scaled_sign,
    sign,
)

MODES = ["deterministic", "stochastic", "real"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(quantizer=binarize, seed=0, **more):
    return BinaryLinear(7, 5, quantizer=quantizer, generator=seeded(seed), **more)


def conv(quantizer=binarize, seed=0, kernel_size=3, **more):
    return BinaryConv2d(3, 4, kernel_size, quantizer=quantizer, generator=seeded(seed), **more)


def batch_for(layer):
    shape = (6, 7) if isinstance(layer, BinaryLinear) else (6, 3, 5, 5)
    return torch.randn(shape, generator=seeded())


def with_weight(layer, weight, x):
    """What PyTorch's own layer gives with this weight and the layer's bias."""
    if isinstance(layer, BinaryLinear):
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, padding=layer.geometry.padding)


def after_seeds(*seeds, draw):
    """What is drawn after each of these seeds of PyTorch's own generator."""
    with torch.random.fork_rng():
        return [draw() for seed in seeds if torch.manual_seed(seed)]


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
    @pytest.mark.parametrize("quantizer", [binarize, real])
    def test_it_is_pytorchs_layer_of_signs_or_latent_weights(self, make, quantizer, memory_format):
        layer = make(quantizer)
        x = batch_for(layer)
        if x.dim() == 4:
            layer, x = layer.to(memory_format=memory_format), x.to(memory_format=memory_format)
        layer.bias.data.copy_(torch.linspace(-1, 1, len(layer.bias)))
        weight = layer.weight.detach()
        weight = (sign(weight) if quantizer is binarize else weight).requires_grad_()
        ours, theirs = layer(x.requires_grad_()), with_weight(layer, weight, x)
        assert torch.equal(ours, theirs)
        found = torch.autograd.grad(ours.square().sum(), (x, layer.weight, layer.bias))
        expected = torch.autograd.grad(theirs.square().sum(), (x, weight, layer.bias))
        assert all(map(torch.equal, found[:2], expected[:2]))
        torch.testing.assert_close(found[2], expected[2])  # summed in another order

    def test_stochastic_weights_are_samples_of_the_seeded_generator(self, make):
        layer = make(binarize_stochastic)
        x = batch_for(layer)
        first, second = seed_layers(layer, 3)(x), layer(x)
        assert not torch.equal(first, second)
        assert torch.equal(seed_layers(layer, 3)(x), first)
        assert not torch.equal(seed_layers(layer, 4)(x), first)
        assert set(layer.effective_weight().flatten().tolist()) == {-1.0, 1.0}

    def test_without_a_seed_weights_are_drawn_by_pytorchs_own_generator(self, make):
        layer = seed_layers(seed_layers(make(binarize_stochastic), 3), None)
        first, again, other = after_seeds(7, 7, 8, draw=partial(layer, batch_for(layer)))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_any_function_or_module_is_a_quantizer_and_gets_the_generator_it_asks_for(self, make):
        def noisy(weight, generator):
            return weight + torch.rand(weight.shape, generator=generator)

        class Noisy(nn.Module):
            def forward(self, weight, generator=None):
                return noisy(weight, generator)

        layer = make()
        x, latent = batch_for(layer), layer.weight.detach()
        drawn = latent + torch.rand(latent.shape, generator=seeded(3))
        for quantizer, weight in (
            (torch.tanh, latent.tanh()),
            (nn.Hardtanh(-0.5, 0.5), latent.clamp(-0.5, 0.5)),
            (lambda w: 2 * w, 2 * latent),
            (noisy, drawn),
            (Noisy(), drawn),
        ):
            own = seed_layers(make(quantizer), 3)
            assert torch.equal(own(x), with_weight(layer, weight, x)), quantizer

    @pytest.mark.parametrize("quantizer", ["stochastic", None, 1.0])
    def test_what_cannot_be_called_is_no_quantizer(self, make, quantizer):
        with pytest.raises(InvalidValue, match=f"a function or a module, got {quantizer!r}"):
            make(quantizer)

    @pytest.mark.parametrize(
        ("quantizer", "deterministic"),
        [
            (binarize, sign),
            (binary_tanh, sign),
            (scaled_sign, scaled_sign),
            (torch.tanh, torch.tanh),
            (binarize_stochastic, sign),  # it draws
            (real, sign),  # it leaves W as it is
        ],
    )
    def test_what_a_layer_is_evaluated_with(self, make, quantizer, deterministic):
        layer = make(quantizer)
        x, latent = batch_for(layer), layer.weight.detach()
        drawn = sign(hard_sigmoid(latent) - (1 - torch.rand(latent.shape, generator=seeded(4))))
        expected = {"deterministic": deterministic(latent), "stochastic": drawn, "real": latent}
        for mode, weight in expected.items():
            with evaluating(layer, mode, seed=4):
                torch.testing.assert_close(layer(x), with_weight(layer, weight, x))
        with evaluating(layer, seed=4):
            own = drawn if quantizer is binarize_stochastic else quantizer(latent)
            torch.testing.assert_close(layer(x), with_weight(layer, own, x))

    def test_an_own_quantizer_that_draws_is_evaluated_as_it_trains(self, make):
        def noisy(weight, generator):
            return weight + torch.rand(weight.shape, generator=generator)

        layer = make(noisy)
        x, latent = batch_for(layer), layer.weight.detach()
        for mode in ("deterministic", None):
            with evaluating(layer, mode, seed=4):
                found = layer(x)
            torch.testing.assert_close(found, with_weight(layer, noisy(latent, seeded(4)), x))

    @pytest.mark.parametrize(
        ("quantizer", "precision"),
        [
            *((quantizer, "half") for quantizer in (binarize, binarize_stochastic)),
            *((quantizer, "half") for quantizer in (binary_tanh, approx_sign)),
            *((quantizer, "float32") for quantizer in (real, scaled_sign, torch.tanh)),
        ],
    )
    def test_only_sums_of_signs_are_taken_in_half(self, make, quantizer, precision):
        layer = make(quantizer)
        layer.precision = "half"
        assert layer.operands()[3] == precision
        with evaluating(layer, "real"):
            assert layer.operands()[3] == "float32"

    def test_a_layer_may_have_no_bias(self, make):
        layer = make(bias=False)
        x = batch_for(layer)
        assert [name for name, _ in layer.named_parameters()] == ["weight"]
        assert torch.equal(layer(x), with_weight(layer, sign(layer.weight), x))

    def test_description_says_shape_and_quantizer(self, make):
        shape = str(tuple(make().weight.shape))
        assert f"{shape}, quantizer=real" in repr(make(real))
        assert f"{shape}, quantizer=Hardtanh, bias=False" in repr(make(nn.Hardtanh(), bias=False))


@pytest.mark.parametrize("make", [lambda: BinaryLinear(7, 5), lambda: BinaryConv2d(3, 4, 3)])
def test_without_a_generator_weights_start_as_pytorchs_own_draws(make):
    one, same, other = (layer.weight for layer in after_seeds(7, 7, 8, draw=make))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.abs().max() <= 1


@pytest.mark.parametrize("pad_value", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_border_is_filled_with_the_pad_value(pad_value, kernel_size):
    layer = conv(pad_value=pad_value, kernel_size=kernel_size)
    x, border = batch_for(layer), (kernel_size // 2,) * 2
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), border, border), constant_values=pad_value)
    expected = F.conv2d(torch.from_numpy(padded), sign(layer.weight), layer.bias)
    assert layer(x).shape == (6, 4, 5, 5)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("pad_value", [0.0, -1.0])
@pytest.mark.parametrize(
    ("sizes", "border"),
    [
        ({"stride": 2}, (1, 1)),
        ({"stride": (1, 3), "kernel_size": (1, 5)}, (0, 2)),
        ({"padding": "valid"}, (0, 0)),
        ({"padding": 2, "kernel_size": 2}, (2, 2)),  # an even kernel with a border of its own
        ({"padding": (0, 1), "kernel_size": (4, 3), "stride": (2, 1)}, (0, 1)),
        ({"groups": 2, "stride": 2}, (1, 1)),
        ({"groups": 4}, (1, 1)),
    ],
)
def test_geometry_is_that_of_pytorchs_convolution(sizes, border, pad_value):
    layer = BinaryConv2d(4, 8, **{"kernel_size": 3} | sizes, pad_value=pad_value)
    nn.init.uniform_(layer.bias)
    theirs = nn.Conv2d(4, 8, **{"kernel_size": 3} | sizes | {"padding": 0})
    theirs.load_state_dict({"weight": sign(layer.weight), "bias": layer.bias})
    x = torch.randn(2, 4, 7, 8, generator=seeded())
    up, left = border
    padded = F.pad(x, (left, left, up, up), value=pad_value)
    assert layer.weight.shape == theirs.weight.shape
    torch.testing.assert_close(layer(x), theirs(padded))


@pytest.mark.parametrize(("size", "stride", "out"), [(7, 2, 4), (8, 2, 4), (8, 3, 3), (7, 1, 7)])
def test_padding_same_keeps_the_size_up_to_the_stride(size, stride, out):
    x = torch.zeros(1, 3, size, size)
    for kernel_size in (1, 3, 5):
        assert conv(kernel_size=kernel_size, stride=stride)(x).shape[2:] == (out, out)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"kernel_size": 2}, r"kernel_size must be odd for padding 'same', got \(2, 2\)"),
        ({"kernel_size": (3, 4)}, r"kernel_size must be odd .*got \(3, 4\)"),
        ({"kernel_size": 0}, "kernel_size must be a whole number, 1 or more, got 0"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size must be a number or two, got \(3, 3, 3\)"),
        ({"stride": 0.5}, "stride must be a whole number, 1 or more, got 0.5"),
        ({"padding": -1}, "padding must be a whole number, 0 or more, got -1"),
        ({"padding": "some"}, "unknown padding 'some'; did you mean 'same'"),
        ({"groups": 0}, "groups must be a whole number, 1 or more, got 0"),
        ({"groups": 2}, "groups must divide in_channels and out_channels, got 2 for 3 and 4"),
        ({"groups": 3}, "got 3 for 3 and 4"),
    ],
)
def test_sizes_of_which_no_convolution_can_be_made_are_refused(sizes, text):
    with pytest.raises(InvalidValue, match=text):
        conv(**sizes)


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


def test_without_a_seed_dropout_draws_from_pytorchs_own_generator():
    first, again, other = after_seeds(7, 7, 8, draw=partial(Dropout(0.5), torch.ones(50)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dropout_without_a_probability_is_refused():
    for p in (-0.1, 1, float("nan")):
        with pytest.raises(InvalidValue, match=rf"\[0, 1\), got {p}"):
            Dropout(p)


# ---------------------------------------------------------------------------- whole networks


def test_derived_seeds_differ_by_seed_and_purpose_and_fit_a_generator():
    made = [derive_seed(seed, purpose) for seed in range(5) for purpose in ("a", "b", "train")]
    assert len(set(made)) == 15
    assert all(0 <= seed < 2**63 for seed in made)
    assert derive_seed(0, "a") == 1202876661367888254  # as in every run that was stored


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
        as_before = [None, "real", None, None]
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


def test_signs_are_all_that_a_network_needs_of_its_latent_weights(tiny, generator, images):
    model = binarynet(tiny, generator=generator)
    model(images)  # moves the averages away from their start
    model.eval()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, :2] = torch.tensor([0.0, -0.0])
        y = model(images)
        for layer in binary_layers(model):
            layer.weight.copy_(sign(layer.weight))
    assert torch.equal(model(images), y)
    assert model.conv1.weight[0, 0, 0, :2].tolist() == [1, 1]
