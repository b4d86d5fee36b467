"""Bits a weight, from tables of runs that were made here and by hand."""

from dataclasses import replace
from math import log2

import pandas as pd
import pytest

from bnnlib.experiments.build import build_model
from bnnlib.experiments.variants import CAPACITY
from bnnlib.runs.ledger import results
from bnnlib.runs.run import run
from bnnlib.studies.capacity import bits_per_weight, count_weights

TINY = replace(CAPACITY, n_train=50, n_test=0, epochs=2, width=0.0625)


@pytest.mark.parametrize(
    ("network", "weights"),
    [("linear", 192 * 10), ("dense_one", 192 * 4 + 4 * 10), ("dense", 192 * 4 + 4 * 4 + 4 * 10)],
)
def test_weights_are_counted_without_biases_and_normalizations(network, weights):
    binary = replace(TINY, network=network)
    for e in (binary, replace(binary, binary=False), replace(binary, weights="real")):
        assert count_weights(build_model(e)) == weights


def test_bits_of_a_run_are_those_that_its_probe_counted(tmp_path):
    fitted = replace(TINY, width=1.0, binary=False, epochs=200)
    for name, e in {"one": TINY, "two": fitted}.items():
        run(e, tmp_path / name, device="cpu", progress="none")
    table = results(tmp_path).assign(network="dense")
    few = table["memorized_bits"]["one"] / (192 * 4 + 4 * 4 + 4 * 10)
    assert bits_per_weight(table)["one"] == few < 0.2
    everything = 50 * log2(10) / (192 * 64 + 64 * 64 + 64 * 10)
    assert bits_per_weight(table)["two"] == pytest.approx(everything, rel=0.05)


def test_the_most_bits_are_those_of_the_best_number_of_images_of_each_seed():
    rows = [
        ("linear", True, 0, 100, 192.0),
        ("linear", True, 0, 200, 384.0),
        ("linear", True, 1, 100, 96.0),
        ("linear", False, 0, 100, 1920.0),
    ]
    table = pd.DataFrame(rows, columns=["network", "binary", "seed", "n_train", "memorized_bits"])
    found = bits_per_weight(table.assign(width=1.0))
    found = found.groupby([table["binary"], table["seed"]]).max()
    assert found.to_dict() == {(True, 0): 0.2, (True, 1): 0.05, (False, 0): 1.0}
