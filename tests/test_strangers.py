"""Files from a stranger: whatever a folder holds, reading it works or is refused, no more."""

import json
import os
import pickle
import shutil
import socket
import struct
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.mutations import (
    EXPERIMENT,
    Harm,
    Watch,
    count_outcomes,
    make_specimens,
    mutations,
    name_by_content,
    outcome,
)
from bnnlib.catalogue import Experiment
from bnnlib.errors import DamagedFile, InvalidValue
from bnnlib.experiments import load_run, run
from bnnlib.folders import HISTORY, LABELS, PARAMETERS, RECORD

CHECKPOINT = "checkpoint"
FILES = [
    ("finished", RECORD),
    ("finished", HISTORY),
    ("finished", LABELS),
    ("finished", PARAMETERS),
    ("unfinished", RECORD),
    ("unfinished", HISTORY),
    ("unfinished", LABELS),
    ("unfinished", CHECKPOINT),
]


def examples(count):
    """The same so many each time, however long they take."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module")
def specimens(tmp_path_factory):
    return {path.name: path for path in make_specimens(tmp_path_factory.mktemp("specimens"))}


@pytest.fixture
def specimen(specimens):
    """Finds a run by its name, and one of its files."""

    def find(kind, name):
        folder = specimens[kind]
        if name != CHECKPOINT:
            return folder, name
        (path,) = folder.glob("checkpoints/*.safetensors")
        return folder, str(path.relative_to(folder))

    return find


# ------------------------------------------------------------------------------ blind damage


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_damaged_file_is_refused_or_harmless(kind, name, specimen, tmp_path):
    folder, name = specimen(kind, name)
    contents = mutations((folder / name).read_bytes(), 20, seed=0)
    counts = count_outcomes(folder, name, contents, tmp_path)
    assert counts.total() == 20
    assert counts["refused"] > 5


def test_mutations_are_as_many_as_asked_for_all_damaged_and_the_same_again():
    content = bytes(range(200))
    made = list(mutations(content, 50, seed=3))
    assert len(made) == 50
    assert content not in made
    assert made == list(mutations(content, 50, seed=3)) != list(mutations(content, 50, seed=4))
    assert len(list(mutations(b"", 5, seed=0))) == 5


# --------------------------------------------------------------------------- skilful damage

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from([10**12, 2**63, -1, 1e308, 10**30, "../../x", "/etc/passwd", "a\x1b[2J\n"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=4,
)


def places(value, path=()):
    """The path to every value in a JSON value, but for the whole."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children:
        yield (*path, key)
        if isinstance(child, dict | list):
            yield from places(child, (*path, key))


def changed(draw, value):
    """`value` with one of the values in it removed, renamed or replaced by another."""
    value = json.loads(json.dumps(value))
    *path, key = draw(st.sampled_from(list(places(value))))
    parent = value
    for step in path:
        parent = parent[step]
    kind = draw(st.sampled_from(["replace"] * 4 + ["remove", "rename"]))
    old = parent.pop(key)
    if kind == "replace":
        new = draw(JSON)
        parent.insert(key, new) if isinstance(parent, list) else parent.update({key: new})
    elif kind == "rename" and isinstance(parent, dict):
        parent[draw(st.text(max_size=9) | st.sampled_from(["self", "format"]))] = old
    return value


def with_its_own_hash(record):
    """A record whose hash is that of its experiment, where that is one."""
    try:
        return record | {"experiment_sha256": Experiment(**record["experiment"]).digest()}
    except (InvalidValue, LookupError, TypeError):
        return record


@pytest.mark.parametrize("kind", ["finished", "unfinished"])
def test_any_value_in_a_record_is_refused_or_harmless(kind, specimen, tmp_path):
    folder, name = specimen(kind, RECORD)
    record, watch = json.loads((folder / name).read_text()), Watch(tmp_path / "run")

    @examples(80)
    @given(st.data())
    def check(data):
        content = json.dumps(with_its_own_hash(changed(data.draw, record))).encode()
        outcome(folder, name, content, tmp_path, watch)

    check()


