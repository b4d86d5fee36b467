"""What the drawn image sets share: random numbers, patterns, colours, blur and noise.

In: raw 64-bit words, one row per image. Out: uint8 images (n, 3, H, W), the same bytes on every
machine. To that end random numbers are made from the bit generator's own words, whose sequence
NumPy keeps stable, and arithmetic is limited to + - * / sqrt, comparison and rounding, which
IEEE 754 fixes to the last bit: no sin, exp, sum or matrix product. Next file: `glyphs.py`.
"""

from collections.abc import Callable

import numpy as np

from bnnlib.errors import InvalidValue, check_whole, unknown_name

SIDE = 32  # of an image, in pixels
SPLITS = ("train", "valid", "test")
CHUNK = 64  # images drawn together: few enough to stay in the processor's cache
LUMINANCE = (0.299, 0.587, 0.114)  # weights of red, green and blue, ITU-R BT.601
NOISE_WORDS = 3 * SIDE * SIDE // 2  # words that the noise of one image takes


class Draws:
    """Random numbers for a chunk of B images, taken in order from one row of words per image.

    Each method takes the same number of words from every row, so an image depends on its own row
    alone. Raises InvalidValue when the words run out.
    """

    def __init__(self, words: np.ndarray):
        self._words = words  # (B, words per image) uint64
        self._used = 0

    def _take(self, count: int) -> np.ndarray:
        start, self._used = self._used, self._used + count
        if self._used > self._words.shape[1]:
            raise InvalidValue(f"{self._used} words needed per image, {self._words.shape[1]} given")
        return self._words[:, start : self._used]

    def _unit(self, count: int) -> np.ndarray:
        return (self._take(count) >> np.uint64(11)) * 2.0**-53  # (B, count) float64 in [0, 1)

    def uniform(self, low: float, high: float, *shape: int) -> np.ndarray:
        """Uniform numbers from low to high, (B, *shape) float32."""
        unit = self._unit(int(np.prod(shape, dtype=np.int64)))
        return (low + (high - low) * unit).astype(np.float32).reshape(-1, *shape)

    def integer(self, count: int) -> np.ndarray:
        """Uniform whole numbers 0 .. count - 1, (B,) int64."""
        return np.floor(self._unit(1)[:, 0] * count).astype(np.int64)

    def chance(self, probability: float) -> np.ndarray:
        """True with this probability, (B,) bool."""
        return self._unit(1)[:, 0] < probability

    def bits(self, count: int) -> np.ndarray:
        """Coin tosses, (B, count) uint8 of 0 and 1; `count` is a multiple of 64."""
        octets = self._take(count // 64).astype("<u8").view(np.uint8)  # 8 bytes of each word
        return np.unpackbits(octets, axis=1)

    def noise(self) -> np.ndarray:
        """Nearly Gaussian noise of mean 0 and variance 1, (B, 3, 32, 32) float32."""
        octets = self._take(NOISE_WORDS).astype("<u8").view(np.uint8)  # 8 bytes of each word
        quads = octets.reshape(-1, 3, SIDE, SIDE, 4).astype(np.int16)
        total = quads[..., 0] + quads[..., 1] + quads[..., 2] + quads[..., 3]
        # Four independent uniform bytes add up to mean 4 * 127.5 and variance 4 * (256^2 - 1) / 12.
        return (total - 510).astype(np.float32) / 147.8


def draw_set(
    draw: Callable[[Draws], tuple[np.ndarray, np.ndarray]],
    split: str,
    n: int,
    seed: int,
    *,
    set_number: int,
    words: int,
    side: int = SIDE,
) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, side, side) uint8 and labels (n,) int64 that `draw` makes chunk by chunk.

    Each image gets `words` random words; its content does not depend on n. Every (set_number,
    split, seed) has its own stream. Raises InvalidValue for an unknown split, a bad n or seed.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    check_whole("n", n)
    stream = np.random.SeedSequence((set_number, SPLITS.index(split), check_whole("seed", seed)))
    bits = np.random.PCG64(stream)
    images, labels = np.empty((n, 3, side, side), np.uint8), np.empty(n, np.int64)
    for start in range(0, n, CHUNK):
        rows = min(CHUNK, n - start)
        draws = Draws(bits.random_raw(rows * words).reshape(rows, words))
        images[start : start + rows], labels[start : start + rows] = draw(draws)
    return images, labels


