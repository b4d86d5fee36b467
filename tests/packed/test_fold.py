"""Thresholds: where sums and pixels decide as the layers themselves do."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnnlib.data.images import scale_pixels
from bnnlib.errors import InvalidValue
from bnnlib.layers import BatchNorm, BinarySigmoid, BinaryTanh
from bnnlib.packed.fold import (
    addition_error,
    asking,
    fold,
    pixel_error,
    pixel_thresholds,
    switches,
)

pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
each_seed = given(seed=st.integers(0, 2**31))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def norm_of(gamma, beta, mean, inv_std=1.0, kind=BatchNorm):
    norm = kind(len(gamma)).eval()
    columns = {"weight": gamma, "bias": beta, "running_mean": mean}
    columns["running_inv_std" if kind is BatchNorm else "running_var"] = inv_std
    for name, value in columns.items():
        getattr(norm, name).data[:] = torch.as_tensor(value)
    return norm


def random_norm(channels, seed, kind=BatchNorm):
    g = torch.Generator().manual_seed(seed)
    gamma, beta, mean = torch.randn(3, channels, generator=g)
    gamma[torch.rand(channels, generator=g) < 0.1] = 0
    return norm_of(gamma, beta, 5 * mean, torch.rand(channels, generator=g), kind)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    largest=st.integers(1, 40),
    act=st.sampled_from([BinaryTanh(), BinarySigmoid()]),
    kind=st.sampled_from([BatchNorm, nn.BatchNorm1d]),
    has_bias=st.booleans(),
)
def test_every_sum_is_on_the_side_that_the_layers_put_it_on(seed, largest, act, kind, has_bias):
    norm = random_norm(7, seed, kind)
    bias = torch.randn(7, generator=torch.Generator().manual_seed(seed)) if has_bias else None
    t, flips = fold(asking([norm, act], bias, conv=False), 7, largest)
    assert t.dtype == np.int32
    for s in range(-largest, largest + 1):
        y = torch.full((1, 7), float(s)) + (0 if bias is None else bias)
        assert ((act(norm(y))[0] == 1).numpy() == ((s >= t) ^ flips)).all()


def test_sums_that_are_the_mean_count_as_one_whatever_the_sign_of_gamma():
    norm = norm_of([1, -1, 0, 0, 0, 1], [0, 0, 0, -1, -0.0, 100.0], [3.0, 3, 3, 3, 3, 3])
    t, flips = fold(asking([norm, BinaryTanh()], None, conv=False), 6, 9)
    assert t.tolist() == [3, 4, -9, 10, -9, -9]
    assert flips.tolist() == [False, True, False, False, False, False]


def test_many_sums_are_asked_for_in_parts(monkeypatch):
    ask = asking([random_norm(5, 3), BinaryTanh()], None, conv=False)
    whole = fold(ask, 5, 50)
    monkeypatch.setattr("bnnlib.packed.fold.AT_ONCE", 10)
    assert all((a == b).all() for a, b in zip(fold(ask, 5, 50), whole, strict=True))


@pytest.mark.parametrize("folding", [lambda ask: fold(ask, 2, 300), lambda ask: switches(ask, 2)])
def test_what_is_no_threshold_is_refused(folding):
    with pytest.raises(InvalidValue, match="2 channels is no threshold"):
        folding(lambda y: y.abs() < 100)


@settings(max_examples=30, deadline=None)
@each_seed
def test_a_switch_is_the_smallest_number_that_is_answered_otherwise(seed):
    ask = asking([random_norm(9, seed), BinaryTanh()], torch.randn(9), conv=False)
    t, flips = switches(ask, 9)
    there = np.isfinite(t)
    at, below = (
        torch.from_numpy(np.where(there, x, 0))[None] for x in (t, np.nextafter(t, -np.inf))
    )
    assert (ask(at)[0].numpy() != flips)[there].all()
    assert (ask(below)[0].numpy() == flips)[there].all()
    always = ask(torch.zeros(1, 9))[0].numpy()
    assert (always == (t < 0))[~there].all()


# ------------------------------------------------------------------------------------- pixels


def float_sums(x, order):
    """Sums of the rows of float32 numbers, added in one of a few orders."""
    if order == "worst":
        x = np.sort(x, axis=1)
    if order == "pairs":
        while x.shape[1] > 1:
            x = np.pad(x, ((0, 0), (0, x.shape[1] % 2)))
            x = x[:, ::2] + x[:, 1::2]
        return x[:, 0]
    total = np.zeros(len(x), np.float32)
    for column in x.T:
        total = total + column
    return total


def pixel_sums(seed, terms, rows=200, spread=True):
    """Pixels, with as many extreme ones as not, times signs: float32 terms, and integer sums."""
    rng = np.random.default_rng(seed)
    p = rng.integers(0, 256, (rows, terms), np.uint8)
    if spread:
        p = np.where(rng.random(p.shape) < 0.5, p, rng.choice([0, 1, 254, 255], p.shape))
    w = rng.choice([-1, 1], p.shape)
    x = scale_pixels(torch.from_numpy(p.astype(np.uint8))).numpy() * w.astype(np.float32)
    return x, ((2 * p.astype(np.int64) - 255) * w).sum(1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    terms=st.sampled_from([1, 2, 9, 12, 18, 27, 75, 300]),
    order=st.sampled_from(["given", "worst", "pairs"]),
)
def test_float_sums_of_pixels_are_within_the_bound(seed, terms, order):
    x, s = pixel_sums(seed, terms)
    error = np.abs(float_sums(x, order).astype(np.float64) - s / 255)
    assert (error <= pixel_error(terms, np.abs(s) / 255)).all()


def test_the_bound_is_not_much_larger_than_the_worst_case_that_is_found():
    g = np.random.default_rng(0)
    x = 1 - g.integers(0, 2**12, (20_000, 27)) * 2.0**-24
    x[:, 13:] *= -1  # up to 13, and down again
    error = np.abs(float_sums(x.astype(np.float32), "given") - x.sum(1)).max()
    assert error <= addition_error(27, 1) < 4 * error
    assert addition_error(1, 1) == 0
    assert addition_error(2, 0) <= 2.0**-24


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    terms=st.sampled_from([9, 18, 27]),
    order=st.sampled_from(["given", "worst", "pairs"]),
)
def test_integers_decide_as_floats_where_there_is_no_doubt(seed, terms, order):
    x, s = pixel_sums(seed, terms, spread=False)
    f = float_sums(x, order)
    t = np.random.default_rng(seed).permutation(f)[:50]  # thresholds that a float sum just meets
    shift = np.random.default_rng(seed + 1).choice([0, 1e-5, 1e-4, 3e-3], 50)
    t = (t + shift).astype(np.float32)
    thresholds, doubtful = pixel_thresholds(t, [terms])
    assert doubtful[shift == 0].all()
    sure = ~doubtful
    assert sure.any()
    assert ((s[:, None] >= thresholds) == (f[:, None] >= t))[:, sure].all()


def test_channels_that_never_change_are_beyond_all_sums():
    t = np.array([np.inf, -np.inf, 1e6, -1e6, 0.004], np.float32)
    thresholds, doubtful = pixel_thresholds(t, [18, 27])
    assert thresholds.tolist() == [6886, -6885, 6886, -6885, 2]
    assert doubtful.tolist() == [False] * 5
    assert pixel_thresholds(np.float32([1 / 255]), [27])[1].all()
    assert not pixel_thresholds(np.float32([2 / 255]), [27])[1].any()  # 27 odd numbers are odd
    assert pixel_thresholds(np.float32([2 / 255]), [18, 27])[1].all()
