"""A write is whole or absent, also in a process that dies of it; a read trusts nothing."""

import errno
import json
import multiprocessing
import os
import re
import signal
import stat
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bnnlib.files
from bnnlib.errors import (
    CannotWrite,
    DamagedFile,
    DataNotFound,
    FolderInUse,
    InvalidValue,
)
from bnnlib.files import (
    LOCK,
    check_free_disk,
    check_length,
    in_words,
    locked,
    make_folder,
    parse_json,
    read_json,
    read_text,
    whole_or_absent,
    write_json,
)
from bnnlib.history import History
from bnnlib.tensors import write_tensors

posix = pytest.mark.skipif(os.name != "posix", reason="processes are forked and killed")


@pytest.fixture
def kept(tmp_path):
    """A file with content, in a folder of its own."""
    path = tmp_path / "folder" / "kept"
    path.parent.mkdir()
    path.write_text("old")
    return path


def is_as_before(path):
    return path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == [path.name]


def in_a_child(action, *arguments):
    """Run in a forked process; returns its exit code, minus the signal that killed it."""
    process = multiprocessing.get_context("fork").Process(target=action, args=arguments)
    process.start()
    process.join(timeout=20)
    return process.exitcode


# ----------------------------------------------------------------------------------- writing


def test_a_write_is_whole_and_leaves_nothing_beside_it(kept):
    with whole_or_absent(kept) as part:
        part.write_text("new")
        assert kept.read_text() == "old"
    assert kept.read_text() == "new"
    assert [path.name for path in kept.parent.iterdir()] == ["kept"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, DataNotFound])
def test_an_error_in_the_block_is_passed_on_and_leaves_the_old_file(error, kept):
    def write_half():
        with whole_or_absent(kept) as part:
            part.write_text("half")
            raise error("a reason")

    with pytest.raises(error, match=r"^a reason$"):
        write_half()
    assert is_as_before(kept)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name"), [(Path, "open"), (os, "fsync"), (Path, "replace"), (Path, "write_text")]
)
def test_a_disk_that_is_full_at_any_step_leaves_the_old_file(owner, name, kept, monkeypatch):
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(CannotWrite) as caught:
        write_json(kept, {"a": 1})
    monkeypatch.undo()
    assert str(caught.value) == f"{kept} cannot be written: No space left on device"
    assert is_as_before(kept)


def test_what_a_dead_process_left_is_no_obstacle(kept):
    kept.with_name("kept.part").write_text("left by a dead process")
    write_json(kept, {"a": 1})
    assert read_json(kept) == {"a": 1}
    assert [path.name for path in kept.parent.iterdir()] == ["kept"]


@posix
def test_a_link_in_the_place_of_the_unfinished_file_is_not_followed(kept, tmp_path):
    (tmp_path / "outside").write_text("mine")
    kept.with_name("kept.part").symlink_to(tmp_path / "outside")
    write_json(kept, {"a": 1})
    assert (tmp_path / "outside").read_text() == "mine"
    assert not kept.is_symlink()
    assert read_json(kept) == {"a": 1}


