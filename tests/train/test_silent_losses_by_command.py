"""What once was lost in silence, through the real commands: a message, and an adapter's merge."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lrmc_ray.console import run_command
from lrmc_ray.record.command import main as record
from lrmc_ray.train.command import main as train
from tests.support.tiny import make_data, make_model

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

QWEN_LIKE = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Leaves out a message of a role that it does not know, as Qwen's template does."""


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """A command in an own folder: its exit code, and its results or its error."""
    monkeypatch.chdir(tmp_path)

    def run(command, *options: str):
        code = run_command(command, [*options, "--output", "out", "--json"])
        shown = capsys.readouterr()
        if code:
            return code, " ".join(shown.err.split())
        return code, json.loads(shown.out.splitlines()[-1])

    return run


def logits_of(model) -> torch.Tensor:
    """Logits of fixed tokens, by transformers alone."""
    ids_BT = torch.arange(40, 72).view(2, 16)
    with torch.inference_mode():
        return model.float().eval()(ids_BT).logits


@pytest.mark.parametrize(("targets", "tied"), [((), True), (("q_proj", "down_proj"), False)])
def test_the_exported_model_is_the_one_whose_adapters_were_trained(targets, tied, run, tmp_path):
    base = make_model(tmp_path / "base", tied=tied)
    data = make_data(tmp_path / "train.jsonl", num_rows=24)
    options = ["--model", str(base), "--train-data", str(data), "--lora-rank", "4"]
    options += ["--lr", "0.01", "--steps", "3", "--batch-size", "8", "--micro-batches", "1"]
    options += [f"train.lora_targets={json.dumps(targets)}"] if targets else []
    code, shown = run(train, *options)
    assert code == 0, shown
    (model,) = (tmp_path / "out").glob("**/model/adapter")
    before = logits_of(AutoModelForCausalLM.from_pretrained(base))
    adapted = logits_of(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), model)
    )
    exported = logits_of(AutoModelForCausalLM.from_pretrained(model.parent))
    assert (adapted - before).norm() > 0.02 * before.norm()
    torch.testing.assert_close(exported, adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("target", "tied"), [("embed_tokens", True), ("lm_head", False)])
def test_an_adapter_that_could_not_be_exported_is_refused(target, tied, run, tmp_path):
    base = make_model(tmp_path / "base", tied=tied)
    data = make_data(tmp_path / "train.jsonl", num_rows=24)
    options = ["--model", str(base), "--train-data", str(data), "--lora-rank", "4"]
    code, error = run(train, *options, f'train.lora_targets=["{target}"]')
    assert code == 2
    assert f"'{target}'" in error
    assert not list((tmp_path / "out").glob("**/model"))


@pytest.mark.parametrize("role", ["developer", "human"])
def test_a_message_that_the_template_drops_is_refused_with_its_line(role, run, tmp_path):
    base = make_model(tmp_path / "base")
    (base / "chat_template.jinja").write_text(QWEN_LIKE)
    known = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "Two."}]
    rows = [known, known, [{"role": role, "content": "Answer in words."}, *known]]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    code, error = run(record, "--model", str(base), "--train-data", str(data))
    assert code == 4
    assert f"{data.name}:3" in error
    assert f"of the role '{role}'" in error
    assert not list((tmp_path / "out").glob("**/manifest.json"))
