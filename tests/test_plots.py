import re
from math import nan

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from bnnlib import plots
from bnnlib.corruption import gaussian_inputs
from bnnlib.data.images import ImageSet, scale_pixels
from bnnlib.errors import InvalidValue
from bnnlib.history import History
from bnnlib.quantizers import binary_sigmoid, binary_tanh

HISTORY = History(
    [
        {"epoch": 1, "train_error": nan, "test_error": nan},
        {"epoch": 2, "train_error": 0.5, "test_error": 0.9},
        {"epoch": 3, "train_error": nan, "test_error": nan},
        {"epoch": 4, "train_error": 0.25, "test_error": 0.875},
    ]
)
TRAIN, TEST = [[2, 50], [4, 25]], [[2, 90], [4, 87.5]]


@pytest.fixture
def ax():
    return Figure().subplots()


def lines(ax):
    """Label and points of each drawn line; the line of the blind guess apart."""
    drawn = [line for line in ax.lines if line.get_gid() != "chance"]
    return [(line.get_label(), line.get_xydata().tolist()) for line in drawn]


def chance(ax):
    return [line.get_ydata()[0] for line in ax.lines if line.get_gid() == "chance"]


def test_errors_are_percents_of_the_evaluated_epochs(ax):
    assert plots.plot_errors(HISTORY, ax) is ax
    assert lines(ax) == [("train", TRAIN), ("test", TEST)]
    assert [line.get_linestyle() for line in ax.lines if line.get_gid() != "chance"] == ["-", "--"]
    assert ax.get_xlabel() == "epoch"
    assert all(tick == int(tick) for tick in ax.get_xticks())
    assert "%" in ax.get_ylabel()


def test_a_second_history_gets_its_label_and_no_second_line_of_chance(ax):
    plots.plot_errors(HISTORY, ax, splits=["train"])
    plots.plot_errors(HISTORY, ax, splits=["train"], label="twin", linestyle=":")
    assert lines(ax) == [("train", TRAIN), ("twin train", TRAIN)]
    assert ax.lines[-1].get_linestyle() == ":"
    assert chance(ax) == [90]


def test_chance_is_that_of_the_classes(ax):
    four = History([row | {f"test_error_class_{i}": nan for i in range(4)} for row in HISTORY.rows])
    plots.plot_errors(four, ax)
    plots.plot_class_errors({"test": (0.1, 0.2)}, "ab", ax)
    plots.plot_levels([0, 1], {"test": [0.1, 0.8]}, ax, chance=0.8)
    plots.plot_errors([HISTORY], ax)
    assert chance(ax) == [75, 50, 80, 90]


def test_a_split_that_the_history_lacks_is_refused(ax):
    with pytest.raises(InvalidValue, match="unknown history column 'valid_error'"):
        plots.plot_errors(HISTORY, ax, splits=["valid"])


def test_several_histories_are_named_once(ax):
    assert plots.plot_errors([HISTORY, HISTORY], ax) is ax
    assert [points for _, points in lines(ax)] == [TRAIN, TRAIN, TEST, TEST]
    assert ax.get_legend_handles_labels()[1] == ["train", "test"]


def test_a_column_is_drawn_where_it_has_values(ax):
    rows = [{"epoch": 1, "flips": 0.5}, {"epoch": 2}, {"epoch": 3, "flips": 0.25}]
    assert plots.plot_column([History(rows)], "flips", ax, "sign flips", scale=1, color="red") is ax
    assert lines(ax) == [("sign flips", [[1, 0.5], [3, 0.25]])]


def test_levels_are_drawn_in_percent_with_the_mean_of_the_seeds_and_their_range(ax):
    errors = {"train": [0, 0.01], "test": np.array([[0.1, 0.3], [0.5, 0.9]])}
    assert plots.plot_levels([0, 1], errors, ax) is ax
    train, test = (points for _, points in lines(ax))
    assert train == [[0, 0], [100, 1]]
    assert test == [[0, pytest.approx(20)], [100, pytest.approx(70)]]
    corners = {tuple(np.round(corner)) for corner in ax.collections[1].get_paths()[0].vertices}
    assert corners == {(0, 10), (0, 30), (100, 50), (100, 90)}


def test_class_errors_are_marks_of_another_shape_for_each_split(ax):
    errors = {"train": (0.1, 0.2, 0.3), "test": (0.9, 0.8, 1.0)}
    assert plots.plot_class_errors(errors, "abc", ax) is ax
    assert [name for name, _ in lines(ax)] == ["train", "test"]
    train, test = (np.array(points) for _, points in lines(ax))
    assert train.ravel() == pytest.approx([0, 10, 1, 20, 2, 30])
    assert test.ravel() == pytest.approx([0, 90, 1, 80, 2, 100])
    assert ax.lines[0].get_marker() != ax.lines[1].get_marker()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "c"]
    assert chance(ax) == pytest.approx([100 * 2 / 3])
    with pytest.raises(InvalidValue, match="3 class errors"):
        plots.plot_class_errors({"train": (0.1, 0.2)}, "abc", ax)


@pytest.mark.parametrize(
    ("quantizer", "values", "slope"), [(binary_tanh, {-1, 1}, 1), (binary_sigmoid, {0, 1}, 0.5)]
)
def test_a_quantizer_is_drawn_with_the_slope_of_its_backward_pass(ax, quantizer, values, slope):
    assert plots.plot_quantizer(quantizer, ax, limit=2) is ax
    (_, value), (_, slopes) = lines(ax)
    assert {y for _, y in value} == values
    # 0.004 apart, the points next to 1 may be rounded to either side of it
    assert all(y == slope for x, y in slopes if abs(x) < 0.999)
    assert all(y == 0 for x, y in slopes if abs(x) > 1.001)


