"""Every shipped chat template with every kind of conversation.

What is expected is built from the rendering at inference: the tokens of the generation prompt of
the conversation up to an answer, then the text behind it in the rendering of both.
"""

import functools

import pytest

from lrmc_ray.chat.answers import Chat
from lrmc_ray.errors import DataError
from lrmc_ray.record.encode import encode_row
from lrmc_ray.record.rows import Row
from tests.support.chat_templates import SPECIAL, shipped, tokenizer_for

TEMPLATES = shipped()
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "its name"}},
            "required": ["city"],
        },
    },
}


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


ROWS = {
    "one": {"messages": [user("2?"), answer("Two.")]},
    "two": {"messages": [user("Ohm?"), answer("U = R I"), user("Power?"), answer("P = U I")]},
    "system": {
        "messages": [{"role": "system", "content": "Be brief."}, user("2?"), answer("Two.")]
    },
    "reasoning": {"messages": [user("2?"), answer("Two.", reasoning_content="One and one.")]},
    "unlearned": {"messages": [user("a?"), answer("bad", weight=0), user("2?"), answer("Two.")]},
    "tools": {
        "messages": [
            user("Rome?"),
            answer("", tool_calls=[CALL]),
            {"role": "tool", "name": "weather", "content": "sunny"},
            answer("Sunny."),
        ],
        "tools": [TOOL],
    },
}
THINKS = {
    *("deepseek_r1_distill", "deepseekv3", "nemotron_3_5_lightning", "nemotron_3_nano"),
    *("nemotron_3_super", "nemotron_3_ultra", "qwen3_5_think", "qwen3_6", "qwen3_8"),
}
"""Templates whose generation prompt opens a think block."""
REASONS = {
    *("glm4moe", "gptoss", "qwen3", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "muse_glimmer"),
    *("diffusion_gemma", "gemma4_v5", *THINKS),
}
"""Templates that render ``reasoning_content``."""
CALLS = {
    *("diffusion_gemma", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "glm4moe"),
    *("gptoss", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "lfm2_v2", "llama3_1", "llama3_2"),
    *("muse_glimmer", "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super"),
    *("nemotron_3_ultra", "qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"),
    *("qwen3_8", "qwen3_instruct_2507", "qwen3_vl"),
}
"""Templates that render tools, their calls and their results."""
NO_SYSTEM = {"gemma"}


def is_rendered(name, case) -> bool:
    original = name.removesuffix("_training")
    if case == "system":
        return original not in NO_SYSTEM
    if case == "reasoning":
        return original in REASONS
    return case != "tools" or original in CALLS


@functools.cache
def tokenizer_of(name):
    return tokenizer_for(TEMPLATES[name])


def in_parts(messages, name):
    """As templates for images want a content."""
    if name.removesuffix("_training") not in ("idefics3", "smolvlm", "llava_next"):
        return messages
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def expected_answers(row, name):
    """Prompt tokens and text of every answer that is to be learned, in their order."""
    tokenizer = tokenizer_of(name)
    messages = in_parts(row["messages"], name)
    tools = row.get("tools")
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        ids = tokenizer.apply_chat_template(
            messages[:index], tools=tools, add_generation_prompt=True, return_dict=False
        )
        before = tokenizer.apply_chat_template(
            messages[:index], tools=tools, add_generation_prompt=True, tokenize=False
        )
        after = tokenizer.apply_chat_template(messages[: index + 1], tools=tools, tokenize=False)
        yield ids, after[len(before) :] if after.startswith(before) else None


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_learned_behind_the_prompt_that_inference_has(name, case):
    row, tokenizer = ROWS[case], tokenizer_of(name)
    if not is_rendered(name, case):
        with pytest.raises(DataError, match=r"does not render|refuses|behind its generation"):
            encode_row(Row("x:1", row), Chat(tokenizer))
        return
    examples = encode_row(Row("x:1", row), Chat(tokenizer))
    spans = []
    for example in examples:
        learned = [i for i, wanted in enumerate(example.is_target) if wanted]
        starts = [i for i in learned if i == 0 or not example.is_target[i - 1]]
        spans += [(example, start) for start in starts]
    wanted = list(expected_answers(row, name))
    assert len(spans) == len(wanted)
    for (example, start), (prompt_ids, text) in zip(spans, wanted, strict=True):
        stop = example.is_target.index(False, start) if False in example.is_target[start:] else None
        said = tokenizer.decode(example.input_ids[start:stop])
        assert example.input_ids[: len(prompt_ids)] == prompt_ids
        if (name, case) == ("diffusion_gemma_training", "tools"):
            # TRL's marks leave out the header that no prompt holds behind a tool's result.
            continue
        assert start == len(prompt_ids)
        spoken = "weather" if case == "tools" and "weather" in said else "Sunny."
        if case != "tools":
            content = {"two": ("U = R I", "P = U I")}.get(case, ("Two.",))
            spoken = next(part for part in content if part in said)
        assert spoken in said
        if case == "reasoning":
            assert "One and one." in said
        if text is not None:
            # All of it but what stands behind the end of the turn; glm4moe's turns are ended by
            # the next one's header.
            assert text.startswith(said) or said.startswith(text)
            assert not SPECIAL.sub("", text[len(said) :]).strip()
        else:
            assert name.removesuffix("_training") in THINKS
            assert "</think>" in said
            assert "<think>" not in said
        last = example.input_ids[stop - 1 if stop else -1]
        assert last in tokenizer.all_special_ids or tokenizer.added_tokens_decoder[last].special


def test_the_samples_of_qwen3_are_these():
    tokenizer = tokenizer_of("qwen3")
    examples = encode_row(Row("x:1", ROWS["two"]), Chat(tokenizer))
    assert [tokenizer.decode(example.input_ids) for example in examples] == [
        "<|im_start|>user\nOhm?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nU = R I<|im_end|>\n",
        "<|im_start|>user\nOhm?<|im_end|>\n<|im_start|>assistant\nU = R I<|im_end|>\n"
        "<|im_start|>user\nPower?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nP = U I<|im_end|>\n",
    ]


def test_an_option_of_the_template_reaches_it():
    tokenizer = tokenizer_of("qwen3")
    (example,) = encode_row(Row("x:1", ROWS["one"]), Chat(tokenizer, {"enable_thinking": False}))
    start = example.is_target.index(True)
    assert tokenizer.decode(example.input_ids[:start]) == (
        "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    with pytest.raises(DataError, match="got 'enable_thinkin', which does not occur"):
        Chat(tokenizer, {"enable_thinkin": False})
