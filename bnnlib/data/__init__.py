"""Labelled images: the published sets, the drawn ones, and your own `.npz` files."""

from bnnlib.data.drawn import DRAWN
from bnnlib.data.images import DATASETS, SIZES, ImageSet, load, load_npz
from bnnlib.data.npz import read_npz
from bnnlib.data.published import SVHN_SUBSET, write_svhn_subset

__all__ = [
    "DATASETS", "DRAWN", "SIZES", "SVHN_SUBSET", "ImageSet", "load", "load_npz", "read_npz",
    "write_svhn_subset",
]  # fmt: skip
