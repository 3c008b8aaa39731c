"""Other people's fused losses over the whole vocabulary, as ``restricted_head.py`` measures them.

    python benchmarks/fused_losses.py install FOLDER    # what can be had, into a folder of its own
    python benchmarks/fused_losses.py check [--device cuda] [--dtype bfloat16]

``check`` compares loss and gradients of each with logits and cross-entropy in float64, and says of
those that do not run why not. The last line is one JSON object. With ``FOLDER`` on PYTHONPATH they
are found. Nothing else in the environment is touched: neither needs more than torch and Triton.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PINS = {"liger-kernel": "0.8.5", "cut-cross-entropy": "25.1.1"}

FusedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Summed cross-entropy of hidden states [N, D], weight [V, D] and gold tokens [N], int64."""


def liger_loss() -> FusedLoss:
    """That of liger-kernel, whose gradients are made with the loss, in chunks."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, gold: loss(weight, hidden, gold)


def cut_loss() -> FusedLoss:
    """That of cut-cross-entropy, which by default leaves out gradients below a threshold."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, gold: linear_cross_entropy(hidden, weight, gold, reduction="sum")


LOSSES = {"liger-kernel": liger_loss, "cut-cross-entropy": cut_loss}


def problem(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and gold tokens of a small size."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 128, generator=generator)
    weight = torch.randn(300, 128, generator=generator) / 128**0.5
    gold = torch.randint(300, (64,), generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype), gold.to(device)


def errors(loss: FusedLoss, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Of loss and gradients, relative to the norms of those in float64 on the same numbers."""
    hidden, weight, gold = problem(device, dtype)
    ours = [x.requires_grad_() for x in (hidden, weight)]
    trues = [x.detach().double().requires_grad_() for x in ours]
    truth = F.cross_entropy(trues[0] @ trues[1].T, gold, reduction="sum")
    found = loss(ours[0], ours[1], gold)
    for value in (truth, found):
        value.backward()  # type: ignore[no-untyped-call]
    pairs = {"loss": (found.detach(), truth.detach())}
    for name, our, true in zip(("hidden", "weight"), ours, trues, strict=True):
        assert our.grad is not None
        assert true.grad is not None
        pairs[name] = our.grad, true.grad
    return {name: float((a.double() - b).norm() / b.norm()) for name, (a, b) in pairs.items()}


def check(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Version of each, its errors, and why it cannot be used, if so."""
    found: dict[str, dict[str, Any]] = {}
    for name, make in LOSSES.items():
        try:
            entry: dict[str, Any] = {"version": importlib.metadata.version(name)}
        except importlib.metadata.PackageNotFoundError:
            found[name] = {"problem": "not installed"}
            continue
        try:
            entry["errors"] = errors(make(), device, dtype)
        except Exception as error:  # whatever their kernels or Triton raise
            first = str(error).strip().partition("\n")[0]
            entry["problem"] = f"{type(error).__name__}: {first}"
        found[name] = entry
    return found


def usable(device: torch.device, dtype: torch.dtype) -> dict[str, FusedLoss]:
    """Those that run here; of the others a line says why not."""
    found = {}
    for name, entry in check(device, dtype).items():
        if problem_here := entry.get("problem"):
            print(f"{name}: {problem_here}")
        else:
            found[name] = LOSSES[name]()
    return found


def install(folder: str) -> None:
    """Get the pinned packages, without what they depend on."""
    for name, version in PINS.items():
        options = ["--quiet", "--no-deps", "--disable-pip-version-check", "--target", folder]
        command = [sys.executable, "-m", "pip", "install", *options, f"{name}=={version}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = result.stderr.strip().splitlines()
        what = "installed" if result.returncode == 0 else (lines or ["pip failed"])[-1]
        print(f"{name} {version}: {what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install").add_argument("folder")
    checks = commands.add_parser("check")
    checks.add_argument("--device", default="cpu")
    checks.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    if args.command == "install":
        install(args.folder)
        return
    found = check(torch.device(args.device), getattr(torch, args.dtype))
    for name, entry in found.items():
        print(f"{name}: {entry}")
    print(json.dumps({"benchmark": "fused_losses", "losses": found}))


if __name__ == "__main__":
    main()
