"""Ray on this machine: a start that takes too long."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lrmc_ray.cluster.session import ray_session
from lrmc_ray.errors import ResourceError

LATE = (
    RuntimeError("Timed out waiting for file /tmp/ray/gcs_server_port"),
    Exception("The current node timed out during startup."),
)


@pytest.fixture
def starts(monkeypatch):
    """Every start of Ray fails with the next of ``errors``, and then succeeds."""
    import ray

    made: list[dict[str, Any]] = []
    errors: list[Exception] = []
    left: list[Exception] = []

    def start(**options):
        assert not left, "what the start before left has not been ended"
        made.append(options)
        if errors:
            left.append(errors.pop(0))
            raise left[0]

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "shutdown", left.clear)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    return made, errors


@pytest.mark.parametrize("late", LATE, ids=["head", "node"])
def test_a_start_that_takes_too_long_is_made_once_more(starts, tmp_path, late, caplog):
    made, errors = starts
    errors.append(late)
    with ray_session(log=tmp_path / "ray.log", num_cpus=1):
        pass
    assert len(made) == 2
    assert made[0] == made[1]
    assert made[0]["num_cpus"] == 1
    assert "Ray's processes were not there in time; it is started once more" in caplog.text


def test_one_that_takes_too_long_twice_is_one_error(starts, tmp_path):
    made, errors = starts
    errors.extend(LATE)
    with (
        pytest.raises(ResourceError, match=r"twice .*timed out during startup.*less to do"),
        ray_session(log=tmp_path / "ray.log", num_cpus=1),
    ):
        pass
    assert len(made) == 2


def test_another_error_is_not_hidden(starts, tmp_path):
    made, errors = starts
    errors.append(ValueError("no such resource"))
    with (
        pytest.raises(ValueError, match="no such resource"),
        ray_session(log=tmp_path / "ray.log", num_cpus=1),
    ):
        pass
    assert len(made) == 1


ON_A_FULL_DISK = """
import logging, sys
handler = logging.StreamHandler(sys.stderr)  # as Ray's, which is made when Ray is imported
logging.getLogger("other").addHandler(handler)
import ray
from pathlib import Path
from lrmc_ray.cluster.session import ray_session

ray.init, ray.is_initialized = lambda **_: None, lambda: False
with ray_session(log=Path("/dev/full"), num_cpus=1):
    logging.getLogger("other").error("a line for the log")
    print("for the terminal", file=sys.stderr)
assert logging.raiseExceptions
"""


def test_a_log_that_finds_the_disk_full_says_nothing_on_the_terminal():
    done = subprocess.run(
        [sys.executable, "-c", ON_A_FULL_DISK],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "for the terminal" in done.stderr
    assert "Traceback" not in done.stderr
