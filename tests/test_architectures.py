"""Models of transformers through all that is done with a model; see ``benchmarks/architectures``.

Those of the default tests are thirty that matter, and one of each family at least: attention with
sliding windows and with chunks, latent and sparse attention, positions by a bias, state spaces,
linear attention, recurrence, convolution, experts, images beside the text, and an encoder.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.architectures import (
    COLUMNS,
    MULTIMODAL,
    NEEDED,
    PAGE,
    Cell,
    Subject,
    counts,
    examine,
    main,
    page,
)
from benchmarks.tiny_models import causal_types
from tests.support.cases import rest_is_slow

torch.set_num_threads(1)

PACKED = [
    *("llama", "qwen2", "qwen3", "granite", "smollm3", "gpt2", "gpt_neox", "opt", "falcon"),
    *("mistral", "gemma2", "gemma3_text", "phi3", "olmo3", "cohere2", "llama4_text"),
    *("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "deepseek_v32"),
]
PADDED = [
    *("bloom", "gpt_neo", "mamba2", "jamba", "qwen3_next", "recurrent_gemma", "lfm2", "mistral3"),
]
FAMILIES = {
    **dict.fromkeys(PACKED, ("works", "works")),
    **dict.fromkeys(PADDED, ("works", "padded")),
    "bert": ("refused", ""),
}
"""What comes out, and what is said of packing."""


FEW = [
    *("llama", "qwen3", "gpt2", "gemma3_text", "phi3", "gpt_oss", "deepseek_v3"),
    *("mixtral", "mamba2", "qwen3_next", "bert"),
]


@pytest.mark.parametrize("model_type", rest_is_slow(FAMILIES, FEW))
def test_a_family_of_models(model_type):
    outcome, packing = FAMILIES[model_type]
    cells = examine(model_type)
    assert list(cells) == list(COLUMNS)
    if outcome == "refused":
        assert cells["load"].outcome == "works"
        assert {cells[name].outcome for name in COLUMNS if name != "load"} == {"refused"}
        assert f"(model_type {model_type}) is not causal" in cells["record"].why
        return
    assert {name: cell.outcome for name, cell in cells.items()} == dict.fromkeys(COLUMNS, "works")
    assert (cells["packing"].why or "works") == packing
    assert cells["LoRA"].why.endswith("%")


def test_a_wrong_number_and_a_traceback_are_told_apart(monkeypatch):
    """Logits that are off by a hundredth, and a column that raises."""

    loads = COLUMNS["load"]

    def damaged(subject: Subject) -> None:
        original = subject.logits
        monkeypatch.setattr(
            subject,
            "logits",
            lambda model, ids_T: original(model, ids_T) * (1.01 if model is subject.made else 1),
        )
        loads(subject)

    def broken(subject: Subject) -> None:
        raise KeyError("input_ids")

    monkeypatch.setitem(COLUMNS, "load", damaged)
    assert examine("llama")["load"].outcome == "wrong"
    monkeypatch.setitem(COLUMNS, "load", broken)
    cells = examine("llama")
    assert cells["load"] == Cell("traceback", "KeyError: 'input_ids'")
    assert counts({"llama": cells})["traceback"] == 1


def test_the_page_names_every_reason():
    good = dict.fromkeys(COLUMNS, Cell("works"))
    rows = {
        "a": good | {"LoRA": Cell("refused", "no layer"), "packing": Cell("works", "padded")},
        "b": good | dict.fromkeys(NEEDED, Cell("refused", "not causal")),
        "c": dict.fromkeys(COLUMNS, Cell("not_built", "needs timm")),
    }
    assert counts(rows) == {"works": 1, "refused": 1, "not_built": 1, "wrong": 0, "traceback": 0}
    text = page(rows)
    assert "| `a` | padded | works | refused: no layer |  |" in text
    assert "| `b` | refused | not causal |" in text
    assert "| `c` | not built | needs timm |" in text
    assert "1 types work, 1 are refused" in text


ALL_TYPES = sorted({*causal_types(), *MULTIMODAL})


def test_the_page_has_every_type():
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{model_type}` |" in text for model_type in ALL_TYPES)
    assert "0 give a wrong number, 0 end in a traceback" in text


def test_what_is_kept_is_not_tried_again(tmp_path, capsys):
    """One JSON object at the end counts what an earlier run has found as well."""
    kept = tmp_path / "rows.jsonl"
    assert main(["--types", "bert", "--keep", str(kept)]) == 0
    first = kept.read_text()
    capsys.readouterr()
    assert main(["--types", "bert,opt", "--keep", str(kept)]) == 0
    assert kept.read_text().startswith(first)
    printed = capsys.readouterr().out.splitlines()
    assert not any(line.startswith("bert") for line in printed)
    assert json.loads(printed[-1])["refused"] == json.loads(printed[-1])["works"] == 1


PARTS = 8


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_type(part):
    """The command itself, on an eighth of the types; what the page says of each comes out again."""
    types = ALL_TYPES[part::PARTS]
    script = Path(__file__).parents[1] / "benchmarks" / "architectures.py"
    done = subprocess.run(
        [sys.executable, str(script), "--types", ",".join(types)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, [line for line in done.stdout.splitlines() if "works" not in line]
    text = PAGE.read_text(encoding="utf-8")
    refused = sum(f"| `{name}` | refused |" in text for name in types)
    not_built = sum(f"| `{name}` | not built |" in text for name in types)
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "works": len(types) - refused - not_built,
        "refused": refused,
        "not_built": not_built,
        "wrong": 0,
        "traceback": 0,
    }
