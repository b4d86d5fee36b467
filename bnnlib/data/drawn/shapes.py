"""`shapes`: ten kinds of objects, a look-alike of CIFAR-10 that needs no file.

Each image shows one of varied size, place, tilt, texture and colour, with its shadow.
"""

import numpy as np

from bnnlib.data.drawn import drawing
from bnnlib.data.drawn.drawing import NOISE_WORDS, Draws, per_image

WORDS = NOISE_WORDS + 256  # random words per image: the noise, and enough for the parameters

# Ranges from which each image's parameters are drawn, uniformly.
RADIUS = (8.0, 13.0)  # half the size of the object, in pixels
STRETCH = (0.85, 1.15)  # width relative to height
TILT = 0.1317  # largest tan(angle / 2): 15 degrees to either side
OFFSET = 3.5  # largest distance of the object from the middle, along each axis, in pixels
DARKER = (30.0, 110.0)  # brightness of the darker of ground and object, of 255
CONTRAST = (60.0, 130.0)  # by how much the other is brighter
CHROMA = 50.0  # how far red, green and blue stray from grey
TEXTURE = 50.0  # largest change of each channel by a texture
PERIOD = (5.0, 12.0)  # of stripes and checks, in pixels
CRISPNESS = (1.5, 4.0)  # steepness of the edges of stripes and checks
SHADOW = (0.0, 0.6)  # share of the light that the object's shadow takes away
BLUR = (0.0, 0.2)  # weight of each adjacent pixel, along columns and rows
NOISE = (2.0, 10.0)  # standard deviation, of 255

SHADOW_SHIFT = 2  # pixels to the right and down
COARSE_KNOTS, FINE_KNOTS = 3, 9  # along each axis, of the textures "gradient" and "mottles"

# Corners of the polygons: x to the right, y downwards, in radii.
SQUARE = ((-0.72, -0.72), (0.72, -0.72), (0.72, 0.72), (-0.72, 0.72))
TRIANGLE = ((0.0, -1.0), (0.95, 0.7), (-0.95, 0.7))
BOWTIE = ((-0.9, -0.75), (0.0, -0.15), (0.9, -0.75), (0.9, 0.75), (0.0, 0.15), (-0.9, 0.75))
ARROW = (
    (-0.95, -0.28), (0.05, -0.28), (0.05, -0.85), (0.95, 0.0),
    (0.05, 0.85), (0.05, 0.28), (-0.95, 0.28),
)  # fmt: skip
CROSS = (
    (-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3),
    (0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3),
)  # fmt: skip
STAR = (
    (0.0, -1.0), (0.259, -0.356), (0.951, -0.309), (0.419, 0.136), (0.588, 0.809),
    (0.0, 0.44), (-0.588, 0.809), (-0.419, 0.136), (-0.951, -0.309), (-0.259, -0.356),
)  # fmt: skip


