"""Tensors in files: written in plain order, and read when everything fits."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from bnnlib.errors import DamagedFile, TooLarge
from bnnlib.files import sha256
from bnnlib.tensors import forms, read_metadata, read_tensors, write_tensors

TENSORS = {
    "plain": torch.arange(6.0).reshape(2, 3),
    "images": torch.arange(48.0).reshape(2, 3, 2, 4).to(memory_format=torch.channels_last),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "strided": torch.arange(10)[::3],
    "bits": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "empty": torch.zeros(0, 3),
    "number": torch.tensor(7),
    "parameter": torch.nn.Parameter(torch.tensor([-0.0, torch.nan, torch.inf])),
}


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "tensors"
    return path, write_tensors(path, TENSORS, {"about": 'a "text"\n'})


def same(one, other):
    return one.dtype == other.dtype and torch.equal(
        one.detach().nan_to_num(), other.detach().nan_to_num()
    )


def test_tensors_are_read_back_by_us_and_by_the_library(written):
    path, digest = written
    assert digest == sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    for found in (load_file(path), read_tensors(path, forms(TENSORS))):
        assert found.keys() == TENSORS.keys()
        assert all(same(found[name], tensor) for name, tensor in TENSORS.items())
    assert read_metadata(path) == {"about": 'a "text"\n'}
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == 0


def test_tensors_of_the_library_are_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "tensors")
    assert read_metadata(tmp_path / "tensors") == {}
    (found,) = read_tensors(tmp_path / "tensors", {"a": ((2,), torch.float32)}).values()
    assert found.tolist() == [1, 1]


def test_what_was_read_does_not_change_with_the_file(written):
    path, _ = written
    found = read_tensors(path, forms(TENSORS))
    with path.open("r+b") as file:
        file.seek(-sum(tensor.nbytes for tensor in TENSORS.values()), os.SEEK_END)
        file.write(b"\x01" * 200)
    assert all(same(found[name], tensor) for name, tensor in TENSORS.items())


def test_all_that_differs_is_listed_before_anything_is_read(written, monkeypatch):
    path, _ = written
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: pytest.fail("a tensor was read"))
    expected = forms(TENSORS) | {
        "plain": ((3, 2), torch.float32),
        "bits": ((3,), torch.uint8),
        "more": ((1,), torch.int64),
    }
    del expected["empty"]
    with pytest.raises(DamagedFile) as caught:
        read_tensors(path, expected)
    assert str(caught.value) == (
        f"{path} does not hold the tensors it should: no more; unknown 'empty'; "
        "plain is float32 (2, 3), not float32 (3, 2); bits is bool (3,), not uint8 (3,)"
    )


def test_of_very_many_differences_the_first_are_listed(written):
    path, _ = written
    with pytest.raises(DamagedFile, match=r"no t19; and 89 more$"):
        read_tensors(path, {f"t{i}": ((), torch.float32) for i in range(100)})


def headed(header, data=b"\0" * 8, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


FOREIGN = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a truncated header": headed({"a": entry()})[:20],
    "truncated data": headed({"a": entry()})[:-1],
    "data after the end": headed({"a": entry()}) + b"x",
    "a header of 2^63 bytes": headed({"a": entry()}, size=2**63),
    "a header of 2^64 - 1 bytes": headed({"a": entry()}, size=2**64 - 1),
    "no JSON": headed(b"{no JSON}"),
    "a list": headed([]),
    "a JSON bomb": headed(b"[" * 100_000),
    "a bomb of objects": headed(b'{"a":' * 100_000),
    "not UTF-8": headed(b'{"\xff": 1}'),
    "an overlap": headed({"a": entry(), "b": entry()}),
    "an offset outside": headed({"a": entry(offsets=(8, 16))}),
    "offsets the wrong way": headed({"a": entry(offsets=(8, 0))}),
    "a negative offset": headed({"a": entry(offsets=(-8, 0))}),
    "an offset of 2^64": headed({"a": entry(offsets=(0, 2**64))}),
    "a shape that overflows": headed({"a": entry(shape=(2**33, 2**33))}),
    "another size than its shape": headed({"a": entry(shape=(3,))}),
    "an unknown type": headed({"a": entry(dtype="PICKLE")}),
    "metadata that are no texts": headed({"__metadata__": {"a": [1]}, "a": entry()}),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_file_of_tensors_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "tensors"
    path.write_bytes(content)
    for read in (read_metadata, lambda path: read_tensors(path, {"a": ((2,), torch.float32)})):
        with pytest.raises(DamagedFile) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path} is not a whole safetensors file: ")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "U64", "F8_E4M3"])
def test_types_that_bnnlib_never_writes_are_refused_by_name(dtype, tmp_path):
    size = {"F16": 4, "BF16": 4, "U64": 1, "F8_E4M3": 8}[dtype]
    (tmp_path / "tensors").write_bytes(headed({"a": entry(dtype, (size,))}))
    with pytest.raises(DamagedFile, match=rf"a is {dtype} \({size},\), not float32"):
        read_tensors(tmp_path / "tensors", {"a": ((2,), torch.float32)})


def test_tensors_that_are_missing_or_a_folder_are_refused(tmp_path):
    for path, reason in ((tmp_path / "no", "No such file"), (tmp_path, "directory|device")):
        with pytest.raises(DamagedFile, match=f"{path.name} is not a whole .*({reason})"):
            read_metadata(path)


def test_a_name_that_a_terminal_would_obey_is_not_printed_as_it_is(tmp_path):
    (tmp_path / "tensors").write_bytes(headed({"\x1b[2J\n": entry()}))
    with pytest.raises(DamagedFile, match=r"unknown '\\x1b\[2J\\n'$"):
        read_tensors(tmp_path / "tensors", {})


def test_tensors_that_do_not_fit_into_memory_are_refused(written, monkeypatch):
    path, _ = written
    memory = type("Memory", (), {"available": 100})
    monkeypatch.setattr("bnnlib.tensors.psutil.virtual_memory", lambda: memory)
    with pytest.raises(TooLarge, match=r"tensors needs \d+ bytes of memory, 100 bytes are free"):
        read_tensors(path, forms(TENSORS))
