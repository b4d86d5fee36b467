"""Binarized neural networks that memorize, in the order a batch meets the modules:

openmp, errors, files, tensors, drawing, glyphs, shapes, patterns, downloads, npz, data,
corruption, batches, quantizers, layers, precision, models, losses, optim, steps, history,
train, probes, limits, catalogue, variants, assembly, memory, interrupts, checkpoints, runs,
folders, experiments, capacity, claims, plots, timings, chapters, side_by_side, __main__.

Import from the module that holds the name: `from bnnlib.layers import BinaryLinear`.
"""

from bnnlib.openmp import spin_briefly

__version__ = "0.2.0"

spin_briefly()  # before anything here loads PyTorch
