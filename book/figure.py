"""Draw the figure of the README from the stored runs: `make figure`."""

from pathlib import Path

import matplotlib.pyplot as plt

from bnnlib.plots import plot_errors, use_book_style
from bnnlib.runs.ledger import stored_runs

PATH = Path(__file__).parent / "_static" / "memorization.png"


def draw() -> plt.Figure:
    """Random training and true test labels: SVHN left, CIFAR-10 right."""
    use_book_style()
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    names = {
        "SVHN": "svhn-noise-100",
        "CIFAR-10": "cifar10-noise-100",
    }
    for ax, (dataset, name) in zip(axes, names.items(), strict=True):
        plot_errors([run.history for run in stored_runs(name)], ax)
        ax.legend(loc="center right")
        ax.set(xlabel=f"epoch, {dataset}", ylabel="")
    axes[0].set_ylabel("error (%)")
    return figure


if __name__ == "__main__":
    draw().savefig(PATH)
    print(PATH)
