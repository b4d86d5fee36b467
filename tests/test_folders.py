"""What a run leaves in its folder, how it is found and read again, and what is refused there."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import bnnlib.folders
from benchmarks.mutations import EXPERIMENT, make_specimens
from bnnlib.errors import BnnlibWarning, DamagedFile, DataNotFound, FolderInUse, InvalidValue
from bnnlib.experiments import evaluate_run, run
from bnnlib.files import LOCK
from bnnlib.folders import (
    HISTORY,
    LABELS,
    PARAMETERS,
    RECORD,
    check_folder,
    is_finished,
    load_run,
    stored_runs,
)
from bnnlib.runs import parameter_hash

posix = pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")


@pytest.fixture(scope="module")
def specimens(tmp_path_factory):
    return make_specimens(tmp_path_factory.mktemp("specimens"))


@pytest.fixture
def folder(specimens, tmp_path):
    """A finished run, to be spoiled."""
    return Path(shutil.copytree(specimens[0], tmp_path / "finished"))


@pytest.fixture
def unfinished(specimens, tmp_path):
    """A run that was stopped, to be spoiled."""
    return Path(shutil.copytree(specimens[1], tmp_path / "unfinished"))


def go_on(folder, experiment=EXPERIMENT):
    return run(experiment, folder, device="cpu", progress="none")


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def edit(folder, **changes):
    """Change the record of a run; None removes an entry."""
    record = json.loads((folder / RECORD).read_text())
    record = {k: v for k, v in (record | changes).items() if v is not None}
    (folder / RECORD).write_text(json.dumps(record))


def experiment_in(folder):
    return json.loads((folder / RECORD).read_text())["experiment"]


def same_weights(one, other):
    return parameter_hash(one) == parameter_hash(other)


# -------------------------------------------------------------------------- reading it again


def test_a_run_is_read_as_it_was_kept(finished):
    loaded = load_run(finished.folder)
    assert loaded.experiment == finished.experiment
    assert loaded.record == finished.record
    assert same_weights(loaded.model, finished.model)
    assert {split: y.tolist() for split, y in loaded.labels.items()} == {
        split: y.tolist() for split, y in finished.labels.items()
    }
    for row, kept in zip(loaded.history.rows, finished.history.rows, strict=True):
        assert row == pytest.approx(kept, rel=1e-8, nan_ok=True)
    assert evaluate_run(loaded, rows=None) == evaluate_run(finished, rows=None)


def test_a_folder_without_a_run_cannot_be_loaded(tmp_path):
    assert not is_finished(tmp_path)
    with pytest.raises(DataNotFound, match=r"no experiment\.json"):
        load_run(tmp_path)


def test_a_folder_without_a_history_cannot_be_loaded(folder):
    (folder / HISTORY).unlink()
    with pytest.raises(DataNotFound, match=r"there is no history\.csv in it"):
        load_run(folder)


def test_an_unfinished_run_can_be_looked_at(unfinished):
    assert not is_finished(unfinished)
    found = load_run(unfinished)
    assert found.history["epoch"] == [1]
    assert found.model is None
    assert found.labels["train"].shape == (60,)


def test_finished_runs_are_found_by_name_and_unfinished_ones_passed_over(folder, unfinished):
    root = folder.parent
    assert [r.folder for r in stored_runs(root=root)] == [folder]
    assert len(stored_runs("capacity", root)) == 1
    assert stored_runs("cifar10-dropout", root) == []


def test_a_folder_of_stored_runs_that_is_not_there_is_named(tmp_path):
    assert stored_runs(root=tmp_path) == []
    with pytest.raises(DataNotFound, match=f"no folder {tmp_path / 'nowhere'} to look for"):
        stored_runs(root=tmp_path / "nowhere")


def test_a_run_of_an_earlier_version_has_no_format_and_fewer_hashes(folder):
    edit(folder, format=None, history_sha256=None, trained_on=None)
    assert load_run(folder).record.keys() == json.loads((folder / RECORD).read_text()).keys() - {
        "experiment"
    }


def test_line_ends_may_change_on_the_way(folder):
    lines = (folder / HISTORY).read_bytes().replace(b"\r\n", b"\n")
    (folder / HISTORY).write_bytes(lines)
    assert len(load_run(folder).history) == EXPERIMENT.epochs


def test_what_this_version_does_not_know_is_left_out(folder):
    edit(folder, later={"a": [1]})
    assert "later" not in load_run(folder).record


# --------------------------------------------------------------------- what was changed by hand


@pytest.mark.parametrize("later", [2, 0, "1", True, 1.0, 10**30])
def test_another_format_is_refused(later, folder):
    edit(folder, format=later)
    with pytest.raises(DamagedFile, match=f"has format '?{later}'?; this bnnlib reads formats 1"):
        load_run(folder)


WRONG_RECORDS = {
    "experiment": [None, [], "capacity"],
    "experiment_sha256": [None, 7],
    "versions": [None, {"torch": 2}, ["2.0"]],
    "device": [None, 5, "a\nb", "x" * 1001],
    "threads": [None, -1, 1.5, True],
    "started": [None, {}],
    "images": [None, {}, {"train": -1}, {"train": 0}, {"train": 60, "other": 1}],
    "corruptions": [None, {"train": "all"}],
    "image_sha256": [None, {"test": "0"}],
    "label_sha256": [None, {"train": None}],
    "trained_on": [7, "a\nb"],
    "parameter_sha256": [7],
    "history_sha256": [[]],
    "seconds": [-1, "1", 1e300],
    "continued": [{}, [{}], [{"threads": 1}]],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in WRONG_RECORDS for value in WRONG_RECORDS[name]]
)
def test_a_record_with_a_wrong_entry_is_refused_by_its_name(name, value, folder):
    edit(folder, **{name: value})
    for read in (load_run, is_finished, go_on):
        with pytest.raises(DamagedFile, match=f"json describes no run: its '{name}' is ") as caught:
            read(folder)
        assert str(caught.value).isprintable()


def test_a_record_with_an_unknown_field_is_refused(folder):
    values = experiment_in(folder)
    values["epoch"] = values.pop("epochs")
    edit(folder, experiment=values)
    with pytest.raises(DamagedFile, match=r"experiment\.json describes no experiment.*'epoch'"):
        load_run(folder)


ABSURD_FIELDS = {
    "epochs": 10**12,
    "width": 1e9,
    "name": "../../x",
    "dropout": [[0.5]],
    "n_train": "all",
    "self": 1,
}


@pytest.mark.parametrize(("field", "value"), ABSURD_FIELDS.items())
def test_a_record_of_an_absurd_experiment_is_refused_by_field(field, value, folder):
    edit(folder, experiment=experiment_in(folder) | {field: value})
    for read in (load_run, go_on):
        with pytest.raises(DamagedFile, match=f"describes no experiment: .*{field}"):
            read(folder)


def test_paths_in_a_record_are_not_followed_when_it_is_read(folder, monkeypatch):
    outside = folder.parent / "outside.npz"
    outside.write_bytes(b"no arrays")
    values = experiment_in(folder) | {"dataset": "../outside.npz"}
    sha = replace(EXPERIMENT, dataset="../outside.npz").digest()
    edit(folder, experiment=values, experiment_sha256=sha)
    monkeypatch.chdir(folder)
    loaded = load_run(folder)
    assert loaded.experiment.dataset == "../outside.npz"
    with pytest.raises(DamagedFile, match=r"outside\.npz"):  # read now, as arrays only
        evaluate_run(loaded)
    assert outside.read_bytes() == b"no arrays"


def spoil(path, old, new):
    found = path.read_bytes()
    assert old in found
    path.write_bytes(found.replace(old, new, 1))


def test_an_experiment_edited_by_hand_is_refused(folder):
    spoil(folder / RECORD, b'"seed": 0', b'"seed": 1')
    with pytest.raises(DamagedFile, match=r"experiment\.json is not as the run left it: its SHA"):
        load_run(folder)


def test_a_history_edited_by_hand_is_refused(folder):
    lines = (folder / HISTORY).read_text().splitlines()
    better = [*lines[:-1], lines[-1].replace(lines[-1].split(",")[4], "0.5")]
    for changed in (better, lines[:-1], [lines[0], *lines[2:]]):
        assert changed != lines
        (folder / HISTORY).write_text("\n".join(changed) + "\n")
        with pytest.raises(DamagedFile, match=r"history\.csv is not as the run left it"):
            load_run(folder)


def test_parameters_of_which_one_bit_differs_are_refused(folder):
    path = folder / PARAMETERS
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    with pytest.raises(DamagedFile, match=r"parameters\.safetensors is not as the run left it"):
        load_run(folder)


def test_parameters_without_a_recorded_hash_are_not_used(folder):
    edit(folder, parameter_sha256=None)
    assert load_run(folder).model is None


def labels_in(folder, **changes):
    with np.load(folder / LABELS) as file:
        arrays = dict(file)
    np.savez(folder / LABELS, **{k: v for k, v in (arrays | changes).items() if v is not None})


WRONG_LABELS = {
    "other labels": ({"train": np.zeros(60, np.int64)}, "is not as the run left it"),
    "too few": ({"train": np.zeros(59, np.int64)}, r"train must be int64 \(60,\), is int64 \(59,"),
    "another type": ({"test": np.zeros(50)}, r"test must be int64 \(50,\), is float64 \(50,"),
    "a split too few": ({"test": None}, r"holds \['train'\], not the splits of its run"),
    "a split too many": ({"\x1b[2J": np.zeros(1)}, r"name|holds"),
}


@pytest.mark.parametrize(("changes", "reason"), WRONG_LABELS.values(), ids=WRONG_LABELS)
def test_labels_that_are_not_those_of_the_run_are_refused(changes, reason, folder):
    labels_in(folder, **changes)
    with pytest.raises(DamagedFile, match=rf"labels\.npz.*({reason})") as caught:
        load_run(folder)
    assert str(caught.value).isprintable()


# ---------------------------------------------------------------------- what lies in the way


def test_another_experiment_is_refused_with_the_fields_that_differ(folder):
    before = content(folder)
    with pytest.raises(InvalidValue) as caught:
        check_folder(folder, replace(EXPERIMENT, seed=7, dropout=(0.5,), summary="in my words"))
    assert str(caught.value) == (
        f"{folder} holds another experiment: dropout (() there, (0.5,) asked for), "
        "seed (0 there, 7 asked for); choose another folder (--out FOLDER, or out=)"
    )
    assert content(folder) == before


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {RECORD: "not JSON"},
        {RECORD: "[]"},
        {RECORD: '{"seconds": 3}'},
        {HISTORY: "epoch\n1\n"},
        {LOCK: "", "notes.txt": "mine"},
    ],
)
def test_a_folder_of_something_else_is_refused_and_untouched(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises((DamagedFile, FolderInUse), match=tmp_path.name):
        go_on(tmp_path)
    assert content(tmp_path) == before


def test_what_a_false_start_left_is_no_obstacle(tmp_path):
    (tmp_path / LOCK).touch()
    (tmp_path / f"{RECORD}.part").write_text("half")
    go_on(tmp_path)
    assert is_finished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {RECORD, HISTORY, LABELS, PARAMETERS}


@posix
@pytest.mark.parametrize("name", [RECORD, HISTORY, LABELS, PARAMETERS, f"{HISTORY}.part", LOCK])
def test_a_link_among_the_files_of_a_run_is_refused_and_not_followed(name, unfinished):
    outside = unfinished.parent / "outside"
    outside.mkdir()
    there = unfinished / name
    if there.exists():
        shutil.move(there, outside / name)
    (outside / name).touch()
    there.symlink_to(outside / name)
    before = content(unfinished), content(outside)
    with pytest.raises(DamagedFile, match=f"holds links, which bnnlib never makes; .*{name}"):
        go_on(unfinished)
    assert (content(unfinished), content(outside)) == before


@posix
def test_a_folder_of_states_that_is_a_link_is_refused_and_not_emptied(unfinished):
    outside = unfinished.parent / "outside"
    shutil.move(unfinished / "checkpoints", outside)
    (unfinished / "checkpoints").symlink_to(outside)
    before = content(outside)
    with pytest.raises(DamagedFile, match=r"holds links, .*checkpoints"):
        go_on(unfinished)
    assert content(outside) == before


@posix
def test_links_and_folders_among_the_states_are_passed_over(unfinished):
    (state,) = (unfinished / "checkpoints").iterdir()
    outside = unfinished.parent / "outside"
    shutil.move(state, outside)
    state.symlink_to(outside)
    (state.parent / "checkpoint-999999999-0123456789abcdef.safetensors").mkdir()
    before = outside.read_bytes()
    go_on(unfinished)
    assert is_finished(unfinished)
    assert outside.read_bytes() == before
    assert len(list(state.parent.iterdir())) == 2  # what bnnlib did not make stays


def test_a_file_in_the_place_of_the_states_is_refused_before_the_first_step(unfinished):
    shutil.rmtree(unfinished / "checkpoints")
    (unfinished / "checkpoints").write_text("mine")
    with pytest.raises(DamagedFile, match="checkpoints is a link or a file, not a folder"):
        go_on(unfinished)
    assert (unfinished / "checkpoints").read_text() == "mine"


@posix
def test_a_link_to_nowhere_is_no_folder(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FolderInUse, match="out is not a folder; choose another"):
        go_on(tmp_path / "out")
    assert not (tmp_path / "nowhere").exists()


# ------------------------------------------------------------------------------- going on


def test_a_run_that_goes_on_keeps_the_record_of_its_beginning(unfinished, specimens):
    begun = json.loads((unfinished / RECORD).read_text())
    edit(unfinished, threads=7, later="unknown", started="long ago")
    with pytest.warns(BnnlibWarning, match="other surroundings.*threads 7 then, 1 now") as caught:
        go_on(unfinished)
    assert len(caught) == 1
    record = json.loads((unfinished / RECORD).read_text())
    assert (record["threads"], record["started"]) == (7, "long ago")
    (again,) = record["continued"]
    assert again["threads"] == torch.get_num_threads()
    assert again["versions"] == begun["versions"]
    assert "later" not in record
    assert same_weights(load_run(unfinished).model, load_run(specimens[0]).model)


@pytest.mark.parametrize("name", ["images", "image_sha256", "label_sha256"])
def test_a_run_begun_with_other_data_is_not_continued(name, unfinished):
    there = json.loads((unfinished / RECORD).read_text())[name]
    edit(unfinished, **{name: there | {"train": 61 if name == "images" else "0" * 64}})
    before = content(unfinished)
    with pytest.raises(InvalidValue, match=f"was begun with other data: its {name} is "):
        go_on(unfinished)
    assert content(unfinished) == before


def test_damaged_labels_of_an_unfinished_run_are_written_again(unfinished, specimens):
    (unfinished / LABELS).write_bytes(b"damaged")
    go_on(unfinished)
    found, whole = load_run(unfinished).labels, load_run(specimens[0]).labels
    assert all(torch.equal(found[split], whole[split]) for split in whole)


def test_a_lock_that_cannot_be_deleted_does_not_spoil_a_finished_run(tmp_path, monkeypatch):
    unlink = Path.unlink

    def held(path, *args, **kwargs):
        if path.name == LOCK:
            raise PermissionError(13, "another process has it")
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(bnnlib.folders.Path, "unlink", held)
    go_on(tmp_path / "out")
    assert is_finished(tmp_path / "out")
