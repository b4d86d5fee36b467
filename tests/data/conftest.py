"""What the tests of data share: how a call is refused, and a pickle that nobody may open."""

import os

import pytest


@pytest.fixture(scope="session")
def refusal():
    """The text of the error in which a call ends, after a look that it is one short line."""

    def text_of(kind, function, *args):
        with pytest.raises(kind) as caught:
            function(*args)
        text = str(caught.value)
        assert text.isprintable()
        assert len(text) < 1000
        return text

    return text_of


class Intruder:
    """Unpickling it makes a folder."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.fixture
def intruder(tmp_path):
    return Intruder(tmp_path / "executed")
