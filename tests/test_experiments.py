import json
import os
import shutil
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from bnnlib.corruption import random_labels
from bnnlib.errors import DataNotFound, InvalidValue, NotRunnable
from bnnlib.experiments import (
    PROFILES,
    PUBLISHED,
    Experiment,
    at_profile,
    build_model,
    evaluate_run,
    is_finished,
    is_guessing,
    load_run,
    prepare_data,
    published,
    resolve_device,
    run,
    smoke,
    stored_runs,
    stream,
)
from bnnlib.layers import binary_layers
from bnnlib.train import History

NOT_YET = ["svhn-stochastic", "cifar10-stochastic"]
BASE = smoke(published("svhn-random-labels"))
EVALUATION = smoke(published("svhn-evaluation"))


def quietly(experiment, out=None):
    return run(experiment, out, device="cpu", progress="none")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of a few seconds in its folder; tests may read it, not write."""
    return quietly(BASE, tmp_path_factory.mktemp("runs") / "base")


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of that folder, to be spoiled."""
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_seconds(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# ------------------------------------------------------------------------ what cannot run yet


@pytest.mark.parametrize("name", NOT_YET)
@pytest.mark.parametrize("profile", PROFILES)
def test_what_cannot_run_yet_says_so_in_one_line(name, profile, tmp_path):
    with pytest.raises(NotRunnable, match=f"{name} cannot run yet: .*not built yet") as caught:
        quietly(at_profile(published(name), profile), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "stochastic"},
        {"weights": "real"},  # evaluation_weights says deterministic
        {"evaluation_weights": "stochastic"},
        {"evaluation_weights": "real"},
        {"evaluation_statistics": "batch"},
    ],
)
def test_a_setting_that_would_be_ignored_is_not_run(changes):
    with pytest.raises(NotRunnable):
        quietly(replace(BASE, **changes))


# ------------------------------------------------------------------------------------ seeds


def test_same_seed_same_history_and_weights_bit_for_bit(finished):
    again = quietly(BASE)
    assert without_seconds(again.history) == without_seconds(finished.history)
    assert same_weights(again.model, finished.model)


def test_another_seed_differs_in_weights_and_order_but_not_in_the_data(finished):
    other = quietly(replace(BASE, seed=1))
    assert not same_weights(other.model, finished.model)
    assert other.history["train_loss"] != finished.history["train_loss"]
    assert all(torch.equal(other.labels[split], y) for split, y in finished.labels.items())


def test_corruption_seed_changes_the_labels_only():
    here, there = (prepare_data(replace(BASE, corruption_seed=seed)) for seed in (0, 1))
    for split in ("train", "test"):
        assert torch.equal(here[split].images, there[split].images)
        assert not torch.equal(here[split].labels, there[split].labels)
    models = [build_model(replace(BASE, corruption_seed=seed)) for seed in (0, 1)]
    assert same_weights(*models)


def test_seed_decides_the_initial_weights():
    one, same, other = (build_model(replace(BASE, seed=seed)) for seed in (0, 0, 1))
    assert same_weights(one, same)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)


def test_data_seed_draws_other_images():
    here, there = (prepare_data(replace(BASE, data_seed=seed))["train"] for seed in (0, 1))
    assert not torch.equal(here.images, there.images)
    assert torch.equal(here.labels, there.labels)  # random, by another seed


def test_streams_differ_by_seed_and_purpose_and_fit_a_generator():
    seeds = [stream(seed, purpose) for seed in range(5) for purpose in ("a", "b", "labels train")]
    assert len(set(seeds)) == 15
    assert seeds == [stream(s, p) for s in range(5) for p in ("a", "b", "labels train")]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_run_leaves_pytorchs_global_generator_alone():
    before = torch.get_rng_state()
    quietly(smoke(published("svhn-dropout")))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_l2_penalty_as_coded_changes_no_weight(finished):
    experiment = smoke(published("svhn-l2"))
    assert experiment.l2 == 5e-4
    assert same_weights(quietly(experiment).model, finished.model)


def test_dropout_does_change_the_weights(finished):
    dropped = quietly(smoke(published("svhn-dropout")))
    assert not torch.equal(dropped.model.dense3.weight, finished.model.dense3.weight)


# ----------------------------------------------------------------------- preparing the data


