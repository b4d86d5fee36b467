"""The contenders that evaluate a network: uint8 images in, scores out.

In: a `Setting` whose folder has the files that `Reference` writes there once. Out: an `Engine`.
Each loads its own file, so that its process has held nothing else. Libraries that need not be
installed are imported when an engine is built.
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.contenders import Entrant, assemble, conv2d, has_bfloat16, on_each_set
from benchmarks.settings import CLASSES, Setting, made_up
from bnnlib.data.images import scale_pixels
from bnnlib.export import export_onnx
from bnnlib.files import atomic_write, make_folder
from bnnlib.layers import BatchNorm, evaluating
from bnnlib.models import Inputs, binarynet
from bnnlib.packed.network import load_packed
from bnnlib.packed.packing import pack
from bnnlib.quantizers import sign
from bnnlib.tensors import read_tensors, tensor_bytes

NETWORK, PACKED, ONNX, INT8 = "network.safetensors", "packed.safetensors", "f32.onnx", "int8.onnx"
CALIBRATION = 100  # images whose means and deviations the normalizations keep
SCORED = 50  # images whose scores are compared, or the batch where it is larger


class Engine(Entrant):
    """Scores of uint8 images by a network in the folder; a subclass loads and calls it."""

    devices = ("cpu",)

    def __init__(self, setting: Setting):
        self.setting, self.folder = setting, Path(setting.folder)
        n = setting.batch_size * max(1, SCORED // setting.batch_size)
        self.batches = made_up(n, "test").images.split(setting.batch_size)
        self.load()

    def load(self) -> None:
        """Read the network."""
        raise NotImplementedError

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, 32, 32) uint8 -> scores (N, 10) float32."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """A turn may be as short as it takes to wake the threads and fill the caches."""
        self(self.batches[0])

    def epoch(self) -> None:
        """Evaluate `setting.steps` batches."""
        for _ in range(self.setting.steps):
            self(self.batches[0])

    def scores(self) -> list[list[float]]:
        """Scores of images, batch by batch."""
        return torch.cat([self(images) for images in self.batches]).tolist()


class Unpacked(Engine):
    """bnnlib's network as it was trained."""

    summary = "the network as it was trained, evaluated by this library"

    def load(self) -> None:
        self.model = skeleton(self.setting)
        self.model.load_state_dict(read_tensors(self.folder / NETWORK)[0])
        self.model.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with evaluating(self.model, "deterministic"):
            return self.model(scale_pixels(images).contiguous(memory_format=torch.channels_last))


class Reference(Unpacked):
    """What all are compared with, by PyTorch's products; writes the files where there are none."""

    summary = "the network as it was trained, by PyTorch's products in float32"
    kernels = "off"

    def load(self) -> None:
        if not (self.folder / NETWORK).exists():
            write_files(calibrated(self.setting), self.folder)
        super().load()


class Packed(Engine):
    """The network in packed words."""

    summary = "the network in packed words"

    def load(self) -> None:
        self.model = load_packed(self.folder / PACKED)

    def __call__(self, images: Tensor) -> Tensor:
        return self.model(images)


class Sign(nn.Module):
    """+1 or -1."""

    def forward(self, x: Tensor) -> Tensor:
        return sign(x)


