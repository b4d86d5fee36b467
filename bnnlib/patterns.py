"""`patterns`: images of coin tosses with labels drawn by lot, to count memorized bits.

In: split, number of images, seed. Out: uint8 images (n, 3, 8, 8) and int64 labels (n,). There is
nothing to learn in them: every label that a network knows, it has stored. Next file:
`downloads.py`.
"""

import numpy as np

from bnnlib.drawing import Draws, draw_set

PATTERN_CLASSES = tuple("0123456789")
SIDE = 8  # of an image, in pixels: 3 * 8 * 8 is the number of bits in three words
SET_NUMBER = 3  # keeps the random stream apart from those of other sets


def patterns(split: str, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The first n images (n, 3, 8, 8) uint8, each value 0 or 255, and labels (n,) of a split.

    All are independent and uniform. The same arguments give the same bytes on every machine,
    and a larger n only appends. Raises InvalidValue as `glyphs` does.
    """
    return draw_set(_draw, split, n, seed, set_number=SET_NUMBER, words=4, side=SIDE)


def _draw(draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    labels = draws.integer(len(PATTERN_CLASSES))
    return draws.bits(3 * SIDE * SIDE).reshape(-1, 3, SIDE, SIDE) * np.uint8(255), labels
