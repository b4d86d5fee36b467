"""What a run leaves in its folder, how it is found and read again, and what is refused there."""

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.mutations import EXPERIMENT, make_specimens
from bnnlib.errors import (
    BnnlibWarning,
    CannotWrite,
    DamagedFile,
    DataNotFound,
    FolderInUse,
    InvalidValue,
)
from bnnlib.files import LOCK, locked
from bnnlib.runs.evaluation import evaluate_run
from bnnlib.runs.folder import load_run
from bnnlib.runs.record import HISTORY, LABELS, PARAMETERS, RECORD, is_finished
from bnnlib.runs.result import differences
from bnnlib.runs.run import run

posix = pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
go_on = partial(run, EXPERIMENT, device="cpu", progress="none")


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


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def untouched(folder):
    """Checks that the `with` block changes no file in a folder, and makes none."""
    before = content(folder)
    yield
    assert content(folder) == before


def record_in(folder):
    return json.loads((folder / RECORD).read_text())


def edit(folder, **changes):
    """Change the record of a run; None removes an entry."""
    record = {k: v for k, v in (record_in(folder) | changes).items() if v is not None}
    (folder / RECORD).write_text(json.dumps(record))


def test_a_run_is_read_as_it_was_kept(finished):
    loaded = load_run(finished.folder)
    assert (loaded.experiment, loaded.record) == (finished.experiment, finished.record)
    assert set(differences(loaded, finished)) <= set(finished.history.columns)
    for row, kept in zip(loaded.history.rows, finished.history.rows, strict=True):
        assert row == pytest.approx(kept, rel=1e-8, nan_ok=True)
    assert evaluate_run(loaded, rows=None) == evaluate_run(finished, rows=None)


@pytest.mark.parametrize("name", [RECORD, HISTORY])
def test_a_folder_without_a_record_or_a_history_cannot_be_loaded(name, folder):
    (folder / name).unlink()
    assert is_finished(folder) is (name == HISTORY)
    with pytest.raises(DataNotFound, match=f"there is no {name} in it"):
        load_run(folder)


def test_an_unfinished_run_can_be_looked_at(unfinished):
    found = load_run(unfinished)
    assert (found.history["epoch"], found.model) == ([1], None)
    assert found.labels["train"].shape == (60,)


def test_a_run_of_another_version_may_have_fewer_hashes_more_entries_and_other_line_ends(folder):
    edit(folder, format=None, trained_on=None, later={"a": [1]})
    lines = (folder / HISTORY).read_bytes().replace(b"\r\n", b"\n")
    (folder / HISTORY).write_bytes(lines)
    loaded = load_run(folder)
    assert loaded.record.keys() == record_in(folder).keys() - {"experiment", "later"}
    assert len(loaded.history) == EXPERIMENT.epochs
    edit(folder, history_sha256=None, parameter_sha256=None)
    assert load_run(folder).model is None  # of which nobody can say whether they are its own


# --------------------------------------------------------------------- what was changed by hand


WRONG_RECORDS = {
    "format": [2, 0, "1", True],
    "experiment": [None, []],
    "experiment_sha256": [7],
    "versions": [{"torch": 2}, ["2.0"]],
    "device": [None, "a\nb", "x" * 1001],
    "threads": [-1, 1.5, True],
    "images": [{}, {"train": 60, "other": 1}],
    "corruptions": [{"train": "all"}],
    "label_sha256": [{"train": None}],
    "trained_on": [7],
    "inputs": [
        {"in_channels": 3, "image_size": 8},
        {"in_channels": 3, "image_size": 2**40, "classes": 10},
        {"in_channels": 0, "image_size": 8, "classes": 10},
        {"in_channels": 3, "image_size": 8, "classes": 2**62},
        {"in_channels": 3, "image_size": 8.0, "classes": 10},
    ],
    "history_sha256": [[]],
    "seconds": [-1, "1", 1e300],
    "cpu_seconds": [-1, "1", 1e300],
    "continued": [{}, [{"threads": 1}]],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in WRONG_RECORDS for value in WRONG_RECORDS[name]]
)
def test_a_record_with_a_wrong_entry_is_refused_by_its_name(name, value, folder):
    edit(folder, **{name: value})
    for read in (load_run, is_finished, go_on):
        with pytest.raises(DamagedFile, match=f"json (describes no run: .*|has ){name}") as caught:
            read(folder)
        assert str(caught.value).isprintable()


