"""fp16 holds every sum that is claimed to be exact in it."""

import copy

import pytest
import torch
from torch import nn

from bnnlib.batches import Batches
from bnnlib.errors import InvalidValue
from bnnlib.kernels.precision import is_exact_in_half, resolve_precision, set_precision
from bnnlib.layers import Activation, BinaryConv2d, BinaryLinear, evaluating, seed_layers
from bnnlib.models import ARCHITECTURES, Architecture, binarynet
from bnnlib.quantizers import approx_sign, binary_tanh

SMALL = Architecture((16, 32), pool_every=1, dense=(64, 32), image_size=8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(*shape):
    return torch.randn(shape, generator=seeded(3))


def in_half(model, side=8):
    """The model, after a look at images of `side` pixels."""
    return set_precision(model, numbers(8, 3, side, side))


def by_precision(model, precision, side=8):
    """The names of the layers with a precision, from input to output."""
    layers = in_half(model, side).named_children()
    return [name for name, layer in layers if getattr(layer, "precision", "") == precision]


# ------------------------------------------------------------------------------------- the bounds


@pytest.mark.parametrize(
    ("terms", "even", "exact"),
    [(2048, False, True), (2049, False, False), (4096, True, True), (4098, True, False)],
)
def test_a_sum_is_exact_up_to_the_bound_of_its_parity(terms, even, exact):
    assert is_exact_in_half(terms, even) == exact


@pytest.mark.parametrize(
    ("network", "first", "half", "mixed"),
    [
        ("cifar10", "conv1", "conv2 conv3 conv4 conv5 dense8 dense9", "conv6 dense7"),
        ("svhn", "conv1", "conv2 conv3 conv4 conv5 conv6 dense7 dense8 dense9", ""),
        ("dense", "dense1", "dense2 dense3", ""),
    ],
)
def test_the_precision_of_the_layers_of_a_network(network, first, half, mixed):
    model, side = binarynet(network, generator=seeded()), ARCHITECTURES[network].image_size
    assert by_precision(model, "half", side) == half.split()
    assert by_precision(model, "mixed", side) == mixed.split()
    assert by_precision(model, "float32", side) == [first]  # it is fed with pixels


def test_an_activation_that_does_not_say_its_values_is_not_trusted_with_half():
    model = binarynet(SMALL, generator=seeded())
    model.act1 = Activation(torch.sign)  # +1 and -1, but 0 for 0
    assert by_precision(model, "float32") == ["conv1", "conv2"]


@pytest.mark.parametrize(
    ("channels", "activation", "precision"),
    [
        (256, "binary_tanh", "half"),  # 2304 terms
        (256, "binary_sigmoid", "mixed"),  # 0 and 1 make odd sums as well
        (255, "binary_tanh", "mixed"),  # so does an odd number of terms
    ],
)
def test_odd_sums_halve_the_bound(channels, activation, precision):
    wide = Architecture((channels, 8), pool_every=1, dense=(8,), image_size=8)
    model = binarynet(wide, generator=seeded(), activation=activation)
    assert "conv2" in by_precision(model, precision)


def test_what_dropout_leaves_is_not_binary():
    model = binarynet(
        SMALL, generator=seeded(), dropout=(0.2,), dropout_position="after_activation"
    )
    assert by_precision(model, "half") == ["conv2", "dense3", "dense5"]
    assert by_precision(model, "float32") == ["conv1", "dense4"]


def test_an_activation_that_is_not_known_to_give_signs_is_not_taken_for_one():
    model = binarynet(SMALL, generator=seeded())
    model.act2 = nn.Tanh()
    model.act3 = Activation(lambda x: 2 * binary_tanh(x))
    model.act4 = Activation(approx_sign)
    assert by_precision(model, "float32") == ["conv1", "dense3", "dense4"]
    assert by_precision(model, "half") == ["conv2", "dense5"]


def test_a_look_leaves_the_network_and_pytorchs_generator_as_they_were():
    model = binarynet(SMALL, generator=seeded(), weights="stochastic", dropout=(0.2,)).eval()
    in_half(seed_layers(model, 3))
    twin = seed_layers(binarynet(SMALL, generator=seeded(), dropout=(0.2,)), 3)
    assert not model.training
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
    assert torch.equal(model.conv1.generator.get_state(), twin.conv1.generator.get_state())
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    before = torch.get_rng_state()
    in_half(seed_layers(model, None))
    assert torch.equal(torch.get_rng_state(), before)


# -------------------------------------------------------------------------------------- the layers


def signs(*shape, seed=0):
    return torch.randint(2, shape, generator=seeded(seed)).float() * 2 - 1


def in_both(layer, x, precision="half"):
    """The output of `layer` at a precision, and its exact output rounded once."""
    with torch.no_grad():
        layer.bias.uniform_(-3, 3, generator=seeded(9))
        layer.precision = "float32"
        exact = copy.deepcopy(layer).double()(x.double()).float()
        layer.precision = precision
        return layer(x), exact


@pytest.mark.parametrize("network", ["cifar10", "svhn"])
def test_every_exact_layer_of_the_published_networks_is_exact(network):
    model = binarynet(network, generator=seeded())
    for name in by_precision(model, "half", side=32):
        layer = model.get_submodule(name)
        size = (4, 4) if isinstance(layer, BinaryConv2d) else ()
        found, exact = in_both(layer, signs(2, layer.weight.shape[1], *size))
        assert found.dtype == torch.float32
        assert torch.equal(found, exact)


@pytest.mark.parametrize("pad_value", [0.0, 1.0, -1.0])
def test_the_largest_sums_are_exact_at_every_border(pad_value):
    layer = BinaryConv2d(256, 4, 3, pad_value=pad_value, generator=seeded())
    layer.weight.data.fill_(0.5)
    layer.weight.data[1] = -0.5
    layer.weight.data[2, 0] = -0.5  # 2302 - 2: another even number near the largest
    found, exact = in_both(layer, torch.ones(1, 256, 5, 5))
    assert torch.equal(found, exact)
    assert (exact[0, 0] - layer.bias[0]).max() == 2304


def test_beyond_the_bound_a_sum_does_round():
    layer = BinaryLinear(4608, 1, generator=seeded())
    layer.weight.data.fill_(1.0)
    layer.weight.data[0, 0] = -1.0
    found, exact = in_both(layer, torch.ones(1, 4608))
    assert found.item() != exact.item()
    assert torch.equal(*in_both(layer, torch.ones(1, 4608), "mixed"))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (BinaryConv2d(16, 24, 3, generator=seeded()), (10, 16, 6, 6)),
        (BinaryLinear(64, 24, generator=seeded()), (10, 64)),
    ],
)
@pytest.mark.parametrize("precision", ["half", "mixed"])
def test_gradients_are_those_of_float32_to_the_precision_of_bf16(layer, shape, precision):
    x = signs(*shape)
    grads = []
    for layer.precision in ("float32", precision):
        y = layer(x.requires_grad_())
        grad = torch.randn(y.shape, generator=seeded(4))
        grads.append(torch.autograd.grad(y, (x, layer.weight, layer.bias), grad))
    for plain, rough in zip(*grads, strict=True):
        assert rough.dtype == torch.float32
        assert (rough - plain).norm() <= 2**-7 * plain.norm()  # some processors add in bf16
    assert not torch.equal(grads[0][1], grads[1][1])  # it was another computation
    assert torch.equal(grads[0][2], grads[1][2])  # the bias is summed in float32