def split_tensors(content):
    """Header and data of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join_tensors(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(("kind", "name"), [("finished", PARAMETERS), ("unfinished", CHECKPOINT)])
def test_any_value_in_the_header_of_tensors_is_refused_or_harmless(kind, name, specimen, tmp_path):
    folder, name = specimen(kind, name)
    header, data = split_tensors((folder / name).read_bytes())
    watch = Watch(tmp_path / "run")

    @examples(60)
    @given(st.data())
    def check(draws):
        content = join_tensors(changed(draws.draw, header), data)
        outcome(folder, name, content, tmp_path, watch)

    check()


def test_any_value_in_what_a_checkpoint_says_is_refused_or_harmless(specimen, tmp_path):
    folder, name = specimen("unfinished", CHECKPOINT)
    header, data = split_tensors((folder / name).read_bytes())
    about, watch = json.loads(header["__metadata__"]["bnnlib"]), Watch(tmp_path / "run")

    @examples(60)
    @given(st.data())
    def check(draws):
        header["__metadata__"]["bnnlib"] = json.dumps(changed(draws.draw, about))
        outcome(folder, name, join_tensors(header, data), tmp_path, watch)

    check()


WRONG_STATES = {
    "format": 2,
    "experiment_sha256": None,
    "steps": -1,
    "seconds": 1e300,
    "updates": [1.5],
    "columns": ["epoch", "epoch"],
    "epochs": True,
}


@pytest.mark.parametrize(("entry", "value"), WRONG_STATES.items())
def test_a_checkpoint_with_a_wrong_entry_is_refused_by_its_name(entry, value, specimen, tmp_path):
    folder, name = specimen("unfinished", CHECKPOINT)
    header, data = split_tensors((folder / name).read_bytes())
    about = json.loads(header["__metadata__"]["bnnlib"]) | {entry: value}
    header["__metadata__"]["bnnlib"] = json.dumps(about)
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    (copy / name).write_bytes(join_tensors(header, data))
    name_by_content(copy / name)
    with pytest.raises(DamagedFile, match=rf"safetensors (is no checkpoint: its|has) '?{entry}"):
        run(EXPERIMENT, copy, device="cpu", progress="none")


WRONG_CELLS = [("epoch", value) for value in (2.0, 1.5, nan, inf, -1.0)]
WRONG_CELLS += [("seconds", value) for value in (nan, inf, -1.0, 1e300)]


@pytest.mark.parametrize(("column", "value"), WRONG_CELLS)
def test_a_checkpoint_with_a_history_of_no_run_is_refused(column, value, specimen, tmp_path):
    folder, name = specimen("unfinished", CHECKPOINT)
    header, data = split_tensors((folder / name).read_bytes())
    place = json.loads(header["__metadata__"]["bnnlib"])["columns"].index(column)
    start = header["history"]["data_offsets"][0] + 8 * place
    data = data[:start] + struct.pack("<d", value) + data[start + 8 :]
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    (copy / name).write_bytes(join_tensors(header, data))
    name_by_content(copy / name)
    with pytest.raises(DamagedFile, match="row 1 of its history is not that of epoch 1"):
        run(EXPERIMENT, copy, device="cpu", progress="none")


def test_any_tensor_of_a_checkpoint_is_refused_or_harmless(specimen, tmp_path):
    folder, name = specimen("unfinished", CHECKPOINT)
    header, data = split_tensors((folder / name).read_bytes())
    watch = Watch(tmp_path / "run")
    for tensor in sorted(header.keys() - {"__metadata__"}):
        start, end = header[tensor]["data_offsets"]
        for filling in b"\xff\0" if tensor.startswith("generator") else b"\xff":
            filled = data[:start] + bytes([filling]) * (end - start) + data[end:]
            outcome(folder, name, join_tensors(header, filled), tmp_path, watch)


@pytest.mark.parametrize("cell", ["", "1e999", "-1", "x", "0.5,1", '"', "1\n2", "\x1b[2J", "٣"])
def test_any_cell_of_a_history_is_refused_or_harmless(cell, specimens, tmp_path):
    folder = Path(shutil.copytree(specimens["finished"], tmp_path / "older"))
    record = json.loads((folder / RECORD).read_text())
    del record["history_sha256"]  # as in the runs of an earlier version
    (folder / RECORD).write_text(json.dumps(record))
    lines = (folder / HISTORY).read_text().splitlines()
    watch = Watch(tmp_path / "run")
    for line in (0, 1):
        cells = lines[line].split(",")
        for column in (0, 2, len(cells) - 1):
            row = ",".join([*cells[:column], cell, *cells[column + 1 :]])
            content = "\r\n".join([*lines[:line], row, *lines[line + 1 :]]).encode()
            outcome(folder, HISTORY, content, tmp_path, watch)


# ----------------------------------------------------------------------------------- pickles


class Malice:
    """Unpickled, it makes a folder."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def pickled(path, malice):
    path.write_bytes(pickle.dumps(malice))