ABSENT = object()


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 10**12), ("dropout", [[0.5]]), ("self", 1), ("epoch", 3), ("lr_final", ABSENT)],
)
def test_a_record_of_an_absurd_experiment_is_refused_by_field(field, value, folder):
    fields = record_in(folder)["experiment"] | {field: value}
    edit(folder, experiment={k: v for k, v in fields.items() if v is not ABSENT})
    with pytest.raises(DamagedFile, match=f"describes no experiment: .*{field}"):
        load_run(folder)


def test_paths_in_a_record_are_not_followed_when_it_is_read(folder, monkeypatch):
    outside = folder.parent / "outside.npz"
    outside.write_bytes(b"no arrays")
    fields = record_in(folder)["experiment"] | {"dataset": "../outside.npz"}
    sha = replace(EXPERIMENT, dataset="../outside.npz").digest()
    edit(folder, experiment=fields, experiment_sha256=sha)
    monkeypatch.chdir(folder)
    loaded = load_run(folder)
    with pytest.raises(DamagedFile, match=r"outside\.npz"):  # read now, as arrays only
        evaluate_run(loaded)
    assert outside.read_bytes() == b"no arrays"


def without_its_last_row(text):
    return b"".join(text.splitlines(keepends=True)[:-1])


@pytest.mark.parametrize(
    ("name", "alter"),
    [
        (RECORD, lambda text: text.replace(b'"seed": 0', b'"seed": 1', 1)),
        (HISTORY, lambda text: text.replace(b"1,", b"1,9", 1)),
        (HISTORY, without_its_last_row),
        (PARAMETERS, lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    ],
)
def test_a_file_edited_by_hand_is_refused(name, alter, folder):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(alter(whole))
    assert alter(whole) != whole
    with pytest.raises(DamagedFile, match=f"{name} is not as the run left it: its SHA-256"):
        load_run(folder)


WRONG_LABELS = {
    "other labels": ({"train": np.zeros(60, np.int64)}, "is not as the run left it"),
    "too few": ({"train": np.zeros(59, np.int64)}, r"train must be int64 \(60,\), is int64 \(59,"),
    "another type": ({"test": np.zeros(50)}, r"test must be int64 \(50,\), is float64 \(50,"),
    "a split too few": ({"test": None}, r"holds \['train'\], not the splits of its run"),
}


@pytest.mark.parametrize(("changes", "reason"), WRONG_LABELS.values(), ids=WRONG_LABELS)
def test_labels_that_are_not_those_of_the_run_are_refused(changes, reason, folder):
    with np.load(folder / LABELS) as file:
        arrays = dict(file) | changes
    np.savez(folder / LABELS, **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(DamagedFile, match=rf"labels\.npz.*{reason}"):
        load_run(folder)


# ---------------------------------------------------------------------- what lies in the way


def test_a_finished_run_is_read_and_left_alone(folder, monkeypatch):
    monkeypatch.setattr("bnnlib.runs.run.fit", None)
    with untouched(folder):
        assert differences(go_on(folder), load_run(folder)) == []


def test_another_experiment_is_refused_with_the_fields_that_differ(unfinished):
    other = replace(EXPERIMENT, seed=7, dropout=(0.5,), summary="in my words")
    with untouched(unfinished), pytest.raises(InvalidValue) as caught:
        run(other, unfinished, device="cpu", progress="none")
    assert str(caught.value) == (
        f"{unfinished} holds another experiment: dropout (() there, (0.5,) asked for), "
        "seed (0 there, 7 asked for); choose another folder (--out FOLDER, or out=)"
    )


@pytest.mark.parametrize(
    ("name", "text"), [("notes.txt", "mine"), (RECORD, "[]"), (HISTORY, "epoch\n1\n")]
)
def test_a_folder_of_something_else_is_refused_and_untouched(name, text, tmp_path):
    (tmp_path / LOCK).touch()
    (tmp_path / name).write_text(text)
    refusal = pytest.raises((DamagedFile, FolderInUse), match=tmp_path.name)
    with untouched(tmp_path), refusal:
        go_on(tmp_path)


@pytest.mark.parametrize("left", [[], [LOCK, f"{RECORD}.part"], None])
def test_a_new_or_empty_folder_and_what_a_false_start_left_are_no_obstacle(left, tmp_path):
    out = tmp_path / "new" / "one" if left is None else tmp_path
    for name in left or ():
        (out / name).write_text("half")
    assert go_on(out).folder == out
    assert is_finished(out)
    assert {path.name for path in out.iterdir()} == {RECORD, HISTORY, LABELS, PARAMETERS}


@pytest.mark.parametrize(("place", "error"), [("", FolderInUse), ("below", CannotWrite)])
def test_a_file_in_the_place_of_the_folder_or_above_it_is_refused(place, error, tmp_path):
    (tmp_path / "file").write_text("mine")
    with untouched(tmp_path), pytest.raises(error, match=r"file is not a folder|below cannot be "):
        go_on(tmp_path / "file" / place)


def test_a_file_in_the_place_of_the_states_is_named_and_left_alone(unfinished):
    shutil.rmtree(unfinished / "checkpoints")
    (unfinished / "checkpoints").write_text("mine")
    with pytest.raises(DamagedFile, match="checkpoints is not a folder; remove it"):
        go_on(unfinished)  # at once, not at the first save
    assert (unfinished / "checkpoints").read_text() == "mine"


def test_a_folder_that_another_process_writes_to_is_refused_and_untouched(unfinished):
    refusal = pytest.raises(FolderInUse, match="another process is writing to")
    with locked(unfinished), untouched(unfinished), refusal:
        go_on(unfinished)


@posix
@pytest.mark.parametrize("name", [RECORD, HISTORY, f"{HISTORY}.part", LOCK, "checkpoints"])
def test_a_link_among_the_files_of_a_run_is_refused_and_not_followed(name, unfinished):
    outside, there = unfinished.parent / "outside", unfinished / name
    outside.mkdir()
    shutil.move(there, outside / name) if there.exists() else (outside / name).touch()
    there.symlink_to(outside / name)
    refusal = pytest.raises(DamagedFile, match=f"holds links, which bnnlib never makes; .*{name}")
    with untouched(unfinished), untouched(outside), refusal:
        go_on(unfinished)


@posix
def test_a_link_to_nowhere_is_no_folder(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FolderInUse, match="out is not a folder; choose another"):
        go_on(tmp_path / "out")
    assert not (tmp_path / "nowhere").exists()


# ------------------------------------------------------------------------------- going on


def test_a_run_that_goes_on_keeps_the_record_of_its_beginning(unfinished, specimens):
    begun = record_in(unfinished)
    here = {name: begun[name] for name in ("versions", "device", "threads", "started")}
    edit(unfinished, threads=7, later="unknown", started="long ago", continued=[here])
    with pytest.warns(BnnlibWarning, match="other surroundings.*threads 7 then, 1 now") as caught:
        ended = go_on(unfinished)
    assert len(caught) == 1
    record = record_in(unfinished)
    assert (record["threads"], record["started"]) == (7, "long ago")
    first, again = record["continued"]
    assert first == here
    assert again == here | {"started": again["started"], "threads": torch.get_num_threads()}
    assert "later" not in record
    assert load_run(unfinished).record == ended.record
    assert differences(load_run(unfinished), load_run(specimens[0])) == []


@pytest.mark.parametrize("name", ["images", "image_sha256", "label_sha256"])
def test_a_run_begun_with_other_data_is_not_continued(name, unfinished):
    there = record_in(unfinished)[name]
    edit(unfinished, **{name: there | {"train": 61 if name == "images" else "0" * 64}})
    refusal = pytest.raises(InvalidValue, match=f"was begun with other data: its {name} is ")
    with untouched(unfinished), refusal:
        go_on(unfinished)


def test_damaged_labels_of_an_unfinished_run_are_written_again(unfinished, specimens):
    (unfinished / LABELS).write_bytes(b"damaged")
    go_on(unfinished)
    assert differences(load_run(unfinished), load_run(specimens[0])) == []


def test_a_lock_that_cannot_be_deleted_does_not_spoil_a_finished_run(tmp_path, monkeypatch):
    unlink = Path.unlink

    def held(path, *args, **kwargs):
        if path.name == LOCK:
            raise PermissionError(13, "another process has it")
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", held)
    go_on(tmp_path / "out")
    assert is_finished(tmp_path / "out")
