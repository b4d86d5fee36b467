"""The process: how its threads spin, what memory it keeps, its cores, which of several it is.

PyTorch's threads meet at a barrier after every operation. The OpenMP libraries let a thread that
waits there spin for a long time, which is good on an idle machine; where another program holds
the core of the thread that is waited for, the spinning takes the other cores from everybody, and
a training step takes many times as long. `python -m benchmarks.contention` measures it.
"""

import ctypes
import os
import sys

BRIEFLY = {
    "GOMP_SPINCOUNT": "5000",  # turns of a loop; GNU's library, with PyTorch on Linux
    "KMP_BLOCKTIME": "1",  # milliseconds; LLVM's and Intel's, with PyTorch on macOS and Windows
}
SAYS_HOW_TO_WAIT = ("OMP_WAIT_POLICY", *BRIEFLY)
# Options of glibc's mallopt, by their names and numbers in malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def spin_briefly() -> bool:
    """Set `BRIEFLY` for this process and its children; returns whether it was set.

    Nothing changes where PyTorch has been loaded, or the user has said how threads wait.
    """
    if "torch" in sys.modules or any(name in os.environ for name in SAYS_HOW_TO_WAIT):
        return False
    os.environ.update(BRIEFLY)
    return True


def keep_freed_memory() -> bool:
    """Let this process keep the memory that a training step frees, for the step that follows.

    glibc gives it back to the system and takes it anew, page by page, at every step. Returns
    whether the C library has such a setting. It is the whole process's, and changes no result.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, 2**30) and mallopt(M_MMAP_THRESHOLD, 2**25))


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def place() -> tuple[int, int]:
    """The rank of this process and the number of ranks, as `torchrun` tells those it starts.

    (0, 1) for one that was started otherwise.
    """
    told = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank, world, *meeting = (os.environ.get(name, "") for name in told)
    if not (rank.isdecimal() and world.isdecimal() and all(meeting)):
        return 0, 1
    return int(rank), int(world)
