import os
from pathlib import Path

import pytest

# The tests' own arithmetic is small: more threads than cores only make it slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray reads it once, when it is imported, and some test files import it before they start it.
os.environ.setdefault("RAY_AUTH_MODE", "token")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A directory with a random model of 0.2M parameters and its tokenizer; do not write there."""
    from tests.support.tiny import make_model

    return make_model(tmp_path_factory.mktemp("tiny_model"))
