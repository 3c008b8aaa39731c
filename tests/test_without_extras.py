"""The stages with the core's own dependencies alone: no package of an extra may be needed."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.tiny import make_data

ROOT = Path(__file__).parents[1]
WITHOUT = """
import sys

NAMES = {names!r}


class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            return None
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Without, sys.meta_path)
"""


def core_distributions() -> set[str]:
    """What `pip install lrmc_ray` brings, by canonical names."""
    found: set[str] = set()
    todo = [(Requirement("lrmc_ray"), "")]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *sorted(requirement.extras)):
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                lines = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            found.add(name)
            todo += [(Requirement(line), wanted) for line in lines]
    return found


def names_of_extras() -> set[str]:
    """Importable names that no distribution of the core ships."""
    core = core_distributions()
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not core.intersection(map(canonicalize_name, owners))
    } - {"pip", "setuptools", "pkg_resources", "_distutils_hack"}


@pytest.fixture(scope="module")
def core_alone(tmp_path_factory) -> dict[str, str]:
    """An environment in which Python and all it starts import nothing of the extras."""
    names = names_of_extras() | {"triton"}
    assert {"pytest", "triton"} <= names
    assert not {"torch", "ray", "numba", "transformers", "mlflow", "lm_eval"} & names
    directory = tmp_path_factory.mktemp("core_alone")
    (directory / "sitecustomize.py").write_text(WITHOUT.format(names=sorted(names)))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(directory), str(ROOT)])}


def test_the_block_holds(core_alone):
    script = "import numba\ntry:\n    import triton\nexcept ModuleNotFoundError: print('refused')"
    done = subprocess.run(
        [sys.executable, "-c", script], env=core_alone, capture_output=True, text=True, check=True
    )
    assert done.stdout == "refused\n"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_record_and_train_need_no_extra(core_alone, tiny_model, tmp_path):
    data = make_data(tmp_path / "train.jsonl", num_rows=12)
    flags = {
        "--model": tiny_model,
        "--train-data": data,
        "--output": tmp_path / "runs",
        "--steps": 2,
        "--batch-size": 4,
    }
    done = subprocess.run(
        [sys.executable, "-m", "lrmc_ray.train", *(f"{a}={b}" for a, b in flags.items())],
        env=core_alone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [metrics] = (tmp_path / "runs").rglob("metrics.jsonl")
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2]
