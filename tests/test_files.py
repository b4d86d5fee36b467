"""A write is whole or absent, also in a process that dies of it; a read trusts nothing."""

import errno
import multiprocessing
import os
import pickle
import re
import signal
import stat
import threading
from math import inf, isnan, nan
from pathlib import Path

import pytest
import torch

from bnnlib import files
from bnnlib.errors import CannotWrite, DamagedFile, FolderInUse, InvalidValue
from bnnlib.files import LOCK, atomic_write, locked, read_json, write_json
from bnnlib.tensors import read_tensors, tensor_bytes

posix = pytest.mark.skipif(os.name != "posix", reason="processes are forked and killed")


@pytest.fixture
def kept(tmp_path):
    """A file with content, in a folder of its own."""
    path = tmp_path / "folder" / "kept"
    path.parent.mkdir()
    path.write_text("old")
    return path


def holds(path, text):
    """Whether a file has this text, and lies alone in its folder."""
    return path.read_text() == text and [p.name for p in path.parent.iterdir()] == [path.name]


def in_a_child(action, *arguments):
    """Run in a forked process; returns its exit code, minus the signal that killed it."""
    process = multiprocessing.get_context("fork").Process(target=action, args=arguments)
    process.start()
    process.join(timeout=300)
    return process.exitcode


# ----------------------------------------------------------------------------------- writing


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("owner", "name"), [(Path, "open"), (os, "fsync"), (Path, "replace")])
def test_a_disk_that_is_full_at_any_step_leaves_the_old_file(owner, name, kept, monkeypatch):
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(CannotWrite) as caught:
        atomic_write(kept, b"new")
    monkeypatch.undo()
    assert str(caught.value) == f"{kept} cannot be written: No space left on device"
    assert holds(kept, "old")


def test_a_write_is_whole_and_what_a_dead_process_left_is_no_obstacle(kept):
    kept.with_name("kept.part").write_text("left by a dead process")
    atomic_write(kept, b"new")
    assert holds(kept, "new")


