"""Pure functions from `ImageSet` to `ImageSet` that destroy labels or pixels.

Each adds a line to the provenance. It touches only the set that it is given: corrupting train
and test takes two calls.
"""

import math
from dataclasses import replace

import numpy as np
import torch

from bnnlib.data.images import ImageSet
from bnnlib.errors import InvalidValue, check_whole


def random_labels(data: ImageSet, fraction: float = 1.0, *, seed: int) -> ImageSet:
    """New labels, i.i.d. uniform over all classes, for a `fraction` of the images.

    The images are chosen at random, round(fraction * N) of them. A new label may equal the
    old one: with ten classes one in ten does. For one seed, a larger fraction corrupts the
    same images in the same way and some more. At 0 the labels stay as they are.
    Raises InvalidValue unless 0 <= fraction <= 1.
    Source: `svhn_random_labels.py:113-131` of the original (fraction 1); levels in between:
    Zhang et al. 2017, section 2.
    """
    if not 0 <= fraction <= 1:
        raise InvalidValue(f"fraction must be between 0 and 1, got {fraction}")
    rng = _generator(seed)
    chosen = rng.permutation(len(data))[: round(fraction * len(data))]
    new = torch.from_numpy(rng.integers(len(data.class_names), size=len(data)))
    labels = data.labels.clone()
    labels[chosen] = new[chosen]
    true = data.labels if data.true_labels is None else data.true_labels
    corrupted = replace(data, labels=labels, true_labels=true)
    note = f"random labels: fraction {fraction}, seed {seed}, sha256 {corrupted.label_hash()}"
    return _noted(corrupted, note)


def gaussian_inputs(
    data: ImageSet, variance: float = 0.1, *, seed: int, matched: bool = False
) -> ImageSet:
    """Gaussian noise in place of the images; the labels stay.

    Each value is N(0, variance), i.i.d., in the scaled range where pixels lie in [-1, 1]; it
    is not clipped, so the images become float32. With `matched`, mean and variance are those
    of the set's own pixels instead, as in Zhang et al. 2017 and Arpit et al. 2017.
    Raises InvalidValue unless variance is positive and finite.
    Source: `cifar10_randX_input.py:127-137` of the original.
    """
    if not 0 < variance < math.inf:
        raise InvalidValue(f"variance must be positive and finite, got {variance}")
    mean, std = _scaled_moments(data) if matched else (0.0, variance**0.5)
    noise = _generator(seed).standard_normal(tuple(data.images.shape), np.float32)
    images = torch.from_numpy(noise).mul_(std).add_(mean)
    note = f"Gaussian inputs: mean {mean:.6g}, variance {std**2:.6g}, seed {seed}"
    return _noted(replace(data, images=images), note)


def shuffled_pixels(data: ImageSet, *, seed: int) -> ImageSet:
    """One random order of the pixel positions, the same for all images and channels.

    With one seed, train and test are shuffled alike. Source: Zhang et al. 2017, section 2.
    """
    flat = data.images.flatten(2)  # (N, C, H*W)
    order = _generator(seed).permutation(flat.shape[2])
    images = flat[:, :, order].reshape(data.images.shape)
    return _noted(replace(data, images=images), f"shuffled pixels: seed {seed}")


def random_pixels(data: ImageSet, *, seed: int) -> ImageSet:
    """Another random order of the pixel positions for every image, the same for its channels.

    Source: Zhang et al. 2017, section 2.
    """
    flat = data.images.flatten(2)  # (N, C, H*W)
    n, _, positions = flat.shape
    orders = np.tile(np.arange(positions), (n, 1))
    orders = _generator(seed).permuted(orders, axis=1)  # each row its own order
    index = torch.from_numpy(orders)[:, None].expand(flat.shape)
    images = flat.gather(2, index).reshape(data.images.shape)
    return _noted(replace(data, images=images), f"random pixels: seed {seed}")


def _generator(seed: int) -> np.random.Generator:
    """None, which NumPy takes for another seed at every call, is refused."""
    return np.random.default_rng(check_whole("seed", seed))


def _scaled_moments(data: ImageSet) -> tuple[float, float]:
    """Mean and standard deviation of all pixels, as they are after scaling to [-1, 1]."""
    pixels = data.images.numpy().astype(np.float64)
    mean, std = pixels.mean(), pixels.std()
    if data.images.dtype == torch.uint8:
        mean, std = mean * (2 / 255) - 1, std * (2 / 255)
    return float(mean), float(std)


def _noted(data: ImageSet, note: str) -> ImageSet:
    return replace(data, provenance=(*data.provenance, note))
