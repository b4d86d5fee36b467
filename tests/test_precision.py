"""fp16 holds every sum that is claimed to be exact in it."""

import copy

import pytest
import torch

from bnnlib.batches import Batches
from bnnlib.errors import InvalidValue
from bnnlib.layers import BinaryConv2d, BinaryLinear, evaluating
from bnnlib.models import Architecture, binarynet
from bnnlib.optim import BinaryAdam, parameter_groups
from bnnlib.precision import is_exact_in_half, use_half, uses_half
from bnnlib.train import evaluate, fit, learning_rates

SMALL = Architecture((16, 32), pool_every=1, dense=(64, 32), image_size=8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def by_precision(model, precision):
    """The names of the layers with a precision, from input to output."""
    return [n for n, m in use_half(model).named_children() if vars(m).get("precision") == precision]


def survives(integers, dtype):
    return integers.to(torch.float32).to(dtype).to(torch.int64) == integers


# ------------------------------------------------------------------------------------- the bounds


@pytest.mark.parametrize(
    ("dtype", "every", "even"), [(torch.float16, 2048, 4096), (torch.bfloat16, 256, 512)]
)
def test_the_integers_that_a_format_holds(dtype, every, even):
    integers = torch.arange(-even, even + 1)
    assert survives(integers[integers.abs() <= every], dtype).all()
    assert survives(integers[integers % 2 == 0], dtype).all()
    assert not survives(torch.tensor([every + 1, even + 2]), dtype).any()


@pytest.mark.parametrize(
    ("terms", "even", "exact"),
    [
        *((2048, False, True), (2049, False, False)),
        *((2304, True, True), (4096, True, True), (4098, True, False), (4608, True, False)),
    ],
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
    model = binarynet(network, generator=seeded())
    assert by_precision(model, "half") == half.split()
    assert by_precision(model, "mixed") == mixed.split()
    assert by_precision(model, "float32") == [first]  # it is fed with pixels


def test_values_0_and_1_make_odd_sums_and_halve_the_bound():
    wide = Architecture((256, 8), pool_every=1, dense=(8,), image_size=8)  # 2304 terms
    tanh, sigmoid = (
        binarynet(wide, generator=seeded(), activation=f"binary_{name}")
        for name in ("tanh", "sigmoid")
    )
    assert "conv2" in by_precision(tanh, "half")
    assert "conv2" in by_precision(sigmoid, "mixed")
    odd = binarynet(Architecture((255, 8), 1, (8,), 8), generator=seeded())  # 2295 terms
    assert "conv2" in by_precision(odd, "mixed")


def test_what_dropout_leaves_is_not_binary():
    model = binarynet(
        SMALL, generator=seeded(), dropout=(0.2,), dropout_position="after_activation"
    )
    assert by_precision(model, "half") == ["conv2", "dense3", "dense5"]
    assert by_precision(model, "float32") == ["conv1", "dense4"]


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


def test_every_exact_layer_of_the_published_networks_is_exact():
    for network in ("cifar10", "svhn"):
        model = binarynet(network, generator=seeded())
        for name in by_precision(model, "half"):
            layer = model.get_submodule(name)
            size = (4, 4) if isinstance(layer, BinaryConv2d) else ()
            x = signs(2, layer.weight.shape[1], *size)
            found, exact = in_both(layer, x)
            assert found.dtype == torch.float32
            assert torch.equal(found, exact)


@pytest.mark.parametrize("pad_value", [0.0, 1.0, -1.0])
def test_the_largest_sums_are_exact_at_every_border(pad_value):
    layer = BinaryConv2d(256, 4, pad_value=pad_value, generator=seeded())
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


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("precision", ["half", "mixed"])
def test_gradients_are_those_of_float32_to_the_precision_of_bf16(kind, precision):
    if kind == "conv":
        layer, x = BinaryConv2d(16, 24, generator=seeded()), signs(10, 16, 6, 6)
    else:
        layer, x = BinaryLinear(64, 24, generator=seeded()), signs(10, 64)
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


def test_real_weights_are_never_rounded(noise):
    plain, half = (binarynet(SMALL, generator=seeded()) for _ in range(2))
    x, _ = next(Batches(noise(), 20).in_order())
    use_half(half)
    with torch.no_grad():
        for weights in ("real", "deterministic"):
            outputs = []
            for model in (plain, half):
                with evaluating(model, weights):
                    outputs.append(model(x))
            if weights == "real":
                assert torch.equal(*outputs)
            else:
                torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_a_network_memorizes_in_half_precision_too(noise):
    model = use_half(binarynet(SMALL, generator=seeded()))
    data = Batches(noise(), 20)
    rates = learning_rates("linear", 1e-2, 0.0, 60)
    optimizer = BinaryAdam(parameter_groups(model))
    fit(model, optimizer, data, rates=rates, generator=seeded(), progress="none")
    in_half = evaluate(model, data)
    for name in by_precision(model, "half"):
        model.get_submodule(name).precision = "float32"
    assert in_half.error <= 0.1
    assert torch.equal(evaluate(model, data).mistakes, in_half.mistakes)


# ------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("precision", "device", "half"),
    [
        *(("auto", "cpu", False), ("auto", "cuda", True)),
        *(("half", "cpu", True), ("float32", "cuda", False)),
    ],
)
def test_half_precision_is_for_gpus_unless_somebody_says_otherwise(precision, device, half):
    assert uses_half(precision, torch.device(device)) == half


def test_unknown_precision_is_refused_with_the_nearest():
    with pytest.raises(InvalidValue, match="'float23'; did you mean 'float32'"):
        uses_half("float23", torch.device("cpu"))


# -------------------------------------------------------------------------------------- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("network", ["cifar10", "svhn"])
@pytest.mark.parametrize("images", [50, 500])
def test_a_gpu_takes_every_sum_of_signs_exactly(network, images):
    model = use_half(binarynet(network, generator=seeded())).cuda()
    size = 32
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
