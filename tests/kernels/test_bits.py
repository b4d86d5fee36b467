"""Each compiled kernel against its definition in NumPy, for every instruction set there is here."""

import copy
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from bnnlib.kernels import bits, compiled, definitions
from bnnlib.kernels.bits import Operands, Weights
from bnnlib.kernels.geometry import MOST_PIXELS, Geometry
from bnnlib.layers import BinaryConv2d, BinaryLinear
from bnnlib.names import QUANTIZERS
from bnnlib.packed.fold import pixel_values

HERE = compiled.sets_here()
EXACT = 2e-6  # of the largest number: several times the rounding of float32


@pytest.fixture(params=HERE)
def each_set(request, kernels, monkeypatch):
    """Kernels of each instruction set in turn, for layers of any size."""
    kernels(request.param)
    monkeypatch.setattr(bits, "pays", lambda shape: True)
    return request.param


@contextmanager
def forced(name):
    """The same for hypothesis, which takes no fixture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "library", lambda: compiled.library(name))
        patch.setattr(bits, "pays", lambda shape: True)
        yield


def close(found, expected):
    scale = max(np.abs(expected).max(initial=0), 1e-30)
    assert np.abs(np.asarray(found) - expected).max(initial=0) <= EXACT * scale


# ------------------------------------------------------------------------------ the definitions


def test_a_word_has_the_first_channel_in_its_lowest_bit():
    x = -np.ones((1, 70))
    x[0, [0, 3, 64]] = 1
    assert_array_equal(definitions.pack(x), np.array([[0b1001, 1]], np.uint64))
    assert_array_equal(definitions.unpack(definitions.pack(x), 70), x)
    assert_array_equal(definitions.unpack(definitions.pack(x), 70, low=0), x > 0)


@pytest.mark.parametrize("low", [-1, 0])
@pytest.mark.parametrize(
    ("stride", "padding"), [((1, 1), (1, 1)), ((2, 1), (0, 2)), ((3, 2), (2, 0))]
)
def test_the_definitions_are_pytorchs_convolution_and_its_gradients(low, stride, padding):
    geometry, generator = Geometry(stride, padding), np.random.default_rng(0)
    x = generator.choice([low, 1], (3, 6, 7, 5)).astype(float)
    w = generator.choice([-1, 1], (4, 3, 3, 5)).astype(float)
    tx, tw = (torch.from_numpy(a).permute(0, 3, 1, 2).requires_grad_() for a in (x, w))
    y = torch.nn.functional.conv2d(tx, tw, stride=stride, padding=padding)
    grad = torch.from_numpy(generator.standard_normal(y.shape))
    y.backward(grad)
    last = grad.permute(0, 2, 3, 1).numpy()
    words = definitions.pack(x), definitions.pack(w)
    assert_array_equal(
        definitions.sums(*words, 5, low, geometry), y.detach().permute(0, 2, 3, 1).numpy()
    )
    close(
        definitions.weight_gradient(words[0], last, w.shape, low, geometry),
        tw.grad.permute(0, 2, 3, 1).numpy(),
    )
    close(
        definitions.input_gradient(words[1], last, x.shape, geometry),
        tx.grad.permute(0, 2, 3, 1).numpy(),
    )


# -------------------------------------------------------------------------------- any shape


@st.composite
def layers(draw):
    """Sizes of a layer, and numbers for it."""
    size = st.integers(1, 7)
    kernel, stride = (draw(st.tuples(st.integers(1, 5), st.integers(1, 5))) for _ in range(2))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    image = tuple(draw(size) + max(0, k - 2 * p) for k, p in zip(kernel, padding, strict=True))
    n, c, o = draw(st.integers(1, 9)), draw(st.integers(1, 140)), draw(st.integers(1, 70))
    n *= draw(st.sampled_from([1, 1, 8]))
    low = draw(st.sampled_from([-1, 0]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = generator.choice([low, 1], (n, *image, c)).astype(np.float32)
    w = generator.choice([-1, 1], (o, *kernel, c)).astype(np.float32)
    return x, w, low, Geometry(stride, padding), generator


@pytest.mark.parametrize("name", HERE)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(layer=layers())
def test_kernels_are_their_definitions(name, layer):
    with forced(name):
        check_products(*layer)


def check_products(x, w, low, geometry, generator):
    words, weights = definitions.pack(x), definitions.pack(w)
    expected = definitions.sums(words, weights, x.shape[3], low, geometry)
    grad = generator.standard_normal(expected.shape).astype(np.float32)
    bias = generator.standard_normal(len(w)).astype(np.float32)
    thresholds = generator.integers(-9, 9, len(w)).astype(np.int32)

    images, taps = (torch.from_numpy(a).permute(0, 3, 1, 2) for a in (x, w))
    operands = Operands.packed(images, taps, False, geometry)
    low = -1 if (np.abs(x) == 1).all() else 0  # all ones are both
    assert operands.shape.low == low
    assert_array_equal(operands.x.numpy().view(np.uint64), words)
    assert_array_equal(operands.weight.numpy().view(np.uint64), weights)
    assert_array_equal(operands.sums(torch.from_numpy(bias)), expected.astype(np.float32) + bias)
    close(
        operands.weight_gradient(torch.from_numpy(grad)),
        definitions.weight_gradient(words, grad.astype(float), w.shape, low, geometry),
    )
    if operands.gives_input_gradient:
        close(
            operands.input_gradient(torch.from_numpy(grad)),
            definitions.input_gradient(weights, grad.astype(float), x.shape, geometry),
        )

    packed = Weights(weights, x.shape[3])
    assert_array_equal(bits.sums(words, packed, low, geometry), expected)
    assert_array_equal(
        bits.at_least(words, packed, low, thresholds, geometry),
        definitions.pack(expected >= thresholds),
    )


@pytest.mark.parametrize("name", HERE)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(layer=layers())
def test_the_layer_of_pixels_is_its_definition(name, layer):
    with forced(name):
        check_pixels(*layer)


def check_pixels(x, w, _, geometry, generator):
    c = min(x.shape[3], MOST_PIXELS // (w.shape[1] * w.shape[2]))
    weights, values = Weights(definitions.pack(w[..., :c]), c), pixel_values()
    pixels = generator.integers(0, 256, (*x.shape[:3], c)).astype(np.uint8)
    pixels[0] = generator.choice([0, 255])
    expected = definitions.pixel_sums(pixels, weights.words, c, values, geometry)
    thresholds = generator.choice(expected.ravel(), len(w)).astype(np.int32)  # on a sum
    assert_array_equal(
        bits.pixel_sums_at_least(pixels, weights, values, thresholds, geometry),
        definitions.pack(expected >= thresholds),
    )


def test_more_terms_than_16_bits_count_are_counted_in_numpy(each_set):
    x, w = np.ones((1, 1, 1, bits.MOST_TERMS + 1)), np.ones((2, 1, 1, bits.MOST_TERMS + 1))
    weights = Weights(definitions.pack(w), w.shape[3])
    for low, expected in ((-1, 2**16), (0, 2**16)):
        found = bits.sums(definitions.pack(x), weights, low, Geometry())
        assert_array_equal(found.ravel(), [expected] * 2)
    layer = BinaryLinear(bits.MOST_TERMS + 1, 2)
    assert layer(torch.ones(3, bits.MOST_TERMS + 1)).shape == (3, 2)


# ------------------------------------------------------------------------------ which numbers


@pytest.mark.parametrize("c", [1, 15, 16, 17, 64, 65, 200])
def test_packing_tells_which_two_values_there_are(each_set, c):
    signs = torch.tensor([1.0, -1.0]).repeat(c)[:c].repeat(3, 1)
    assert bits.pack(signs)[1] == -1
    assert bits.pack((signs + 1) / 2)[1] == (0 if c > 1 else -1)
    for wrong in (0.5, 2.0, -2.0, float("nan"), float("inf"), 1 + 2**-23):
        spoiled = signs.clone()
        spoiled[-1, -1] = wrong
        assert bits.pack(spoiled) is None
        latent = bits.pack(spoiled, latent=True)
        assert (latent is None) == np.isnan(wrong)
    mixed = torch.tensor([[-1.0, 0.0, 1.0]])
    assert bits.pack(mixed) is None


def test_a_latent_weight_of_either_zero_is_plus_one(each_set):
    words, _ = bits.pack(torch.tensor([[0.0, -0.0, 1e-45, -1e-45, -3.0]]), latent=True)
    assert words.item() == 0b111


# --------------------------------------------------------------------------------- in a layer


def gradients(layer, x, grad):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())


LAYERS = {
    "3x3": lambda: BinaryConv2d(20, 24, 3),
    "5x5, stride 2": lambda: BinaryConv2d(20, 24, 5, stride=2),
    "border of -1": lambda: BinaryConv2d(20, 24, 3, pad_value=-1.0),
    "no bias": lambda: BinaryConv2d(20, 24, 1, bias=False),
    "dense": lambda: BinaryLinear(20, 24),
    "weights with another slope": lambda: BinaryLinear(20, 24, quantizer=QUANTIZERS["clipped"]),
}


@pytest.mark.parametrize("low", [-1, 0])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_compute_the_same_with_and_without_kernels(
    make, low, format, each_set, kernels, generator, monkeypatch
):
    layer, used, packed = make(), [], Operands.packed
    monkeypatch.setattr(
        Operands, "packed", lambda *a: used.append((found := packed(*a)) is not None) or found
    )
    layer.to(memory_format=format)
    for p in layer.parameters():
        p.data.uniform_(-1, 1, generator=generator)
    shape = (6, 20, 7, 7) if isinstance(layer, BinaryConv2d) else (6, 20)
    x = torch.randint(0, 2, shape, generator=generator).float()
    x = x if low == 0 else 2 * x - 1
    x = x.contiguous(memory_format=format) if x.dim() == 4 else x
    with torch.no_grad():
        grad = torch.randn(layer(x).shape, generator=generator)
    used.clear()
    found = gradients(layer, x, grad)
    kernels("off")
    expected = gradients(layer, x, grad)
    three_values = low == 0 and getattr(layer, "pad_value", 0) == -1
    assert used == [not three_values, False]
    assert torch.equal(found[0], expected[0])
    assert found[0].stride() == expected[0].stride()
    layer.double()
    exact = gradients(layer, x.double(), grad.double())
    for mine, plain, true in zip(found[1:], expected[1:], exact[1:], strict=True):
        scale = true.abs().max()
        assert (mine - true).abs().max() <= max(1.5 * (plain - true).abs().max(), 3e-7 * scale)


def test_gradients_are_as_close_to_float64_as_pytorchs(each_set, kernels, generator):
    """At the size of a real layer, as relative distances in the Euclidean norm."""
    layer = BinaryConv2d(64, 64, 3, generator=generator).to(memory_format=torch.channels_last)
    x = torch.randint(0, 2, (50, 64, 16, 16), generator=generator).float() * 2 - 1
    x = x.contiguous(memory_format=torch.channels_last)
    grad = torch.randn(x.shape, generator=generator)
    mine = gradients(layer, x, grad)[1:3]
    kernels("off")
    plain = gradients(layer, x, grad)[1:3]
    exact = gradients(layer.double(), x.double(), grad.double())[1:3]
    for m, p, e in zip(mine, plain, exact, strict=True):
        assert (m - e).norm() <= 1.5 * (p - e).norm()


def test_second_derivatives_are_the_plain_ones(each_set, kernels, generator):
    layer = BinaryConv2d(20, 24, 3, generator=generator)
    x = torch.randint(0, 2, (4, 20, 5, 5), generator=generator).float() * 2 - 1

    def penalty():
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
        first.square().sum().backward()
        return leaf.grad, layer.weight.grad, layer.bias.grad

    found = penalty()
    kernels("off")
    for mine, plain in zip(found, penalty(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_numbers_on_as_many_threads(each_set, threads, generator):
    layer = BinaryConv2d(40, 40, 3, generator=generator)
    x = torch.randint(0, 2, (9, 40, 8, 8), generator=generator).float() * 2 - 1
    grad = torch.randn(9, 40, 8, 8, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        one, other = gradients(layer, x, grad), gradients(layer, x, grad)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def test_the_plain_product_is_taken_where_words_do_not_say_it_all(each_set, generator):
    layer = BinaryLinear(20, 24, generator=generator)
    signs = torch.ones(8, 20)
    with torch.no_grad():
        assert layer(torch.full((8, 20), 0.3)).abs().max() < 20  # not of signs
        layer.weight[0, 0] = float("nan")
        assert layer(signs).isfinite().all()  # NaN counts as +1, as `sign` has it
        assert layer(signs * float("nan")).isnan().all()
        assert layer.double()(signs.double()).dtype == torch.float64


@pytest.mark.parametrize(("inputs", "outputs", "n"), list(product((16, 64), (16, 64), (1, 50))))
def test_kernels_are_for_layers_that_are_large_enough(kernels, inputs, outputs, n):
    """`pays` says so; a wrong answer costs time only."""
    for name in HERE:
        kernels(name)
        least = compiled.SETS[name]
        shape = bits._shape((n, 32, 32), (outputs, 3, 3), inputs, -1, Geometry((1, 1), (1, 1)))
        wide = inputs >= least.inputs and outputs >= least.outputs
        assert bits.pays(shape) == (wide and n >= bits.GROUP)
        with torch.no_grad():
            assert bits.pays(shape) == wide
        one = bits._shape((n, 1, 1), (outputs, 1, 1), inputs, -1, Geometry())
        assert not bits.pays(one)


def plainly(layer):
    """Ways to compute in which words would be wrong: a function of the inputs for each."""
    real = BinaryLinear(20, 24, quantizer=QUANTIZERS["real"])
    scaled = BinaryLinear(20, 24, quantizer=QUANTIZERS["scaled_sign"])

    def autocast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    one = torch.func.vmap(lambda row: layer(row[None])[0])
    return {
        "real weights": real,
        "scaled signs": scaled,
        "autocast": autocast,
        "float64": lambda x: copy.deepcopy(layer).double()(x.double()),
        "vmap": one,
        "compiled": torch.compile(layer, backend="eager"),
        "real inputs": lambda x: layer(x * 0.3),
        "traced": lambda x: torch.jit.trace(layer, x, check_trace=False)(x),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", plainly(None))
def test_elsewhere_pytorch_computes(way, each_set, generator, monkeypatch):
    layer, found = BinaryLinear(20, 24, generator=generator), []
    packed = Operands.packed
    monkeypatch.setattr(Operands, "packed", lambda *a: found.append(packed(*a)) or found[-1])
    x = torch.randint(0, 2, (8, 20), generator=generator).float() * 2 - 1
    y = plainly(layer)[way](x)
    assert y.shape == (8, 24)
    assert found in ([], [None])


def test_defaults_of_pytorch_and_strides_of_a_bias_change_nothing(each_set, generator):
    layer = BinaryConv2d(20, 24, 3, generator=generator)
    layer.bias = torch.nn.Parameter(torch.randn(24, 2, generator=generator)[:, 0])
    assert not layer.bias.is_contiguous()
    x = torch.randint(0, 2, (6, 20, 7, 7), generator=generator).float() * 2 - 1
    grad = torch.randn(6, 24, 7, 7, generator=generator)
    expected = gradients(layer, x, grad)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = gradients(layer, x, grad)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    layer.bias = torch.nn.Parameter(layer.bias.detach().contiguous())
    assert torch.equal(layer(x), expected[0])