@pytest.mark.parametrize("weights", ["real", "deterministic"])
def test_a_network_gives_the_scores_of_float32_and_real_weights_are_never_rounded(noise, weights):
    plain, half = (binarynet(SMALL, generator=seeded()) for _ in range(2))
    in_half(half)
    x, _ = next(Batches(noise(), 20).in_order())
    scores = []
    for model in (plain, half):
        with torch.no_grad(), evaluating(model, weights):
            scores.append(model(x))
    tolerance = 0 if weights == "real" else 1e-5
    torch.testing.assert_close(*scores, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("precision", "device", "resolved"),
    [("auto", "cpu", "float32"), ("auto", "cuda", "half"), ("half", "cpu", "half")],
)
def test_half_precision_is_for_gpus_unless_somebody_says_otherwise(precision, device, resolved):
    assert resolve_precision(precision, torch.device(device)) == resolved


def test_unknown_precision_is_refused_with_the_nearest():
    with pytest.raises(InvalidValue, match="'float23'; did you mean 'float32'"):
        resolve_precision("float23", torch.device("cpu"))


# -------------------------------------------------------------------------------------- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("network", ["cifar10", "svhn"])
@pytest.mark.parametrize("images", [50, 500])
def test_a_gpu_takes_every_sum_of_signs_exactly(network, images):
    size = 32
    model = in_half(binarynet(network, generator=seeded()), size).cuda()
    for name, layer in list(model.named_children())[1:]:
        size = size // 2 if name.startswith("pool") else size
        if getattr(layer, "precision", "float32") == "float32":
            continue
        shape = (size, size) if isinstance(layer, BinaryConv2d) else ()
        x = signs(images, layer.weight.shape[1], *shape)
        expected = copy.deepcopy(layer).cpu()
        expected.precision = "float32"
        with torch.no_grad():  # the biases are 0, and sums in float32 are exact
            found = layer(x.cuda())
            assert torch.equal(found.cpu(), expected(x)), name
