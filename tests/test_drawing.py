"""The drawing kit: repeatable random numbers, exact operations, and each picture operation."""

import ast
import hashlib
from pathlib import Path

import numpy as np
import pytest

from bnnlib import drawing, glyphs, patterns, shapes
from bnnlib.drawing import SPLITS, Draws, blur, draw_set
from bnnlib.errors import InvalidValue

# Parts of NumPy that give the same bits on every machine: random words, single IEEE operations,
# operations on integers, and the moving of data.
EXACT = {
    "PCG64", "SeedSequence", "abs", "arange", "empty", "empty_like", "float32", "floor",
    "full_like", "inf", "int16", "int64", "integer", "load", "maximum", "minimum", "ndarray",
    "ones_like", "pad", "prod", "random", "sqrt", "stack", "uint64", "uint8", "unpackbits", "where",
    "zeros", "zeros_like",
}  # fmt: skip
# Methods that add up, in an order that is NumPy's own.
INEXACT = {"cumsum", "dot", "mean", "prod", "std", "sum", "trace", "var"}
SETS = {"glyphs": glyphs.glyphs, "shapes": shapes.shapes, "patterns": patterns.patterns}
SIDES = {"glyphs": 32, "shapes": 32, "patterns": 8}
DIGESTS = {
    ("glyphs", "train"): "d277283b1cc3fed24b50f407e6adc645b8320597471e752a3b00efd6679a50db",
    ("glyphs", "valid"): "71948fe82de3f50b6200bffcd65e50a1d6b3307838b1936e075ff2d744fb3de6",
    ("glyphs", "test"): "c4d47802670e45e13c239657aacb7a562b1943cbd97df37a7945ba2bfc06d735",
    ("shapes", "train"): "90e0b5a0ddcba6b82e31a8f1aeb5fe498b00d1baa4ecf42ebeb9301caba78e50",
    ("shapes", "valid"): "3b9de89c4513561ef205a11f16734e4969088f31c0b378e3c91150120b277160",
    ("shapes", "test"): "d45d6eeb8214977ff3f9646c83e1967532d64c905b4b183ee15da62f0907c55a",
    ("patterns", "train"): "005014d08016bc004fd6f03b4cdb7ee58d867fd312f92051fdc9ec2935ca7f45",
    ("patterns", "valid"): "ff01b1c99725875f8e6990b8ec7f512c21b216fa16e1f98b004b514132dde8b1",
    ("patterns", "test"): "025f07973db65f9adf55282d3636d961f56a2109f40c2a22538b8417736d4c09",
}


def random_draws(rows: int) -> Draws:
    return Draws(np.random.PCG64(7).random_raw(rows * 1600).reshape(rows, 1600))


@pytest.fixture
def draws() -> Draws:
    """2,000 rows of words."""
    return random_draws(2000)


@pytest.mark.parametrize("module", [drawing, glyphs, shapes, patterns])
def test_only_exact_operations_are_used(module):
    tree = ast.parse(Path(module.__file__).read_text())
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    numpy = {node for node in attributes if ast.unparse(node.value) in ("np", "np.random")}
    assert {node.attr for node in numpy} <= EXACT
    assert not {node.attr for node in attributes if node not in numpy} & INEXACT
    assert not any(isinstance(node, ast.MatMult) for node in ast.walk(tree))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", SETS)
def test_images_are_the_same_bytes_on_every_machine(name, split):
    images, labels = SETS[name](split, 64)
    assert images.dtype == np.uint8
    assert images.shape == (64, 3, SIDES[name], SIDES[name])
    assert labels.dtype == np.int64
    content = images.tobytes() + labels.astype(np.uint8).tobytes()
    assert hashlib.sha256(content).hexdigest() == DIGESTS[name, split]


@pytest.mark.parametrize("name", SETS)
def test_a_larger_set_only_appends(name):
    images, labels = SETS[name]("valid", 150)
    for n in (0, 1, 64, 100):
        fewer_images, fewer_labels = SETS[name]("valid", n)
        assert np.array_equal(fewer_images, images[:n])
        assert np.array_equal(fewer_labels, labels[:n])