class Eager(Engine):
    """The network made of PyTorch's own layers, as somebody would write it who evaluates only."""

    summary = "PyTorch's own layers in channels_last, the signs of the weights taken beforehand"
    dtype = torch.float32

    def load(self) -> None:
        tensors = read_tensors(self.folder / NETWORK)[0]
        for name in [name for name in tensors if name.endswith("running_inv_std")]:
            variance = tensors.pop(name) ** -2 - 1e-4
            tensors[name.replace("inv_std", "var")] = variance
        signs = {name: sign(t) if t.dim() > 1 else t for name, t in tensors.items()}
        self.model = assemble(self.setting, conv2d, nn.Linear, Sign).requires_grad_(False).eval()
        self.model.load_state_dict(signs, strict=False)  # without counters of batches
        self.model.to(self.dtype, memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = scale_pixels(images).to(self.dtype, memory_format=torch.channels_last)
        return self.model(x).float()


class Compiled(Eager):
    """The same through torch.compile, which makes C++ of what lies between the products."""

    summary = "the same through torch.compile, weights frozen"

    @classmethod
    def missing(cls) -> str | None:
        return super().missing() or (None if shutil.which("c++") else "there is no C++ compiler")

    def load(self) -> None:
        import torch._inductor.config as inductor

        super().load()
        inductor.freezing = True
        self.model = torch.compile(self.model)
        self(self.batches[0])


class _Half(Eager):
    dtype = torch.bfloat16

    @classmethod
    def missing(cls) -> str | None:
        if not has_bfloat16():
            return "this processor has no products in bfloat16"
        return super().missing()


class HalfEager(_Half):
    """PyTorch's own layers in bfloat16."""

    summary = "PyTorch's own layers in channels_last and bfloat16"


class HalfCompiled(_Half, Compiled):
    """The same through torch.compile."""

    summary = "the same through torch.compile, weights frozen"


class OnnxRuntime(Engine):
    """The network as `bnnlib.export_onnx` writes it, in another program."""

    summary = "the exported network in onnxruntime, float32"
    requires = ("onnxruntime", "onnx", "onnxscript")
    file = ONNX

    def load(self) -> None:
        from onnxruntime import InferenceSession, SessionOptions

        options = SessionOptions()
        options.intra_op_num_threads = self.setting.threads
        path, providers = self.folder / self.file, ["CPUExecutionProvider"]
        self.session = InferenceSession(path, options, providers=providers)

    def __call__(self, images: Tensor) -> Tensor:
        (scores,) = self.session.run(None, {"images": scale_pixels(images).numpy()})
        return torch.from_numpy(scores)


class OnnxRuntimeInt8(OnnxRuntime):
    """The same after onnxruntime's own quantization."""

    summary = "the same, weights and activations quantized to 8 bits by onnxruntime"
    file = INT8


ENGINES = {
    **on_each_set("bnnlib, packed", Packed),
    "bnnlib, not packed": Unpacked,
    "PyTorch": Eager,
    "PyTorch, compiled": Compiled,
    "PyTorch, bfloat16": HalfEager,
    "PyTorch, bfloat16, compiled": HalfCompiled,
    "onnxruntime": OnnxRuntime,
    "onnxruntime, 8 bits": OnnxRuntimeInt8,
}


# -------------------------------------------------------------------------------- the network


def skeleton(setting: Setting) -> nn.Module:
    """The network with its initial weights."""
    generator = torch.Generator().manual_seed(0)
    return binarynet(setting.network, generator=generator, width=setting.width)


@torch.no_grad()
def calibrated(setting: Setting) -> nn.Module:
    """A network of random signs whose normalizations know its sums, some with negative scales."""
    model, generator = skeleton(setting), torch.Generator().manual_seed(1)
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    alphas = [norm.alpha for norm in norms]
    for norm in norms:
        norm.weight.uniform_(-0.2, 1, generator=generator)
        norm.bias.normal_(0, 0.3, generator=generator)
        norm.alpha = 1.0
    model.train()(scale_pixels(made_up(CALIBRATION, "train").images))
    for norm, alpha in zip(norms, alphas, strict=True):
        norm.alpha = alpha
    return model.eval().to(memory_format=torch.channels_last)


def write_files(model: nn.Module, folder: Path) -> None:
    """The network in each of the forms that engines read."""
    make_folder(folder)
    pack(model).save(folder / PACKED)
    if export_onnx_where_possible(model, folder / ONNX):
        quantize(folder / ONNX, folder / INT8)
    atomic_write(folder / NETWORK, tensor_bytes(model.state_dict()))


def export_onnx_where_possible(model: nn.Module, path: Path) -> bool:
    """Write the network for onnxruntime, if it and what exports are installed."""
    try:
        import onnxruntime.quantization  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        return False
    export_onnx(model, path, Inputs(3, 32, len(CLASSES)))
    return True


def quantize(path: Path, out: Path) -> None:
    """onnxruntime's static quantization, with the ranges that the calibration images have."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        batches = iter([{"images": scale_pixels(made_up(CALIBRATION, "train").images).numpy()}])

        def get_next(self):
            return next(self.batches, None)

    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(path, out, Reader(), **types)
