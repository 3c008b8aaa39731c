"""What the README tells people to type does what it says, here on a small model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def block(name: str) -> str:
    """The commands behind the marker ``name``."""
    found = re.search(rf"<!-- {name} -->\n```bash\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert found, f"README has no block {name}"
    return found[1]


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_example_of_own_data_runs_as_it_stands(tiny_model, tmp_path):
    commands = block("own-data")
    assert len(commands.splitlines()) <= 25
    commands = commands.replace(".venv/bin/python", sys.executable)
    (tmp_path / "my_model").symlink_to(tiny_model)
    commands = commands.replace("--model demo", "--model my_model --json evaluate.limit=8")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    directory = next((tmp_path / "my_runs").glob("*/study.json")).parent
    study = json.loads((directory / "study.json").read_text())
    assert [trial["state"] for trial in study["trials"]] == ["COMPLETE", "COMPLETE"]
    assert [trial["role"] for trial in study["trials"]] == ["defaults", "yardstick"]
    assert study["record"]["samples"] == 3
    tasks = {name.split("/")[2] for name in study["trials"][0]["results"] if name.count("/") == 3}
    assert {"wordnet", "plain_english"} <= tasks
    assert any("my_task" in name for name in study["trials"][0]["results"])
    assert (directory / "report.html").stat().st_size > 10_000
    assert (directory / "best_model" / "model.safetensors").is_file()
    assert result
