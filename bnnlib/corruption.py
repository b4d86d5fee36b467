"""Pure functions from `ImageSet` to `ImageSet` that destroy labels or pixels.

Each adds a line to the provenance. It touches only the set that it is given: corrupting train
and test takes two calls.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bnnlib.data.images import ImageSet, scale_pixels
from bnnlib.errors import InvalidValue, check_name, check_whole
from bnnlib.names import NOISE_SHAPES


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
    data: ImageSet,
    variance: float = 0.1,
    *,
    seed: int,
    matched: bool = False,
    shape: str = "white",
) -> ImageSet:
    """Gaussian noise in place of the images; the labels stay.

    Each value is N(0, variance) in the scaled range where pixels lie in [-1, 1]; it is not
    clipped, so the images become float32. With `matched`, mean and variance are those of the
    set's own pixels instead, as in Zhang et al. 2017 and Arpit et al. 2017. The `shape`:

    - "white": the values of an image are independent.
    - "blurred": white noise under a Gaussian window of one pixel (standard deviation), which
      wraps around, then scaled to the variance.
    - "images": with the mean image and the covariance of the set, whatever `variance` says.

    Raises InvalidValue unless variance is positive and finite, and for another shape.
    Source: `cifar10_randX_input.py:127-137` of the original ("white").
    """
    if not 0 < variance < math.inf:
        raise InvalidValue(f"variance must be positive and finite, got {variance}")
    check_name("shape", shape, NOISE_SHAPES)
    rng = _generator(seed)
    if shape == "images":
        note = f"Gaussian inputs: mean and covariance of the images, seed {seed}"
        return _noted(replace(data, images=_gaussian_like(data, rng)), note)
    mean, std = _scaled_moments(data) if matched else (0.0, variance**0.5)
    noise = torch.from_numpy(rng.standard_normal(tuple(data.images.shape), np.float32))
    if shape == "blurred":
        noise = _blurred(noise)
    note = f"Gaussian inputs: {shape}, mean {mean:.6g}, variance {std**2:.6g}, seed {seed}"
    return _noted(replace(data, images=noise.mul_(std).add_(mean)), note)


def _blurred(noise: Tensor) -> Tensor:
    """White noise (N, C, H, W) of variance 1 -> smooth noise of variance 1."""
    response = torch.ones(1)
    for size in noise.shape[2:]:  # of a Gaussian window, which is one in frequency too
        response = response[..., None] * torch.exp(-2 * (math.pi * torch.fft.fftfreq(size)) ** 2)
    smooth = torch.fft.ifft2(torch.fft.fft2(noise) * response[0]).real
    return (smooth / response.square().mean().sqrt()).contiguous()


def _gaussian_like(data: ImageSet, rng: np.random.Generator) -> Tensor:
    """Gaussian draws with the mean and the covariance of the scaled images: (N, C, H, W).

    Sums of all centred images, weighted by independent normal numbers, have just their covariance.
    """
    x = scale_pixels(data.images).flatten(1)  # (N, C*H*W)
    mean, n = x.mean(0), len(x)
    centred = (x - mean) / max(1, n - 1) ** 0.5
    parts = [rng.standard_normal((len(part), n), np.float32) for part in x.split(1000)]
    noise = torch.cat([torch.from_numpy(part) @ centred for part in parts])
    return (noise + mean).reshape(data.images.shape)


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
