"""The kernels in C: built by the system's compiler where they are first needed, then kept.

Each instruction set has an object of its own, made from the same sources; the best one that the
processor has is used, or the one that `BNNLIB_KERNELS` names ("off" for none). An object is named
by a hash of its sources, its flags and the compiler, and lies in the user's cache folder. Its loops
are OpenMP's and run on the threads of PyTorch, which has loaded that library before.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from bnnlib.errors import CannotWrite, InvalidValue, check_name
from bnnlib.files import make_folder

VARIABLE = "BNNLIB_KERNELS"
SOURCES = sorted((Path(__file__).parent / "c").glob("*.[ch]"))
FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast")
OPENMP = "-fopenmp"


class Set(NamedTuple):
    """An instruction set."""

    needs: tuple[str, ...]  # of the processor, as PyTorch calls it
    flags: tuple[str, ...]  # of the compiler
    inputs: int  # channels of a layer from which on a training step is faster with the kernels
    outputs: int


SETS = {  # the best one first
    "avx512": Set(
        ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vpopcntdq", "bmi2"),
        (*("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vpopcntdq"), "-mbmi2"),
        *(16, 16),
    ),
    "avx2": Set(("avx2", "fma3", "bmi2"), ("-mavx2", "-mfma", "-mbmi2"), 16, 32),
    "portable": Set((), (), 64, 64),
}


class Shape(ctypes.Structure):
    """`Shape` of `binary.h`."""

    _names = (
        *("n", "h", "w", "c", "o", "kh", "kw", "sh", "sw", "ph", "pw", "oh", "ow"),
        *("words", "low", "threads"),
    )
    _fields_ = [(name, ctypes.c_long) for name in _names]


NUMBER, ADDRESS, SHAPE = ctypes.c_long, ctypes.c_void_p, ctypes.POINTER(Shape)
SIGNATURES = {
    "pack": (NUMBER, (ADDRESS, NUMBER, NUMBER, NUMBER, NUMBER, ADDRESS)),
    "prepared_bytes": (NUMBER, (NUMBER, NUMBER)),
    "prepare": (None, (ADDRESS, NUMBER, NUMBER, NUMBER, ADDRESS)),
    "sums": (None, (SHAPE, *(ADDRESS,) * 6)),
    "pixel_sums": (None, (SHAPE, *(ADDRESS,) * 5)),
    "weight_gradient": (None, (SHAPE, ADDRESS, ADDRESS, ADDRESS)),
    "input_gradient": (None, (SHAPE, ADDRESS, ADDRESS, ADDRESS)),
}


def sets_here() -> list[str]:
    """The instruction sets that this processor has, the best one first."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return [name for name, s in SETS.items() if all(has.get(need) for need in s.needs)]


@cache
def library(wanted: str | None = None) -> ctypes.CDLL | None:
    """The kernels for `wanted`, an instruction set (None: what `BNNLIB_KERNELS` says, or the best).

    None where they are "off", or where no compiler builds them, which is told in one line. The
    attribute `set` is the name of the instruction set.
    Raises InvalidValue for a name that is none, or of a set that this processor lacks.
    """
    here = sets_here()
    wanted = wanted or os.environ.get(VARIABLE) or here[0]
    check_name(VARIABLE, wanted, ("off", *SETS))
    if wanted == "off":
        return None
    if wanted not in here:
        raise InvalidValue(f"{VARIABLE}: this processor has no {wanted}, only {', '.join(here)}")
    try:
        loaded = ctypes.CDLL(str(build(wanted)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        print(
            f"bnnlib: no kernels in C, PyTorch's are used: {reason[0] if reason else error}",
            file=sys.stderr,
        )
        return None
    loaded.set = wanted
    for name, (result, arguments) in SIGNATURES.items():
        if (function := getattr(loaded, name, None)) is not None:
            function.restype, function.argtypes = result, arguments
    return loaded


def build(name: str) -> Path:
    """The object for an instruction set, compiled unless it lies in the cache.

    Two processes that build at once write the same file, each of them whole.
    Raises OSError or SubprocessError where that cannot be done.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler named cc or gcc")
    command = [*compiler.split(), *FLAGS, *SETS[name].flags]
    version = _run([*compiler.split(), "--version"])
    content = [str(command), version, *(path.read_text() for path in SOURCES)]
    kept = caches() / f"{name}-{hashlib.sha256(chr(0).join(content).encode()).hexdigest()[:16]}.so"
    if kept.exists():
        return kept
    print(f"bnnlib: building the kernels for {name}, once ...", file=sys.stderr, flush=True)
    folder = writable(kept.parent)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / kept.name
        _compile(command, built)
        return built.replace(folder / kept.name)


def caches() -> Path:
    """The folder of built kernels, of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bnnlib"


def writable(folder: Path) -> Path:
    """This folder, or where it cannot be written to one of this process."""
    try:
        make_folder(folder)
    except CannotWrite:
        return Path(tempfile.mkdtemp(prefix="bnnlib-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="bnnlib-"))


def _compile(command: list[str], out: Path) -> None:
    """Without OpenMP, and so for one thread, where the compiler does not have it."""
    rest = [*(str(path) for path in SOURCES if path.suffix == ".c"), "-o", str(out)]
    try:
        _run([*command, OPENMP, *rest])
    except subprocess.CalledProcessError:
        _run([*command, *rest])


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


if __name__ == "__main__":  # `make env`
    print(f"kernels: {getattr(library(), 'set', 'off')}")
