"""Outputs and derivatives of the binary layers against PyTorch's own products of the signs."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bnnlib.data.images import scale_pixels
from bnnlib.errors import InvalidValue
from bnnlib.kernels.products import _without_tf32
from bnnlib.layers import BinaryConv2d, BinaryLinear
from bnnlib.losses import squared_hinge_loss
from bnnlib.models import ARCHITECTURES, binarynet
from bnnlib.quantizers import binarize, binarize_stochastic, binary_sigmoid, binary_tanh, real

SIZES = st.integers(1, 5)
LEADING = st.lists(SIZES, max_size=3).map(tuple)  # dimensions before the features; none at all
each_kind_of_layer = pytest.mark.parametrize(
    "kind", [BinaryLinear, partial(BinaryConv2d, kernel_size=3)]
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(*shape):
    return torch.randn(shape, generator=seeded(1))


def batch_for(layer):
    return numbers(5, layer.weight.shape[1], *((6, 6) if layer.weight.dim() == 4 else ()))


def borrowing(values, slope):
    """The values, with the gradient of `slope`: by PyTorch's own rules."""
    return slope + (values - slope).detach()


def reference(layer, x, weight=None):
    """The layer's output by PyTorch's functions, as `nn.Linear` and `nn.Conv2d` call them."""
    if weight is None:
        weight = borrowing(torch.where(layer.weight >= 0, 1.0, -1.0), layer.weight)
    if isinstance(layer, BinaryLinear):
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, **layer.geometry._asdict())


def first_and_second(layer, product, x):
    """The output, its gradients, and those of the gradients' squared norm."""
    x, values = x.clone().requires_grad_(), tuple(layer.parameters())
    y = product(x)
    loss = y.pow(3).mean()  # so that the gradients depend on everything
    first = torch.autograd.grad(loss, (x, *values), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, *values))
    return y, *first, *second


def assert_same_derivatives(layer, x, ours=None, theirs=reference):
    layer, x = layer.double(), x.double()
    found = first_and_second(layer, ours or layer, x)
    expected = first_and_second(layer, lambda x: theirs(layer, x), x)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(leading=LEADING, inputs=SIZES, outputs=SIZES)
def test_a_linear_layer_takes_any_leading_dimensions(leading, inputs, outputs):
    layer = BinaryLinear(inputs, outputs, generator=seeded())
    assert_same_derivatives(layer, numbers(*leading, inputs))


def test_a_square_batch_of_sequences_gets_the_right_gradients():
    """With B = T = out_features a transposed gradient has the right shape and wrong numbers."""
    assert_same_derivatives(BinaryLinear(4, 3, generator=seeded()), numbers(3, 3, 4))


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    batch=st.none() | SIZES, channels=st.tuples(SIZES, SIZES), size=st.tuples(SIZES, SIZES), k=SIZES
)
def test_a_convolution_takes_a_batch_or_one_image(batch, channels, size, k):
    layer = BinaryConv2d(*channels, 2 * (k // 2) + 1, generator=seeded())
    leading = () if batch is None else (batch,)
    assert_same_derivatives(layer, numbers(*leading, channels[0], *size))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": 2},
        {"stride": (3, 1), "padding": (2, 0)},
        {"padding": "valid", "groups": 2},
        {"kernel_size": (1, 2), "padding": 1, "groups": 4, "stride": 2},
    ],
)
def test_derivatives_of_a_convolution_of_any_geometry(geometry, bias):
    layer = BinaryConv2d(4, 8, **{"kernel_size": 3} | geometry, bias=bias, generator=seeded())
    assert_same_derivatives(layer, numbers(2, 4, 7, 6))


@pytest.mark.parametrize("quantizer", [binarize_stochastic, real])
@each_kind_of_layer
def test_derivatives_of_other_weights_than_signs(kind, quantizer):
    layer = kind(3, 4, generator=seeded(), quantizer=quantizer).double()
    layer.generator = seeded(7)
    drawn = layer.effective_weight().detach()

    def ours(x):
        layer.generator = seeded(7)
        return layer(x)

    def theirs(layer, x):
        return reference(layer, x, borrowing(drawn, layer.weight))

    assert_same_derivatives(layer, batch_for(layer), ours, theirs)


@pytest.mark.parametrize(
    ("quantizer", "slope"),
    [
        (binarize, lambda x: x),
        (binary_tanh, lambda x: x.clamp(-1, 1)),
        (binary_sigmoid, lambda x: ((x + 1) / 2).clamp(0, 1)),
    ],
)
def test_derivatives_of_a_quantizer_are_those_of_the_function_whose_slope_it_borrows(
    quantizer, slope
):
    layer = BinaryLinear(7, 5, generator=seeded())

    def theirs(layer, x):
        return reference(layer, borrowing(quantizer(x), slope(x)))

    assert_same_derivatives(layer, batch_for(layer), lambda x: layer(quantizer(x)), theirs)


