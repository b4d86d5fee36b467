from math import inf, nan, nextafter

import pytest
import torch

from bnnlib.quantizers import (
    approx_sign,
    approx_step,
    binarize,
    binarize_stochastic,
    binary_sigmoid,
    binary_tanh,
    hard_sigmoid,
    scaled_sign,
    sign,
)

FLOATS = [torch.float32, torch.float64]
NEXT_TO_ONE = {torch.float32: 1 + 2**-23, torch.float64: nextafter(1, 2)}


def gradient(quantizer, values, dtype=torch.float32, incoming=1.0):
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    quantizer(x).backward(torch.full_like(x, incoming))
    return x.grad.tolist()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("quantizer", "lower"), [(sign, -1), (binary_tanh, -1), (binarize, -1), (binary_sigmoid, 0)]
)
def test_two_values_and_zero_gives_the_upper(quantizer, lower, dtype):
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # subnormal
    x = torch.tensor([0.0, -0.0, least, 0.3, 1, 7, inf, -least, -0.3, -1, -7, -inf], dtype=dtype)
    before = x.clone()
    assert quantizer(x).tolist() == [1] * 7 + [lower] * 5
    assert quantizer(x).dtype == dtype
    assert torch.equal(x, before)


def test_not_a_number_becomes_plus_one():
    assert sign(torch.tensor([nan])).item() == 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("quantizer", "slope"), [(binary_tanh, 1.0), (binary_sigmoid, 0.5)])
def test_straight_through_slope_up_to_one_inclusive(quantizer, slope, dtype):
    beyond = NEXT_TO_ONE[dtype]
    inside, outside = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0], [beyond, -beyond, 1.5, -1.5, inf, -inf]
    assert gradient(quantizer, inside, dtype, incoming=-6.0) == [-6 * slope] * 6
    assert gradient(quantizer, outside, dtype) == [0.0] * 6


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("quantizer", "height"), [(approx_sign, 1), (approx_step, 0.5)])
def test_the_slope_of_two_parabolas_is_that_of_bi_real_net(quantizer, height, dtype):
    values = [-2.0, -1.0, -0.75, -0.25, 0.0, 0.25, 0.75, 1.0, 2.0]
    slopes = [2 + 2 * x if x < 0 else 2 - 2 * x for x in values]
    expected = [height * s if abs(x) < 1 else 0 for x, s in zip(values, slopes, strict=True)]
    assert gradient(quantizer, values, dtype, incoming=-3.0) == [-3 * s for s in expected]
    upper_and_lower = quantizer(torch.tensor([0.0, -1e-30], dtype=dtype)).tolist()
    assert upper_and_lower == [1, 1 - 2 * height]


def test_gradient_of_weights_is_passed_on_without_a_mask(generator):
    values = [0.0, 0.5, -1.0, 1.0, 3.0, -3.0]
    for quantizer in (binarize, lambda w: binarize_stochastic(w, generator)):
        assert gradient(quantizer, values, incoming=4.0) == [4] * 6


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2, 2)])
def test_signs_are_scaled_by_the_mean_size_of_each_output_channel(shape, generator):
    weight = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    rows, count = weight.detach().flatten(1), weight[0].numel()
    scale, signs = rows.abs().mean(1, keepdim=True), torch.where(rows >= 0, 1.0, -1.0)
    scaled = scaled_sign(weight)
    torch.testing.assert_close(scaled.detach(), (scale * signs).view(shape))
    incoming = torch.randn(shape, generator=generator, dtype=torch.float64)
    scaled.backward(incoming)
    g = incoming.flatten(1)  # through the sign, where it is not clipped, and through the scale
    expected = scale * g * (rows.abs() <= 1) + (g * signs).sum(1, keepdim=True) * signs / count
    torch.testing.assert_close(weight.grad, expected.view(shape))


def test_hard_sigmoid_is_a_clipped_line():
    x = torch.tensor([-inf, -2, -1, -0.5, 0, 0.5, 1, 2, inf])
    assert hard_sigmoid(x).tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]


@pytest.mark.parametrize("weight", [-0.8, 0.0, 0.5])
def test_stochastic_weights_are_plus_one_with_the_probability_of_the_hard_sigmoid(
    weight, generator
):
    n = 40_000
    sample = binarize_stochastic(torch.full((n,), weight), generator)
    p = (weight + 1) / 2
    assert set(sample.tolist()) == {-1.0, 1.0}
    assert abs((sample == 1).double().mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-24])
def test_saturated_weights_never_flip_whatever_is_drawn(draw, generator, monkeypatch):
    weight = torch.tensor([-1.0, 1.0, -2.0, 2.0])
    monkeypatch.setattr(torch, "rand", lambda shape, **kw: torch.full(shape, draw))
    assert binarize_stochastic(weight, generator).tolist() == [-1, 1, -1, 1]
