"""The environment's Jupyter kernel: ipykernel, which imports bnnlib first.

So the threads of PyTorch spin as briefly in a notebook as in a run, also
where a cell imports PyTorch before bnnlib. The variables are not named
under `env` of the kernelspec, because those override the user's own; bnnlib
obeys the user (`bnnlib/process.py`).
In: nothing. Out: a kernelspec in this environment, for everything that
starts a kernel: JupyterLab, papermill, the build of the book.
"""

import shutil
import sys
from pathlib import Path

from ipykernel.kernelspec import write_kernel_spec

from notebooks import KERNELSPEC

# IPython imports its extensions before any cell. Where one cannot be
# imported, it starts without.
FIRST = ["--ext=bnnlib"]


def install(prefix: Path) -> Path:
    """Write the kernelspec below `prefix`, over one that is there."""
    kernels = Path(prefix) / "share" / "jupyter" / "kernels"
    folder = kernels / KERNELSPEC["name"]
    shutil.rmtree(folder, ignore_errors=True)
    write_kernel_spec(folder, extra_arguments=FIRST)
    return folder


if __name__ == "__main__":
    install(Path(sys.prefix))
