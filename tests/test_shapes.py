"""`shapes`: outlines, textures and shadows are what their names say."""

import numpy as np
import pytest
from scipy import ndimage

from bnnlib import shapes as module
from bnnlib.drawing import Draws
from bnnlib.shapes import OUTLINES, SHAPE_CLASSES, SQUARE, circle, polygon


@pytest.fixture
def draws() -> Draws:
    """400 rows of random words."""
    return Draws(np.random.PCG64(5).random_raw(400 * module.WORDS).reshape(400, module.WORDS))


def grid() -> tuple[np.ndarray, np.ndarray]:
    """400 x 400 points over the square from -1.25 to 1.25."""
    steps = np.linspace(-1.25, 1.25, 400, dtype=np.float32)
    return np.broadcast_arrays(steps[None, :], steps[:, None])


def pieces(mask: np.ndarray) -> int:
    """How many pieces a mask has; pixels that touch at a corner are one piece."""
    return ndimage.label(mask, structure=np.ones((3, 3)))[1]


def test_polygon_distance_to_a_square():
    x = np.array([0.0, 0.72, 1.72, 1.72, -0.5], np.float32)
    y = np.array([0.0, 0.0, 0.0, 1.72, 0.62], np.float32)
    expected = [-0.72, 0, 1, np.sqrt(2), -0.1]
    assert polygon(x, y, SQUARE) == pytest.approx(expected, abs=1e-6)


def test_circle_distance():
    assert circle(np.array([3.0]), np.array([4.0]), 2.0).tolist() == [3.0]


@pytest.mark.parametrize("name", SHAPE_CLASSES)
def test_outlines_are_whole_and_fit_the_picture(name):
    x, y = grid()
    inside = OUTLINES[name](x, y) < 0
    assert pieces(inside) == 1
    assert pieces(~inside) == (2 if name == "ring" else 1)
    assert not inside[0].any()
    assert not inside[:, 0].any()
    assert 0.1 < inside.mean() * 2.5**2 / np.pi < 0.8  # share of the circle of radius 1


@pytest.mark.parametrize("name", SHAPE_CLASSES)
def test_distances_change_by_at_most_the_way_gone(name):
    x, y = grid()
    distance = OUTLINES[name](x, y)
    step = 2.5 / 399
    assert np.abs(np.diff(distance, axis=0)).max() < step * 1.01
    assert np.abs(np.diff(distance, axis=1)).max() < step * 1.01


def test_any_two_kinds_differ_even_when_turned():
    x, y = grid()
    angles = np.radians(np.arange(-15, 16, 5))
    turned = {
        name: [outline(np.cos(a) * x + np.sin(a) * y, np.cos(a) * y - np.sin(a) * x) < 0
               for a in angles]
        for name, outline in OUTLINES.items()
    }  # fmt: skip
    for i, one in enumerate(SHAPE_CLASSES):
        for other in SHAPE_CLASSES[i + 1 :]:
            for mask in turned[other]:
                upright = turned[one][len(angles) // 2]
                assert (mask ^ upright).sum() > 0.15 * (mask | upright).sum(), (one, other)


def test_coverage_follows_the_label(draws, monkeypatch):
    for name, value in {"TILT": 0.0, "OFFSET": 0.0, "STRETCH": (1.0, 1.0)}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "RADIUS", (10.0, 10.0))
    labels = np.arange(400) % 10
    coverage = module._coverage(draws, labels)
    x, y = np.meshgrid((np.arange(32) - 15.5) / 10, (np.arange(32) - 15.5) / 10)
    for label, outline in enumerate(OUTLINES.values()):
        distance = outline(x, y)
        clear = np.abs(distance) > 1e-4  # not on the outline, where rounding decides
        seen = coverage[labels == label] > 0.5
        assert np.array_equal(seen[:, clear], np.tile(distance[clear] < 0, (40, 1)))


def test_shadow_is_the_object_moved():
    share = np.zeros((1, 32, 32), np.float32)
    share[0, 3, 4] = 1
    assert np.argwhere(module._shadow(share)).tolist() == [[0, 5, 6]]


def test_textures_stay_in_range_and_use_all_of_it(draws):
    texture = module._texture(draws)
    assert texture.shape == (400, 32, 32)
    assert texture.dtype == np.float32
    assert texture.min() >= 0
    assert texture.max() <= 1
    assert 0.3 < (np.ptp(texture, axis=(1, 2)) == 1).mean() < 0.7  # stripes and checks, half of all


def test_stripes_have_their_period(draws, monkeypatch):
    monkeypatch.setattr(module, "PERIOD", (8.0, 8.0))
    monkeypatch.setattr(module, "CRISPNESS", (1.0, 1.0))
    stripes, across = module._stripes(draws)
    gradient = np.hypot(np.diff(stripes[:, :-1], axis=2), np.diff(stripes[:, :, :-1], axis=1))
    assert np.median(gradient) == pytest.approx(2 / 8, rel=0.01)  # 0 to 1 and back in 8 pixels
    assert abs(np.corrcoef(stripes.ravel(), across.ravel())[0, 1]) < 0.05


def test_objects_stand_out_from_their_ground(draws):
    ground, surface = module._materials(draws)
    weights = np.array([0.299, 0.587, 0.114])
    difference = np.abs((ground - surface).mean(axis=(2, 3)) @ weights)
    assert difference.min() > module.CONTRAST[0] - module.TEXTURE
