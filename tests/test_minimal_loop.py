"""The example: it trains, without Ray, and reports the loss that transformers would."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.tiny import make_data

EXAMPLE = Path(__file__).parents[1] / "examples" / "minimal_loop.py"
# What is loaded at the end goes to the standard error stream.
RUN = f"""
import runpy, sys
sys.argv = [{str(EXAMPLE)!r}, *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
print("loaded ray:", "ray" in sys.modules, file=sys.stderr)
"""


def losses(*arguments: str, timeout: int = 240) -> tuple[float, float]:
    """Before and after, in nats per token of a held-out answer."""
    result = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        capture_output=True, text=True, check=True, timeout=timeout,
    )  # fmt: skip
    assert "loaded ray: False" in result.stderr
    before = re.search(r"^before: (\d+\.\d{4}) nats per token", result.stdout, re.MULTILINE)
    after = re.search(
        r"^after:  (\d+\.\d{4}), \d+ steps of 8 samples$", result.stdout, re.MULTILINE
    )
    return float(before[1]), float(after[1])


def loss_by_transformers(model_directory: Path, rows: list[dict[str, str]]) -> float:
    """The mean over all answers' tokens, by the model's own labels."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    total, count = 0.0, 0
    for row in rows:
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        answer_ids = tokenizer.encode(row["completion"] + "<|im_end|>", add_special_tokens=False)
        ids = torch.tensor([prompt_ids + answer_ids])
        labels = torch.tensor([[-100] * len(prompt_ids) + answer_ids])
        with torch.no_grad():
            mean = model(input_ids=ids, labels=labels).loss
        total += float(mean) * len(answer_ids)
        count += len(answer_ids)
    return total / count


def test_the_loss_on_held_out_answers_falls(tiny_model, tmp_path):
    data = make_data(tmp_path / "rows.jsonl", num_rows=40)
    before, after = losses("--model", str(tiny_model), "--data", str(data), "--lr", "0.01",
                           "--steps", "10")  # fmt: skip
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    assert before == pytest.approx(loss_by_transformers(tiny_model, rows[::5]), abs=1e-3)
    assert after < 0.5 * before


@pytest.mark.slow
def test_it_learns_the_demos_questions():
    before, after = losses(timeout=1200)
    assert 0.5 < before < 4
    assert after < 0.6 * before
