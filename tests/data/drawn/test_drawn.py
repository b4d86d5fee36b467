"""The drawn sets: the same bytes everywhere, no image twice, and pictures of what labels say."""

import ast
import hashlib
from pathlib import Path

import numpy as np
import pytest

from benchmarks import make_glyphs
from bnnlib.data import drawn
from bnnlib.data.drawn import draw_set, drawing, glyphs, patterns, shapes
from bnnlib.names import DRAWN, SPLITS

# Parts of NumPy that give the same bits on every machine: random words, single IEEE operations,
# operations on integers, and the moving of data.
EXACT = {
    "PCG64", "SeedSequence", "abs", "arange", "clip", "concatenate", "empty_like", "float32",
    "floor", "full_like", "inf", "int16", "int64", "load", "maximum", "minimum", "ndarray",
    "ones_like", "pad", "random", "sqrt", "stack", "uint64", "uint8", "unpackbits", "where",
    "zeros", "zeros_like",
}  # fmt: skip
# Methods that add up, in an order that is NumPy's own.
INEXACT = {"cumsum", "dot", "mean", "prod", "std", "sum", "trace", "var"}
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
each_set = pytest.mark.parametrize("name", DRAWN)


@pytest.mark.parametrize("module", [drawn, drawing, glyphs, shapes, patterns])
def test_only_exact_operations_are_used(module):
    tree = ast.parse(Path(module.__file__).read_text())
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    numpy = {node for node in attributes if ast.unparse(node.value) in ("np", "np.random")}
    assert {node.attr for node in numpy} <= EXACT
    assert not {node.attr for node in attributes if node not in numpy} & INEXACT
    assert not any(isinstance(node, ast.MatMult) for node in ast.walk(tree))


@pytest.mark.parametrize(("name", "split"), DIGESTS)
def test_images_are_the_same_bytes_on_every_machine(name, split):
    images, labels = draw_set(name, split, 64, seed=0)
    side = 8 if name == "patterns" else 32
    assert (images.dtype, images.shape) == (np.uint8, (64, 3, side, side))
    assert labels.dtype == np.int64
    content = images.tobytes() + labels.astype(np.uint8).tobytes()
    assert hashlib.sha256(content).hexdigest() == DIGESTS[name, split]


@each_set
def test_a_larger_set_only_appends(name):
    images, labels = draw_set(name, "valid", 150, seed=0)
    for n in (1, 64, 100):
        fewer_images, fewer_labels = draw_set(name, "valid", n, seed=0)
        assert np.array_equal(fewer_images, images[:n])
        assert np.array_equal(fewer_labels, labels[:n])


@each_set
def test_no_image_occurs_twice_across_splits_and_seeds(name):
    streams = [(split, seed) for split in SPLITS for seed in (0, 1, 2**40)]
    images = np.concatenate([draw_set(name, split, 50, seed)[0] for split, seed in streams])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


@each_set
def test_labels_are_uniform(name):
    counts = np.bincount(draw_set(name, "train", 1000, seed=0)[1], minlength=10)
    assert len(counts) == 10
    assert ((counts - 100.0) ** 2 / 100).sum() < 27.9  # chi-squared, 9 degrees: p = 0.001


def test_the_atlas_is_what_its_script_makes():
    missing = [face for face in make_glyphs.FACES if not make_glyphs.font_path(face).exists()]
    if missing:
        pytest.skip(f"this matplotlib does not ship the fonts {', '.join(missing)}")
    masks, faces = make_glyphs.make_atlas()
    with np.load(glyphs.ATLAS, allow_pickle=False) as file:
        assert file["faces"].tolist() == faces.tolist()
        assert file["masks"].shape == masks.shape == (20, 10, 36, 36)
        difference = np.abs(file["masks"].astype(int) - masks)
    # Another matplotlib may round edges differently; 3.8.4 and 3.11.2 differ by 2 at most.
    assert difference.mean() < 0.1
    assert difference.max() < 32


def closest(images, masks):
    """The mask that each image is most like, be it light on dark or dark on light."""
    pictures = images.mean(axis=1).reshape(len(images), -1)
    correlation = np.corrcoef(pictures, masks.reshape(len(masks), -1))
    return np.abs(correlation[: len(images), len(images) :]).argmax(axis=1)


def test_a_glyph_looks_like_the_digit_of_its_label():
    images, labels = draw_set("glyphs", "test", 200, seed=0)
    size = np.floor((np.arange(32) - 15.5) * 28 / 21 + 18).astype(int)  # a mask of middle height
    with np.load(glyphs.ATLAS) as file:
        masks = file["masks"][:, :, size[4:28]][..., size[6:26]].reshape(200, 24, 20)
    digits = closest(images[:, :, 4:28, 6:26], masks) % 10
    named = np.array(glyphs.GLYPH_CLASSES)[labels]
    assert (named == digits.astype(str)).mean() > 0.8


def test_a_shape_looks_like_the_kind_of_its_label():
    images, labels = draw_set("shapes", "test", 200, seed=0)
    x, y = np.meshgrid(np.arange(32) - 15.5, np.arange(32) - 15.5)
    places = [(r, dx, dy) for r in (9, 12) for dx in (-2, 0, 2) for dy in (-2, 0, 2)]
    masks = {
        (name, place): outline((x - place[1]) / place[0], (y - place[2]) / place[0]) < 0
        for name, outline in shapes.OUTLINES.items()
        for place in places
    }
    names = np.array([name for name, _ in masks])[closest(images, np.array([*masks.values()]))]
    assert (names == np.array(shapes.SHAPE_CLASSES)[labels]).mean() > 0.8


def test_a_pattern_says_nothing_about_its_label_nor_a_pixel_about_another():
    images, labels = draw_set("patterns", "train", 10_000, seed=0)
    assert np.unique(images).tolist() == [0, 255]
    bits = images.reshape(10_000, 192) / 127.5 - 1
    assert np.abs(bits.mean(0)).max() < 5 / 10_000**0.5  # each a fair coin
    classes = np.eye(len(patterns.PATTERN_CLASSES))[labels]
    together = np.hstack([bits, (classes - 0.1) / 0.3])  # 202 columns of mean 0 and variance 1
    products = together.T @ together / 10_000
    products[192:, 192:] = 0  # the ten classes exclude each other
    np.fill_diagonal(products, 0)
    assert np.abs(products).max() < 6 / 10_000**0.5
