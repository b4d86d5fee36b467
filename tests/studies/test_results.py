"""The stored runs: each is whole, names what made it, and behaves as any network must."""

import json
import os
from collections import defaultdict
from functools import cache

import evidence
import pytest

from bnnlib.errors import DataNotFound
from bnnlib.experiments import build as assembly
from bnnlib.experiments.build import prepare_data
from bnnlib.experiments.variants import named
from bnnlib.runs.ledger import stored_runs
from bnnlib.runs.record import RESULTS, profile_of
from bnnlib.studies.claims import CLAIMS, TABLE_CLAIMS

STORED = stored_runs(profile=None)


def name_of(kept):
    return f"{kept.folder.parent.name}-{kept.folder.name}"


def each(runs):
    return pytest.mark.parametrize("kept", runs, ids=name_of)


@each(STORED)
def test_a_stored_run_names_an_experiment_that_exists_at_one_of_its_profiles(kept):
    assert named(kept.experiment.name).name == kept.folder.parent.name
    assert profile_of(kept.experiment) != "own"


@each(STORED)
def test_a_stored_run_is_whole(kept):
    e, history = kept.experiment, kept.history
    epochs = history["epoch"]
    assert len(epochs) == 1 if e.evaluates else epochs == list(range(1, e.epochs + 1))
    assert 0 <= history.last("train_error") <= 1
    assert kept.record["seconds"] == pytest.approx(sum(history["seconds"]), abs=1)
    hashes = [kept.record["parameter_sha256"]]
    hashes += [*kept.record["label_sha256"].values(), *kept.record["image_sha256"].values()]
    assert all(len(value) == 64 and int(value, 16) for value in hashes)


def test_no_two_stored_runs_are_the_same():
    assert len({kept.experiment.digest() for kept in STORED}) == len(STORED)


@pytest.fixture(scope="module")
def read_once():
    """Each real data set is read from disk once for all stored runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "load", cache(assembly.load))
        yield


@each(STORED)
@pytest.mark.skipif(not os.environ.get("BNNLIB_DATA"), reason="BNNLIB_DATA names no data folder")
def test_images_and_labels_of_a_stored_run_can_be_made_again(kept, read_once):
    try:
        sets = prepare_data(kept.experiment)
    except DataNotFound as error:
        pytest.skip(str(error))
    assert {k: data.label_hash() for k, data in sets.items()} == kept.record["label_sha256"]
    assert {k: data.image_hash() for k, data in sets.items()} == kept.record["image_sha256"]


def has_random_test_labels(kept):
    e = kept.experiment
    return not e.evaluates and e.random_labels == 1 and "test" in e.random_label_splits


def learned_nothing_true(kept):
    """Whether the test labels are true, and what it was trained on says nothing about them."""
    e = kept.experiment
    noise = e.gaussian_variance > 0 and e.gaussian_splits == ("train",)
    random = e.random_labels == 1 and "train" in e.random_label_splits
    return not e.evaluates and not has_random_test_labels(kept) and (noise or random)


@each([kept for kept in STORED if has_random_test_labels(kept)])
def test_random_test_labels_are_guessed(kept):
    n = kept.record["images"]["test"]
    assert abs(kept.history.last("test_error") - 0.9) < 4 * (0.9 * 0.1 / n) ** 0.5  # of a binomial


BANDS = {"cifar10": (0.87, 0.93), "svhn": (0.84, 0.96)}  # as those of the claims
GROUPS = defaultdict(list)
for kept in filter(learned_nothing_true, STORED):
    GROUPS[kept.experiment.name].append(kept.history.last("test_error"))


@pytest.mark.parametrize("name", [name for name, errors in GROUPS.items() if len(errors) >= 3])
def test_true_test_labels_are_not_learned_from_noise_as_the_mean_of_three_seeds(name):
    low, high = BANDS[name.split("-")[0]]
    assert low <= sum(GROUPS[name]) / len(GROUPS[name]) <= high


# ---------------------------------------------------------------------- what is made of them


@pytest.mark.parametrize("name", evidence.FILES)
def test_a_file_of_all_runs_is_that_of_the_folders(name):
    text = (RESULTS / name).read_text(encoding="utf-8")
    assert text == evidence.contents(RESULTS)[name], f"`make evidence` writes {name} anew"


def test_all_claims_are_there_for_other_programs():
    found = json.loads((RESULTS / "claims.json").read_text(encoding="utf-8"))
    assert "Student" in found["method"]
    claims = found["claims"]
    assert [row["claim"] for row in claims] == [c.text for c in (*CLAIMS, *TABLE_CLAIMS)]
    for row in claims:
        assert row["n"] == len(row["values"]) >= 3
        low, high = row["interval"]
        assert low <= row["estimate"] <= high
        least, most = (row["threshold"][0], row["threshold"][1])
        inside = (least is None or least <= low) and (most is None or high <= most)
        assert inside == (row["verdict"] == "holds")
        assert row["cpu_hours"] > 0