@posix
def test_a_link_in_the_place_of_the_file_or_its_unfinished_form_is_not_followed(kept, tmp_path):
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "link.part").symlink_to(kept)
    atomic_write(tmp_path / "link", b"new")
    assert holds(kept, "old")
    assert not (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "link"}


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_who_may_read_a_file_is_for_the_user_to_say(mask, kept):
    before = os.umask(mask)
    try:
        atomic_write(kept, b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o666 & ~mask


def test_a_folder_that_is_missing_or_a_file_is_named_with_the_reason(kept):
    missing, below = kept.parent / "no" / "file", kept / "file"
    for path, reason in ((missing, "No such file"), (below, "Not a dir"), (kept.parent, ".*dir")):
        with pytest.raises(CannotWrite, match=f"{path} cannot be written: {reason}"):
            atomic_write(path, b"new")
    assert holds(kept, "old")


def die_between_write_and_renaming(path):
    Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    atomic_write(path, b"new")


@posix
def test_a_process_killed_before_the_renaming_leaves_the_old_file(kept):
    assert in_a_child(die_between_write_and_renaming, kept) == -signal.SIGKILL
    assert kept.read_text() == "old"


def write_with_a_small_limit(path):
    """The kernel itself refuses the write after some bytes, as on a full disk."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        atomic_write(path, tensor_bytes({"a": torch.zeros(10_000)}))
    except CannotWrite as error:
        os._exit(0 if str(error) == f"{path} cannot be written: File too large" else 2)
    os._exit(1)


@posix
def test_a_write_that_the_kernel_cuts_short_leaves_the_old_file_and_one_line(kept):
    assert in_a_child(write_with_a_small_limit, kept) == 0
    assert holds(kept, "old")


def test_the_folder_is_flushed_too_but_a_disk_that_flushes_none_will_do(kept, monkeypatch):
    def flush(handle):
        flushed.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        if flushed[-1]:
            raise OSError(errno.EINVAL, "Invalid argument")

    flushed = []
    monkeypatch.setattr("os.fsync", flush)
    atomic_write(kept, b"new")
    assert flushed == [False, True]
    assert holds(kept, "new")


def test_a_folder_is_made_with_those_above_it_or_refused_by_name(kept, tmp_path):
    for _ in range(2):
        files.make_folder(tmp_path / "a" / "b")
    with pytest.raises(CannotWrite, match=r"kept cannot be written: File exists"):
        files.make_folder(kept)


@pytest.mark.parametrize("value", ["", "a\0b", 3, None])
def test_what_can_be_no_folder_is_refused_by_name(value):
    with pytest.raises(InvalidValue, match="out must be the path of a folder, got "):
        files.as_folder("out", value)
    assert files.as_folder("out", "~") == Path.home()


# --------------------------------------------------------------------------------------- JSON

NOT_JSON = {
    "NaN": ('{"a": NaN}', "it holds NaN"),
    "Infinity": ('{"a": [-Infinity]}', "it holds -Infinity"),
    "deep": ('{"a": ' + "[" * 100_000, "recursion depth"),
    "digits": ('{"a": ' + "9" * 100_000 + "}", "4300 digits"),
    "half": ('{"a": ', "line 1 column"),
    "a mark": ('\ufeff{"a": 1}', "BOM"),
    "a list": ("[]", "JSON object"),
}


@pytest.mark.parametrize(("text", "reason"), NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_no_json_is_refused_in_one_line(text, reason):
    with pytest.raises(DamagedFile, match=f"the answer (is not JSON|holds no).*{reason}") as caught:
        files.parse_json(text, "the answer")
    assert str(caught.value).isprintable()


def test_json_is_read_as_it_was_written_and_lacks_nan(kept):
    content = {"a": [1, 2.5, None, True, "\u00e9\n"], "b": {}, "c": 10**30}
    write_json(kept, content)
    with pytest.raises(ValueError, match="JSON"):
        write_json(kept, {"a": float("nan")})
    assert read_json(kept) == content


def test_text_that_is_too_long_not_text_missing_or_a_folder_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b'{"a": "\xff"}')
    for place, reason in (
        (path, "is not text in UTF-8: invalid start byte"),
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "no", "cannot be read: No such file"),
    ):
        with pytest.raises(DamagedFile, match=f"{place} {reason}"):
            read_json(place)
    monkeypatch.setattr(files, "MAX_TEXT", len(path.read_bytes()))
    path.write_text('{"a": 123}')
    assert read_json(path) == {"a": 123}
    path.write_text('{"a": 1234}')
    with pytest.raises(DamagedFile, match="file is longer than 10 bytes"):
        read_json(path)


# -------------------------------------------------------------------------------------- tables


def read_table(path):
    return files.parse_table(files.read_text(path), path)


def test_a_table_of_numbers_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "table.csv"
    row = {"epoch": 1, "seed": 2**40, "larger": 2**60 + 1, "width": 1 / 3, "binary": True}
    files.write_table(path, [row], list(row), exact=True)
    assert read_table(path) == [row]
    files.write_table(path, [row], list(row), exact=False)
    assert read_table(path) == [row | {"width": 0.333333333}]
    path.write_text("bits,width\n1,inf\r\n-2.5,\n")
    first, second = read_table(path)
    assert first == {"bits": 1, "width": inf}
    assert second["bits"] == -2.5
    assert isnan(second["width"])


NO_TABLE = {
    "a short row": ("a,b\n1,2\n3\n", "line 3.* shorter"),
    "a long row": ("a,b\n1,2,3\n", "line 2.* longer"),
    "a code": ("a\n\x1b[2J\n", "line 2: .*x1b"),
    "one name twice": ("a,b,a\n1,2,3\n", "two columns have one name"),
    "a name of codes": ("a,\x1b[2J\n1,2\n", "a column has the name .*x1b"),
    "a long name": ("a" * 101 + "\n1\n", "a column has the name 'aaa"),
    "no name": ("a,\n1,2\n", "a column has the name ''"),
    "a long cell": ("a\n" + "1" * 200_000 + "\n", "field limit"),
    "half a quote": ('a\n"1\n', "unexpected end of data"),
}


@pytest.mark.parametrize(("text", "reason"), NO_TABLE.values(), ids=NO_TABLE)
def test_what_is_no_table_of_numbers_is_refused_with_the_line(text, reason, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(DamagedFile, match=f"{path}, line .*no table of numbers") as caught:
        read_table(path)
    assert re.search(reason, str(caught.value).replace("\\", ""))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text",
    ["a,b,c\n1,,3\r\n-2.5,inf,\n", '"a,1",b,c\n1,2,3\n', "a\n", "\n", "", f"b\n{2**60 + 1}\n"],
)
def test_columns_are_those_of_the_whole_table_and_nan_where_it_has_none(text):
    rows = files.parse_table(text, "here")
    columns = files.parse_columns(text, "here", ("c", "b", "no"))
    assert list(columns) == ["c", "b", "no"]
    for name, values in columns.items():
        assert str(values) == str([row.get(name, nan) for row in rows])


@pytest.mark.parametrize("case", [name for name in NO_TABLE if name != "a long cell"])
def test_columns_of_what_is_no_table_of_numbers_are_refused(case):
    with pytest.raises(DamagedFile, match=r"here.*no table of numbers") as caught:
        files.parse_columns(NO_TABLE[case][0], "here", ("a",))
    assert str(caught.value).isprintable()


# ------------------------------------------------------------------------------------- tensors

TENSORS = {
    "images": torch.arange(48.0).reshape(2, 3, 2, 4).to(memory_format=torch.channels_last),
    "strided": torch.arange(10)[::3],
    "bits": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "empty": torch.zeros(0, 3),
    "number": torch.tensor(7),
    "parameter": torch.nn.Parameter(torch.tensor([-0.0, torch.nan, torch.inf])),
}


def test_tensors_are_read_back_and_do_not_change_with_the_file(tmp_path):
    path = tmp_path / "tensors"
    atomic_write(path, tensor_bytes(TENSORS, {"about": 'a "text"\n'}))
    found, texts = read_tensors(path)
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\x01" * 100)
    assert texts == {"about": 'a "text"\n'}
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)


WHOLE = tensor_bytes({"a": torch.ones(2)})
FOREIGN = {
    "empty": b"",
    "truncated": WHOLE[:-1],
    "data after the end": WHOLE + b"x",
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + WHOLE[8:],
    "a pickle": pickle.dumps({"a": 1}),
    "an unknown type": WHOLE.replace(b"F32", b"P32"),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_file_of_tensors_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "tensors"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match="is not a whole safetensors file: ") as caught:
        read_tensors(path)
    assert str(caught.value).isprintable()
    with pytest.raises(DamagedFile, match=r"no is not a whole .*No such file"):
        read_tensors(tmp_path / "no")


# --------------------------------------------------------------------------------------- lock


def hold(folder, ready):
    with locked(folder):
        ready.set()
        signal.pause()


@posix
def test_a_second_process_is_refused_until_the_first_one_dies(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready))
    holder.start()
    try:
        assert ready.wait(20)
        refused = f"another process is writing to {tmp_path}; wait for it, or stop it"
        with pytest.raises(FolderInUse, match=re.escape(refused)), locked(tmp_path):
            pytest.fail("two have it")
    finally:
        holder.kill()
        holder.join()
    with locked(tmp_path):
        assert (tmp_path / LOCK).exists()


def test_in_one_process_a_folder_is_locked_once_too_and_given_back_by_an_error(tmp_path):
    caught = []

    def second():
        try:
            with locked(tmp_path):
                raise ValueError("mine")
        except (FolderInUse, ValueError) as error:
            caught.append(type(error))

    with locked(tmp_path):
        second()
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    second()
    second()
    assert caught == [FolderInUse, FolderInUse, ValueError, ValueError]


@posix
def test_a_lock_that_is_a_link_or_a_folder_is_not_used(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(CannotWrite, match="lock cannot be locked"), locked(tmp_path):
        pytest.fail("the link was followed")
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).mkdir()
    with pytest.raises(CannotWrite, match="lock cannot be locked: Is a dir"), locked(tmp_path):
        pytest.fail("a folder was locked")
