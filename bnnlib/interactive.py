"""Figures of the book that answer to the pointer, drawn by Bokeh in the page, without a server.

Each has a still picture beside it, for print and where scripts are off.
"""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from bokeh import layouts
from bokeh.embed import components
from bokeh.models import (
    ColumnDataSource,
    CustomJS,
    HoverTool,
    LayoutDOM,
    Legend,
    Range1d,
    Slider,
    Span,
)
from bokeh.plotting import figure
from bokeh.resources import Resources
from IPython.display import HTML, display
from matplotlib.figure import Figure

from bnnlib.history import History
from bnnlib.plots import COLOURS, GREY

if TYPE_CHECKING:
    import pandas as pd

# Where the pages find Bokeh's scripts; not set: they are written into the output, as in JupyterLab.
SCRIPTS = "BNNLIB_BOKEH"
PARTS = ["bokeh", "bokeh-widgets"]
MARKERS = {"holds": "circle", "open": "diamond", "fails": "x"}
STILL_MARKERS = {"holds": "o", "open": "D", "fails": "X"}
SHADES = {"holds": COLOURS["valid"], "open": COLOURS["fourth"], "fails": COLOURS["train"]}
LINES = ("solid", "dashed", "dashdot", "dotted")  # to both Bokeh and Matplotlib


def show(layout: LayoutDOM, still: Figure | None, alt: str) -> None:
    """Display a Bokeh layout on the page and, in print or without scripts, the still figure.

    None: the page has such a figure already.
    """
    root, alt = os.environ.get(SCRIPTS), escape(alt)
    where = {"mode": "server", "root_url": root} if root else {"mode": "inline"}
    scripts = Resources(**where, components=PARTS, log_level="error").render_js()
    script, place = components(layout)
    html = f'<div class="on-screen" role="group" aria-label="{alt}">{place}</div>{scripts}{script}'
    if still:
        html += (
            f'<div class="in-print"><img class="dark-light" alt="{alt}" src="{_as_url(still)}">'
            "</div><noscript><style>.in-print {display: block}</style></noscript>"
        )
    display(HTML(html))


def _as_url(still: Figure) -> str:
    picture = io.BytesIO()
    still.savefig(picture, format="png")
    plt.close(still)
    return f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"


def _plot(**options: Any) -> figure:
    """An empty plot in the style of the book."""
    plot = figure(
        sizing_mode="stretch_width", tools="", toolbar_location=None,
        background_fill_alpha=0, border_fill_alpha=0, outline_line_color=None, **options,
    )  # fmt: skip
    plot.grid.visible = False
    for axis in plot.axis:
        axis.axis_label_text_color = axis.major_label_text_color = GREY
        axis.axis_line_color = axis.major_tick_line_color = GREY
        axis.minor_tick_line_color = None
        axis.axis_label_text_font_style = "normal"
    plot.title.text_color = GREY
    return plot


# ------------------------------------------------------------------------------------ claims


def forest(claims: "pd.DataFrame") -> tuple[LayoutDOM, Figure]:
    """Estimate, interval and threshold of each claim, by unit: for the pointer, and still.

    `claims` is what `judge_all` gives, or rows of it. A bar is the interval; where the claim holds,
    the ground is shaded.
    """
    units = list(dict.fromkeys(claims["unit"]))
    groups = [claims[claims["unit"] == unit] for unit in units]
    plots = [_forest(group, unit) for group, unit in zip(groups, units, strict=True)]
    heights = [len(group) + 1.5 for group in groups]
    still, axes = plt.subplots(
        len(units), figsize=(6.4, 0.29 * sum(heights)), height_ratios=heights, squeeze=False
    )
    for ax, group, unit in zip(axes[:, 0], groups, units, strict=True):
        _still_forest(ax, group, unit)
    return layouts.column(*plots, sizing_mode="stretch_width"), still


def _bounds(group: "pd.DataFrame") -> tuple[float, float]:
    """From where to where an axis has to go."""
    columns = group[["low", "high", "least", "most"]].to_numpy().ravel()
    low, high = min(v for v in columns if isfinite(v)), max(v for v in columns if isfinite(v))
    room = 0.06 * (high - low or 1)
    return low - room, high + room


def _forest(group: "pd.DataFrame", unit: str) -> figure:
    left, right = _bounds(group)
    rows = [str(number) for number in group.index]
    plot = _plot(
        height=40 * len(rows) + 55,
        y_range=rows[::-1],
        x_range=Range1d(left, right),
        x_axis_label=unit,
    )
    text = group["claim"]
    source = ColumnDataSource(
        {
            "row": rows,
            "bar": [(row, -0.2) for row in rows],  # the text is above it
            "line": [(row, 0.22) for row in rows],
            "short": [t if len(t) <= 56 else t[:55].rstrip() + "…" for t in text],
            "claim": list(text),
            "mean": list(group["estimate"]),
            "low": list(group["low"]),
            "high": list(group["high"]),
            "from": list(group["least"].clip(left, right)),
            "to": list(group["most"].clip(left, right)),
            "runs": list(group["experiments"]),
            "values": [", ".join(f"{v:.4g}" for v in values) for values in group["values"]],
            "threshold": [f"{t} {unit}" for t in group["threshold"]],
            "verdict": list(group["verdict"]),
            "colour": [SHADES[v] for v in group["verdict"]],
            "marker": [MARKERS[v] for v in group["verdict"]],
            "edge": [left] * len(rows),
        }
    )
    plot.hbar("row", left="from", right="to", height=0.9, source=source, color=GREY, alpha=0.15)
    bars = plot.hbar("bar", left="low", right="high", height=0.08, source=source, color="colour")
    dots = plot.scatter(
        "mean", "bar", size=11, line_width=2, marker="marker", color="colour", source=source
    )
    plot.text(
        "edge", "line", "short", source=source, text_color=GREY, text_font_size="11px",
        x_offset=4, text_baseline="middle",
    )  # fmt: skip
    tips = [("claim @row", "@claim"), ("verdict", "@verdict"), ("threshold", "@threshold")]
    tips += [("mean", "@mean{0.[000]} (@low{0.[000]} to @high{0.[000]})")]
    tips += [("each seed", "@values"), ("runs", "@runs")]
    plot.add_tools(HoverTool(renderers=[dots, bars], tooltips=tips))
    return plot


