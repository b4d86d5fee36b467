"""The same network in other libraries for binarized networks, which need not be installed.

`requirements-bench.txt` has the versions that were measured. A peer imports its library only
when it is built.
"""

import os
from importlib.metadata import version

import numpy as np
import torch

from benchmarks.contenders import Entrant, PlainLoop, assemble, draw
from benchmarks.settings import KERNEL, LEARNING_RATE, Setting, made_up, shapes

os.environ["TF_USE_LEGACY_KERAS"] = "1"  # Larq needs Keras 2; TensorFlow reads it when imported


class Brevitas(PlainLoop):
    """The network in Brevitas, binary weights and activations with a constant scale of 1."""

    summary = "the same binary network in Brevitas, on PyTorch"
    requires = ("brevitas",)

    def build(self) -> None:
        from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear
        from brevitas.quant import SignedBinaryActPerTensorConst, SignedBinaryWeightPerTensorConst

        class Weight(SignedBinaryWeightPerTensorConst):
            scaling_const = 1.0

        class Activation(SignedBinaryActPerTensorConst):
            min_val, max_val = -1.0, 1.0

        self.model = assemble(
            self.setting,
            lambda i, o: QuantConv2d(i, o, KERNEL, padding=KERNEL // 2, weight_quant=Weight),
            lambda i, o: QuantLinear(i, o, bias=True, weight_quant=Weight),
            lambda: QuantIdentity(act_quant=Activation),
        )
        draw(self.model, lambda p, generator: p.data.uniform_(-1, 1, generator=generator))
        self.model.to(self.setting.device)
        self.optimizer = _ClippingAdam(self.model)


class _ClippingAdam(torch.optim.Adam):
    """Adam that keeps weights in [-1, 1], as Brevitas' own binary examples do."""

    def __init__(self, model: torch.nn.Module):
        super().__init__(model.parameters(), lr=LEARNING_RATE)
        self.clipped = [p for p in model.parameters() if p.dim() > 1]

    def step(self, closure=None) -> None:
        super().step(closure)
        for p in self.clipped:
            p.data.clamp_(-1, 1)


class Larq(Entrant):
    """The network in Larq, trained by Keras' `train_on_batch`, which compiles the step."""

    summary = "the same binary network in Larq, on TensorFlow; its process holds PyTorch too"
    requires = ("larq", "tensorflow", "tf_keras")
    devices = ("cpu",)

    def __init__(self, setting: Setting):
        tf = _tensorflow(setting.threads)
        self.setting = setting
        self.train = _arrays(max(setting.images, setting.epoch_images), "train")
        self.test = _arrays(max(setting.test_images, 1), "test")
        self.rng = np.random.default_rng(0)
        self.model = _larq_network(tf, setting)
        self.model.compile(
            tf.keras.optimizers.Adam(LEARNING_RATE),
            loss=lambda y, scores: tf.reduce_mean(tf.square(tf.nn.relu(1 - y * scores))),
            metrics=[_share_of_mistakes],
        )

    def epoch(self) -> None:
        """Train `setting.steps` steps."""
        images, targets = self.train
        order = self.rng.permutation(self.setting.epoch_images)
        for index in np.split(order, self.setting.steps):
            self.model.train_on_batch(images[index], targets[index])

    def evaluate(self, images: int) -> float:
        """The error on the first test images."""
        scores = self.model.predict(self.test[0][:images], batch_size=500, verbose=0)
        return float((scores.argmax(1) != self.test[1][:images].argmax(1)).mean())


def _tensorflow(threads: int):
    """TensorFlow on so many threads, without a GPU."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.set_visible_devices([], "GPU")
    return tf


def _arrays(n: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The made-up images as (n, 32, 32, 3) uint8, and their labels as (n, 10) of +-1."""
    data = made_up(n, split)
    targets = 2 * np.eye(len(data.class_names), dtype=np.float32)[data.labels.numpy()] - 1
    return data.images.permute(0, 2, 3, 1).contiguous().numpy(), targets


def _share_of_mistakes(y, scores):
    import tensorflow as tf

    wrong = tf.not_equal(tf.argmax(y, 1), tf.argmax(scores, 1))
    return tf.reduce_mean(tf.cast(wrong, tf.float32))


def _larq_network(tf, setting: Setting):
    """The layers of `bnnlib.models.binarynet` in Keras; pixels are scaled inside."""
    import larq

    layers = tf.keras.layers
    first = {"input_quantizer": None, "kernel_quantizer": "ste_sign"}
    common = {"kernel_quantizer": "ste_sign", "input_quantizer": "ste_sign"}
    common |= {"kernel_constraint": "weight_clip", "use_bias": True}
    init = tf.keras.initializers.RandomUniform(-1, 1, seed=0)
    network = tf.keras.Sequential([layers.Rescaling(2 / 255, -1, input_shape=(32, 32, 3))])
    for shape in shapes(setting.network, setting.width):
        options = {**common, **(first if shape.name == "conv1" else {}), "kernel_initializer": init}
        if shape.size:
            network.add(larq.layers.QuantConv2D(shape.outputs, KERNEL, padding="same", **options))
        else:
            if len(network.output_shape) > 2:
                network.add(layers.Flatten())
            network.add(larq.layers.QuantDense(shape.outputs, **options))
        if shape.pooled:
            network.add(layers.MaxPool2D(2))
        network.add(layers.BatchNormalization(momentum=0.9, epsilon=1e-4))
    return network


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """The installed versions of these packages."""
    return {name: version(name) for name in names}
