"""What happens inside a network while it memorizes; on request as columns of a `History`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import log, log2

import torch
from torch import Tensor, nn

from bnnlib.batches import Batches
from bnnlib.data.images import ImageSet, scale_pixels
from bnnlib.errors import check_name
from bnnlib.layers import binary_layers, evaluating
from bnnlib.names import PROBES
from bnnlib.training import Evaluation, EvaluationMode, TrainingState, evaluate

CRITICAL_IMAGES = 64  # first training images, for the probe "critical"
CRITICAL_RADIUS = 8 * 2 / 255  # eight grey levels, on the scale of [-1, 1]

# Ways to test a network with latent weights. "real" is what the original's stochastic script for
# CIFAR-10 does, "batch" what that for SVHN does.
EVALUATION_MODES = {
    "sign": EvaluationMode("deterministic"),
    "real": EvaluationMode("real"),
    "sample": EvaluationMode("stochastic"),
    "mean10": EvaluationMode("stochastic", samples=10),
    "batch": EvaluationMode("stochastic", "batch"),
}


def _latent_weights(model: nn.Module) -> dict[str, Tensor]:
    latent = set(binary_layers(model))
    return {name: m.weight.detach() for name, m in model.named_modules() if m in latent}


def binary_weights(model: nn.Module) -> dict[str, Tensor]:
    """For each binary layer, by name, where its weight counts as +1: bool, the weight's shape."""
    return {name: weight >= 0 for name, weight in _latent_weights(model).items()}


