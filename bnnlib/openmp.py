"""How long a thread of PyTorch spins for the others before it sleeps: briefly.

PyTorch's threads meet at a barrier after every operation. The OpenMP libraries let a thread that
waits there spin for a long time, which is good on an idle machine; where another program holds
the core of the thread that is waited for, the spinning takes the other cores from everybody, and
a training step takes many times as long. `python -m benchmarks.contention` measures it.
In: nothing. Out: variables of the environment, which are read when PyTorch is loaded.
Next file: `errors.py`.
"""

import os
import sys

BRIEFLY = {
    "GOMP_SPINCOUNT": "5000",  # turns of a loop; GNU's library, with PyTorch on Linux
    "KMP_BLOCKTIME": "1",  # milliseconds; LLVM's and Intel's, with PyTorch on macOS and Windows
}
SAYS_HOW_TO_WAIT = ("OMP_WAIT_POLICY", *BRIEFLY)


def spin_briefly() -> bool:
    """Set `BRIEFLY` for this process and its children; returns whether it was set.

    Nothing changes where PyTorch has been loaded, or the user has said how threads wait.
    """
    if "torch" in sys.modules or any(name in os.environ for name in SAYS_HOW_TO_WAIT):
        return False
    os.environ.update(BRIEFLY)
    return True