def test_images_lie_in_the_sheet_row_by_row(ax, noise):
    data = noise(n=12, size=8)
    assert plots.show_images(data, ax, columns=5, rows=2, names=False) is ax
    (sheet,) = (image.get_array() for image in ax.images)
    for i in range(10):
        top, left = i // 5 * 10, i % 5 * 10
        shown = np.asarray(sheet)[top : top + 8, left : left + 8]
        expected = (scale_pixels(data.images[i]) + 1) / 2
        np.testing.assert_allclose(shown[..., :3], expected.permute(1, 2, 0), atol=1e-6)
        assert (shown[..., 3] == 1).all()


def test_names_of_the_classes_stand_beneath_their_images(ax, noise):
    data = noise(n=12, classes=("ship", "frog"))
    plots.show_images(data, ax, columns=4, rows=3)
    assert [text.get_text() for text in ax.texts] == [data.class_names[y] for y in data.labels]


def test_grey_images_are_shown_in_grey(ax, noise):
    data = noise(2)
    grey = ImageSet(data.images[:, :1], data.labels)
    plots.show_images(grey, ax, columns=2)
    sheet = ax.images[0].get_array()
    np.testing.assert_allclose(sheet[:8, :8, 0] * 255, data.images[0, 0], atol=1e-4)
    for channel in (1, 2):
        np.testing.assert_array_equal(sheet[..., channel], sheet[..., 0])


def test_unclipped_noise_can_be_shown_and_no_more_images_than_there_are(ax, noise):
    data = gaussian_inputs(noise(n=12), 4.0, seed=1)
    plots.show_images(data, ax)
    (sheet,) = (image.get_array() for image in ax.images)
    assert (sheet.min(), sheet.max()) == (0, 1)
    with pytest.raises(InvalidValue, match="noise train has 12 images, asked for 20"):
        plots.show_images(data, ax, rows=2)


def test_weights_are_shares_of_their_number(ax, generator):
    weights = {"conv1": torch.rand(100, generator=generator), "dense3": torch.full((7, 7), -0.99)}
    assert plots.plot_weights(weights, ax) is ax
    heights = {patch.get_label(): patch.get_xy()[:, 1] for patch in ax.patches}
    assert heights["dense3"].max() == pytest.approx(100)
    assert 0 < heights["conv1"].max() < 20


def test_book_style_leaves_no_ground_and_is_readable_on_both_themes():
    with mpl.rc_context():
        plots.use_book_style()
        for key in ("figure.facecolor", "axes.facecolor", "savefig.facecolor"):
            assert mpl.rcParams[key] == "none"
        luminance = np.dot(mpl.colors.to_rgb(mpl.rcParams["text.color"]), [0.2126, 0.7152, 0.0722])
        assert 0.35 < luminance < 0.65


# -------------------------------------------------------------------------------------- tables


def cells(table):
    """Head and rows of a table in HTML, each cell as (class, text)."""
    rows = plots.table_html(table).split("</tr>")[:-1]
    return [re.findall(r'<t[hd] class="([\w ]+)">(.*?)</t[hd]>', row) for row in rows]


def test_a_table_has_one_head_text_to_the_left_and_numbers_to_the_right():
    table = {"error (%)": [1.5, 22.25], "n": [3, None], "to 10 %": ["5", "-"], "why": ["<b", "1 a"]}
    head, first, second = cells(pd.DataFrame(table, pd.Index(["x", "y"], name="network")))
    names = ["network", *table]
    kinds = ["text", "number", "number", "number", "text"]
    assert head == list(zip(kinds, names, strict=True))
    assert [text for _, text in first] == ["x", "1.50", "3.0", "5", "&lt;b"]
    assert [text for _, text in second] == ["y", "22.25", "NaN", "-", "1 a"]


def test_an_index_that_only_counts_is_left_out_and_one_with_levels_is_columns():
    assert cells(pd.DataFrame({"a": [1]})) == [[("number", "a")], [("number", "1")]]
    levels = pd.MultiIndex.from_tuples([("x", 1)], names=["data", "seed"])
    assert [text for _, text in cells(pd.DataFrame({"a": [2]}, levels))[0]] == ["data", "seed", "a"]


def test_a_column_with_sentences_is_long():
    table = pd.DataFrame({"a": ["word"], "b": ["a word and a word and a word and a word, 41"]})
    assert [kind for kind, _ in cells(table)[0]] == ["text", "text long"]


def test_what_stands_in_backticks_is_code():
    assert cells(pd.DataFrame({"a": ["`x < 1` or"]}))[1] == [("text", "<code>x &lt; 1</code> or")]


def test_a_column_that_is_headed_by_a_number_says_of_what():
    loads = pd.DataFrame([[3, 4]], ["A"], pd.Index([0.5, 1], name="load"))
    assert [text for _, text in cells(loads)[0]] == ["index", "load 0.5", "load 1"]
    pairs = pd.MultiIndex.from_tuples([("train", 0), ("test", 1)], names=["split", "seed"])
    table = pd.DataFrame([[3, 4]], pd.Index(["A"], name="method"), pairs)
    assert [text for _, text in cells(table)[0]] == ["method", "train seed 0", "test seed 1"]
