"""How a kernel moves over an image, and how large a first layer is."""

from typing import NamedTuple

# A sum of as many scaled pixels, which are whole numbers of 2^-24, is one of 32 bits.
MOST_PIXELS = 127


class Geometry(NamedTuple):
    """Steps, borders and groups of a convolution, height first."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1

    def out_shape(self, x: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, int, int]:
        """(N, H', W') of an input (N, H, W, ...) and a weight (O, height, width, ...)."""
        height, width = (
            (size + 2 * pad - kernel) // step + 1
            for size, pad, kernel, step in zip(
                x[1:3], self.padding, weight[1:3], self.stride, strict=True
            )
        )
        return x[0], height, width
