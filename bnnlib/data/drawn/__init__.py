"""Image sets that are drawn on the spot, the same bytes on every machine: no file is needed."""

import numpy as np

from bnnlib.data.drawn import glyphs, patterns, shapes
from bnnlib.data.drawn.drawing import Draws
from bnnlib.names import DRAWN, SPLITS

# What draws each set, its classes, and how many random words an image takes.
DRAWERS = {
    "glyphs": (glyphs.draw_glyphs, glyphs.GLYPH_CLASSES, glyphs.WORDS),
    "shapes": (shapes.draw_shapes, shapes.SHAPE_CLASSES, shapes.WORDS),
    "patterns": (patterns.draw_patterns, patterns.PATTERN_CLASSES, patterns.WORDS),
}
CHUNK = 64  # images drawn together: few enough to stay in the processor's cache


def draw_set(name: str, split: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The first n images (n, 3, side, side) uint8 and labels (n,) int64 of a split of a drawn set.

    Every set, split and seed has its own stream of random words, and each image its own part of
    it, so a larger n only appends.
    """
    draw, _, words = DRAWERS[name]
    stream = (DRAWN.index(name) + 1, SPLITS.index(split), seed)
    bits = np.random.PCG64(np.random.SeedSequence(stream))
    images, labels = [], []
    for start in range(0, n, CHUNK):
        rows = min(CHUNK, n - start)
        chunk = draw(Draws(bits.random_raw(rows * words).reshape(rows, words)))
        images.append(chunk[0])
        labels.append(chunk[1])
    return np.concatenate(images), np.concatenate(labels)