def saved_by_torch(path, malice):
    torch.save({"weight": torch.zeros(3), "malice": malice}, path)


def saved_by_numpy(path, malice):
    with path.open("wb") as file:
        np.savez(file, train=np.array([malice], dtype=object), test=np.zeros(50, np.int64))


@pytest.mark.parametrize("write", [pickled, saved_by_torch, saved_by_numpy])
@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_pickle_is_refused_and_not_executed(kind, name, write, specimen, tmp_path):
    folder, name = specimen(kind, name)
    write(tmp_path / "malice", Malice(tmp_path / "trace"))
    content = (tmp_path / "malice").read_bytes()
    watch = Watch(tmp_path / "run")
    assert outcome(folder, name, content, tmp_path, watch) == "refused"
    assert not (tmp_path / "trace").exists()


def test_the_malice_of_these_tests_is_real(tmp_path):
    pickle.loads(pickle.dumps(Malice(tmp_path / "trace")))
    assert (tmp_path / "trace").is_dir()


# -------------------------------------------------------------------------------- the watch

WRONGS = {
    "a file": lambda here: (here / "file").write_text("x"),
    "a file that is there": lambda here: (here / "old").open("r+").close(),
    "a deletion": lambda here: (here / "old").unlink(),
    "a renaming": lambda here: (here / "run" / "mine").rename(here / "mine"),
    "a way out": lambda here: (here / "run" / ".." / "file").write_text("x"),
    "a folder": lambda here: (here / "run2").mkdir(),
    "a link": lambda here: (here / "link").symlink_to(here),
    "a pickle": lambda here: pickle.loads(pickle.dumps(Path)),
    "a command": lambda here: os.system("true"),
    "a connection": lambda here: socket.socket().connect_ex(("127.0.0.1", 9)),
}


@pytest.mark.parametrize("wrong", WRONGS.values(), ids=WRONGS)
def test_the_watch_of_these_tests_sees_harm(wrong, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    (tmp_path / "old").write_text("x")
    watch = Watch(tmp_path / "run")
    with pytest.raises(Harm), watch:
        wrong(tmp_path)


def test_the_watch_of_these_tests_lets_read_and_lets_write_in_its_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "old").write_text("x")
    watch = Watch(tmp_path / "run")
    with watch:
        (tmp_path / "run" / "mine").write_text("y")
        (tmp_path / "old").read_text()
    (tmp_path / "elsewhere").write_text("unwatched")


# ------------------------------------------------------------------------------- no memory


def peak_memory():
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kB on Linux


ABSURD = {
    "a wide network": {"network": "cifar10", "dataset": "glyphs", "width": 64.0},
    "all epochs": {"epochs": 10**5},
    "many images": {"n_train": 10**8, "n_test": 10**8},
    "a large batch": {"n_train": 10**8, "batch_size": 10**6},
    "no number": {"width": 1e9},
}


@pytest.mark.parametrize("fields", ABSURD.values(), ids=ABSURD)
def test_an_absurd_experiment_takes_no_memory(fields, specimens, tmp_path):
    folder = Path(shutil.copytree(specimens["finished"], tmp_path / "run"))
    record = json.loads((folder / RECORD).read_text())
    record["experiment"] |= fields
    (folder / RECORD).write_text(json.dumps(with_its_own_hash(record)))
    before = peak_memory()
    if "width" in fields:
        with pytest.raises(DamagedFile, match=r"should: no conv1|width must be above 0"):
            load_run(folder)
    else:
        assert load_run(folder).experiment == replace(EXPERIMENT, **fields)
    with pytest.raises((InvalidValue, DamagedFile), match=next(iter(fields))):
        run(EXPERIMENT, folder, device="cpu", progress="none")
    assert peak_memory() - before < 100e6
