"""What the benchmark left is read as it was written, and drawn."""

import json
import re

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from benchmarks import timings
from benchmarks.timings import Pace, load_timings, time_calls, time_steps, without_kernels
from bnnlib.errors import BnnlibError
from bnnlib.experiments.originals import published
from bnnlib.experiments.profiles import smoke
from bnnlib.experiments.variants import named
from bnnlib.kernels import bits
from bnnlib.process import BRIEFLY


def quartiles(middle):
    return {"low": middle / 2, "median": middle, "high": 2 * middle}


def speed(contender, images):
    row = {"network": "svhn", "width": 0.25, "threads": 2, "contender": contender}
    names = ("milliseconds", "speed_to_twin", "speed_to_tuned_twin", "share_of_limit")
    return row | {name: quartiles(1.5) for name in names} | {"images_per_second": quartiles(images)}


def product(layer, kind, seconds, kernel_seconds):
    size = {"flops": 8e6, "bytes": {"floats": 4e3, "words": 2e3}}
    times = {"seconds": seconds, "kernel_seconds": kernel_seconds}
    return {"layer": layer, "kind": kind, "layout": "NHWC", **size, **times}


def limit():
    rates = {name: quartiles(rate) for name, rate in (("floats", 1e11), ("bytes", 1e10))}
    products = [product("conv1", "forward", 2e-3, None), product("conv2", "forward", 4e-3, 1e-3)]
    return {
        "network": "svhn",
        "width": 0.25,
        "threads": 2,
        "seconds": [0.01, 0.02, 0.5],
        "rates": rates | {"words": quartiles(1e12)},
        "products": products,
    }


def engine(contender, images, equal, **ratios):
    row = {"network": "svhn", "width": 0.25, "batch_size": 1, "threads": 2, "contender": contender}
    pace = {"images_per_second": quartiles(images), "speed_to_eager": quartiles(3.0)}
    return row | pace | {"equal": equal, "same_class": 0.5} | ratios


def grown(contender, value, took):
    about = {"by": "batch_size", "value": value, "contender": contender}
    return about | {"milliseconds": quartiles(took), "peak_bytes": 1e6 * took}


@pytest.fixture
def results():
    memory = {"peak_bytes": quartiles(3e6), "imports_bytes": quartiles(1e6)}
    return {
        "batch_size": 50,
        "speeds": [speed("bnnlib", 2000), speed("float twin", 1000)],
        "limits": [limit()],
        "startup": [{"program": "import torch", "seconds": quartiles(1.0)}],
        "memory": [{"contender": "bnnlib", **memory}],
        "growth": [grown("bnnlib", 1, 2.0), grown("bnnlib", 2, 4.0), grown("float twin", 1, 3.0)],
    }


@pytest.fixture
def ax():
    return Figure().subplots()


def test_every_experiment_trains_on_images_of_its_size():
    pair = {"digits": smoke(published("svhn-random-labels")), "patterns": smoke(named("capacity"))}
    paces = time_steps(pair, rounds=1, steps={"patterns": 2})
    assert list(paces) == list(pair)
    assert all(pace.seconds > 0 and 0 < pace.share <= 1.1 for pace in paces.values())


def test_experiments_take_turns_and_the_median_round_counts(monkeypatch):
    log, taken = [], {"a": iter([9, 1, 5, 2]), "b": iter([9, 4, 4, 7])}

    def turn(name, steps):
        return lambda: log.append(name * steps) or Pace(next(taken[name]), 1.0)

    monkeypatch.setattr(timings, "_turn", turn)
    paces = time_steps({"first": "a", "second": "b"}, rounds=3, steps={"second": 2})
    assert log == ["a", "bb"] * 4
    assert [pace.seconds for pace in paces.values()] == [2, 4]


