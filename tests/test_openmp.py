"""The threads of PyTorch spin briefly wherever bnnlib loads it, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest

from bnnlib.openmp import BRIEFLY, SAYS_HOW_TO_WAIT

SHOW = "import os; print(*(os.environ.get(name, '-') for name in {names!r}))"


def environment_after(code, **said):
    """The variables in a new process that has run `code`, where the user said so much."""
    surroundings = {k: v for k, v in os.environ.items() if k not in SAYS_HOW_TO_WAIT}
    show = SHOW.format(names=SAYS_HOW_TO_WAIT)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"],
        env=surroundings | said,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(SAYS_HOW_TO_WAIT, done.stdout.split(), strict=True))


def test_it_is_set_before_pytorch_is_loaded():
    found = environment_after("import bnnlib, sys\nassert 'torch' not in sys.modules")
    assert found == {"OMP_WAIT_POLICY": "-", **BRIEFLY}


@pytest.mark.parametrize("name", SAYS_HOW_TO_WAIT)
def test_what_the_user_says_stays_and_stays_alone(name):
    found = environment_after("import bnnlib", **{name: "1"})
    assert found == dict.fromkeys(SAYS_HOW_TO_WAIT, "-") | {name: "1"}


def test_nothing_is_set_where_pytorch_was_first():
    code = "import sys\nsys.modules['torch'] = None\nimport bnnlib"
    assert environment_after(code) == dict.fromkeys(SAYS_HOW_TO_WAIT, "-")


def test_the_threads_of_pytorch_obey():
    """libgomp prints what it read as it is loaded."""
    code = "import bnnlib, torch"
    surroundings = {k: v for k, v in os.environ.items() if k not in SAYS_HOW_TO_WAIT}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=surroundings | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("PyTorch's OpenMP is not GNU's here")
    assert f"GOMP_SPINCOUNT = '{BRIEFLY['GOMP_SPINCOUNT']}'" in done.stderr