@pytest.mark.parametrize(
    ("changes", "corrupted"),
    [
        ({}, {"train": 1, "valid": 1, "test": 1}),
        ({"random_label_splits": ("train", "valid")}, {"train": 1, "valid": 1, "test": 0}),
        ({"random_labels": 0.0}, {"train": 0, "valid": 0, "test": 0}),
        (
            {"gaussian_variance": 0.1, "random_label_splits": ("test",)},
            {"train": 1, "valid": 0, "test": 1},
        ),
        ({"gaussian_variance": 0.1}, {"train": 2, "valid": 1, "test": 1}),
    ],
)
def test_only_the_named_splits_are_corrupted(changes, corrupted):
    sets = prepare_data(replace(BASE, n_valid=20, **changes))
    assert {split: len(data.provenance) for split, data in sets.items()} == corrupted


def test_gaussian_inputs_keep_the_true_labels():
    true = prepare_data(replace(BASE, random_labels=0.0))
    sets = prepare_data(replace(smoke(published("cifar10-gaussian-inputs")), dataset="glyphs"))
    assert sets["train"].images.dtype == torch.float32
    assert sets["train"].images.std().item() == pytest.approx(0.1**0.5, rel=0.01)
    assert sets["test"].images.dtype == torch.uint8
    for split in ("train", "test"):
        assert torch.equal(sets[split].labels, true[split].labels)


def test_labels_of_the_splits_come_from_independent_streams():
    sets = prepare_data(replace(BASE, n_train=200, n_valid=200, n_test=200))
    labels = [data.labels for data in sets.values()]
    agreement = [(a == b).double().mean() for a, b in pairwise(labels)]
    assert max(agreement) < 0.2


def test_no_more_images_are_taken_than_asked_for_or_there(tmp_path):
    images = np.zeros((30, 3, 8, 8), np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(30) % 10)
    own = replace(BASE, dataset="mine.npz", n_test=0)
    sizes = {
        n: len(prepare_data(replace(own, n_train=n), tmp_path)["train"]) for n in (7, 99, None)
    }
    assert sizes == {7: 7, 99: 30, None: 30}


def test_a_split_of_no_images_is_left_out():
    assert list(prepare_data(replace(BASE, n_valid=0, n_test=0))) == ["train"]
    assert list(prepare_data(replace(BASE, n_valid=5))) == ["train", "valid", "test"]


def test_partly_random_labels_are_the_level_asked_for():
    true, half = (prepare_data(replace(BASE, n_train=500, random_labels=r)) for r in (0.0, 0.5))
    expected = random_labels(true["train"], 0.5, seed=stream(0, "labels train"))
    assert torch.equal(half["train"].labels, expected.labels)


# ----------------------------------------------------------------------------- run and folder


def test_the_folder_holds_experiment_history_labels_and_parameters(finished):
    assert set(content(finished.folder)) == {
        "experiment.json",
        "history.csv",
        "labels.npz",
        "parameters.safetensors",
    }


def test_the_record_says_what_a_reader_must_know(finished):
    record = json.loads((finished.folder / "experiment.json").read_text())
    assert record["experiment"] == json.loads(json.dumps(asdict(BASE)))
    assert set(record["versions"]) == {"bnnlib", "python", "torch", "numpy"}
    assert record["versions"]["torch"] == torch.__version__
    assert record["images"] == {"train": 100, "test": 100}
    assert record["seconds"] > 0
    for split, data in prepare_data(BASE).items():
        assert record["label_sha256"][split] == data.label_hash()
        assert record["corruptions"][split] == list(data.provenance)
    assert {"device", "threads", "started"} <= set(record)


def test_a_run_is_read_as_it_was_kept(finished):
    loaded = load_run(finished.folder)
    assert loaded.experiment == BASE
    assert loaded.record == finished.record
    assert same_weights(loaded.model, finished.model)
    assert {split: y.tolist() for split, y in loaded.labels.items()} == {
        split: y.tolist() for split, y in finished.labels.items()
    }
    for row, kept in zip(loaded.history.rows, finished.history.rows, strict=True):
        assert row == pytest.approx(kept, rel=1e-8, nan_ok=True)
    assert evaluate_run(loaded, rows=None) == evaluate_run(finished, rows=None)


