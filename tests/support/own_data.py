"""The search that a document's block of commands starts, on a small model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.documents import ROOT, block


def study_of(name: str, tiny_model: Path, directory: Path) -> dict[str, Any]:
    """The study of the search that the block ``name`` starts, with the report beside it."""
    commands = block(name)
    assert commands.count("./lrmc tune") == 1
    commands = commands.replace("./lrmc tune", f"{sys.executable} -m lrmc_ray tune --json")
    (directory / "my_model").symlink_to(tiny_model)
    (directory / "examples").symlink_to(ROOT / "examples")
    shorter = "search.trials=2 train.steps=4 evaluate.limit=8"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{commands.rstrip()} --model my_model {shorter}"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])
    path = next((directory / "my_runs").glob("*/study.json"))
    assert path.with_name("report.html").stat().st_size > 10_000
    assert (path.parent / "best_model" / "model.safetensors").is_file()
    study: dict[str, Any] = json.loads(path.read_text())
    assert [trial["state"] for trial in study["trials"]] == ["COMPLETE", "COMPLETE"]
    assert [trial["role"] for trial in study["trials"]] == ["defaults", "yardstick"]
    return study


def tasks_of(study: dict[str, Any]) -> set[str]:
    """Tasks that its first trial was scored on."""
    names = [name.split("/") for name in study["trials"][0]["results"]]
    return {parts[2] for parts in names if len(parts) == 4}
