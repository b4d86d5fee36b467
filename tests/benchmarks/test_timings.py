"""What the benchmark left is read as it was written, and drawn."""

import json
import re

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from benchmarks import timings
from benchmarks.timings import Pace, load_timings, time_steps
from bnnlib.errors import BnnlibError
from bnnlib.experiments.originals import published
from bnnlib.experiments.profiles import smoke
from bnnlib.experiments.variants import named
from bnnlib.process import BRIEFLY


def quartiles(middle):
    return {"low": middle / 2, "median": middle, "high": 2 * middle}


def speed(contender, images):
    row = {"network": "svhn", "width": 0.25, "contender": contender}
    names = ("milliseconds", "speed_to_twin", "speed_to_tuned_twin", "share_of_limit")
    return row | {name: quartiles(1.5) for name in names} | {"images_per_second": quartiles(images)}


def grown(contender, value, took):
    about = {"by": "batch_size", "value": value, "contender": contender}
    return about | {"milliseconds": quartiles(took), "peak_bytes": 1e6 * took}


@pytest.fixture
def results():
    memory = {"peak_bytes": quartiles(3e6), "imports_bytes": quartiles(1e6)}
    return {
        "batch_size": 50,
        "speeds": [speed("bnnlib", 2000), speed("float twin", 1000)],
        "limits": [{"network": "svhn", "width": 0.25, "seconds": [0.01, 0.02, 0.5]}],
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


@pytest.mark.parametrize(("share", "text"), [(0.9, "quiet: .* for 90%"), (0.4, "busy to .* 40%")])
def test_the_least_share_of_a_core_says_what_the_times_are_worth(share, text):
    assert re.search(text, timings.how_quiet({"a": Pace(1.0, 0.99), "b": Pace(2.0, share)}))


def test_the_table_has_a_row_for_each_contender(results):
    first, second = timings.speed_table(results)
    assert (first["contender"], second["contender"]) == ("bnnlib", "float twin")
    assert first["images/s"] == "2,000"
    assert first["ms a step"] == "1.5\N{NO-BREAK SPACE}(0.8–3.0)"
    assert (first["to the twin"], first["of the limit"]) == ("1.50", "150%")


def test_a_network_has_a_panel_where_speeds_are_drawn_from_the_top_beside_the_limit(results):
    (ax,) = timings.draw(results).axes
    assert timings.networks(results) == [("svhn", 0.25)]
    assert ax.get_xlabel() == "svhn × 0.25"
    assert [bar.get_width() for bar in ax.patches] == [2000, 1000]
    assert ax.yaxis_inverted()
    (limit,) = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert limit.get_xdata()[0] == pytest.approx(50 / 0.02)  # the median round's
    plt.close("all")


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
    for network in timings.networks(results):
        rows = [r for r in results["speeds"] if (r["network"], r["width"]) == network]
        assert {r["contender"] for r in rows} == contenders - set(results["skipped"])
        assert all(r["milliseconds"]["low"] > 0 for r in rows)
    assert {row["by"] for row in results["growth"]} == {"batch_size", "width", "images", "epochs"}


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