@pytest.mark.parametrize("name", SETS)
def test_no_image_occurs_twice_across_splits_and_seeds(name):
    streams = [(split, seed) for split in SPLITS for seed in (0, 1, 2**40)]
    images = np.concatenate([SETS[name](split, 50, seed)[0] for split, seed in streams])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


@pytest.mark.parametrize("name", SETS)
def test_labels_are_uniform(name):
    labels = SETS[name]("train", 1000)[1]
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == 10
    assert ((counts - 100.0) ** 2 / 100).sum() < 27.9  # chi-squared, 9 degrees: p = 0.001


@pytest.mark.parametrize("name", SETS)
def test_bad_arguments_are_named(name):
    with pytest.raises(InvalidValue, match=r"unknown split 'tset'; did you mean 'test'\?"):
        SETS[name]("tset", 1)
    with pytest.raises(InvalidValue, match=r"n must be a whole number, 0 or more, got -1"):
        SETS[name]("train", -1)
    with pytest.raises(InvalidValue, match=r"seed must be .* got 0\.5"):
        SETS[name]("train", 1, seed=0.5)


def test_the_set_number_changes_the_stream():
    def draw(draws):
        level = draws.integer(2**20)
        return np.zeros((len(level), 3, 32, 32), np.uint8), level

    one, other = (draw_set(draw, "train", 9, 0, set_number=k, words=1)[1] for k in (1, 2))
    assert not np.any(one == other)


def test_uniform_numbers_fill_their_range(draws):
    numbers = draws.uniform(-2, 3, 5, 4)
    assert numbers.shape == (2000, 5, 4)
    assert numbers.dtype == np.float32
    assert -2 <= numbers.min() < -1.99
    assert 2.99 < numbers.max() <= 3
    assert numbers.mean() == pytest.approx(0.5, abs=0.03)  # 4 standard errors


def test_integers_and_chances_have_the_right_frequencies(draws):
    counts = np.bincount(draws.integer(4), minlength=4)
    assert counts.shape == (4,)
    assert counts == pytest.approx(500, abs=80)  # 4 standard deviations
    assert draws.chance(0.3).mean() == pytest.approx(0.3, abs=0.041)


def test_bits_are_those_of_the_words_byte_by_byte():
    words = np.array([[1, 0, 2**63], [2**8, 2**64 - 1, 0]], np.uint64)
    bits = Draws(words).bits(128)
    assert bits.dtype == np.uint8
    first, second = bits.tolist()
    assert first == [0] * 7 + [1] + [0] * 120  # the lowest byte first, its highest bit first
    assert second == [0] * 15 + [1] + [0] * 48 + [1] * 64
    draws = Draws(words)
    draws.bits(128)
    assert np.flatnonzero(draws.bits(64)).tolist() == [56]
    with pytest.raises(InvalidValue, match="4 words needed"):
        draws.bits(64)


def test_noise_has_mean_0_and_variance_1():
    noise = random_draws(500).noise()
    assert noise.shape == (500, 3, 32, 32)
    assert noise.mean(dtype=np.float64) == pytest.approx(0, abs=0.0035)
    assert noise.var(dtype=np.float64) == pytest.approx(1, abs=0.0045)


def test_words_are_used_once_and_may_run_out():
    draws = Draws(np.arange(6, dtype=np.uint64).reshape(2, 3) << np.uint64(61))
    assert draws.uniform(0, 8).tolist() == [0, 3]
    assert draws.uniform(0, 8, 2).tolist() == [[1, 2], [4, 5]]
    with pytest.raises(InvalidValue, match="4 words needed per image, 3 given"):
        draws.chance(0.5)


@pytest.mark.parametrize("degrees", [-90, -15, 0, 6, 90])
def test_direction_is_cosine_and_sine(degrees):
    angle = np.radians(degrees)
    cos, sin = drawing.direction(np.array([np.tan(angle / 2)]))
    assert cos[0] == pytest.approx(np.cos(angle), abs=1e-15)
    assert sin[0] == pytest.approx(np.sin(angle), abs=1e-15)


