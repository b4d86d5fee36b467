"""Figures for the pointer: they show what they are given, and ask nothing of a network."""

import re
from math import inf, nan

import numpy as np
import pandas as pd
import pytest
from bokeh.models import HoverTool, Slider

from bnnlib import interactive
from bnnlib.history import History
from bnnlib.interactive import curves, forest, show, weight_slider

CLAIMS = pd.DataFrame(
    {
        "claim": ["it is small", "it is large " * 9, "they differ"],
        "unit": ["%", "%", "points"],
        "estimate": [2.0, 40.0, 3.0],
        "low": [1.0, 30.0, -1.0],
        "high": [3.0, 50.0, 7.0],
        "least": [-inf, 60.0, 0.0],
        "most": [5.0, inf, inf],
        "threshold": ["at most 5", "at least 60", "at least 0"],
        "verdict": ["holds", "fails", "open"],
        "experiments": ["a", "b", "a; b"],
        "values": [[1.5, 2.5], [40.0, 40.0], [3.0, 3.0]],
    },
    pd.RangeIndex(1, 4, name="number"),
)


def sources(layout):
    """The data of each renderer below a layout."""
    return [r.data_source.data for p in plots(layout) for r in p.renderers]


def plots(layout):
    return [child for child in getattr(layout, "children", [layout]) if hasattr(child, "renderers")]


def test_a_forest_has_a_plot_for_each_unit_and_a_row_for_each_claim():
    layout, still = forest(CLAIMS)
    percent, points = plots(layout)
    data = percent.renderers[0].data_source.data
    assert (data["row"], data["mean"]) == (["1", "2"], [2.0, 40.0])
    assert (data["low"], data["high"]) == ([1.0, 30.0], [3.0, 50.0])
    assert data["marker"] == ["circle", "x"]
    assert data["values"] == ["1.5, 2.5", "40, 40"]
    left, right = percent.x_range.start, percent.x_range.end
    assert (data["from"], data["to"]) == ([left, 60.0], [5.0, right])
    assert left < 1  # intervals and thresholds are in view
    assert right > 60
    assert len(data["short"][1]) <= 56 < len(data["claim"][1])
    assert points.renderers[0].data_source.data["verdict"] == ["open"]
    assert [ax.get_xlabel() for ax in still.axes] == ["%", "points"]


def test_the_pointer_brings_claim_threshold_seeds_and_runs():
    layout, _ = forest(CLAIMS)
    [hover] = plots(layout)[0].select(HoverTool)
    asked = " ".join(text for _, text in hover.tooltips)
    assert {"@claim", "@threshold", "@values", "@runs"} <= set(re.findall(r"@\w+", asked))


def history(*errors):
    return History([{"epoch": i + 1, "train_error": e} for i, e in enumerate(errors)])


def test_curves_are_means_and_ranges_in_percent_where_there_are_values():
    plot, still = curves({"one": [history(0.5, nan, 0.1), history(0.7, nan, 0.3)]})
    data = sources(plot)[0]
    assert list(data["epoch"]) == [1, 3]
    for name, values in {"mean": [60, 20], "low": [50, 10], "high": [70, 30]}.items():
        np.testing.assert_allclose(data[name], values)
    [legend] = plot.legend
    assert legend.click_policy == "hide"
    assert [item.label.value for item in legend.items] == ["one"]
    np.testing.assert_allclose(still.axes[0].lines[0].get_xydata(), [[1, 60], [3, 20]])


def test_groups_beyond_the_colours_get_another_line():
    plot, _ = curves({str(k): [history(0.5, 0.4)] for k in range(6)})
    looks = {f"{r.glyph.line_color} {r.glyph.line_dash}" for r in plot.renderers[1::2]}
    assert len(looks) == 6


def test_a_slider_has_a_place_for_each_step_and_moves_the_mark():
    slider, plot = weight_slider([0.2, -0.1, -0.2, 0.0]).children
    assert isinstance(slider, Slider)
    assert (slider.start, slider.end, slider.step) == (0, 3, 1)
    curve, mark, *_ = (renderer.data_source for renderer in plot.renderers)
    assert curve.data["y"] == [0.2, -0.1, -0.2, 0.0]
    assert mark.data == {"step": [0], "w": [0.2], "mark": ["sign +1"]}
    [callback] = slider.js_property_callbacks["change:value"]
    assert callback.args == {"now": mark, "latent": [0.2, -0.1, -0.2, 0.0]}


@pytest.mark.parametrize("root", ["", "../bokeh/"])
def test_a_page_has_its_scripts_and_a_still_picture(root, monkeypatch):
    shown = []
    monkeypatch.setattr(interactive, "display", lambda html: shown.append(html.data))
    monkeypatch.setenv(interactive.SCRIPTS, root)
    show(*curves({"one": [history(0.5, 0.4)]}), alt='a "weight"')
    [page] = shown
    assert re.search(r'<div class="in-print"><img [^>]*alt="a &quot;weight&quot;"', page)
    loaded = re.findall(r'<script[^>]* src="([^"]+)"', page)
    names = [f"../bokeh/static/js/{part}.min.js" for part in interactive.PARTS]
    assert loaded == (names if root else [])
    assert ("Bokeh=" in page.replace(" ", "")) == (not root)
    if root:  # else Bokeh's own text is in it
        assert not re.search(r'(src|href)="https?:', page)
