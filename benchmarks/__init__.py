"""What takes longer than a test: speed, and faults made on purpose."""

import bnnlib  # noqa: F401 - before PyTorch, so that threads spin briefly, in every contender