def flip_ratio(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of each layer's binary weights that differ between two `binary_weights`.

    Helwegen et al. 2019 count flips in the same way, from step to step.
    """
    return {name: _share(before[name] ^ after[name]) for name in after}


def saturation(model: nn.Module) -> dict[str, float]:
    """Share of each layer's latent weights that lie at the clip, |W| = 1."""
    return {name: _share(weight.abs() >= 1) for name, weight in _latent_weights(model).items()}


def mutual_information(predicted: Tensor, labels: Tensor, classes: int = 10) -> float:
    """I(predicted; label) in bits for each image, from labels (N,) int64 and predictions (N,).

    I = sum over i, j of p_ij log2(p_ij / (p_i p_j)) with the observed shares p. Few images
    make this too large by about (m_ij - m_i - m_j + 1) / (2 N ln 2), where m counts the
    shares that are not zero (Miller 1955); so much is taken off. Between 0 and log2(classes).
    """
    pairs = torch.bincount(predicted * classes + labels, minlength=classes**2)
    p = (pairs.double() / len(labels)).reshape(classes, classes)
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    seen = p > 0
    information = (p[seen] * (p[seen] / independent[seen]).log2()).sum().item()
    cells = (seen.sum() - seen.any(1).sum() - seen.any(0).sum() + 1).item()
    bias = cells / (2 * len(labels) * log(2))
    return min(max(0.0, information - bias), log2(classes))


def _share(mask: Tensor) -> float:
    """How much of a bool tensor is True; NaN for an empty one."""
    return mask.double().mean().item()


def part_errors(evaluation: Evaluation, data: ImageSet) -> dict[str, float]:
    """Errors on the images whose label is the true one and on those whose label is not.

    NaN for a part without images. Source: Arpit et al. 2017, section 3.
    """
    corrupted, wrong = data.corrupted, evaluation.mistakes
    return {"clean": _share(wrong[~corrupted]), "corrupted": _share(wrong[corrupted])}


@torch.inference_mode()
def critical_sample_ratio(
    model: nn.Module, x: Tensor, radius: float, steps: int = 20, *, generator: torch.Generator
) -> float:
    """Share of the inputs with another predicted class within `radius` in every pixel.

    A search without gradients, because those of a sign are surrogates: each step moves all
    pixels of an image by +-radius/2 at random, inside the box, and is kept where the score of
    the predicted class loses ground against the best other one. A lower bound of the ratio.
    In: x (N, C, H, W) scaled, `radius` on the same scale, `generator` on the device of x.
    Source: Arpit et al. 2017, section 4.2, who search with noisy gradients.
    """
    with evaluating(model, "deterministic"):  # else other samples would count as other classes
        scores = model(x)
        predicted = scores.argmax(1)
        shift, best = torch.zeros_like(x), _margin(scores, predicted)
        for _ in range(steps):
            coin = torch.randint(0, 2, x.shape, generator=generator, device=x.device)
            proposal = (shift + (coin - 0.5) * radius).clamp(-radius, radius)
            margin = _margin(model(x + proposal), predicted)
            better = margin < best
            shift[better], best[better] = proposal[better], margin[better]
    return _share(best < 0)


def _margin(scores: Tensor, predicted: Tensor) -> Tensor:
    """How far the predicted class is ahead of the best other one: (N, classes), (N,) -> (N,)."""
    own = scores.gather(1, predicted[:, None])
    others = scores.scatter(1, predicted[:, None], -torch.inf)
    return own[:, 0] - others.amax(1)


def mode_errors(
    model: nn.Module,
    batches: Mapping[str, Batches],
    after_batch: Callable[[], object] = lambda: None,
    seed: int = 0,
) -> dict[str, float]:
    """`SPLIT_error_MODE` for each of `EVALUATION_MODES` and each of the sets, by split.

    `seed`: of stochastic weights, from which each of these evaluations gets draws of its own.
    """
    columns = {}
    for split in batches:
        for name, mode in EVALUATION_MODES.items():
            mode = replace(mode, seed=seed).afresh(f"{split} {name}")
            columns[f"{split}_error_{name}"] = evaluate(
                model, batches[split], mode, after_batch
            ).error
    return columns


class Recorder:
    """Columns for the history of one run; called by `fit` after each epoch.

    - "flips": `flips_LAYER`, `flip_ratio` between the epoch's start and end, each epoch.
    - "saturation": `saturation_LAYER`, each epoch.
    - "parts": `train_error_clean` and `train_error_corrupted`, see `part_errors`.
    - "critical": `critical_sample_ratio` of the first training images.
    - "bits": `memorized_bits`, `mutual_information` of all training images.

    The last three are computed when the errors are. Raises InvalidValue for an unknown name.
    """

    def __init__(self, names: Sequence[str], train: ImageSet, seed: int):
        for name in names:
            check_name("probe", name, PROBES)
        self.names, self.train, self.seed = names, train, seed

    def begin(self, state: TrainingState) -> None:
        """Note in the state what the first epoch is to be compared with."""
        if "flips" in self.names:
            state.signs = binary_weights(state.model)

    def __call__(self, state: TrainingState, results: Mapping[str, Evaluation]) -> dict[str, float]:
        """The columns of one epoch; `results` are its evaluations, none in most epochs."""
        row = {}
        if "flips" in self.names:
            before, state.signs = state.signs, binary_weights(state.model)
            row |= _prefixed("flips_", flip_ratio(before, state.signs))
        if "saturation" in self.names:
            row |= _prefixed("saturation_", saturation(state.model))
        if not results:
            return row
        if "parts" in self.names:
            row |= _prefixed("train_error_", part_errors(results["train"], self.train))
        if "critical" in self.names:
            row["critical_sample_ratio"] = self._critical(state.model)
        if "bits" in self.names:
            predicted, labels = results["train"].predicted, self.train.labels
            information = mutual_information(predicted, labels, len(self.train.class_names))
            row["memorized_bits"] = len(labels) * information
        return row

    def _critical(self, model: nn.Module) -> float:
        device = next(model.parameters()).device
        x = scale_pixels(self.train.at_most(CRITICAL_IMAGES).images.to(device))
        generator = torch.Generator(device).manual_seed(self.seed)
        return critical_sample_ratio(model, x, CRITICAL_RADIUS, generator=generator)


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in values.items()}
