"""Files from a stranger: whatever a folder holds, reading it works or is refused, no more."""

import io
import json
import os
import pickle
import shutil
import socket
import struct
from math import nan
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
from bnnlib.errors import DamagedFile, InvalidValue
from bnnlib.experiments.experiment import Experiment
from bnnlib.runs.folder import load_run
from bnnlib.runs.record import HISTORY, LABELS, PARAMETERS, RECORD
from bnnlib.runs.run import run

CHECKPOINT = "checkpoints/*.safetensors"
FILES = [
    *[("finished", name) for name in (RECORD, HISTORY, LABELS, PARAMETERS)],
    *[("unfinished", name) for name in (RECORD, HISTORY, LABELS, CHECKPOINT)],
]


@pytest.fixture(scope="module")
def specimens(tmp_path_factory):
    return {path.name: path for path in make_specimens(tmp_path_factory.mktemp("specimens"))}


@pytest.fixture
def specimen(specimens):
    """Finds a run by its name, and the name of one of its files by a pattern."""

    def find(kind, pattern):
        (path,) = specimens[kind].glob(pattern)
        return specimens[kind], str(path.relative_to(specimens[kind]))

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
    made, again, others = (list(mutations(content, 50, seed)) for seed in (3, 3, 4))
    assert len(made) == 50
    assert content not in made
    assert made == again != others


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


def try_changes(value, count, contents, folder, name, workshop):
    """Read a run whose file has each of so many changes of a value in it, the same every time."""
    watch = Watch(workshop / "run")

    @settings(max_examples=count, derandomize=True, deadline=None, database=None)
    @given(st.data())
    def check(data):
        outcome(folder, name, contents(changed(data.draw, value)), workshop, watch)

    check()


@pytest.mark.parametrize("kind", ["finished", "unfinished"])
def test_any_value_in_a_record_is_refused_or_harmless(kind, specimen, tmp_path):
    folder, name = specimen(kind, RECORD)
    record = json.loads((folder / name).read_text())

    def contents(changed_record):
        return json.dumps(with_its_own_hash(changed_record)).encode()

    try_changes(record, 80, contents, folder, name, tmp_path)