def per_image(values: np.ndarray, ndim: int = 3) -> np.ndarray:
    """`values` (B, ...) with axes of length 1 appended, up to `ndim` axes."""
    return values.reshape(values.shape + (1,) * (ndim - values.ndim))


def clip(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`values` with those outside low .. high moved to the nearer end."""
    return np.minimum(np.maximum(values, low), high)


def direction(half_tangent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of an angle from tan(angle / 2), without trigonometric functions."""
    square = half_tangent * half_tangent
    return (1 - square) / (1 + square), 2 * half_tangent / (1 + square)


def tilted_frame(
    draws: Draws, tilt: float, offset: float, stretch: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel lies in the frame of a thing, x and y (B, 32, 32) in pixels.

    The thing stands up to `offset` pixels from the middle along each axis, turned by an angle
    with |tan(angle / 2)| <= `tilt`, its width multiplied by a number in the range `stretch`.
    """
    cos, sin = (per_image(part) for part in direction(draws.uniform(-tilt, tilt)))
    steps = np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2
    x = steps[None, None, :] - per_image(draws.uniform(-offset, offset))
    y = steps[None, :, None] - per_image(draws.uniform(-offset, offset))
    return (cos * x + sin * y) / per_image(draws.uniform(*stretch)), cos * y - sin * x


def low_frequency(knots: np.ndarray) -> np.ndarray:
    """A smooth pattern (B, 32, 32) through random knots (B, k, k), bilinear between them."""
    gaps = knots.shape[1] - 1
    position = (np.arange(SIDE, dtype=np.float32) + 0.5) * (gaps / SIDE)
    share = position - np.floor(position)
    left = position.astype(np.int64)
    rows = knots[:, left] * (1 - share)[:, None] + knots[:, left + 1] * share[:, None]
    return rows[:, :, left] * (1 - share) + rows[:, :, left + 1] * share


def brightness_pair(
    draws: Draws, darker: tuple[float, float], contrast: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Brightness (B,) of a ground and of what stands on it; either is the darker half the time.

    `darker` is the range of the lower brightness, `contrast` that of the distance to the higher.
    """
    low = draws.uniform(*darker)
    high = low + draws.uniform(*contrast)
    light_ground = draws.chance(0.5)
    return np.where(light_ground, high, low), np.where(light_ground, low, high)


def luminance(colour: np.ndarray) -> np.ndarray:
    """Brightness (B,) of colours (B, 3)."""
    red, green, blue = LUMINANCE
    return red * colour[:, 0] + green * colour[:, 1] + blue * colour[:, 2]


def coloured(draws: Draws, brightness: np.ndarray, chroma: float) -> np.ndarray:
    """Random colours (B, 3) of the given brightness (B,); a larger `chroma` is less grey."""
    tint = draws.uniform(-chroma, chroma, 3)
    return tint + per_image(brightness - luminance(tint), 2)


def mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Pictures (B, 3, 32, 32): `first` where `share` (B, 32, 32) is 0, `second` where it is 1.

    `first` and `second` are colours (B, 3) or pictures (B, 3, 32, 32).
    """
    first, second = per_image(first, 4), per_image(second, 4)
    return first + (second - first) * share[:, None]


def blur(pictures: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Pictures (B, 3, 32, 32) smoothed along columns, then rows, by [a, 1 - 2a, a], a = `amount`.

    `amount` is (B,), from 0 to 1/3; edge pixels are repeated outwards.
    """
    a = per_image(amount, 4)
    tall = np.pad(pictures, ((0, 0), (0, 0), (1, 1), (0, 0)), mode="edge")
    pictures = pictures + a * (tall[:, :, :-2] + tall[:, :, 2:] - 2 * pictures)
    wide = np.pad(pictures, ((0, 0), (0, 0), (0, 0), (1, 1)), mode="edge")
    return pictures + a * (wide[..., :-2] + wide[..., 2:] - 2 * pictures)


def photograph(
    draws: Draws,
    pictures: np.ndarray,
    blur_range: tuple[float, float],
    noise_range: tuple[float, float],
) -> np.ndarray:
    """Pictures (B, 3, 32, 32) float32 as a poor camera takes them: blurred, noisy, uint8.

    `blur_range` bounds the `amount` of `blur`, `noise_range` the noise's standard deviation.
    """
    pictures = blur(pictures, draws.uniform(*blur_range))
    pictures = pictures + draws.noise() * per_image(draws.uniform(*noise_range), 4)
    return np.floor(clip(pictures, 0, 255) + 0.5).astype(np.uint8)
