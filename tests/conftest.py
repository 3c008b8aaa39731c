import os
import shutil
from pathlib import Path

import pytest

# The tests' own arithmetic is small: more threads than cores only make it slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton runs its kernels on the CPU where there is no GPU. It reads this when it is imported, which
# torch does behind some of its own modules.
if not Path("/proc/driver/nvidia/version").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Ray reads it once, when it is imported, and some test files import it before they start it.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with Ray first: they take the longest, and several processes share the files."""
    with_ray = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in with_ray)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A directory with a random model of 0.2M parameters and its tokenizer; do not write there."""
    from tests.support.tiny import make_model

    return make_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture
def copy_of_model(tiny_model, tmp_path) -> Path:
    """A copy of the small model that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "copy")


@pytest.fixture(scope="session")
def recorded(tiny_model, tmp_path_factory) -> Path:
    """A record of 20 samples, made with the small model; do not write there."""
    from tests.support.tiny import make_data
    from tests.support.training import record_of

    base = tmp_path_factory.mktemp("recorded")
    return record_of(tiny_model, make_data(base / "train.jsonl", num_rows=20), base / "record")


@pytest.fixture(scope="session")
def base_scores(tiny_model, tmp_path_factory) -> Path:
    """The small model's scores on the tasks of ``RULE``, made by the evaluation's own code."""
    from lrmc_ray.evaluate.harness import score
    from lrmc_ray.evaluate.items import Scores
    from lrmc_ray.evaluate.request import ScoreRequest
    from tests.support.rung import RULE

    directory = tmp_path_factory.mktemp("base_scores")
    request = ScoreRequest(
        tasks=RULE.tasks,
        batch_tokens=512,
        precision="fp32",
        limit=6,
        split="dev",
        drift_samples={"domain": 0, "general": 0},
    )
    Scores.from_rows(score(tiny_model, request).rows).save(directory)
    return directory
