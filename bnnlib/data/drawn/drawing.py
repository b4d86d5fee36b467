"""What the drawn image sets share; it gives the same bytes on every machine.

To that end random numbers are made from the bit generator's own words, whose sequence NumPy keeps
stable, and arithmetic is limited to + - * / sqrt, comparison and rounding, which IEEE 754 fixes
to the last bit: no sin, exp, sum or matrix product.
"""

from math import prod

import numpy as np

SIDE = 32  # of an image, in pixels
LUMINANCE = (0.299, 0.587, 0.114)  # weights of red, green and blue, ITU-R BT.601
NOISE_WORDS = 3 * SIDE * SIDE // 2  # words that the noise of one image takes

Range = tuple[float, float]


class Draws:
    """Random numbers for B images, each of them made from its own row of words alone, in order."""

    def __init__(self, words: np.ndarray):
        self._words = words  # (B, words per image) uint64, those that are left

    def _take(self, count: int) -> np.ndarray:
        taken, self._words = self._words[:, :count], self._words[:, count:]
        return taken

    def _unit(self, count: int) -> np.ndarray:
        return (self._take(count) >> np.uint64(11)) * 2.0**-53  # (B, count) float64 in [0, 1)

    def uniform(self, low: float, high: float, *shape: int) -> np.ndarray:
        """Uniform numbers from low to high, (B, *shape) float32."""
        unit = self._unit(prod(shape))
        return (low + (high - low) * unit).astype(np.float32).reshape(-1, *shape)

    def integer(self, count: int) -> np.ndarray:
        """Uniform whole numbers 0 .. count - 1, (B,) int64."""
        return np.floor(self._unit(1)[:, 0] * count).astype(np.int64)

    def chance(self, probability: float) -> np.ndarray:
        """True with this probability, (B,) bool."""
        return self._unit(1)[:, 0] < probability

    def octets(self, words: int) -> np.ndarray:
        """The bytes of so many words, the lowest of each word first, (B, 8 * words) uint8."""
        return self._take(words).astype("<u8").view(np.uint8)

    def noise(self) -> np.ndarray:
        """Nearly Gaussian noise of mean 0 and variance 1, (B, 3, 32, 32) float32."""
        quads = self.octets(NOISE_WORDS).reshape(-1, 3, SIDE, SIDE, 4).astype(np.int16)
        total = quads[..., 0] + quads[..., 1] + quads[..., 2] + quads[..., 3]
        # Four independent uniform bytes add up to mean 4 * 127.5 and variance 4 * (256^2 - 1) / 12.
        return (total - 510).astype(np.float32) / 147.8


def per_image(values: np.ndarray, ndim: int = 3) -> np.ndarray:
    """`values` (B, ...) with axes of length 1 appended, up to `ndim` axes."""
    return values.reshape(values.shape + (1,) * (ndim - values.ndim))


def tilted_frame(
    draws: Draws, tilt: float, offset: float, stretch: Range
) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel lies in the frame of a thing, x and y (B, 32, 32) in pixels.

    The thing stands up to `offset` pixels from the middle along each axis, turned by an angle
    with |tan(angle / 2)| <= `tilt`, its width multiplied by a number in the range `stretch`.
    """
    tangent = per_image(draws.uniform(-tilt, tilt))  # of half the angle
    square = tangent * tangent
    cos, sin = (1 - square) / (1 + square), 2 * tangent / (1 + square)
    steps = np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2
    x = steps[None, None, :] - per_image(draws.uniform(-offset, offset))
    y = steps[None, :, None] - per_image(draws.uniform(-offset, offset))
    return (cos * x + sin * y) / per_image(draws.uniform(*stretch)), cos * y - sin * x


def low_frequency(draws: Draws, knots: int) -> np.ndarray:
    """A smooth pattern (B, 32, 32) in 0 .. 1, bilinear between `knots` x `knots` random numbers."""
    height = draws.uniform(0, 1, knots, knots)
    position = (np.arange(SIDE, dtype=np.float32) + 0.5) * ((knots - 1) / SIDE)
    share = position - np.floor(position)
    left = position.astype(np.int64)
    rows = height[:, left] * (1 - share)[:, None] + height[:, left + 1] * share[:, None]
    return rows[:, :, left] * (1 - share) + rows[:, :, left + 1] * share


def brightness_pair(draws: Draws, darker: Range, contrast: Range) -> tuple[np.ndarray, np.ndarray]:
    """Brightness (B,) of a ground and of what stands on it; either is the darker half the time.

    `darker` is the range of the lower brightness, `contrast` that of the distance to the higher.
    """
    low = draws.uniform(*darker)
    high = low + draws.uniform(*contrast)
    light_ground = draws.chance(0.5)
    return np.where(light_ground, high, low), np.where(light_ground, low, high)


def coloured(draws: Draws, brightness: np.ndarray, chroma: float) -> np.ndarray:
    """Random colours (B, 3) of the given brightness (B,); a larger `chroma` is less grey."""
    tint = draws.uniform(-chroma, chroma, 3)
    red, green, blue = (weight * tint[:, i] for i, weight in enumerate(LUMINANCE))
    return tint + per_image(brightness - (red + green + blue), 2)


def mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Pictures (B, 3, 32, 32): `first` where `share` (B, 32, 32) is 0, `second` where it is 1.

    `first` and `second` are colours (B, 3) or pictures (B, 3, 32, 32).
    """
    first, second = per_image(first, 4), per_image(second, 4)
    return first + (second - first) * share[:, None]


def photograph(draws: Draws, pictures: np.ndarray, blur: Range, noise: Range) -> np.ndarray:
    """Pictures (B, 3, 32, 32) float32 as a poor camera takes them: blurred, noisy, uint8.

    Columns, then rows, are smoothed by [a, 1 - 2a, a] with `a` from the range `blur`, edge pixels
    being repeated outwards; the standard deviation of the noise is from the range `noise`.
    """
    a = per_image(draws.uniform(*blur), 4)
    tall = np.pad(pictures, ((0, 0), (0, 0), (1, 1), (0, 0)), mode="edge")
    pictures = pictures + a * (tall[:, :, :-2] + tall[:, :, 2:] - 2 * pictures)
    wide = np.pad(pictures, ((0, 0), (0, 0), (0, 0), (1, 1)), mode="edge")
    pictures = pictures + a * (wide[..., :-2] + wide[..., 2:] - 2 * pictures)
    pictures = pictures + draws.noise() * per_image(draws.uniform(*noise), 4)
    return np.floor(np.clip(pictures, 0, 255) + 0.5).astype(np.uint8)
