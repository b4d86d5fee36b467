"""`glyphs`: digits in twenty typefaces, a look-alike of SVHN that needs no file from outside.

Each stands on an uneven ground, often with neighbours cut off at the sides as on a house number.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np

from bnnlib.data.drawn import drawing
from bnnlib.data.drawn.drawing import NOISE_WORDS, Draws, per_image

GLYPH_CLASSES = tuple("0123456789")  # the label is the digit
WORDS = NOISE_WORDS + 64  # random words per image: the noise, and enough for the parameters

# Ranges from which each image's parameters are drawn, uniformly.
HEIGHT = (18.0, 24.0)  # of the digit, in pixels
STRETCH = (0.9, 1.1)  # width relative to the typeface's own
TILT = 0.0524  # largest tan(angle / 2): 6 degrees to either side
OFFSET = 2.0  # largest distance of the digit from the middle, along each axis, in pixels
NEIGHBOUR = 0.5  # chance of a neighbour, for each side
ADVANCE = (25.0, 30.0)  # from the digit to a neighbour, in pixels of the atlas
DARKER = (20.0, 110.0)  # brightness of the darker of ground and ink, of 255
CONTRAST = (70.0, 150.0)  # by how much the other is brighter
CHROMA = 35.0  # how far red, green and blue stray from grey
UNEVENNESS = 35.0  # largest change of each channel across the ground
BLUR = (0.0, 0.25)  # weight of each adjacent pixel, along columns and rows
NOISE = (2.0, 10.0)  # standard deviation, of 255

ATLAS = Path(__file__).parent / "assets" / "glyphs.npz"
ATLAS_DIGIT = 28.0  # height of the tallest digit of each face in the atlas, in pixels
KNOTS = 4  # of the ground's pattern, along each axis


@lru_cache(maxsize=1)
def _atlas() -> np.ndarray:
    """Coverage masks of the digits, (faces, 10, 36, 36) float32 in 0 .. 1; see assets/README.md."""
    with np.load(ATLAS, allow_pickle=False) as file:
        return file["masks"].astype(np.float32) / 255


def draw_glyphs(draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, 3, 32, 32) uint8 and their labels (B,) int64, uniform over the ten digits."""
    labels = draws.integer(len(GLYPH_CLASSES))
    ink_share = _coverage(draws, labels)
    ground_brightness, ink_brightness = drawing.brightness_pair(draws, DARKER, CONTRAST)
    ground = drawing.coloured(draws, ground_brightness, CHROMA)
    ink = drawing.coloured(draws, ink_brightness, CHROMA)
    change = draws.uniform(-UNEVENNESS, UNEVENNESS, 3)
    ground = drawing.mix(ground, ground + change, drawing.low_frequency(draws, KNOTS))
    return drawing.photograph(draws, drawing.mix(ground, ink, ink_share), BLUR, NOISE), labels


def _coverage(draws: Draws, labels: np.ndarray) -> np.ndarray:
    """How much of each pixel the digit and its neighbours cover, (B, 32, 32) in 0 .. 1."""
    face = per_image(draws.integer(len(_atlas())))
    zoom = per_image(ATLAS_DIGIT / draws.uniform(*HEIGHT))
    advance = per_image(draws.uniform(*ADVANCE))
    digits = np.stack([draws.integer(10), labels, draws.integer(10)], axis=1)
    left, right = draws.chance(NEIGHBOUR), draws.chance(NEIGHBOUR)
    shown = np.stack([left, np.ones_like(left), right], axis=1)
    x, y = (part * zoom for part in drawing.tilted_frame(draws, TILT, OFFSET, STRETCH))
    place = np.clip(np.floor(x / advance + 0.5), -1, 1)  # -1 left, 0 the digit, 1 right
    image, position = np.arange(len(labels))[:, None, None], place.astype(np.int64) + 1
    coverage = _look_up(face, digits[image, position], x - place * advance, y)
    return coverage * shown[image, position]


def _look_up(face: np.ndarray, digit: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Coverage (B, 32, 32) at x, y from the middle of a mask of the atlas, bilinear."""
    atlas = _atlas()
    side = atlas.shape[-1]
    # The masks are empty along their borders, so a point outside may be moved to the border.
    x, y = (np.clip(part + (side - 1) / 2, 0, side - 2) for part in (x, y))
    left, top = np.floor(x), np.floor(y)
    corner = ((face * 10 + digit) * side + top.astype(np.int64)) * side + left.astype(np.int64)
    flat, x, y = atlas.reshape(-1), x - left, y - top
    upper = flat[corner] * (1 - x) + flat[corner + 1] * x
    lower = flat[corner + side] * (1 - x) + flat[corner + side + 1] * x
    return upper * (1 - y) + lower * y