@pytest.mark.parametrize("precision", ["half", "mixed"])
@each_kind_of_layer
def test_second_derivatives_in_reduced_precision_are_refused(kind, precision):
    layer = kind(4, 3, generator=seeded())
    layer.precision = precision
    x = batch_for(layer).sign().requires_grad_()
    with pytest.raises(InvalidValue, match=f"at precision 'float32' only.*{precision!r}"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("precision", ["float32", "half", "mixed"])
@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
@each_kind_of_layer
def test_what_needs_no_gradient_gets_none(kind, frozen, precision):
    layer = kind(4, 3, generator=seeded())
    layer.precision = precision
    parts = {"input": batch_for(layer).sign(), "weight": layer.weight, "bias": layer.bias}
    for name, part in parts.items():
        part.requires_grad_(name != frozen)
    layer(parts["input"]).square().sum().backward()
    assert {name for name, part in parts.items() if part.grad is None} == {frozen}


class Scaled(BinaryLinear):
    """Signs times a number, as XNOR-Net has them."""

    def effective_weight(self):
        return 0.5 * super().effective_weight()


@pytest.mark.parametrize("quantizer", [binarize, real])
def test_an_own_effective_weight_is_obeyed_of_a_class_or_of_one_layer_alone(quantizer):
    made = partial(BinaryLinear, 7, 5), partial(Scaled, 7, 5)
    plain, scaled = (make(quantizer=quantizer, generator=seeded()) for make in made)
    x = numbers(6, 7)
    torch.testing.assert_close(scaled(x), 0.5 * plain(x))
    plain.effective_weight = lambda: torch.ones(5, 7)
    assert torch.equal(plain(x), F.linear(x, torch.ones(5, 7), plain.bias))


# -------------------------------------------------------------------------- autocast and TF32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
@each_kind_of_layer
def test_autocast_is_followed_as_pytorchs_layers_follow_it(kind, dtype):
    layer = kind(4, 3, generator=seeded())
    with torch.no_grad():
        layer.weight[0, 0] = -1e-9  # no number of float16
    results = []
    for product in (layer, lambda x: reference(layer, x)):
        x = batch_for(layer).requires_grad_()
        with torch.autocast("cpu", dtype) if dtype else nullcontext():
            y = product(x)
        grads = torch.autograd.grad(y.float().square().mean(), (x, layer.weight, layer.bias))
        results.append((y, *grads))
    assert [t.dtype for t in results[0]] == [dtype or torch.float32, *[torch.float32] * 3]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("network", ["small", "dense"])
def test_a_whole_network_trains_under_autocast(network):
    model = binarynet(network, generator=seeded(), width=0.25)
    side = ARCHITECTURES[network].image_size
    x, labels = numbers(20, 3, side, side), torch.arange(20) % 10
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = squared_hinge_loss(model(x), labels)
        loss.backward()
        model.train(not model.training)  # once with the averages
    for p in model.parameters():
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


@pytest.fixture
def precision_flags():
    """Leaves PyTorch's switches of precision as they were."""
    names = [torch.backends, torch.backends.cudnn, torch.backends.cudnn.conv]
    before = [flag.fp32_precision for flag in names]
    yield
    for flag, value in zip(names, before, strict=True):
        flag.fp32_precision = value


@pytest.mark.parametrize("said", [None, "ieee", "tf32"])
def test_tf32_is_off_inside_and_as_it_was_afterwards(said, precision_flags):
    """With PyTorch's new switches too, beside which its old ones raise."""
    if said:
        torch.backends.fp32_precision = said
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    with _without_tf32(True):
        assert conv.fp32_precision == "ieee"
    assert conv.fp32_precision == before
    if said:  # and it still follows the switch of all
        torch.backends.fp32_precision = "ieee" if said == "tf32" else "tf32"
        assert conv.fp32_precision == torch.backends.fp32_precision
    with _without_tf32(False):
        assert conv.fp32_precision != "none"


# ------------------------------------------------------------------------- rounded once


@pytest.mark.parametrize("make", [lambda: BinaryConv2d(3, 8, 3), lambda: BinaryLinear(75, 8)])
def test_in_evaluation_a_first_layer_rounds_its_sum_once(make, generator):
    """So it is the exact sum of scaled pixels, rounded: float64 holds that sum."""
    layer = make().eval()
    layer.bias.data.uniform_(generator=generator)
    shape = (5, 3, 9, 9) if isinstance(layer, BinaryConv2d) else (200, 75)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    x, bias = scale_pixels(pixels), layer.bias.data.clone()
    exact = copy.deepcopy(layer).double()
    exact.bias.data.zero_()
    expected = exact(x.double()).float() + bias.view(-1, *(1,) * (x.dim() - 2))
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x.requires_grad_()).detach(), expected)
    torch.testing.assert_close(layer.train()(x), expected)
