"""Thresholds: where sums and pixels decide as the layers themselves do."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnnlib.data.images import scale_pixels
from bnnlib.errors import InvalidValue
from bnnlib.kernels.geometry import MOST_PIXELS
from bnnlib.layers import BatchNorm, BinarySigmoid, BinaryTanh
from bnnlib.packed.fold import (
    asking,
    fold,
    pixel_thresholds,
    pixel_values,
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


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), terms=st.sampled_from([1, 2, 9, 18, 27, 75, MOST_PIXELS]))
def test_a_threshold_of_integers_decides_as_the_sum_that_is_rounded_once(seed, terms):
    rng = np.random.default_rng(seed)
    p, w = rng.integers(0, 256, (200, terms)), rng.choice([-1, 1], (200, terms))
    s = (pixel_values().astype(np.int64)[p] * w).sum(1)
    x = scale_pixels(torch.from_numpy(p.astype(np.uint8))).double() * torch.from_numpy(w)
    f = x.sum(1).float().numpy()
    t = rng.permutation(f)[:50]  # thresholds that a sum just meets, or just does not
    t = np.nextafter(t, rng.choice(np.float32([-np.inf, np.inf]), 50))
    t[:20] = f[:20]
    assert ((s[:, None] >= pixel_thresholds(t, terms)) == (f[:, None] >= t)).all()


def test_channels_that_never_change_are_beyond_all_sums():
    t = np.array([np.inf, -np.inf, 1e6, -1e6, 0, 2.0**-24], np.float32)
    largest = 27 * 2**24
    expected = [largest + 1, -largest, largest + 1, -largest, 0, 1]
    assert pixel_thresholds(t, 27).tolist() == expected
    assert pixel_thresholds(t, MOST_PIXELS)[0] == MOST_PIXELS * 2**24 + 1 < 2**31


def test_scaled_pixels_are_whole_numbers_of_their_unit():
    scaled = scale_pixels(torch.arange(256, dtype=torch.uint8)).double().numpy()
    assert (pixel_values() / 2.0**24 == scaled).all()
    assert pixel_values()[[0, 255]].tolist() == [-(2**24), 2**24]