def polygon(x: np.ndarray, y: np.ndarray, corners: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Distance of points x, y from the outline of a polygon, negative inside (even-odd rule)."""
    nearest, inside = np.full_like(x, np.inf), np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
        gap_x, gap_y = x - x0 - along * dx, y - y0 - along * dy
        nearest = np.minimum(nearest, gap_x * gap_x + gap_y * gap_y)
        if dy != 0:  # a ray to the right cannot cross a horizontal edge
            crossing = x0 + (y - y0) * (dx / dy)
            inside ^= ((y < y0) != (y < y1)) & (x < crossing)
    return np.where(inside, -np.sqrt(nearest), np.sqrt(nearest))


def circle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance of points x, y from a circle around the origin, negative inside."""
    return np.sqrt(x * x + y * y) - radius


def crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A disc without a smaller disc to the right of its middle."""
    return np.maximum(circle(x, y, 0.95), -circle(x - 0.5, y, 0.75))


def heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two discs on the upper sides of a square that stands on a corner."""
    x = np.abs(x)
    disc = circle(x - 0.42, y + 0.32, 0.5)
    square = (x + np.abs(y - 0.1)) * 0.7071 - 0.6
    return np.minimum(disc, square)


# The kinds of objects: signed distance from the outline, in radii, at points x, y.
OUTLINES = {
    "arrow": lambda x, y: polygon(x, y, ARROW),
    "bowtie": lambda x, y: polygon(x, y, BOWTIE),
    "crescent": crescent,
    "cross": lambda x, y: polygon(x, y, CROSS),
    "disc": lambda x, y: circle(x, y, 0.85),
    "heart": heart,
    "ring": lambda x, y: np.abs(circle(x, y, 0.7)) - 0.22,
    "square": lambda x, y: polygon(x, y, SQUARE),
    "star": lambda x, y: polygon(x, y, STAR),
    "triangle": lambda x, y: polygon(x, y, TRIANGLE),
}
SHAPE_CLASSES = tuple(OUTLINES)


def draw_shapes(draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, 3, 32, 32) uint8 and labels (B,) int64, uniform over SHAPE_CLASSES."""
    labels = draws.integer(len(SHAPE_CLASSES))
    object_share = _coverage(draws, labels)
    ground, surface = drawing.brightness_pair(draws, DARKER, CONTRAST)
    ground, surface = _textured(draws, ground), _textured(draws, surface)
    shadow = np.zeros_like(object_share)
    shadow[:, SHADOW_SHIFT:, SHADOW_SHIFT:] = object_share[:, :-SHADOW_SHIFT, :-SHADOW_SHIFT]
    shadow *= per_image(draws.uniform(*SHADOW))
    pictures = drawing.mix(ground * (1 - shadow)[:, None], surface, object_share)
    return drawing.photograph(draws, pictures, BLUR, NOISE), labels


def _coverage(draws: Draws, labels: np.ndarray) -> np.ndarray:
    """How much of each pixel the object covers, (B, 32, 32) in 0 .. 1."""
    radius = per_image(draws.uniform(*RADIUS))
    x, y = (part / radius for part in drawing.tilted_frame(draws, TILT, OFFSET, STRETCH))
    distance = np.empty_like(x)
    for label, outline in enumerate(OUTLINES.values()):
        chosen = labels == label
        distance[chosen] = outline(x[chosen], y[chosen])
    return np.clip(0.5 - distance * radius, 0, 1)  # a half on the outline


def _textured(draws: Draws, brightness: np.ndarray) -> np.ndarray:
    """Pictures (B, 3, 32, 32) of one texture each, in two colours around a random one."""
    colour = drawing.coloured(draws, brightness, CHROMA)
    half = draws.uniform(-TEXTURE / 2, TEXTURE / 2, 3)
    return drawing.mix(colour - half, colour + half, _texture(draws))


def _texture(draws: Draws) -> np.ndarray:
    """Gradient, mottles, stripes or checks, one for each image: (B, 32, 32) in 0 .. 1."""
    gradient = drawing.low_frequency(draws, COARSE_KNOTS)
    mottles = drawing.low_frequency(draws, FINE_KNOTS)
    period, crispness = per_image(draws.uniform(*PERIOD)), per_image(draws.uniform(*CRISPNESS))
    x, y = drawing.tilted_frame(draws, tilt=1.0, offset=PERIOD[1] / 2, stretch=(1.0, 1.0))
    stripes, across = _bands(x / period, crispness), _bands(y / period, crispness)
    checks = stripes * across + (1 - stripes) * (1 - across)
    kinds = np.stack([gradient, mottles, stripes, checks])
    kind = draws.integer(len(kinds))
    return kinds[kind, np.arange(len(kind))]


def _bands(phase: np.ndarray, crispness: np.ndarray) -> np.ndarray:
    """0 and 1 in turn with period 1 in `phase`; a larger `crispness` makes steeper edges."""
    zigzag = np.abs(phase - np.floor(phase) - 0.5) * 2  # 0 .. 1
    return np.clip((zigzag - 0.5) * crispness + 0.5, 0, 1)