@posix
def test_a_link_in_the_place_of_the_file_is_replaced_not_followed(kept, tmp_path):
    (tmp_path / "link").symlink_to(kept)
    write_json(tmp_path / "link", {"a": 1})
    assert is_as_before(kept)
    assert not (tmp_path / "link").is_symlink()


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_who_may_read_a_file_is_for_the_user_to_say(mask, kept):
    before = os.umask(mask)
    try:
        write_json(kept, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o666 & ~mask


def test_two_that_write_one_file_do_not_mix(kept):
    def write_twice():
        with whole_or_absent(kept) as part:
            part.write_text("the first")
            with whole_or_absent(kept) as other:
                other.write_text("the second, ")
                part.write_text("both at once")
            assert kept.read_text() == "both at once"  # the second is over, and whole
            other.write_text("a third")

    with pytest.raises(CannotWrite, match="cannot be written: another process writes it too"):
        write_twice()
    assert kept.read_text() == "both at once"


def test_a_folder_that_is_missing_or_a_file_is_named_with_the_reason(kept):
    missing, below = kept.parent / "no" / "file", kept / "file"
    for path, reason in ((missing, "No such file or directory"), (below, "Not a directory")):
        with pytest.raises(CannotWrite) as caught:
            write_json(path, {})
        assert str(caught.value) == f"{path} cannot be written: {reason}"
    with pytest.raises(CannotWrite, match=r"folder cannot be written: .*directory"):
        write_json(kept.parent, {})
    assert is_as_before(kept)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_that_is_read_only_is_named_with_the_reason(kept):
    kept.parent.chmod(0o500)
    with pytest.raises(CannotWrite, match="kept cannot be written: Permission denied"):
        write_json(kept, {})
    kept.parent.chmod(0o700)
    assert is_as_before(kept)


def die_between_write_and_renaming(path):
    with whole_or_absent(path) as part:
        part.write_text("new")
        os.kill(os.getpid(), signal.SIGKILL)


@posix
def test_a_process_killed_before_the_renaming_leaves_the_old_file(kept):
    assert in_a_child(die_between_write_and_renaming, kept) == -signal.SIGKILL
    assert kept.read_text() == "old"
    write_json(kept, {"a": 1})
    assert [path.name for path in kept.parent.iterdir()] == ["kept"]


WRITES = {
    "tensors": lambda path: write_tensors(path, {"a": torch.zeros(10_000)}),
    "json": lambda path: write_json(path, {"a": "x" * 40_000}),
    "history": lambda path: History([{"epoch": i} for i in range(10_000)]).save(path),
}


def write_with_a_small_limit(write, path):
    """The kernel itself refuses the write after some bytes, as on a full disk."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        write(path)
    except CannotWrite as error:
        os._exit(0 if str(error) == f"{path} cannot be written: File too large" else 2)
    os._exit(1)


@posix
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_that_the_kernel_cuts_short_leaves_the_old_file_and_one_line(write, kept):
    assert in_a_child(write_with_a_small_limit, write, kept) == 0
    assert is_as_before(kept)


def test_json_without_numbers_that_json_lacks(kept):
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            write_json(kept, {"a": value})
    assert is_as_before(kept)


def test_a_folder_is_made_with_those_above_it_or_refused_by_name(kept, tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(CannotWrite, match=r"kept cannot be made: File exists"):
        make_folder(kept)
    with pytest.raises(InvalidValue, match=r"'a\\x00b' is no name for a folder"):
        make_folder(Path("a\0b"))


def test_a_disk_that_flushes_no_folders_will_do(kept, monkeypatch):
    def flush_files_only(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("os.fsync", flush_files_only)
    write_json(kept, {"a": 1})
    assert read_json(kept) == {"a": 1}


# --------------------------------------------------------------------------------------- JSON

NOT_JSON = {
    "NaN": ('{"a": NaN}', "it holds 'NaN'"),
    "Infinity": ('{"a": [-Infinity]}', "it holds '-Infinity'"),
    "too large": ('{"a": 1e999}', "it holds '1e999'"),
    "deep lists": ('{"a": ' + "[" * 100_000, "nested too deep"),
    "deep objects": ('{"a": ' * 100_000, "nested too deep"),
    "digits": ('{"a": ' + "9" * 100_000 + "}", "4300 digits"),
    "half": ('{"a": ', "line 1 column"),
    "nothing": ("", "line 1 column"),
    "twice": ('{"a": {"b": 1, "b": 2}}', "'b' occurs twice in one object"),
    "a mark": ('\ufeff{"a": 1}', "BOM"),
}


@pytest.mark.parametrize(("text", "reason"), NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_no_json_is_refused_in_one_line(text, reason, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DamagedFile) as caught:
        read_json(path)
    assert re.match(f"{path} is not JSON that can be read: .*{reason}", str(caught.value))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["[]", "1", '"a"', "null"])
def test_json_that_is_no_object_is_refused(text):
    with pytest.raises(DamagedFile, match="the answer holds no JSON object"):
        parse_json(text, "the answer")


def test_json_is_read_as_it_was_written(kept):
    content = {"a": [1, 2.5, None, True, "\u00e9\n"], "b": {}, "c": 10**30}
    write_json(kept, content)
    assert read_json(kept) == content


def test_text_that_is_too_long_not_text_missing_or_a_folder_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DamagedFile, match="file is not text in UTF-8: invalid start byte"):
        read_json(path)
    with pytest.raises(DamagedFile, match="cannot be read: Is a directory"):
        read_json(tmp_path)
    with pytest.raises(DamagedFile, match="no cannot be read: No such file"):
        read_json(tmp_path / "no")
    monkeypatch.setattr(bnnlib.files, "MAX_TEXT", 10)
    path.write_text("x" * 10)
    assert read_text(path) == "x" * 10
    path.write_text("x" * 11)
    with pytest.raises(DamagedFile, match="file is longer than 10 bytes"):
        read_text(path)


@pytest.mark.parametrize("value", ["[],", "{},", "0,", "\n"])
def test_a_text_of_very_many_values_is_refused_before_they_are_made(value, monkeypatch):
    monkeypatch.setattr(bnnlib.files, "MAX_VALUES", 1000)
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    check_length(value * 500, "it")
    with pytest.raises(DamagedFile, match="it holds more than 1,000 values"):
        parse_json(value * 1001, "it")


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
    with locked(tmp_path):
        pass


def test_in_one_process_a_folder_is_locked_once_too(tmp_path):
    caught = []

    def second():
        try:
            with locked(tmp_path):
                caught.append(None)
        except FolderInUse as error:
            caught.append(error)

    with locked(tmp_path):
        second()
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert [type(error) for error in caught] == [FolderInUse] * 2
    second()
    assert caught[-1] is None


@posix
def test_a_lock_that_is_a_link_is_refused_and_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(DamagedFile, match=r"lock is a link, .* remove it"), locked(tmp_path):
        pytest.fail("the link was followed")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_that_cannot_be_locked_is_named_with_the_reason(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(CannotWrite, match="lock cannot be locked: Is a dir"), locked(tmp_path):
        pytest.fail("a folder was locked")


def test_an_error_inside_gives_the_folder_back(tmp_path):
    with pytest.raises(ValueError, match="mine"), locked(tmp_path):
        raise ValueError("mine")
    with locked(tmp_path):
        pass


# --------------------------------------------------------------------------------------- disk


def test_a_disk_with_too_little_room_is_named_with_both_sizes(tmp_path, monkeypatch):
    check_free_disk(tmp_path, 1)
    usage = SimpleNamespace(free=2_000_000)
    monkeypatch.setattr(bnnlib.files.psutil, "disk_usage", lambda path: usage)
    check_free_disk(tmp_path, 2_000_000)
    with pytest.raises(CannotWrite) as caught:
        check_free_disk(tmp_path, 2_100_000)
    assert str(caught.value) == (
        f"{tmp_path} needs about 2.1 MB of disk, 2 MB are free; free some, or choose a folder "
        "on another disk"
    )


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (1_500_000, "1.5 MB"),
        (12_345_678_901, "12.3 GB"),
        (5e14, "500 TB"),
    ],
)
def test_bytes_in_words(size, words):
    assert in_words(size) == words
