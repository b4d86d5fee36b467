from dataclasses import replace
from math import inf, nan

import numpy as np
import pytest
import torch

from bnnlib.corruption import gaussian_inputs, random_labels, random_pixels, shuffled_pixels
from bnnlib.data.images import ImageSet, scale_pixels
from bnnlib.errors import InvalidValue
from bnnlib.experiments.build import prepare_data
from bnnlib.experiments.originals import published
from bnnlib.experiments.profiles import smoke

ALL = [random_labels, gaussian_inputs, shuffled_pixels, random_pixels]


@pytest.mark.parametrize("corrupt", ALL)
class TestEveryCorruption:
    def test_the_set_given_in_stays_as_it_is_and_the_seed_decides(self, corrupt, noise):
        data, untouched = noise(), noise()
        one, again, other = (corrupt(data, seed=seed) for seed in (1, 1, 2))
        for a, b, equal in ((data, untouched, True), (one, again, True), (one, other, False)):
            same = torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
            assert same is equal
        assert data.provenance == ()
        assert (one.name, one.split, one.class_names) == (data.name, data.split, data.class_names)

    def test_labels_or_images_stay(self, corrupt, noise):
        data = noise()
        labels_stay = corrupt is not random_labels
        corrupted = corrupt(data, seed=1)
        assert torch.equal(corrupted.labels, data.labels) is labels_stay
        assert torch.equal(corrupted.images, data.images) is not labels_stay

    def test_it_adds_a_line_that_names_its_seed(self, corrupt, noise):
        first, second = corrupt(corrupt(noise(), seed=31), seed=47).provenance
        assert "seed 31" in first
        assert "seed 47" in second

    @pytest.mark.parametrize("seed", [None, -1, 1.0, True])
    def test_without_a_seed_it_is_refused(self, corrupt, seed, noise):
        with pytest.raises(InvalidValue, match=f"seed must be a whole .* got {seed}"):
            corrupt(noise(), seed=seed)


@pytest.mark.parametrize(
    ("corrupt", "values", "text"),
    [
        (random_labels, (-0.1, 1.1, nan), "fraction must be between 0 and 1"),
        (gaussian_inputs, (0, -0.1, nan, inf), "variance must be positive and finite"),
    ],
)
def test_a_share_or_a_variance_that_is_none_is_refused(corrupt, values, text, noise):
    for value in values:
        with pytest.raises(InvalidValue, match=f"{text}, got {value}"):
            corrupt(noise(), value, seed=1)


# ---------------------------------------------------------------------------------- labels


def one_class(n, classes):
    """n images of class 0 in a set of so many classes."""
    images = torch.zeros(n, 3, 1, 1, dtype=torch.uint8)
    names = tuple(map(str, range(classes)))
    return ImageSet(images, torch.zeros(n, dtype=torch.int64), "blank", "train", names)


def test_level_1_is_uniform_and_independent_of_the_true_label():
    labels = random_labels(one_class(20_000, 10), seed=1).labels
    counts = torch.bincount(labels, minlength=10)
    assert labels.dtype == torch.int64
    # 2,000 of each, the true class too; five standard deviations are 212
    assert (counts - 2_000).abs().max() < 212
    assert len(set(counts.tolist())) > 1  # drawn one by one, not dealt out evenly


def test_the_share_of_touched_labels_is_exact_and_a_higher_level_adds_to_a_lower():
    data = one_class(300, 100_000)  # where no new label equals the old one
    before = data.labels
    for fraction, touched in ((0, 0), (0.1, 30), (0.25, 75), (0.57, 171), (1, 300)):
        labels = random_labels(data, fraction, seed=1).labels
        assert int((labels != 0).sum()) == touched
        assert touched in (0, 300) or not labels[:touched].all()  # of any images
        assert torch.equal(labels[before != 0], before[before != 0])
        before = labels


def test_the_true_labels_are_kept_through_every_corruption(noise):
    data = noise()
    once = random_labels(data, 0.5, seed=1)
    for corrupted in (once, gaussian_inputs(once, seed=2), random_labels(once, 0.5, seed=3)):
        assert torch.equal(corrupted.true_labels, data.labels)
    changed = once.labels != data.labels
    assert torch.equal(once.corrupted, changed)
    assert 0 < int(changed.sum()) < 30  # of 30 new labels some are the old ones


def test_the_share_and_the_hash_of_the_labels_are_noted(noise):
    corrupted = random_labels(noise(), 0.5, seed=1)
    assert corrupted.label_hash() in corrupted.provenance[0]
    assert "fraction 0.5" in corrupted.provenance[0]


