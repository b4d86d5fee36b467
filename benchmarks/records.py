"""What every kept result says of how it came about: the machine, versions, the time it took.

In: a function that measures. Out: its rows, with all that, and the file.
"""

import io
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np
import psutil
import torch
from matplotlib.figure import Figure

import bnnlib
from benchmarks.rounds import Row
from bnnlib.files import atomic_write, make_folder, write_json
from bnnlib.kernels.compiled import library


def recorded(measure: Callable[[], Row], device: str = "cpu") -> Row:
    """What `measure` returns, after what it was measured on; its "libraries" join the versions."""
    about = machine(device)
    started, start = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    found = measure()
    return {
        "started": started,
        "seconds": round(time.perf_counter() - start),
        "machine": about,
        "versions": own_versions() | found.pop("libraries", {}),
        **found,
    }


def machine(device: str = "cpu") -> Row:
    """What is measured on; `load` is how many other programs were at work just before."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "kernels": getattr(library(), "set", "off"),
        "device": torch.cuda.get_device_name(device) if "cuda" in device else "cpu",
        "system": platform.system(),
        "load": round(psutil.getloadavg()[0], 2),
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def own_versions() -> dict[str, str]:
    """What every contender runs on."""
    return {
        "bnnlib": bnnlib.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def save(results: Row, out: Path, draw: Callable[[Row], Figure] | None = None) -> None:
    """Write the results, and their chart beside them."""
    make_folder(out.parent)
    write_json(out, results)
    if draw:
        picture = io.BytesIO()
        draw(results).savefig(picture, format="png")
        atomic_write(out.with_suffix(".png"), picture.getvalue())
    click.echo(out)
