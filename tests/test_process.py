"""The threads of PyTorch spin briefly wherever bnnlib loads it, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest

from bnnlib.process import BRIEFLY, SAYS_HOW_TO_WAIT

SHOW = f"import os; print(*(os.environ.get(name, '-') for name in {SAYS_HOW_TO_WAIT}))"
SILENT = dict.fromkeys(SAYS_HOW_TO_WAIT, "-")


def ran(code, **said):
    """A new process that has run `code`, where the user said so much."""
    surroundings = {k: v for k, v in os.environ.items() if k not in SAYS_HOW_TO_WAIT}
    command = [sys.executable, "-c", f"{code}\n{SHOW}"]
    return subprocess.run(
        command, env=surroundings | said, capture_output=True, text=True, check=True
    )


def variables(code, **said):
    return dict(zip(SAYS_HOW_TO_WAIT, ran(code, **said).stdout.split(), strict=True))


def test_it_is_set_before_pytorch_is_loaded():
    found = variables("import bnnlib, sys\nassert 'torch' not in sys.modules")
    assert found == {"OMP_WAIT_POLICY": "-", **BRIEFLY}


@pytest.mark.parametrize("name", SAYS_HOW_TO_WAIT)
def test_what_the_user_says_stays_and_stays_alone(name):
    assert variables("import bnnlib", **{name: "1"}) == SILENT | {name: "1"}


def test_nothing_is_set_where_pytorch_was_first():
    assert variables("import sys\nsys.modules['torch'] = None\nimport bnnlib") == SILENT


def test_the_threads_of_pytorch_obey():
    """libgomp prints what it read as it is loaded."""
    said = ran("import bnnlib, torch", OMP_DISPLAY_ENV="VERBOSE").stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("PyTorch's OpenMP is not GNU's here")
    assert f"GOMP_SPINCOUNT = '{BRIEFLY['GOMP_SPINCOUNT']}'" in said
