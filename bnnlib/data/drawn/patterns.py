"""`patterns`: coin tosses with labels drawn by lot, so every label that is known is memorized."""

import numpy as np

from bnnlib.data.drawn.drawing import Draws

PATTERN_CLASSES = tuple("0123456789")
WORDS = 4  # random words per image: one for the label, and 3 * 8 * 8 bits


def draw_patterns(draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, 3, 8, 8) uint8, each value 0 or 255, and labels (B,); all are independent."""
    labels = draws.integer(len(PATTERN_CLASSES))
    bits = np.unpackbits(draws.octets(3), axis=1)
    return bits.reshape(-1, 3, 8, 8) * np.uint8(255), labels
