"""The kernel of notebooks: its PyTorch spins briefly, unless the user says otherwise."""

import json
import os
import sys
from contextlib import contextmanager

import kernel
import pytest
from jupyter_client.manager import start_new_kernel
from notebooks import KERNELSPEC

from bnnlib.process import BRIEFLY, SAYS_HOW_TO_WAIT

CELL = f"""
import torch  # before bnnlib
import json, os
print(json.dumps({{name: os.environ.get(name) for name in {SAYS_HOW_TO_WAIT!r}}}))
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The kernelspec in an environment of its own, which Jupyter searches first."""
    folder = kernel.install(tmp_path)
    monkeypatch.setenv("JUPYTER_PATH", str(folder.parents[1]))
    return folder


@contextmanager
def started(**said):
    """A kernel of the installed spec in surroundings where the user has said so much."""
    env = {k: v for k, v in os.environ.items() if k not in SAYS_HOW_TO_WAIT} | said
    manager, client = start_new_kernel(kernel_name=KERNELSPEC["name"], env=env)
    try:
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def printed(client, cell):
    """What a cell prints; it must not fail."""
    texts = []

    def collect(message):
        texts.append(message["content"].get("text", ""))

    reply = client.execute_interactive(cell, output_hook=collect, timeout=300)
    assert reply["content"]["status"] == "ok", reply
    return "".join(texts)


@pytest.mark.parametrize("said", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive"}])
def test_threads_spin_briefly_unless_the_user_says_otherwise(installed, said):
    with started(**said) as client:
        found = json.loads(printed(client, CELL))
        assert found == dict.fromkeys(SAYS_HOW_TO_WAIT) | (said or BRIEFLY)
        assert printed(client, "print('bnnlib' in globals())") == "False\n"


def test_a_kernel_starts_also_where_bnnlib_is_broken(installed, tmp_path):
    (tmp_path / "bnnlib.py").write_text("raise OSError('it is broken')")
    with started(PYTHONPATH=str(tmp_path)) as client:
        assert printed(client, "print(1 + 1)") == "2\n"


def test_the_environment_of_these_tests_has_this_kernel(installed, tmp_path):
    spec = (installed / "kernel.json").relative_to(tmp_path)
    assert (sys.prefix / spec).read_text() == (tmp_path / spec).read_text(), "run `make env`"


def test_it_replaces_an_older_one(installed, tmp_path):
    spec = installed / "kernel.json"
    before = spec.read_text()
    spec.write_text("{}")
    assert kernel.install(tmp_path) == installed
    assert spec.read_text() == before
