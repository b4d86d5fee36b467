"""What a contender is, and the first of them: bnnlib and its float twin, plain and tuned.

In: a `Setting`. Out: a `Contender`: the network of `bnnlib.models`, trained on uint8 images in
memory with the squared hinge loss. Others are in `naive.py` and, with libraries of their own, in
`peers.py`; those that evaluate a network are in `engines.py`.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.settings import KERNEL, LEARNING_RATE, Setting, made_up, shapes
from bnnlib.batches import Batches
from bnnlib.data.images import scale_pixels
from bnnlib.experiments.build import build_model
from bnnlib.experiments.originals import published
from bnnlib.kernels.compiled import SETS, library, sets_here
from bnnlib.kernels.precision import resolve_precision
from bnnlib.losses import squared_hinge_loss
from bnnlib.optim import BinaryAdam, parameter_groups
from bnnlib.training import Step, TrainingState, evaluate


class Entrant:
    """What a process of its own is for: a contender, or the machine's limit."""

    summary: str
    requires: tuple[str, ...] = ()  # optional libraries
    devices: tuple[str, ...] = ("cpu", "cuda")
    kernels: str | None = None  # of which instruction set, or "off"; None: the best of the machine

    @classmethod
    def missing(cls) -> str | None:
        """Why this machine cannot have it, or need not."""
        here = sets_here()
        if cls.kernels in (None, "off"):
            return None
        if cls.kernels not in here:
            return f"this processor has no {cls.kernels}"
        if cls.kernels == here[0]:
            return "these are the kernels that are taken here anyway"
        return None if library(cls.kernels) else "no compiler builds the kernels here"

    def warm_up(self) -> None:
        """What is done before each turn, and not timed."""


def forced(kind: type[Entrant], kernels: str) -> type[Entrant]:
    """The same with these kernels, as on a processor that has no better ones; "off" for none."""
    how = "no kernels in C" if kernels == "off" else f"its kernels for {kernels}"
    about = {"kernels": kernels, "devices": ("cpu",), "summary": f"{kind.summary}, with {how}"}
    return type(kind.__name__, (kind,), about)


def on_each_set(name: str, kind: type[Entrant]) -> dict[str, type[Entrant]]:
    """A contender as users have it, and forced to each instruction set in turn."""
    return {name: kind} | {f"{name}, {kernels}": forced(kind, kernels) for kernels in SETS}


class Contender(Entrant):
    """A model, its optimizer, and images on the device; a subclass builds the first two."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, setting: Setting):
        self.setting = setting
        images = max(setting.images, setting.epoch_images)
        self.train = made_up(images, "train", setting.device)
        self.test = made_up(max(setting.test_images, 1), "test", setting.device)
        self.epoch_set = self.train.first(setting.epoch_images)
        self.generator = torch.Generator().manual_seed(0)
        self.build()

    def build(self) -> None:
        """Make the model and the optimizer."""
        raise NotImplementedError

    def epoch(self) -> None:
        """Train `setting.steps` steps."""
        raise NotImplementedError

    def evaluate(self, images: int) -> float:
        """The error on the first test images."""
        batches = Batches(self.test.first(images), self.setting.batch_size, self.setting.device)
        return evaluate(self.model, batches).error


class Bnnlib(Contender):
    """bnnlib, by the functions that `bnnlib.experiments.run` calls."""

    summary = "this library, as `python -m bnnlib run` uses it"

    def build(self) -> None:
        sizes = {name: getattr(self.setting, name) for name in ("network", "width", "batch_size")}
        e = replace(published("cifar10-random-labels"), **sizes)
        device = torch.device(self.setting.device)
        self.model = build_model(e, device, resolve_precision("auto", device))
        self.optimizer = BinaryAdam(parameter_groups(self.model), lr=LEARNING_RATE)
        self.state = TrainingState(self.model, self.optimizer, self.generator)
        self.step = Step(self.state, Batches(self.epoch_set, e.batch_size, device))

    def epoch(self) -> None:
        # Without the look at all numbers after an epoch, which has hundreds of steps elsewhere.
        self.step.begin_epoch()
        for _ in range(len(self.step.order)):
            self.step()
        self.state.epoch_start, self.state.done = None, 0


def assemble(
    setting: Setting,
    conv: Callable[[int, int], nn.Module],
    dense: Callable[[int, int], nn.Module],
    act: Callable[[], nn.Module],
) -> nn.Sequential:
    """The network of `bnnlib.models.binarynet`, layer by layer under the same names."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, shape in enumerate(shapes(setting.network, setting.width), start=1):
        if not shape.size and "flatten" not in layers:
            layers["flatten"] = nn.Flatten()
        layers[shape.name] = (conv if shape.size else dense)(shape.inputs, shape.outputs)
        if shape.pooled:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
        norm = nn.BatchNorm2d if shape.size else nn.BatchNorm1d
        layers[f"norm{i}"] = norm(shape.outputs, eps=1e-4)
        layers[f"act{i}"] = act()
    layers.popitem()  # the scores are the last batch normalization
    return nn.Sequential(layers)


class PlainLoop(Contender):
    """A contender trained by the loop that most PyTorch programs have."""

    layout = torch.contiguous_format

    def epoch(self) -> None:
        self.model.train()
        images, labels = self.epoch_set.images, self.epoch_set.labels
        order = torch.randperm(len(labels), generator=self.generator).to(labels.device)
        loss_sum, wrong = 0.0, 0
        for index in order.split(self.setting.batch_size):
            x = scale_pixels(images[index]).contiguous(memory_format=self.layout)
            logits = self.scores(x)
            loss = squared_hinge_loss(logits, labels[index])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.item()
            wrong += (logits.argmax(dim=1) != labels[index]).sum().item()

    def scores(self, x: Tensor) -> Tensor:
        """The forward pass."""
        return self.model(x)


class FloatTwin(PlainLoop):
    """The full-precision twin, as a PyTorch program has it that leaves the defaults alone."""

    summary = "the same layers with real weights and Hardtanh; PyTorch's defaults"

    def build(self) -> None:
        self.model = assemble(self.setting, conv2d, nn.Linear, nn.Hardtanh)
        draw(self.model, nn.init.xavier_uniform_)
        self.model.to(self.setting.device, memory_format=self.layout)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)


class TunedFloatTwin(FloatTwin):
    """The twin with what PyTorch's guides advise for speed."""

    summary = "the float twin in the layout channels_last, with the fused Adam"
    layout = torch.channels_last

    def build(self) -> None:
        super().build()
        parameters = self.model.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)


class HalfFloatTwin(TunedFloatTwin):
    """The tuned twin with products in bfloat16, which recent processors take twice as fast."""

    summary = "the tuned float twin under torch.autocast, with products in bfloat16"
    devices = ("cpu",)

    @classmethod
    def missing(cls) -> str | None:
        return None if has_bfloat16() else "this processor has no products in bfloat16"

    def scores(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x).float()


def has_bfloat16() -> bool:
    """Whether the processor multiplies numbers of bfloat16 itself."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def conv2d(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the image size."""
    return nn.Conv2d(inputs, outputs, KERNEL, padding=KERNEL // 2)


def draw(model: nn.Module, init: Callable[..., object]) -> None:
    """Draw the weights from a generator of their own; biases and normalizations stay."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:
            init(p, generator=generator)
