"""Figures of the book: functions of data and an `ax`, which they draw on and return.

`use_book_style` is called once a chapter.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import cycle
from math import isnan
from numbers import Number

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from bnnlib.data.images import ImageSet, scale_pixels
from bnnlib.errors import InvalidValue
from bnnlib.history import History

GREY = "#7a7a7a"  # readable on white and on the dark theme
# Okabe and Ito's colours, which colour-blind readers can tell apart; those too dark or too
# light for one of the two themes are left out.
COLOURS = {
    "train": "#d55e00",
    "test": "#3b8fc4",
    "valid": "#009e73",
    "third": "#cc79a7",
    "fourth": "#c99700",
}
DASHES = {"train": "-", "test": "--", "valid": "-."}  # the same without colour


def use_book_style() -> None:
    """Figures without background and in mid-grey ink, so that light and dark pages fit both.

    In a notebook tables are shown by `table_html`.
    """
    if (ipython := sys.modules.get("IPython")) and (shell := ipython.get_ipython()):
        shell.display_formatter.formatters["text/html"].for_type(pd.DataFrame, table_html)
    plt.rcParams.update(
        {
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "figure.figsize": (6.4, 3.4),
            "figure.dpi": 144,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "text.color": GREY,
            "axes.labelcolor": GREY,
            "axes.edgecolor": GREY,
            "xtick.color": GREY,
            "ytick.color": GREY,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": plt.cycler(color=list(COLOURS.values())),
            "legend.frameon": False,
            "lines.linewidth": 2,
        }
    )


NUMBER = re.compile(r"[-+\u2212]?[\d,]*\.?\d*(e[-+]?\d+)?%?|-|NaN|<NA>")  # or none


def table_html(table: pd.DataFrame) -> str:
    """A table with one head: text flush left, numbers flush right with equally many decimals.

    The index is a column like the others; one that only counts the rows is left out. What stands
    in backticks is code.
    """
    counts = isinstance(table.index, pd.RangeIndex) and table.index.name is None
    columns = table if counts else table.reset_index()
    cells, classes = [], []
    for _, column in columns.items():
        if pd.api.types.is_float_dtype(column):
            text = column.to_string(index=False, header=False).splitlines()
        else:
            text = list(map(str, column))
        text = [word.strip() for word in text]
        cells.append(text)
        long = max(map(len, text), default=0) > 40
        kind = "text long" if long else "text"
        classes.append("number" if all(map(NUMBER.fullmatch, text)) else kind)

    def row(tag: str, words: Iterable[object]) -> str:
        pairs = zip(words, classes, strict=True)
        return "".join(f'<{tag} class="{c}">{_marked(word)}</{tag}>' for word, c in pairs)

    head = row("th", (_head(name, columns.columns.names) for name in columns))
    body = "".join(f"<tr>{row('td', words)}</tr>" for words in zip(*cells, strict=True))
    return f'<table class="dataframe"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _marked(word: object) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(str(word)))


def _head(name: object, levels: Sequence[str | None]) -> str:
    """The head of a column, all levels in one line; a number follows the name of its level."""
    words = []
    for value, level in zip(name if isinstance(name, tuple) else (name,), levels, strict=True):
        number = isinstance(value, Number)
        words += [level] if number and level else []
        words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return " ".join(words).strip()


def show_images(
    data: ImageSet, ax: Axes, columns: int = 10, rows: int = 1, names: bool = True
) -> Axes:
    """The first rows x columns images of a set as one sheet, with class names underneath.

    Float images are shown as far as they lie in [-1, 1].
    """
    count = rows * columns
    shown = data.first(count)
    pixels = (scale_pixels(shown.images).clamp(-1, 1) + 1) / 2  # (N, C, H, W) in [0, 1]
    pixels = pixels.expand(-1, 3, -1, -1)  # grey is three times the same
    height, width = pixels.shape[2:]
    gap_y, gap_x = (11 if names else 2), 2
    sheet = np.zeros((rows * (height + gap_y), columns * (width + gap_x), 4))
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        top, left = i // columns * (height + gap_y), i % columns * (width + gap_x)
        sheet[top : top + height, left : left + width] = np.dstack(
            [image, np.ones(image.shape[:2])]
        )
        if names:
            name = shown.class_names[int(shown.labels[i])]
            ax.text(left + width / 2, top + height + 1, name, ha="center", va="top", fontsize=8)
    ax.imshow(sheet, interpolation="nearest")
    ax.set_axis_off()
    return ax


def plot_quantizer(quantizer: Callable[[Tensor], Tensor], ax: Axes, limit: float = 2.0) -> Axes:
    """Value of an activation on [-limit, limit], and the slope that backpropagation uses."""
    x = torch.linspace(-limit, limit, 1001, requires_grad=True)
    y = quantizer(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    ax.plot(x.detach(), y.detach(), color=COLOURS["train"], label="value")
    ax.plot(x.detach(), slope, color=COLOURS["test"], linestyle="--", label="backward slope")
    ax.set(xlabel="x", ylabel="")
    return ax


def plot_errors(
    histories: History | Sequence[History],
    ax: Axes,
    splits: Sequence[str] = ("train", "test"),
    label: str = "",
    **style,
) -> Axes:
    """Errors of a run, or of several of one kind, against the epoch, in percent.

    Training is solid, test dashed; dotted, the error of a blind guess. `label` goes before the
    split's name in the legend. Epochs without evaluation are skipped.
    """
    several = [histories] if isinstance(histories, History) else histories
    for split in splits:
        options = {"color": COLOURS[split], "linestyle": DASHES[split]}
        options |= {"label": f"{label} {split}".strip()} | style
        plot_column(several, f"{split}_error", ax, **options)
    return ax


def plot_column(
    histories: Sequence[History], column: str, ax: Axes, label: str, scale: float = 100, **style
) -> Axes:
    """One column of several runs against the epoch, times `scale`; the legend names it once.

    Epochs without a value are skipped. Errors get the line of a blind guess.
    """
    for history in histories:
        pairs = zip(history["epoch"], history[column], strict=True)
        known = [(epoch, scale * value) for epoch, value in pairs if not isnan(value)]
        ax.plot(*zip(*known, strict=True), label=label, **style)
        label = "_"  # Matplotlib leaves such a label out of the legend
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    if "error" in column:
        _percent_axis(ax, histories[0].chance)
    return ax


def plot_levels(
    levels: Sequence[float], errors: Mapping[str, np.ndarray], ax: Axes, chance: float = 0.9
) -> Axes:
    """Errors (levels, seeds), as shares, against the share of random labels.

    For each name a line through the means over the seeds, and a band from lowest to highest;
    dotted, `chance`, the error of a blind guess.
    """
    x = [100 * level for level in levels]
    for name, values in errors.items():
        percent = 100 * np.reshape(values, (len(levels), -1))  # (levels, seeds)
        style = {"color": COLOURS.get(name), "linestyle": DASHES.get(name, "-")}
        (line,) = ax.plot(x, percent.mean(1), marker="o", label=name, **style)
        band = {"color": line.get_color(), "alpha": 0.25, "linewidth": 0}
        ax.fill_between(x, percent.min(1), percent.max(1), **band)
    _percent_axis(ax, chance)
    ax.set_xlabel("random labels (%)")
    return ax


def _percent_axis(ax: Axes, chance: float) -> None:
    drawn = [line.get_ydata()[0] for line in ax.lines if line.get_gid() == "chance"]
    if 100 * chance not in drawn:
        ax.axhline(100 * chance, color=GREY, linewidth=1, linestyle=":", gid="chance")
    ax.set(ylabel="error (%)", ylim=(-2, 102))


def plot_class_errors(
    errors: Mapping[str, Sequence[float]], names: Sequence[str], ax: Axes
) -> Axes:
    """A mark for the error of each class (shares), of another shape for each key of `errors`."""
    if any(len(values) != len(names) for values in errors.values()):
        raise InvalidValue(f"every entry needs {len(names)} class errors, one for each name")
    for (label, values), marker in zip(errors.items(), cycle("osD^"), strict=False):
        style = {"linestyle": "", "marker": marker, "color": COLOURS.get(label), "label": label}
        ax.plot(range(len(names)), [100 * value for value in values], **style)
    _percent_axis(ax, 1 - 1 / len(names))
    ax.set_xticks(range(len(names)), names, rotation=30 if max(map(len, names)) > 2 else 0)
    return ax


def plot_weights(weights: Mapping[str, Tensor], ax: Axes) -> Axes:
    """Histograms of latent weights on [-1, 1], one outline for each name."""
    for name, values in weights.items():
        ax.hist(
            values.detach().flatten().numpy(),
            bins=np.linspace(-1, 1, 41),
            weights=np.full(values.numel(), 100 / values.numel()),
            histtype="step",
            linewidth=1.6,
            label=name,
        )
    ax.set(xlabel="latent weight", ylabel="share of the weights (%)")
    return ax