# ------------------------------------------------------------------------------------ noise


@pytest.mark.parametrize("variance", [0.1, 0.5])
def test_gaussian_inputs_have_mean_0_and_the_variance_and_are_not_clipped(noise, variance):
    data = noise(n=300, size=16)
    x = gaussian_inputs(data, variance, seed=1).images
    assert (x.dtype, x.shape) == (torch.float32, data.images.shape)
    # five standard deviations of a mean and a variance of 230,400 values
    assert abs(x.mean().item()) < 5 * (variance / 230_400) ** 0.5
    assert abs(x.var().item() / variance - 1) < 5 * (2 / 230_400) ** 0.5
    assert x.abs().max() > 1.2
    assert scale_pixels(x) is x  # nor scaled again


def test_matched_noise_has_the_moments_of_the_scaled_pixels_also_of_noise(noise):
    data = noise(n=300, size=16)
    data.images[:] = data.images // 4 + 150  # a bright set of low contrast
    pixels = scale_pixels(data.images)
    assert pixels.mean() > 0.3
    for seed in (1, 2):
        data = gaussian_inputs(data, seed=seed, matched=True)
        torch.testing.assert_close(data.images.mean(), pixels.mean(), rtol=0, atol=4e-3)
        torch.testing.assert_close(data.images.std(), pixels.std(), rtol=0, atol=4e-3)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("matched", [False, True])
def test_white_noise_is_the_draws_of_the_seed_scaled_and_shifted(noise, matched):
    data = noise()
    pixels = data.images.numpy() / 127.5 - 1
    mean, std = (pixels.mean(), pixels.std()) if matched else (0, 0.3**0.5)
    x = gaussian_inputs(data, 0.3, seed=1, matched=matched).images.numpy()
    np.testing.assert_allclose(x, normal(1, *x.shape) * std + mean, rtol=1e-5, atol=1e-6)
    if not matched:  # as in every run that was stored
        assert (x == normal(1, *x.shape) * np.float32(std)).all()


def test_blurred_noise_is_white_noise_under_a_window_of_one_pixel(noise):
    x = gaussian_inputs(noise(n=2, size=8), 0.3, seed=1, shape="blurred").images.numpy()
    white, blurred = normal(1, *x.shape), np.zeros(x.shape)
    for i in range(-6, 7):
        for j in range(-6, 7):
            weight = np.exp(-(i**2 + j**2) / 2)
            blurred += weight * np.roll(white, (i, j), axis=(2, 3))
    line = sum(np.exp(-(i**2)) for i in range(-6, 7))  # of the squares of the weights
    np.testing.assert_allclose(x, blurred / line * 0.3**0.5, atol=0.02)


@pytest.mark.parametrize("matched", [False, True])
def test_blurred_noise_has_the_variance_and_neighbours_that_are_alike(noise, matched):
    data = noise(n=300, size=16)
    pixels = scale_pixels(data.images)
    mean, variance = (pixels.mean().item(), pixels.var().item()) if matched else (0.0, 0.2)
    x = gaussian_inputs(data, 0.2, seed=1, matched=matched, shape="blurred").images
    assert (x.dtype, x.shape, x.is_contiguous()) == (torch.float32, data.images.shape, True)
    assert x.mean() == pytest.approx(mean, abs=0.01)
    assert x.var() == pytest.approx(variance, rel=0.03)
    z = (x - x.mean()) / x.std()
    for axis in (2, 3):  # the sum of two windows has twice the variance: exp(-d^2 / 4)
        for distance in (1, 2, 3):
            alike = (z * z.roll(distance, axis)).mean()
            assert alike == pytest.approx(np.exp(-(distance**2) / 4), abs=0.02)
    assert abs((z[:, 0] * z[:, 1]).mean()) < 0.02  # colours and images by themselves
    assert abs((z[:-1] * z[1:]).mean()) < 0.02


def correlated(n=2000):
    """Images of 2 x 2: bright or dark in all of their values, most of them bright."""
    rng = np.random.default_rng(0)
    shade = np.where(rng.random((n, 1, 1, 1)) < 0.7, 180, 90)
    pixels = torch.from_numpy((shade + rng.integers(40, size=(n, 3, 2, 2))).astype(np.uint8))
    pixels[:, 2] = 255 - pixels[:, 2]  # blue the other way round
    return ImageSet(pixels, torch.zeros(n, dtype=torch.int64), "shades", "train", ("only",))


