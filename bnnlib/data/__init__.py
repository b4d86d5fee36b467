"""Labelled images: the published sets, the drawn ones, your own arrays, data sets and files.

Names are loaded when they are first asked for: to look for a file needs no PyTorch.
"""

from importlib import import_module

_MODULES = {
    **dict.fromkeys(("ImageSet", "load", "load_npz"), "images"),
    "read_npz": "npz",
    "write_svhn_subset": "published",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'bnnlib.data' has no name {name!r}")
    return getattr(import_module(f"bnnlib.data.{_MODULES[name]}"), name)
