"""The long fault tests, each tried once or twice, and what they found at length."""

import pytest

from benchmarks import faults
from bnnlib.studies.claims import reliability


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return faults.Workshop(tmp_path_factory.mktemp("faults"), scale=0.02)


@pytest.mark.parametrize(
    "fault", [faults.interrupted, faults.damaged_states, faults.two_processes, faults.numbers]
)
def test_a_fault_ends_as_promised(fault, shop):
    row = fault(shop)
    assert row.tried == row.as_promised > 0


def test_a_run_that_is_another_is_seen(shop):
    out = shop.unfinished(3)
    shop.whole.model.norm1.bias.data[0] += 1
    assert not shop.goes_on(out)
    shop.whole.model.norm1.bias.data[0] -= 1


def test_everything_that_was_tried_at_length_ended_as_promised():
    rows = {row["fault"]: row for row in reliability()}
    assert all(row["tried"] == row["as promised"] for row in rows.values())
    assert rows["SIGKILL at a chosen point"]["tried"] >= 200
    assert rows["SIGKILL at a random moment"]["tried"] >= 20
    altered = [row["tried"] for name, row in rows.items() if name.startswith("altered")]
    assert sum(altered) >= 10_000