def test_noise_like_the_images_has_their_mean_image_and_covariance():
    data = correlated()
    pixels = data.images.numpy().reshape(2000, 12) / 127.5 - 1
    x = gaussian_inputs(data, seed=1, matched=True, shape="images").images
    assert (x.dtype, x.shape) == (torch.float32, data.images.shape)
    x, expected = x.numpy().reshape(2000, 12), np.cov(pixels.T)
    assert np.abs(x.mean(0) - pixels.mean(0)).max() < 5 * pixels.std() / 2000**0.5
    assert np.abs(np.cov(x.T) - expected).max() < 0.12 * expected.max()
    assert np.corrcoef(x.T)[0, 11] < -0.85  # opposite corners and colours
    standard = (x - x.mean(0)) / x.std(0)
    assert (standard**4).mean() == pytest.approx(3, abs=0.4)  # normal: bright or dark has 1.9


def test_noise_like_the_images_is_a_sum_of_them_with_normal_weights():
    data = correlated(n=1010)  # more than are drawn at once
    pixels = data.images.numpy().reshape(1010, 12) / 127.5 - 1
    x = gaussian_inputs(data, 7.0, seed=3, shape="images").images  # whatever the variance
    drawn = normal(3, 1010, 1010) @ (pixels - pixels.mean(0)) / 1009**0.5 + pixels.mean(0)
    np.testing.assert_allclose(x.reshape(1010, 12), drawn, atol=1e-4)


def test_one_image_like_the_images_is_the_image(noise):
    data = noise(n=1)
    x = gaussian_inputs(data, seed=1, matched=True, shape="images").images
    assert torch.equal(x, scale_pixels(data.images))


def test_shapes_differ_and_are_noted(noise):
    notes = {"white": "white, mean", "blurred": "blurred, mean", "images": "covariance of the"}
    made = [gaussian_inputs(noise(), seed=1, matched=True, shape=shape) for shape in notes]
    assert len({data.images.numpy().tobytes() for data in made}) == 3
    for data, words in zip(made, notes.values(), strict=True):
        assert words in data.provenance[0]


def test_a_shape_that_is_none_names_the_nearest(noise):
    with pytest.raises(InvalidValue, match="unknown shape 'blured'; did you mean 'blurred'"):
        gaussian_inputs(noise(), seed=1, shape="blured")


def test_an_experiment_has_a_shape_where_it_has_noise_that_may_have_it():
    e = smoke(published("cifar10-gaussian-inputs"))
    with pytest.raises(InvalidValue, match=r"='images' takes .* gaussian_matched can only"):
        replace(e, gaussian_shape="images")
    with pytest.raises(InvalidValue, match="gaussian_shape"):
        replace(e, gaussian_variance=0.0, gaussian_shape="blurred")
    images = prepare_data(replace(e, gaussian_shape="blurred"))["train"].images
    alike = (images[..., 1:] * images[..., :-1]).mean() / images.square().mean()
    assert alike == pytest.approx(np.exp(-1 / 4), abs=0.02)


# ----------------------------------------------------------------------------------- pixels


def positions(n):
    """n images of 16 x 16 in which the value of a pixel is its position."""
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(n, 3, 1, 1)
    return ImageSet(images, torch.zeros(n, dtype=torch.int64), "positions", "train", ("only",))


def orders(data):
    return data.images.flatten(2).numpy()  # (N, 3, 256)


def test_shuffled_pixels_move_alike_in_every_image_channel_and_set():
    few, many = (orders(shuffled_pixels(positions(n), seed=1)) for n in (3, 5))
    assert (many == many[0, 0]).all()
    assert (few == many[0, 0]).all()
    assert sorted(many[0, 0]) == list(range(256))
    assert (many[0, 0] != np.arange(256)).mean() > 0.9


def test_random_pixels_move_differently_in_every_image_but_with_their_colours():
    found = orders(random_pixels(positions(5), seed=1))
    assert (np.sort(found) == np.arange(256)).all()
    assert (found == found[:, :1]).all()
    assert len({image.tobytes() for image in found[:, 0]}) == 5


@pytest.mark.parametrize("corrupt", [shuffled_pixels, random_pixels])
def test_moving_pixels_keeps_floats(corrupt, noise):
    data = gaussian_inputs(noise(), seed=1)
    moved = corrupt(data, seed=1)
    assert moved.images.dtype == torch.float32
    assert torch.equal(moved.images.flatten(2).sort().values, data.images.flatten(2).sort().values)
