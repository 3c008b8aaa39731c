"""What is scored is what is learned, on the chat template of Qwen3 and on others."""

from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import LlamaConfig, LlamaForCausalLM

from lrmc_ray.chat.answers import Chat
from lrmc_ray.chat.conversation import spoken_answer
from lrmc_ray.evaluate.prefix_lm import PrefixLM
from lrmc_ray.record.encode import encode_row
from lrmc_ray.record.rows import Row
from tests.support.chat_templates import shipped, tokenizer_for

HISTORY = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two?"}]
SQL = "SELECT 1;"


def language_model(tokenizer, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    return PrefixLM(model, tokenizer, batch_tokens=512, template_options=options)


@pytest.mark.parametrize(
    ("name", "options", "before", "behind"),
    [
        ("qwen3", {}, "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"),
        (
            "qwen3",
            {"enable_thinking": False},
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "",
        ),
        ("qwen3_6", {}, "<|im_start|>assistant\n<think>\n", "\n</think>\n\n"),
        ("qwen2_5", {}, "<|im_start|>assistant\n", ""),
        (None, {}, "Assistant:\n", ""),
    ],
)
def test_the_text_scored_is_the_text_learned(name, options, before, behind, monkeypatch):
    tokenizer = tokenizer_for(shipped()[name] if name else None)
    row = {"messages": [*HISTORY, {"role": "assistant", "content": SQL}]}
    (example,) = encode_row(Row("x:1", row), Chat(tokenizer, options))
    start = example.is_target.index(True)
    learned = [i for i, wanted in zip(example.input_ids, example.is_target, strict=True) if wanted]
    lm = language_model(tokenizer, **options)
    prompt = lm.apply_chat_template(HISTORY)
    assert prompt.endswith(before)
    request = Instance("loglikelihood", {}, (prompt, SQL), 0)
    asked: list[Any] = []

    def answer(requests, **_):
        asked.extend(requests)
        return [(0.0, True)]

    monkeypatch.setattr(lm, "_loglikelihood_tokens", answer)
    lm.loglikelihood([request], disable_tqdm=True)
    ((_, context_ids, answer_ids),) = asked
    assert context_ids == example.input_ids[:start]
    assert answer_ids == learned[:-1]  # the end of the turn is no part of the gold query
    assert request.args == (prompt, behind + SQL)
    assert tokenizer.decode(answer_ids) == behind + SQL


@pytest.mark.parametrize(
    ("prompt", "written", "spoken"),
    [
        ("assistant\n", "SELECT 1;", "SELECT 1;"),
        ("assistant\n", "<think>\n\n", None),
        ("assistant\n", "<think>\n\n</think>\n\nSELECT 1;", "SELECT 1;"),
        ("assistant\n<think>\n", "One;\n\nand one.\n", None),
        ("assistant\n<think>\n", "One;\n\n</think>\n\nSELECT 1;", "SELECT 1;"),
        ("assistant\n<think>\n\n</think>\n\n", "SELECT 1;", "SELECT 1;"),
        ("Say </think>", "<think>", None),
    ],
)
def test_the_answer_stands_behind_a_closed_think_block(prompt, written, spoken):
    assert spoken_answer(prompt, written) == spoken


def test_stop_strings_do_not_stop_within_a_think_block(monkeypatch):
    tokenizer = tokenizer_for(shipped()["qwen3"])
    lm = language_model(tokenizer)
    script = tokenizer("<think>\n\n</think>\n\nTwo;\n\nTwo", add_special_tokens=False)["input_ids"]
    steps = iter(script)

    def logits(hidden_BD):
        return torch.nn.functional.one_hot(
            torch.tensor([next(steps)] * len(hidden_BD)), len(tokenizer)
        ).float()

    monkeypatch.setattr(lm._shared, "logits", logits)
    settings = {"until": [";", "\n\n"], "max_gen_toks": 64, "do_sample": False}
    request = Instance("generate_until", {}, (lm.apply_chat_template(HISTORY), settings), 0)
    assert lm.generate_until([request], disable_tqdm=True) == ["Two"]
