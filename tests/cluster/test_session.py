"""Ray on this machine: a start that takes too long."""

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

    def start(**options):
        made.append(options)
        if errors:
            raise errors.pop(0)

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    return made, errors


@pytest.mark.parametrize("late", LATE, ids=["head", "node"])
def test_a_start_that_takes_too_long_is_made_once_more(starts, tmp_path, late):
    made, errors = starts
    errors.append(late)
    with ray_session(log=tmp_path / "ray.log", num_cpus=1):
        pass
    assert len(made) == 2
    assert made[0] == made[1]
    assert made[0]["num_cpus"] == 1


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