def split_tensors(path):
    """Header, data, and what a checkpoint says in its header, of a safetensors file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    about = json.loads(header.get("__metadata__", {}).get("bnnlib", "{}"))
    return header, content[8 + size :], about


def join_tensors(header, data, about=None):
    if about is not None:
        header = header | {"__metadata__": {"bnnlib": json.dumps(about)}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(("kind", "name"), [("finished", PARAMETERS), ("unfinished", CHECKPOINT)])
def test_any_value_in_the_header_of_tensors_is_refused_or_harmless(kind, name, specimen, tmp_path):
    folder, name = specimen(kind, name)
    header, data, _ = split_tensors(folder / name)
    try_changes(header, 60, lambda new: join_tensors(new, data), folder, name, tmp_path)


def test_any_value_in_what_a_checkpoint_says_is_refused_or_harmless(specimen, tmp_path):
    folder, name = specimen("unfinished", CHECKPOINT)
    header, data, about = split_tensors(folder / name)
    try_changes(about, 60, lambda new: join_tensors(header, data, new), folder, name, tmp_path)


@pytest.fixture
def refused(specimen, tmp_path):
    """Checks that a run with a changed checkpoint is not continued, for the stated reason."""

    def check(change, text):
        folder, name = specimen("unfinished", CHECKPOINT)
        copy = Path(shutil.copytree(folder, tmp_path / "run"))
        (copy / name).write_bytes(join_tensors(*change(*split_tensors(copy / name))))
        name_by_content(copy / name)
        with pytest.raises(DamagedFile, match=text):
            run(EXPERIMENT, copy, device="cpu", progress="none")

    return check


WRONG_STATES = {
    "format": (3, "has format 3; this bnnlib reads formats 1 to 2"),
    "experiment_sha256": (None, "is the state of another experiment"),
    "steps": (-1, "holds no state"),
    "seconds": (1e300, "holds no state"),
    "cpu_seconds": (1e300, "holds no state"),
    "updates": (1.5, "holds no state"),
    "optimizer": ({"state": {}, "groups": []}, "it has the settings of another optimizer"),
    "columns": (["epoch", "epoch"], "holds no state"),
    "epochs": (True, "holds no state"),
}


@pytest.mark.parametrize("entry", WRONG_STATES)
def test_a_checkpoint_with_a_wrong_entry_is_refused_by_its_name(entry, refused):
    value, text = WRONG_STATES[entry]
    refused(lambda header, data, about: (header, data, about | {entry: value}), text)


@pytest.mark.parametrize(
    ("column", "value"),
    [("epoch", 2.0), ("epoch", 1.5), ("epoch", nan), ("seconds", nan), ("seconds", -1.0)],
)
def test_a_checkpoint_with_a_history_of_no_run_is_refused(column, value, refused):
    def change(header, data, about):
        start = header["history"]["data_offsets"][0] + 8 * about["columns"].index(column)
        return header, data[:start] + struct.pack("<d", value) + data[start + 8 :], about

    refused(change, "row 1 of its history is not that of epoch 1")


@pytest.mark.parametrize("changed", [{"dtype": "I32"}, {"shape": [1, 8]}])  # it would fit, too
def test_a_checkpoint_with_a_tensor_of_another_type_or_shape_is_refused(changed, refused):
    def change(header, data, about):
        header[name] |= changed
        return header, data, about

    name = "optimizer.norm1.bias.exp_avg"
    refused(change, f"it differs in .*{name}")


def test_any_tensor_of_a_checkpoint_is_refused_or_harmless(specimen, tmp_path):
    folder, name = specimen("unfinished", CHECKPOINT)
    header, data, _ = split_tensors(folder / name)
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


WAYS = {
    "pickle": pickle.dump,
    "torch": lambda malice, file: torch.save({"weight": torch.zeros(3), "malice": malice}, file),
    "numpy": lambda malice, file: np.savez(file, train=np.array([malice], dtype=object)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_pickle_is_refused_and_not_executed(kind, name, way, specimen, tmp_path):
    folder, name = specimen(kind, name)
    content = io.BytesIO()
    WAYS[way](Malice(tmp_path / "trace"), content)
    watch = Watch(tmp_path / "run")
    assert outcome(folder, name, content.getvalue(), tmp_path, watch) == "refused"
    assert not (tmp_path / "trace").exists()


def test_the_malice_of_these_tests_is_real(tmp_path):
    pickle.loads(pickle.dumps(Malice(tmp_path / "trace")))
    assert (tmp_path / "trace").is_dir()


# -------------------------------------------------------------------------------- the watch

WRONGS = {
    "a file": lambda here: (here / "old").open("r+").close(),
    "a deletion": lambda here: (here / "old").unlink(),
    "a renaming": lambda here: (here / "run" / "mine").rename(here / "mine"),
    "a way out": lambda here: (here / "run" / ".." / "folder").mkdir(),
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
    with Watch(tmp_path / "run") as watch:
        (tmp_path / "run" / "new").write_text("y")
        (tmp_path / "old").read_text()
    with pytest.raises(Harm), watch:
        wrong(tmp_path)


# ------------------------------------------------------------------------------- no memory


def peak_memory():
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kB on Linux


def test_a_network_of_absurd_width_takes_no_memory(specimens, tmp_path):
    folder = Path(shutil.copytree(specimens["finished"], tmp_path / "run"))
    record = json.loads((folder / RECORD).read_text())
    record["experiment"] |= {"network": "cifar10", "dataset": "glyphs", "width": 64.0}
    (folder / RECORD).write_text(json.dumps(with_its_own_hash(record)))
    before = peak_memory()
    with pytest.raises(DamagedFile, match=r"differs in .*conv1"):
        load_run(folder)
    assert peak_memory() - before < 100e6