def _still_forest(ax: plt.Axes, group: "pd.DataFrame", unit: str) -> None:
    left, right = _bounds(group)
    for y, (_, row) in enumerate(group.iterrows()):
        shade = SHADES[row["verdict"]]
        bounds = np.clip([row["least"], row["most"]], left, right)
        ax.fill_betweenx([y - 0.45, y + 0.45], *bounds, color=GREY, alpha=0.15, linewidth=0)
        ax.plot([row["low"], row["high"]], [y, y], color=shade)
        ax.plot(row["estimate"], y, STILL_MARKERS[row["verdict"]], color=shade)
    ax.set_yticks(range(len(group)), group.index)
    ax.set(xlim=(left, right), ylim=(len(group) - 0.5, -0.5), xlabel=unit)


# ----------------------------------------------------------------------------- learning curves


def curves(
    runs: Mapping[str, Sequence[History]], column: str = "train_error"
) -> tuple[LayoutDOM, Figure]:
    """An error of several groups of runs, in percent: the mean over the seeds, and their range.

    A click on a name in the legend hides its line.
    """
    plot = _plot(
        height=380, x_axis_label="epoch", y_axis_label="error (%)", y_range=Range1d(-2, 102)
    )
    still, ax = plt.subplots()
    items, lines = [], []
    for k, (group, histories) in enumerate(runs.items()):
        colour = list(COLOURS.values())[k % len(COLOURS)]
        dash = LINES[k // len(COLOURS) % len(LINES)]
        epochs, values = _aligned(histories, column)
        mean, low, high = values.mean(0), values.min(0), values.max(0)
        data = {"epoch": epochs, "mean": mean, "low": low, "high": high}
        source = ColumnDataSource(data | {"name": [group] * len(epochs)})
        band = plot.varea("epoch", "low", "high", source=source, color=colour, alpha=0.2)
        line = plot.line("epoch", "mean", source=source, color=colour, line_dash=dash, line_width=2)
        items.append((group, [line, band]))
        lines.append(line)
        ax.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.plot(epochs, mean, color=colour, linestyle=dash, label=group)
    legend = Legend(
        items=items, click_policy="hide", label_text_color=GREY, background_fill_alpha=0,
        border_line_color=None, ncols=2, label_text_font_size="11px",
    )  # fmt: skip
    plot.add_layout(legend, "above")
    tips = [("", "@name"), ("epoch", "@epoch"), ("error", "@mean{0.0} % (@low{0.0} to @high{0.0})")]
    plot.add_tools(HoverTool(renderers=lines, tooltips=tips))
    ax.set(xlabel="epoch", ylabel="error (%)", ylim=(-2, 102))
    ax.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return plot, still


def _aligned(histories: Sequence[History], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The epochs in which all runs have a value, and those in percent, (runs, epochs)."""
    values = np.array([history[name] for history in histories])
    known = np.isfinite(values).all(0)
    return np.array(histories[0]["epoch"])[known], 100 * values[:, known]


# ------------------------------------------------------------------------------ a latent weight


def weight_slider(latent: Sequence[float]) -> LayoutDOM:
    """The latent value of one weight before each step; a slider goes through time with its sign."""
    steps = list(range(len(latent)))
    reach = 1.15 * max(abs(w) for w in latent)
    plot = _plot(height=260, x_axis_label="step", y_axis_label="latent weight")
    plot.x_range, plot.y_range = Range1d(-1, 1.15 * len(latent)), Range1d(-reach, reach)
    plot.add_layout(Span(location=0, dimension="width", line_color=GREY, line_width=1))
    plot.line(steps, latent, color=COLOURS["test"], line_width=2)
    now = ColumnDataSource({"step": [0], "w": [latent[0]], "mark": [_mark(latent[0])]})
    plot.scatter("step", "w", size=12, color=COLOURS["train"], source=now)
    plot.text("step", "w", "mark", source=now, x_offset=9, y_offset=-4, text_color=GREY)
    slider = Slider(start=0, end=len(latent) - 1, value=0, step=1, title="step")
    code = """
        const w = latent[cb_obj.value]
        now.data = {step: [cb_obj.value], w: [w], mark: [w >= 0 ? "sign +1" : "sign −1"]}
    """
    slider.js_on_change("value", CustomJS(args={"now": now, "latent": list(latent)}, code=code))
    return layouts.column(slider, plot, sizing_mode="stretch_width")


def _mark(weight: float) -> str:
    return f"sign {'+1' if weight >= 0 else '−1'}"