def test_functions_take_turns_too():
    log = []
    paces = time_calls({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, 2, times=3)
    assert "".join(log) == "aaabbb" * 3
    assert all(pace.seconds > 0 for pace in paces.values())


def test_what_is_named_plain_trains_without_the_kernels(monkeypatch):
    seen = []

    def turn(name, steps):
        return lambda: seen.append((name, bits.library() is None)) or Pace(1.0, 1.0)

    monkeypatch.setattr(bits, "library", lambda: "the kernels")
    monkeypatch.setattr(timings, "_turn", turn)
    time_steps({"a": "bits", "b": "floats"}, rounds=1, plain=("b",))
    assert set(seen) == {("bits", False), ("floats", True)}


def test_the_kernels_are_back_after_an_error(monkeypatch):
    monkeypatch.setattr(bits, "library", lambda: "the kernels")
    with pytest.raises(ZeroDivisionError):
        without_kernels()(lambda: 1 // 0)()
    assert bits.library() == "the kernels"


@pytest.mark.parametrize(("share", "text"), [(0.9, "quiet: .* for 90%"), (0.4, "busy to .* 40%")])
def test_the_least_share_of_a_core_says_what_the_times_are_worth(share, text):
    assert re.search(text, timings.how_quiet({"a": Pace(1.0, 0.99), "b": Pace(2.0, share)}))


def test_the_time_on_a_core_leaves_out_that_of_other_processes():
    assert Pace(2.0, 0.25).on_core == 0.5


def test_all_of_several_measurements_must_be_quiet():
    quiet, busy = {"a": Pace(1.0, 0.95)}, {"b": Pace(1.0, 0.5)}
    assert timings.is_quiet(quiet)
    assert not timings.is_quiet(quiet, busy)
    assert "busy to tell: this process had a core for only 50%" in timings.how_quiet(quiet, busy)


def test_paces_are_bars_with_their_numbers(ax):
    timings.plot_paces({"a": Pace(0.002, 1.0), "b": Pace(4.0, 1.0)}, ax)
    assert [bar.get_width() for bar in ax.patches] == [2, 4000]
    assert [text.get_text() for text in ax.texts] == ["2", "4,000"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


def test_the_table_has_a_row_for_each_contender(results):
    first, second = timings.speed_table(results)
    assert (first["contender"], second["contender"]) == ("bnnlib", "float twin")
    assert first["images/s"] == "2,000"
    assert first["ms a step"] == "1.5\N{NO-BREAK SPACE}(0.8–3.0)"
    assert (first["to the twin"], first["of the limit"]) == ("1.50", "150%")


def test_a_network_has_a_panel_where_speeds_are_drawn_from_the_top_beside_the_limit(results):
    (ax,) = timings.draw(results).axes
    assert ax.get_xlabel() == "svhn × 0.25\nthreads: 2"
    assert [bar.get_width() for bar in ax.patches] == [2000, 1000]
    assert ax.yaxis_inverted()
    (limit,) = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert limit.get_xdata()[0] == pytest.approx(50 / 0.02)  # the median round's
    plt.close("all")


def test_engines_have_a_table_and_a_panel_for_each_batch_size():
    rows = [
        engine("bnnlib, packed", 90, True, speed_to_compiled=quartiles(2.0)),
        engine("PyTorch", 30, False),
    ]
    rows += [row | {"batch_size": 50} for row in rows]
    first, second, *_ = timings.inference_table({"engines": rows})
    assert (first["network"], first["batch"], first["same class"]) == ("svhn × 0.25", 1, "equal")
    assert (first["to PyTorch"], first["to compiled"], first["of the limit"]) == ("3.0", "2.0", "")
    assert (second["to compiled"], second["same class"]) == ("", "50%")
    figure = timings.draw_inference({"engines": rows})
    assert [ax.get_xlabel() for ax in figure.axes] == [
        f"svhn × 0.25, batch {n}\nthreads: 2" for n in (1, 50)
    ]
    plt.close("all")


def test_more_than_four_panels_go_on_below():
    rows = [engine("bnnlib, packed", n, True) | {"batch_size": n} for n in range(1, 6)]
    axes = timings.draw_inference({"engines": rows}).axes
    assert [ax.get_visible() for ax in axes] == [True] * 5 + [False] * 3
    plt.close("all")


def test_a_product_lies_in_the_roofline_by_its_bytes_and_its_rate(ax):
    first, second, third = timings.roofline(limit())
    assert (first["as"], second["as"], third["as"]) == ("floats", "floats", "words")
    assert (second["intensity"], third["intensity"]) == (2000, 4000)
    assert (second["rate"], third["rate"]) == pytest.approx((2e9, 8e9))
    timings.plot_roofline(limit(), ax, additions=4)
    roofs = [max(line.get_ydata()) for line in ax.lines[:3]]
    assert roofs == pytest.approx([100, 400, 1000])
    assert min(ax.lines[0].get_ydata()) == pytest.approx(4 * 10)  # the memory's slope
    assert [text.get_text() for text in ax.texts] == ["floats", "tables of sums", "words"]


def test_memory_is_drawn_with_the_imports_part_of_it(results, ax):
    timings.plot_memory(results, ax)
    assert [bar.get_width() for bar in ax.patches] == [3, 1]


def test_growth_is_a_line_for_each_contender(results, ax):
    timings.plot_growth(results, "batch_size", ax)
    assert [list(line.get_ydata()) for line in ax.lines] == [[2, 4], [3]]
    timings.plot_growth(results, "batch_size", ax, "peak_bytes", 1e-6)
    assert [list(line.get_ydata()) for line in ax.lines[2:]] == [[2, 4], [3]]
    assert ax.get_xlabel() == "batch size"


def test_the_kept_results_are_whole():
    results = load_timings()
    contenders = set(results["contenders"])
    assert {"bnnlib", "float twin", "float twin, tuned"} <= contenders - set(results["skipped"])
    for rows in timings.panels(results["speeds"], "network", "width", "threads").values():
        assert {r["contender"] for r in rows} == contenders - set(results["skipped"])
        assert all(r["milliseconds"]["low"] > 0 for r in rows)
    assert {row["by"] for row in results["growth"]} == {"batch_size", "width", "images", "epochs"}
    assert {row["threads"] for row in results["limits"]} == {1, 2}


def test_the_kept_results_of_engines_are_whole_and_packed_networks_computed_the_same():
    results = load_timings(timings.INFERENCE, timings.ENGINE_LISTS)
    there = set(results["contenders"]) - set(results["skipped"])
    where = ("network", "width", "batch_size", "threads")
    for rows in timings.panels(results["engines"], *where).values():
        assert {r["contender"] for r in rows} == there
        assert all(r["equal"] for r in rows if r["contender"].startswith("bnnlib"))
    assert len(results["rates"]) == len(timings.panels(results["engines"], *where))


def test_the_kept_contention_is_that_of_the_spin_that_is_set():
    results = load_timings(timings.CONTENTION, ["contention"])
    assert str(results["ours"]) == BRIEFLY["GOMP_SPINCOUNT"]
    spins = {row["spin"] for row in results["contention"]}
    assert {results["library"], results["ours"]} < spins
    assert len(timings.contention_table(results)) == len(results["contention"])


@pytest.mark.parametrize("name", ["speeds", "limits", "memory", "growth", "startup"])
@pytest.mark.parametrize("wrong", [None, "many", [3]])
def test_anything_else_is_refused_by_name(results, tmp_path, name, wrong):
    path = tmp_path / "training.json"
    path.write_text(json.dumps(results | {name: wrong}))
    with pytest.raises(BnnlibError, match=f"training.json is no result .* {name!r}"):
        load_timings(path)
