"""The estimates behind the choice against what was measured, and the choice."""

import re
from pathlib import Path

import pytest
import torch

from lrmc_ray.method.fast import moclip_launch
from lrmc_ray.method.fast.backend_choice import (
    LossSize,
    cross_entropy_seconds,
    dense_kernel_seconds,
    dense_seconds,
    kernel_backend,
    kernel_seconds,
    logits_backend,
    sparse_seconds,
)
from lrmc_ray.method.fast.candidate_logits import loss_size
from lrmc_ray.method.head import OutputHead
from lrmc_ray.method.subsets import CandidateSets

README = Path(__file__).parents[3] / "benchmarks" / "README.md"
TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def measured() -> list[tuple[LossSize, float, float]]:
    """Size, seconds of all logits, and seconds of the sparse way, from the table of the H100."""
    pattern = (
        r"^\| (\d+), (\d+), (\d+), (\d+) \| (float32|bf16) \| ([\d.]+) \| ([\d.]+) \([\d.]+x\) \|"
    )
    found = []
    for rows, hidden, vocabulary, mean, kind, dense, sparse in re.findall(
        pattern, README.read_text("utf-8"), flags=re.M
    ):
        entries = int(rows) * int(mean)
        size = LossSize(int(rows), int(hidden), int(vocabulary), entries, TYPES[kind])
        found.append((size, float(dense) / 1e3, float(sparse) / 1e3))
    return found


def test_estimates_are_what_was_measured():
    assert len(measured()) == 8
    for size, dense, sparse in measured():
        assert cross_entropy_seconds(size) == pytest.approx(dense, rel=0.2)
        assert sparse_seconds(size) == pytest.approx(sparse, rel=0.2)


def test_candidates_alone_are_taken_at_every_size_that_was_measured():
    for size, _, _ in measured():
        assert kernel_backend(size) == "kernel"
        assert kernel_seconds(size) < min(cross_entropy_seconds(size), sparse_seconds(size))
        assert kernel_backend(size, gathers=False) == "dense_kernel"


@pytest.mark.parametrize("dtype", TYPES.values(), ids=str)
def test_all_logits_are_taken_where_they_cost_less(dtype):
    """Few positions, a small vocabulary, or nearly all of it among the candidates."""
    for rows, hidden, vocabulary, entries in (
        (8, 576, 4096, 200),
        (128, 64, 1000, 32_000),
        (512, 576, 49_152, 512 * 49_152 // 2),
    ):
        size = LossSize(rows, hidden, vocabulary, entries, dtype)
        assert kernel_backend(size) == "dense_kernel"
        assert dense_kernel_seconds(size) < kernel_seconds(size)
        assert dense_kernel_seconds(size) < dense_seconds(size)


def test_an_estimate_grows_with_everything():
    size = LossSize(1000, 576, 49_152, 24_000, torch.bfloat16, longest=200)
    for more in (
        LossSize(1000, 1152, 49_152, 24_000, torch.bfloat16, longest=200),
        LossSize(1000, 576, 49_152, 48_000, torch.bfloat16, longest=200),
        LossSize(1000, 576, 49_152, 24_000, torch.float32, longest=200),
        LossSize(1000, 576, 49_152, 24_000, torch.bfloat16, num_tail=64, longest=200),
        LossSize(1000, 576, 49_152, 24_000, torch.bfloat16, longest=400),
        LossSize(1000, 576, 49_152, 24_000, torch.bfloat16),  # unknown: as long as it may be
    ):
        assert kernel_seconds(more) > kernel_seconds(size)
        if more.longest == 200:  # only this one has a program that is waited for
            assert dense_kernel_seconds(more) > dense_kernel_seconds(size)
            assert dense_seconds(more) > dense_seconds(size)


def test_a_row_that_is_divided_costs_launches_and_no_longer_its_length():
    """By hand: 256 rows of 1152 bytes twice at 20 GB/s, and four launches of 10 us."""

    def seconds(longest: int) -> float:
        return kernel_seconds(LossSize(1000, 576, 49_152, 24_000, torch.bfloat16, longest=longest))

    assert seconds(256) - seconds(0) == pytest.approx(2 * 256 * 1152 / 20e9)
    assert seconds(257) - seconds(256) == pytest.approx(40e-6)
    assert seconds(1024) == seconds(257)


def test_without_kernels_the_device_decides():
    few = LossSize(10, 64, 6000, 10_000, torch.float32)
    many = LossSize(10, 64, 6000, 10_001, torch.float32)  # more than a sixth of all logits
    assert logits_backend("cpu", few) == "sparse"
    assert logits_backend("cpu", many) == "dense"
    assert logits_backend("cuda", few) == "dense"
    large = LossSize(2048, 640, 262_144, 49_152, torch.float32)
    assert logits_backend("cuda", large) == "sparse"
    assert logits_backend("mps", large) == "gather"


def test_the_size_reads_no_value_of_a_tensor():
    sets = CandidateSets(
        torch.tensor([0, 2, 5]),
        torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32),
        torch.full((5,), -3.0, dtype=torch.float16),
        torch.tensor([1, 3], dtype=torch.int32),
    )
    head = OutputHead(torch.zeros(9, 4, device="meta"), whole_size=40)
    hidden = torch.zeros(2, 4, device="meta")
    size = loss_size(hidden, head, sets.to("meta"), 7)
    assert size == LossSize(2, 4, 40, 5, torch.float32, 7, None)
    assert loss_size(hidden, head, sets.planned().to("meta")).longest == 3


def test_no_kernel_of_a_step_is_chosen_unless_it_is_asked_for(monkeypatch):
    """No GPU has run them yet."""
    monkeypatch.setattr(moclip_launch, "works_on_gpu", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("LRMC_TRITON", raising=False)
    found = [moclip_launch.runs_on(torch.device("cuda"))]
    for value in ("0", "1"):
        monkeypatch.setenv("LRMC_TRITON", value)
        found.append(moclip_launch.runs_on(torch.device("cuda")))
    assert found == [False, False, True]
    assert not moclip_launch.runs_on(torch.device("cpu"))
