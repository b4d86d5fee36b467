"""Which layers may take their sums in half precision: those whose sums it holds exactly.

A product of +1 and -1 is exact in every format, and so are sums of them in float32, in which a
GPU's matrix units add; what can round is the sum, as it is written. fp16 has every integer up to
2048, and every even one up to 4096; bf16 has them up to 256 and 512 only. The bias is added in
float32. Kernels that do not add products of the operands themselves, such as Winograd's, are not
covered; `tests/kernels/test_precision.py` looks at those of a GPU where there is one.
"""

import copy

import torch
from torch import Tensor, nn

from bnnlib.errors import check_name
from bnnlib.names import PRECISIONS

EVERY_INTEGER = 2048  # up to here, in fp16
MARK = 0.7109375  # a factor that no network has, and exact in every format


def resolve_precision(name: str, device: torch.device) -> str:
    """ "float32" or "half"; "auto" is "half" on a GPU and "float32" on a CPU, where it is slower.

    Raises InvalidValue for other names. This concerns binary layers; a full-precision twin is
    computed as PyTorch's defaults have it.
    """
    check_name("precision", name, PRECISIONS)
    return {"auto": "half" if device.type == "cuda" else "float32"}.get(name, name)


def set_precision(model: nn.Module, x: Tensor) -> nn.Module:
    """Let layers that are fed with signs compute in half precision.

    Those whose sums fp16 holds exactly take them there; the others take sums in float32, or TF32,
    which is exact too ("mixed"). All of them take their gradients in bf16, whose range is that of
    float32. Weights, moments, normalization and loss stay in float32, and so does a layer that is
    fed with pixels. `x`: noise in the shape of a few images, to see which layer is fed with what.
    """
    for name, values in fed_with_signs(model, x).items():
        layer = model.get_submodule(name)
        layer.precision = "half" if is_exact(layer, values) else "mixed"
    return model


def fed_with_signs(model: nn.Module, x: Tensor) -> dict[str, tuple[int, int]]:
    """The binary layers fed by an activation of two values, by name, with those values, in order.

    An activation says which in its attribute `values`; what has a `precision` is a binary layer. A
    copy of the model is trained on `x`, whose activations are marked by an unusual factor: a layer
    that sees both values times the factor is fed by one of them, maybe through a pool, and no
    function that only happens to give +1 and -1 is taken for one.
    """
    model, found = copy.deepcopy(model).train(), {}
    marked = {m: m.values for m in model.modules() if hasattr(m, "values")}

    def look(name: str, x: Tensor) -> None:
        for low, high in set(marked.values()):
            if ((x == low * MARK) | (x == high * MARK)).all():
                found[name] = low, high

    for module in marked:
        module.register_forward_hook(lambda _, inputs, output: output * MARK)
    for name, module in model.named_modules():
        if hasattr(module, "precision"):
            module.register_forward_pre_hook(lambda _, inputs, n=name: look(n, inputs[0]))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model(x)
    return found


def is_exact(layer: nn.Module, values: tuple[int, int]) -> bool:
    """Whether fp16 has all sums of a layer, without the bias, whose inputs are these two values.

    With inputs of +1 and -1 a sum has the parity of its terms; at a border of zeros whole taps
    drop out, so that an even number of channels keeps it even. Inputs of 0 and 1 have no parity.
    """
    if getattr(layer, "pad_value", 0) not in (-1, 0, 1):
        return False
    terms, channels = layer.weight[0].numel(), layer.weight.shape[1]
    return is_exact_in_half(terms, even=values == (-1, 1) and channels % 2 == 0)


def is_exact_in_half(terms: int, even: bool) -> bool:
    """Whether fp16 has every sum of so many terms, each +1, 0 or -1.

    `even`: whether it is known that all sums are even, because no odd number of terms is not 0.
    """
    return terms <= (2 * EVERY_INTEGER if even else EVERY_INTEGER)
