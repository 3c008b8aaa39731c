"""The fused losses of other packages that ``gpu_round.sh`` measures beside ours."""

import importlib.metadata
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import fused_losses

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def plain(hidden, weight, gold):
    return F.cross_entropy((hidden @ weight.T).float(), gold, reduction="sum")


def test_errors_are_those_of_the_loss_and_of_both_gradients():
    found = fused_losses.errors(plain, CPU, torch.float32)
    assert set(found) == {"loss", "hidden", "weight"}
    assert max(found.values()) < 1e-6
    # In bf16 logits and gradients are rounded, to 8 bits.
    rounded = fused_losses.errors(plain, CPU, torch.bfloat16)
    assert 1e-3 < rounded["weight"] < 2**-7
    twice = fused_losses.errors(lambda h, w, gold: 2 * plain(h, w, gold), CPU, torch.float32)
    assert twice == pytest.approx({"loss": 1.0, "hidden": 1.0, "weight": 1.0}, rel=1e-5)
    frozen = fused_losses.errors(lambda h, w, gold: plain(1.5 * h, w, gold), CPU, torch.float32)
    assert all(value > 0.01 for value in frozen.values())


def test_each_error_is_of_what_it_is_named_for():
    """The same loss, with twice the gradient of the weight alone."""

    def twice(hidden, weight, gold):
        return plain(hidden, 2 * weight - weight.detach(), gold)

    found = fused_losses.errors(twice, CPU, torch.float32)
    assert found["weight"] == pytest.approx(1.0, rel=1e-5)
    assert max(found["loss"], found["hidden"]) < 1e-6


def test_what_is_installed_is_pinned_and_brings_nothing_along(monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fused_losses.subprocess, "run", run)
    fused_losses.install("there")
    for command, (name, version) in zip(commands, fused_losses.PINS.items(), strict=True):
        assert command[-1] == f"{name}=={version}"
        assert "--no-deps" in command
        assert command[command.index("--target") + 1] == "there"


def test_losses_are_called_in_the_order_of_their_packages(monkeypatch):
    """liger-kernel takes the weight first, cut-cross-entropy the hidden states; both a sum."""

    class OfLiger:
        def __init__(self, reduction):
            assert reduction == "sum"

        def __call__(self, weight, hidden, gold):
            return plain(hidden, weight, gold)

    def of_cut(hidden, weight, gold, reduction):
        assert reduction == "sum"
        return plain(hidden, weight, gold)

    liger, cut = types.ModuleType("liger"), types.ModuleType("cut")
    monkeypatch.setattr(liger, "LigerFusedLinearCrossEntropyLoss", OfLiger, raising=False)
    monkeypatch.setattr(cut, "linear_cross_entropy", of_cut, raising=False)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", cut)
    for make in fused_losses.LOSSES.values():
        assert max(fused_losses.errors(make(), CPU, torch.float32).values()) < 1e-6


@pytest.mark.skipif(any(map(is_installed, fused_losses.PINS)), reason="one is installed")
def test_what_is_not_installed_is_left_out_and_named(capsys):
    assert fused_losses.usable(CPU, torch.float32) == {}
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{name}: not installed" for name in fused_losses.PINS]


def test_a_loss_that_cannot_run_is_named_with_its_error(monkeypatch, capsys):
    """Here packages that are there in any case, one with a loss that works."""

    def broken():
        raise RuntimeError("no such device\nmore")

    losses = {"pytest": broken, "torch": lambda: plain}
    monkeypatch.setattr(fused_losses, "LOSSES", losses)
    found = fused_losses.check(CPU, torch.float32)
    assert found["pytest"]["problem"] == "RuntimeError: no such device"
    assert found["torch"]["version"] == importlib.metadata.version("torch")
    assert "problem" not in found["torch"]
    assert list(fused_losses.usable(CPU, torch.float32)) == ["torch"]
    assert capsys.readouterr().out == "pytest: RuntimeError: no such device\n"


def test_without_an_index_the_installation_says_so_and_goes_on(tmp_path):
    result = subprocess.run(
        [sys.executable, "benchmarks/fused_losses.py", "install", str(tmp_path / "peers")],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    for line, (name, version) in zip(lines, fused_losses.PINS.items(), strict=True):
        assert line.startswith(f"{name} {version}: ")
        assert "No matching distribution" in line


def test_check_ends_with_one_object():
    result = subprocess.run(
        [sys.executable, "benchmarks/fused_losses.py", "check"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(result.stdout.splitlines()[-1])
    assert set(found["losses"]) == set(fused_losses.PINS)


def test_the_round_installs_before_it_measures_and_into_a_folder_of_its_own():
    script = (ROOT / "benchmarks" / "gpu_round.sh").read_text("utf-8")
    parts = re.findall(r"^  part (\w+)", script, flags=re.MULTILINE)
    assert parts.index("peers") < parts.index("fused") < parts.index("head")
    assert 'install "$folder/peers"' in script
    assert 'rm -rf "$folder/qwen" "$folder/peers"' in script
