"""Every kernel as a GPU's compiler takes it: the interpreter takes more than the compiler does."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def test_every_kernel_compiles_with_all_its_options(tmp_path):
    """For compute capability 9.0, which needs no GPU. None has more than fits on a processor."""
    result = subprocess.run(
        [sys.executable, "benchmarks/launch_plan.py", "--quick"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    kernels = json.loads(result.stdout.splitlines()[-1])["kernels"]
    kinds = {name.partition(",")[0].partition(" ")[0] for name in kernels}
    assert kinds == {
        *("candidate_loss", "add_token_rows", "add_partial_rows"),
        *("part_products", "part_gradients", "add_parts", "tile_products", "tile_gradients"),
        *("tail_products", "add_tail_to_hidden", "add_tail_to_weight"),
        *("row_losses", "row_derivatives"),
        *("chunk_dots", "add_spans", "chunk_update", "set_to_one"),
    }
    for name, row in kernels.items():
        assert row["programs"] >= 1, name
        assert row["stack_bytes"] <= 64, name
