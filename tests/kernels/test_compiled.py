"""Building the kernels: once, by several processes at a time, and not at all."""

import os
import subprocess
import sys

import pytest
import torch

from bnnlib.errors import InvalidValue
from bnnlib.kernels import bits, compiled
from bnnlib.layers import BinaryLinear

BUILDS = "from bnnlib.kernels.compiled import library; print(getattr(library(), 'set', None))"
USES = """
import torch
from bnnlib.layers import BinaryLinear
print(BinaryLinear(512, 512)(torch.ones(64, 512)).grad_fn is not None)
"""


def start(code, cache, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(process):
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out.strip(), errors.strip()


@pytest.fixture
def compiler():
    try:
        compiled.library("portable").set  # noqa: B018
    except AttributeError:
        pytest.skip("there is no C compiler here")


@pytest.fixture
def fresh(monkeypatch):
    """`library` without what it remembers."""
    monkeypatch.delenv(compiled.VARIABLE, raising=False)
    compiled.library.cache_clear()
    yield monkeypatch
    compiled.library.cache_clear()


def test_processes_that_build_at_once_all_have_the_kernels_and_later_ones_do_not_build(
    tmp_path, compiler
):
    together = [start(BUILDS, tmp_path, BNNLIB_KERNELS="portable") for _ in range(2)]
    for out, _ in map(said, together):
        assert out == "portable"
    (kept,) = (tmp_path / "bnnlib").iterdir()
    assert kept.name.startswith("portable-")
    before = kept.stat().st_mtime_ns
    assert said(start(BUILDS, tmp_path, BNNLIB_KERNELS="portable")) == ("portable", "")
    assert kept.stat().st_mtime_ns == before


def test_building_is_told_in_one_line(tmp_path, compiler):
    _, errors = said(start(BUILDS, tmp_path, BNNLIB_KERNELS="portable"))
    assert errors.splitlines() == ["bnnlib: building the kernels for portable, once ..."]


@pytest.mark.parametrize("how", ["none", "broken", "missing"])
def test_without_a_compiler_one_line_says_so_and_pytorch_computes(tmp_path, how):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no licence >&2; exit 1\n")
    broken.chmod(0o755)
    changes = {
        "none": {"PATH": str(tmp_path / "nothing"), "CC": ""},
        "broken": {"CC": str(broken)},
        "missing": {"CC": "/no/such/cc"},
    }[how]
    out, errors = said(start(USES, tmp_path, **changes))
    assert out == "True"
    (line,) = [line for line in errors.splitlines() if "building" not in line]
    assert line.startswith("bnnlib: no kernels in C, PyTorch's are used: ")
    assert {"none": "no C compiler", "broken": "no licence", "missing": "/no/such/cc"}[how] in line


def test_a_cache_that_cannot_be_written_costs_a_build_for_each_process(tmp_path, compiler):
    (tmp_path / "bnnlib").write_text("a file in the place of the folder")
    assert said(start(BUILDS, tmp_path, BNNLIB_KERNELS="portable"))[0] == "portable"


def test_the_best_set_is_taken_unless_the_variable_says_otherwise(fresh, compiler):
    assert compiled.library().set == compiled.sets_here()[0]
    for name in compiled.sets_here():
        fresh.setenv(compiled.VARIABLE, name)
        compiled.library.cache_clear()
        assert compiled.library().set == name


def test_kernels_can_be_switched_off(fresh):
    fresh.setenv(compiled.VARIABLE, "off")
    assert compiled.library() is None
    layer = BinaryLinear(512, 512)
    assert bits.Operands.packed(*(torch.ones(64, 512, 1, 1),) * 2, True, bits.Geometry()) is None
    assert layer(torch.ones(64, 512)).shape == (64, 512)


def test_a_name_that_is_none_and_a_set_that_is_not_here_are_refused(fresh):
    with pytest.raises(InvalidValue, match="unknown BNNLIB_KERNELS 'avx'; did you mean 'avx2'"):
        compiled.library("avx")
    fresh.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(InvalidValue, match="this processor has no avx512, only portable"):
        compiled.library("avx512")
    assert compiled.sets_here() == ["portable"]
