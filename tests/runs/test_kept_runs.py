"""What earlier releases wrote can be read, and a run that one began goes on."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch

from bnnlib.batches import Batches
from bnnlib.errors import BnnlibWarning
from bnnlib.experiments.build import prepare_data
from bnnlib.probes import EVALUATION_MODES
from bnnlib.runs.folder import load_run
from bnnlib.runs.record import is_finished
from bnnlib.runs.run import run
from bnnlib.training import evaluate

FIXTURES = Path(__file__).parents[1] / "fixtures"
FORMATS = sorted(path.name for path in FIXTURES.glob("format-*"))

each_format = pytest.mark.parametrize("name", FORMATS)


def test_there_is_a_run_of_every_format():
    assert FORMATS[0] == "format-1"


@each_format
def test_a_finished_run_is_read_with_everything_it_kept_and_computes_what_it_computed(name):
    kept = load_run(FIXTURES / name / "finished")  # which compares all of its hashes
    e, sets = kept.experiment, prepare_data(kept.experiment)
    assert (e.name, e.width, e.dropout) == ("svhn-tanh-stochastic", 0.02, (0.2,))
    assert kept.history["epoch"] == [1, 2, 3, 4]
    assert kept.record["versions"]["bnnlib"] == "0.1.0"
    assert kept.record["seconds"] > 0
    assert {split: len(labels) for split, labels in kept.labels.items()} == kept.record["images"]
    assert torch.equal(sets["train"].labels, kept.labels["train"])
    found = evaluate(kept.model, Batches(sets["train"], 20), EVALUATION_MODES["sign"]).error
    recorded = kept.history.last("train_error_sign")
    assert found == pytest.approx(recorded, abs=1.5 / 60)  # another machine may round a tie anew


@each_format
def test_an_unfinished_run_of_an_earlier_release_goes_on(name, tmp_path):
    begun = load_run(FIXTURES / name / "unfinished")
    out = Path(shutil.copytree(FIXTURES / name / "unfinished", tmp_path / "out"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BnnlibWarning)  # of other versions, maybe
        ended = run(begun.experiment, out, device="cpu", progress="none")
    assert is_finished(out)
    assert ended.record["continued"]
    earlier, now = begun.history, load_run(out).history
    assert len(earlier) == 2
    for column in earlier.columns:
        assert str(now[column][:2]) == str(earlier[column])
    assert torch.equal(ended.labels["train"], begun.labels["train"])
