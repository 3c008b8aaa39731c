"""The one JSON object of a round on a GPU, from what its parts print."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_summary

ROOT = Path(__file__).parents[1]


def head_methods(plain: float, kernel: float, tail: float) -> dict[str, dict[str, float]]:
    seconds = {
        gpu_summary.PLAIN: plain,
        gpu_summary.KERNEL: kernel,
        gpu_summary.TAIL: tail,
        gpu_summary.AUTO: kernel,
        gpu_summary.DENSE: kernel,
        "liger-kernel": 2 * kernel,
    }
    return {name: {"seconds": value, "extra_memory_share": 0.03} for name, value in seconds.items()}


def write(folder: Path, name: str, values: object, code: int = 0) -> None:
    text = f"a table\n{json.dumps(values)}\n" if values is not None else "it broke\n"
    (folder / f"{name}.txt").write_text(text)
    (folder / f"{name}.exit").write_text(f"{code}\n")


def test_rows_have_goals_and_what_was_found(tmp_path):
    sizes = [*gpu_summary.HEAD_GOALS, "16,576,49152,24"]
    results = [{"size": size, "methods": head_methods(1.2, 0.2, 0.6)} for size in sizes]
    write(tmp_path, "peers", None)
    write(tmp_path, "fused", {"losses": {}})
    write(tmp_path, "correctness", None)
    write(tmp_path, "head", {"results": results})
    write(tmp_path, "head_float32", {"results": []})
    write(tmp_path, "moclip", {"moclip_over_fused_adamw": 1.5})
    write(tmp_path, "step", {"trainer_over_defaults": 1.25})
    write(tmp_path, "qwen_model", None)
    step = {"trainer_over_defaults": 1.3, "variants": {"default": {"memory_ratio": 0.7}}}
    write(tmp_path, "qwen_step", step)
    write(tmp_path, "qwen_record", {"recording_over_forward": 0.95})
    found = gpu_summary.summary(tmp_path)
    assert found["is_correct"]
    assert not found["failed"]
    rows = found["rows"]
    first, *_, last = gpu_summary.HEAD_GOALS
    assert rows[f"head {first}"]["found"] == pytest.approx(6.0)
    assert rows[f"head {first}"]["is_reached"] is True
    assert rows[f"head {last}"]["is_reached"] is False
    assert rows[f"head {last}, tail"]["found"] == pytest.approx(2.0)
    assert rows[f"head {last}, memory"]["is_reached"] is True
    assert rows[f"head {first} against liger-kernel"]["found"] == pytest.approx(2.0)
    assert not any("cut-cross-entropy" in name for name in rows)
    assert rows["auto 16,576,49152,24"]["is_reached"] is True
    assert rows["all logits 16,576,49152,24"]["found"] == pytest.approx(6.0)
    assert rows["moclip over fused AdamW"]["is_reached"] is True
    assert rows["step, SmolLM2"]["is_reached"] is False
    assert rows["memory, Qwen3-1.7B"]["found"] == 0.7
    assert rows["recording, Qwen3-1.7B"]["is_reached"] is True


def test_a_part_that_failed_is_named_and_its_rows_are_empty(tmp_path):
    write(tmp_path, "correctness", None, code=1)
    write(tmp_path, "moclip", None, code=124)
    result = subprocess.run(
        [sys.executable, "benchmarks/gpu_summary.py", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert not found["is_correct"]
    assert found["failed"]["correctness"] == "exit code 1"
    assert found["failed"]["moclip"] == "took too long"
    assert found["failed"]["head"] == "not run"
    assert all(row["found"] is None for row in found["rows"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_round_says_so_in_one_line(tmp_path):
    result = subprocess.run(
        ["bash", "benchmarks/gpu_round.sh", str(tmp_path / "round")],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "measures on an NVIDIA GPU, but torch sees none here" in result.stderr
    assert not (tmp_path / "round").exists()


def test_the_round_has_all_parts_and_ends_within_ten_minutes():
    script = (ROOT / "benchmarks" / "gpu_round.sh").read_text(encoding="utf-8")
    parts = re.findall(r"^  part (\w+) (\d+) ", script, flags=re.MULTILINE)
    assert {name for name, _ in parts} == set(gpu_summary.PARTS)
    assert sum(int(seconds) for _, seconds in parts) <= 600


def test_without_a_gpu_the_round_says_what_it_needs(tmp_path):
    result = subprocess.run(
        ["bash", "benchmarks/gpu_round.sh", str(tmp_path / "round")],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "but torch sees none here" in result.stderr
    assert not (tmp_path / "round").exists()


@pytest.mark.slow
def test_every_part_of_the_round_runs_dry(tmp_path):
    """At small sizes on the CPU, the kernels interpreted: only a GPU is missing."""
    result = subprocess.run(
        ["bash", "benchmarks/gpu_round.sh", "--dry-run", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert not found["failed"]
    for name in (
        "moclip over fused AdamW",
        "step, SmolLM2",
        "step, Qwen3-1.7B",
        "memory, Qwen3-1.7B",
        "recording, Qwen3-1.7B",
        "auto 20,16,40,38",
    ):
        assert found["rows"][name]["found"] > 0