def test_a_run_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert quietly(BASE).folder is None
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_read_and_not_repeated(folder):
    before = content(folder)
    again = quietly(BASE, folder)
    assert content(folder) == before
    assert again.record["started"] == load_run(folder).record["started"]


def test_another_experiment_is_refused_with_the_fields_that_differ(folder):
    before = content(folder)
    with pytest.raises(InvalidValue) as caught:
        quietly(replace(BASE, seed=7, dropout=(0.5,)), folder)
    for text in ("holds another experiment", "seed (0 there, 7", "dropout (() there, (0.5,)"):
        assert text in str(caught.value)
    assert "width" not in str(caught.value)
    assert content(folder) == before


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {"experiment.json": "not JSON"},
        {"experiment.json": "[]"},
        {"experiment.json": '{"seconds": 3}'},
        {"history.csv": "epoch\n1\n"},
    ],
)
def test_a_folder_of_something_else_is_refused_and_untouched(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises(InvalidValue, match=tmp_path.name):
        quietly(BASE, tmp_path)
    assert content(tmp_path) == before


def test_an_unfinished_run_is_refused_and_untouched(folder):
    record = json.loads((folder / "experiment.json").read_text())
    del record["seconds"]
    (folder / "experiment.json").write_text(json.dumps(record))
    before = content(folder)
    assert not is_finished(folder)
    with pytest.raises(InvalidValue, match="no finished run"):
        quietly(BASE, folder)
    assert content(folder) == before


def test_a_file_in_the_place_of_the_folder_or_above_it_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        with pytest.raises(InvalidValue, match="file"):
            quietly(BASE, out)
    assert file.read_text() == "mine"


def test_an_empty_folder_and_a_missing_one_are_used(tmp_path):
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        if out.name == "empty":
            out.mkdir()
        assert quietly(BASE, out).folder == out
        assert is_finished(out)


def test_a_folder_without_a_run_cannot_be_loaded(tmp_path):
    assert not is_finished(tmp_path)
    with pytest.raises(DataNotFound, match=r"no experiment\.json"):
        load_run(tmp_path)


def test_a_folder_without_a_history_cannot_be_loaded(folder):
    (folder / "history.csv").unlink()
    with pytest.raises(DataNotFound, match=r"history\.csv"):
        load_run(folder)


def test_a_record_with_an_unknown_field_is_refused(folder):
    record = json.loads((folder / "experiment.json").read_text())
    record["experiment"]["epoch"] = record["experiment"].pop("epochs")
    (folder / "experiment.json").write_text(json.dumps(record))
    with pytest.raises(InvalidValue, match="'epoch'; did you mean 'epochs'"):
        load_run(folder)


def test_missing_data_leave_no_folder_behind(tmp_path):
    experiment = replace(BASE, dataset="cifar10", n_train=50, n_test=0)
    with pytest.raises(DataNotFound):
        run(experiment, tmp_path / "out", device="cpu", root=tmp_path, progress="none")
    assert not (tmp_path / "out").exists()


def test_too_few_images_for_a_batch_leave_no_folder_behind(tmp_path):
    with pytest.raises(InvalidValue, match="20 images do not fill one batch of 50"):
        quietly(replace(BASE, n_train=20), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_epochs_give_the_initial_weights(tmp_path):
    untrained = quietly(replace(BASE, epochs=0), tmp_path / "out")
    assert len(untrained.history) == 0
    assert same_weights(untrained.model, build_model(BASE))
    assert len(load_run(tmp_path / "out").history) == 0


@pytest.mark.parametrize("name", ["cud", "cpux", "meta"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(InvalidValue, match=f"device '{name}' cannot be used here"):
        resolve_device(name)


def test_device_auto_is_one_that_works():
    assert resolve_device("cpu") == torch.device("cpu")
    assert torch.zeros(2, device=resolve_device("auto")).sum() == 0


def test_the_twin_and_the_other_profile_run_too():
    twin = quietly(replace(BASE, binary=False, activation="binary_sigmoid"))
    assert binary_layers(twin.model) == []
    assert len(twin.history) == 2


# --------------------------------------------------------------------- evaluating a memorizer


def test_all_rows_give_the_training_error_of_the_last_epoch(finished):
    assert evaluate_run(finished, rows=None) == finished.history.last("train_error")
    assert evaluate_run(finished) == finished.history.last("train_error")  # fewer than 7,000


def test_the_first_rows_are_evaluated(finished):
    wrong = [rows * evaluate_run(finished, rows) for rows in range(1, 101)]
    assert wrong == pytest.approx([round(count) for count in wrong])
    assert {round(b - a) for a, b in pairwise(wrong)} == {0, 1}  # one more row, right or wrong
    assert round(wrong[-1]) == round(100 * finished.history.last("train_error"))


def test_evaluation_leaves_the_run_as_it_is(folder):
    evaluated = load_run(folder)
    evaluate_run(evaluated, rows=10)
    assert same_weights(evaluated.model, load_run(folder).model)
    assert evaluated.model.training


def test_altered_labels_are_refused(folder):
    altered = load_run(folder)
    altered.labels["train"][0] = (altered.labels["train"][0] + 1) % 10
    with pytest.raises(InvalidValue, match="not those it was trained on"):
        evaluate_run(altered)


@pytest.mark.parametrize("file", ["parameters.safetensors", "labels.npz"])
def test_a_run_that_kept_only_its_history_cannot_be_evaluated(folder, file):
    (folder / file).unlink()
    with pytest.raises(InvalidValue, match="kept its parameters and labels"):
        evaluate_run(load_run(folder))


def test_the_evaluation_is_an_experiment_too(finished, tmp_path):
    experiment = replace(EVALUATION, run_folder=str(finished.folder))
    result = quietly(experiment, tmp_path / "out")
    assert result.history["train_error"] == finished.history["train_error"][-1:]
    assert result.history["epoch"] == [2]
    assert is_finished(tmp_path / "out")
    before = content(tmp_path / "out")
    assert quietly(experiment, tmp_path / "out").experiment == experiment
    assert content(tmp_path / "out") == before


def test_the_evaluation_needs_the_folder_of_a_run(tmp_path):
    with pytest.raises(InvalidValue, match="svhn-random-labels; name its folder"):
        quietly(EVALUATION)
    with pytest.raises(DataNotFound, match="holds no run"):
        quietly(replace(EVALUATION, run_folder=str(tmp_path)))


def test_the_evaluation_takes_no_run_of_another_experiment(tmp_path):
    quietly(smoke(published("svhn-dropout")), tmp_path / "dropout")
    with pytest.raises(InvalidValue, match="svhn-dropout"):
        quietly(replace(EVALUATION, run_folder=str(tmp_path / "dropout")))


# ----------------------------------------------------------------------------- stored results


@pytest.mark.parametrize(("error", "guessing"), [(0.9, True), (0.79, True), (0.77, False)])
def test_a_guess_is_wrong_nine_times_in_ten_within_four_standard_deviations(
    finished, error, guessing
):
    history = History([{"test_error": error}])  # 100 images: one standard deviation is 3 points
    assert is_guessing(replace(finished, history=history)) is guessing


def test_finished_runs_are_found_by_name_and_unfinished_ones_passed_over(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "experiment.json").write_text('{"experiment": {}}')
    found = stored_runs(root=tmp_path)
    assert [r.folder for r in found] == [folder]
    assert len(stored_runs("svhn-random-labels", tmp_path)) == 1
    assert stored_runs("cifar10-dropout", tmp_path) == []
    assert stored_runs(root=tmp_path / "nowhere") == []


STORED = stored_runs()
each_stored = pytest.mark.parametrize("kept", STORED, ids=lambda kept: str(kept.folder.name))


@each_stored
def test_a_stored_run_is_whole(kept):
    assert isinstance(kept.experiment, Experiment)
    assert kept.experiment.name in PUBLISHED
    assert kept.history["epoch"] == list(range(1, kept.experiment.epochs + 1))
    assert 0 <= kept.history.last("train_error") <= 1
    assert kept.record["seconds"] == pytest.approx(sum(kept.history["seconds"]), abs=1)
    assert all(len(value) == 64 for value in kept.record["label_sha256"].values())


@each_stored
@pytest.mark.skipif(not os.environ.get("BNNLIB_DATA"), reason="BNNLIB_DATA names no data folder")
def test_the_labels_of_a_stored_run_can_be_made_again(kept):
    try:
        sets = prepare_data(kept.experiment)
    except DataNotFound as error:
        pytest.skip(str(error))
    hashes = {split: data.label_hash() for split, data in sets.items()}
    assert hashes == kept.record["label_sha256"]
