"""How far two runs of an experiment are apart that differ only in how their gradients are rounded.

Forward, the kernels compute what PyTorch does, bit for bit; their gradients are rounded otherwise,
as they are on another number of threads. After some steps a weight near 0 gets the other sign, and
the runs go apart. Each experiment is trained for a few epochs with PyTorch's products on one
thread, with PyTorch's on two, and with the kernels on one; the last two are held against the first.

`python -m benchmarks.drift` prints a row for each experiment.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import click
import torch

from benchmarks.timings import without_kernels
from bnnlib.experiments.experiment import Experiment
from bnnlib.experiments.originals import PUBLISHED
from bnnlib.experiments.profiles import quick
from bnnlib.layers import binary_layers
from bnnlib.quantizers import sign
from bnnlib.runs.result import Run
from bnnlib.runs.run import run

EPOCHS = 5


def trained(e: Experiment, threads: int, kernels: bool) -> Run:
    """A run of the experiment in a folder that goes away."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            how = {"device": "cpu", "progress": "none"}
            if kernels:
                return run(e, Path(folder) / "run", **how)
            with without_kernels():
                return run(e, Path(folder) / "run", **how)
    finally:
        torch.set_num_threads(before)


def apart(one: Run, other: Run) -> tuple[float, float, float]:
    """Shares and numbers that differ: signs of weights, the last loss, the largest error."""
    pairs = zip(binary_layers(one.model), binary_layers(other.model), strict=True)
    flips = torch.cat([(sign(a.weight) != sign(b.weight)).flatten() for a, b in pairs])
    columns = [c for c in one.history.columns if c.endswith("_error")]
    rows = zip(one.history.rows, other.history.rows, strict=True)
    errors = [abs(a[c] - b[c]) for a, b in rows for c in columns]
    losses = [r.history.rows[-1]["train_loss"] for r in (one, other)]
    return flips.double().mean().item(), abs(losses[1] / losses[0] - 1), max(errors)


@click.command()
@click.option("--epochs", default=EPOCHS, show_default=True)
def main(epochs: int) -> None:
    """Train every original experiment three times, and say how far the runs are apart."""
    click.echo(f"{'':34}{'signs that differ':>22}{'last loss':>20}{'error, largest':>20}")
    click.echo(f"{'experiment':34}" + f"{'two threads':>12}{'kernels':>10}" * 3)
    for e in PUBLISHED.values():
        if e.evaluates:
            continue  # it trains nothing
        e = replace(quick(e), epochs=epochs)
        plain, threads, kernels = (trained(e, *how) for how in ((1, False), (2, False), (1, True)))
        pairs = zip(apart(plain, threads), apart(plain, kernels), strict=True)
        numbers = "".join(f"{a:>12.2%}{b:>10.2%}" for a, b in pairs)
        click.echo(f"{e.name:34}{numbers}")


if __name__ == "__main__":
    main()
