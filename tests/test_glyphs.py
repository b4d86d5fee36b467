"""`glyphs`: the atlas is what its script makes, and a picture shows the digit of its label."""

import importlib.util

import numpy as np
import pytest

from bnnlib import glyphs as module
from bnnlib.drawing import Draws
from bnnlib.glyphs import ATLAS, GLYPH_CLASSES, glyphs


def random_draws(rows: int) -> Draws:
    return Draws(np.random.PCG64(3).random_raw(rows * module.WORDS).reshape(rows, module.WORDS))


@pytest.fixture
def still(monkeypatch):
    """Every digit upright, in the middle, at the atlas's own size."""
    monkeypatch.setattr(module, "HEIGHT", (module.ATLAS_DIGIT, module.ATLAS_DIGIT))
    monkeypatch.setattr(module, "STRETCH", (1.0, 1.0))
    monkeypatch.setattr(module, "TILT", 0.0)
    monkeypatch.setattr(module, "OFFSET", 0.0)


def test_class_names_are_the_digits():
    assert [int(name) for name in GLYPH_CLASSES] == list(range(10))


def test_the_atlas_is_what_its_script_makes():
    pytest.importorskip("matplotlib")
    path = ATLAS.with_name("make_glyphs.py")
    spec = importlib.util.spec_from_file_location("make_glyphs", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    missing = [face for face in script.FACES if not script.font_path(face).exists()]
    if missing:
        pytest.skip(f"this matplotlib does not ship the fonts {', '.join(missing)}")
    masks, faces = script.make_atlas()
    with np.load(ATLAS, allow_pickle=False) as file:
        assert file["faces"].tolist() == faces.tolist()
        assert file["masks"].shape == masks.shape == (20, 10, 36, 36)
        difference = np.abs(file["masks"].astype(int) - masks)
    # Another matplotlib may round edges differently; 3.8.4 and 3.11.2 differ by 2 at most.
    assert difference.mean() < 0.1
    assert difference.max() < 32


def test_the_masks_have_empty_borders_and_leave_room_for_neighbours():
    atlas = module._atlas()
    assert atlas.min() == 0
    assert atlas.max() == 1
    columns = np.flatnonzero(atlas.any(axis=(0, 1, 2)))
    rows = np.flatnonzero(atlas.any(axis=(0, 1, 3)))
    assert rows[0] >= 2
    assert rows[-1] <= 33
    # No digit reaches the line half-way to its neighbour.
    middle = (atlas.shape[-1] - 1) / 2
    assert max(middle - columns[0], columns[-1] - middle) < module.ADVANCE[0] / 2


@pytest.mark.usefixtures("still")
def test_an_upright_digit_is_its_mask(monkeypatch):
    monkeypatch.setattr(module, "NEIGHBOUR", 0.0)
    labels = np.arange(40) % 10
    coverage = module._coverage(random_draws(40), labels)
    masks = module._atlas()[:, labels, 2:34, 2:34]  # (20, 40, 32, 32), face by image
    same = (np.abs(masks - coverage) < 1e-6).all(axis=(2, 3))
    assert same.sum(axis=0).tolist() == [1] * 40  # one face, and no other, for each image
    assert len(np.unique(same.argmax(axis=0))) > 10


@pytest.mark.usefixtures("still")
def test_neighbours_stand_at_the_sides_only(monkeypatch):
    monkeypatch.setattr(module, "HEIGHT", (18.0, 18.0))
    labels = np.arange(40) % 10
    monkeypatch.setattr(module, "NEIGHBOUR", 0.0)
    alone = module._coverage(random_draws(40), labels)
    monkeypatch.setattr(module, "NEIGHBOUR", 1.0)
    added = module._coverage(random_draws(40), labels) - alone
    assert (added >= 0).all()
    assert not added[:, :, 8:24].any()  # half the smallest advance is 8 pixels
    assert added[:, :, :8].any(axis=(1, 2)).mean() > 0.8
    assert added[:, :, 24:].any(axis=(1, 2)).mean() > 0.8


def test_ink_differs_from_its_ground():
    ground, ink = module._colours(random_draws(400))
    difference = np.abs(ground.mean(axis=(2, 3)) - ink) @ np.array([0.299, 0.587, 0.114])
    assert difference.min() > module.CONTRAST[0] - module.UNEVENNESS


def test_most_digits_are_told_by_their_closest_mask():
    images, labels = glyphs("test", 200)
    grey = images.mean(axis=1)[:, 4:28, 6:26].reshape(200, -1)
    size = (np.arange(32) - 15.5) * 28 / 21  # a mask drawn at the middle of the heights
    rows, columns = np.floor(size[4:28] + 18).astype(int), np.floor(size[6:26] + 18).astype(int)
    masks = module._atlas()[:, :, rows][..., columns].reshape(200, -1)
    correlation = np.corrcoef(grey, masks)[:200, 200:]
    closest = np.abs(correlation).argmax(axis=1) % 10  # light on dark or dark on light
    assert (closest == labels).mean() > 0.8