def test_tilted_frame_moves_turns_and_stretches(draws):
    x, y = drawing.tilted_frame(draws, tilt=0.0, offset=0.0, stretch=(2.0, 2.0))
    assert x[0, 5].tolist() == [(column - 15.5) / 2 for column in range(32)]
    assert y[0, :, 5].tolist() == [row - 15.5 for row in range(32)]
    x, y = drawing.tilted_frame(draws, tilt=0.1, offset=3.0, stretch=(1.0, 1.0))
    across, down = x[:, 0, 31] - x[:, 0, 0], y[:, 0, 31] - y[:, 0, 0]
    assert np.hypot(across, down) == pytest.approx(31, abs=1e-4)  # a turn keeps lengths
    largest = np.tan(2 * np.arctan(0.1))
    assert 0.9 * largest < np.abs(down / across).max() <= largest + 1e-5
    centre = np.hypot(x[:, 15:17, 15:17].mean((1, 2)), y[:, 15:17, 15:17].mean((1, 2)))
    assert 3.5 < centre.max() <= 3 * np.sqrt(2) + 1e-4


def test_low_frequency_is_linear_between_knots():
    plane = np.array([[[0.0, 16, 32], [0, 16, 32], [0, 16, 32]]], np.float32)
    pattern = drawing.low_frequency(plane)
    assert pattern.shape == (1, 32, 32)
    assert np.array_equal(pattern[0, 7], np.arange(32) + np.float32(0.5))
    assert np.array_equal(drawing.low_frequency(plane.swapaxes(1, 2)), pattern.swapaxes(1, 2))


def test_brightness_pair_keeps_the_contrast_and_swaps_half(draws):
    ground, other = drawing.brightness_pair(draws, (10.0, 20.0), (30.0, 40.0))
    assert (np.abs(ground - other) >= 30 - 1e-4).all()
    assert (np.abs(ground - other) <= 40 + 1e-4).all()
    assert (np.minimum(ground, other) <= 20).all()
    assert (ground > other).mean() == pytest.approx(0.5, abs=0.045)


def test_coloured_has_the_brightness_asked_for(draws):
    brightness = np.linspace(0, 255, 2000, dtype=np.float32)
    colour = drawing.coloured(draws, brightness, chroma=40.0)
    assert colour @ np.array(drawing.LUMINANCE) == pytest.approx(brightness, abs=1e-3)
    assert 60 < np.ptp(colour, axis=1).max() <= 80  # two channels of a tint, 80 apart at most


def test_mix_goes_from_first_to_second():
    first, second = np.zeros((1, 3), np.float32), np.full((1, 3, 32, 32), 8, np.float32)
    share = np.zeros((1, 32, 32), np.float32)
    share[0, 0, :2] = 0.25, 1
    picture = drawing.mix(first, second, share)
    assert picture.shape == (1, 3, 32, 32)
    assert picture[0, 1, 0, :3].tolist() == [2, 8, 0]


def test_blur_spreads_a_point_and_keeps_a_plain_ground():
    pictures = np.full((2, 3, 32, 32), 10, np.float32)
    pictures[1, :, 4, 0] = 26
    blurred = blur(pictures, np.array([0.25, 0.25], np.float32))
    assert np.array_equal(blurred[0], pictures[0])
    assert blurred[1, 0, 3:6, :2].tolist() == [[13, 11], [16, 12], [13, 11]]
    assert np.array_equal(blur(pictures, np.zeros(2, np.float32)), pictures)


def test_photograph_rounds_and_clips():
    levels = np.array([-5, 0, 99.4, 99.6, 255, 300], np.float32)
    pictures = np.tile(np.resize(levels, 32), (100, 3, 32, 1))
    pixels = drawing.photograph(random_draws(100), pictures, (0.0, 0.0), (0.0, 0.0))
    assert pixels.dtype == np.uint8
    assert pixels[7, 1, 3, :6].tolist() == [0, 0, 99, 100, 255, 255]


def test_photograph_adds_noise_of_the_size_asked_for():
    pictures = np.full((100, 3, 32, 32), 128, np.float32)
    pixels = drawing.photograph(random_draws(100), pictures, (0.1, 0.1), (8.0, 8.0))
    assert pixels.std(dtype=np.float64) == pytest.approx(8, abs=0.1)
