"""A network for other programs, in the format ONNX and in real numbers."""

import copy
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnnlib.data.images import scale_pixels
from bnnlib.errors import BnnlibError, InvalidValue
from bnnlib.files import atomic_write
from bnnlib.layers import evaluating
from bnnlib.models import Inputs

CHECKED = 16  # images
NEEDED = "to write ONNX, install its packages: pip install onnx onnxscript onnxruntime"


class Agreement(NamedTuple):
    """How another program computes what was exported, on images of noise."""

    images: int
    same_class: int  # of so many images the largest score is the same
    largest_difference: float  # of a score


def export_onnx(model: nn.Module, path: str | Path, inputs: Inputs) -> Agreement | None:
    """Write the network, as it is evaluated with deterministic weights, to a new file.

    The file takes images (N, C, H, W) float32 named "images", which `scale_pixels` makes of
    pixels, any number of them, and gives "scores" (N, classes). Its weights of +1 and -1 take 32
    bits each: ONNX has no products of bits. Then onnxruntime computes the scores of a few images
    of noise. It rounds otherwise than PyTorch, so that a number close to 0 may get another sign.

    Returns how the two agree, None where onnxruntime is not installed. Raises InvalidValue where
    the file is there already, BnnlibError where the packages of ONNX are missing.
    """
    if os.path.lexists(path):
        raise InvalidValue(f"{path} is there already; name another file")
    model = copy.deepcopy(model).cpu().requires_grad_(False)
    x = _noise(inputs)
    with evaluating(model, "deterministic"), torch.no_grad():
        content, scores = _in_onnx(model, x), model(x)
    atomic_write(path, content)
    return _agreement(content, x, scores)


def _noise(inputs: Inputs) -> Tensor:
    shape = (CHECKED, inputs.in_channels, inputs.image_size, inputs.image_size)
    generator = torch.Generator().manual_seed(0)
    return scale_pixels(torch.randint(256, shape, generator=generator, dtype=torch.uint8))


def _in_onnx(model: nn.Module, x: Tensor) -> bytes:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BnnlibError(NEEDED) from error
    batch = ({0: torch.export.Dim("batch")},)
    names = {"input_names": ["images"], "output_names": ["scores"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about PyTorch
        program = torch.onnx.export(
            model, (x,), **names, dynamic_shapes=batch, dynamo=True, verbose=False
        )
    return program.model_proto.SerializeToString()


def _agreement(content: bytes, x: Tensor, scores: Tensor) -> Agreement | None:
    try:
        from onnxruntime import InferenceSession
    except ImportError:  # it is not built for every machine
        return None
    session = InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": x.numpy()})
    other = torch.from_numpy(found)
    same = (other.argmax(1) == scores.argmax(1)).sum().item()
    return Agreement(len(x), same, (other - scores).abs().max().item())
