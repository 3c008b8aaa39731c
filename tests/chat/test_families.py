"""Templates that behave as those of well-known families, with what is learned written out.

The prompts are rendered by transformers; what is said was written by hand, from what each family's
model has to write behind its prompt.
"""

import pytest

from lrmc_ray.chat.answers import Chat
from lrmc_ray.errors import DataError
from lrmc_ray.record.encode import encode_row
from lrmc_ray.record.rows import Row
from tests.support.chat_templates import (
    COMMAND_R7B,
    DEEPSEEK_V3_1,
    DEFAULT_SYSTEM,
    GLM_4_7,
    MINIMAX_M2,
    NEMOTRON_3,
    tokenizer_for,
)

TOKENIZERS = {
    "Command R7B": tokenizer_for(COMMAND_R7B, "<|USER_TOKEN|>"),
    "MiniMax-M2": tokenizer_for(MINIMAX_M2, "]~!b[", "]~b]", "[e~["),
    "Devstral": tokenizer_for(DEFAULT_SYSTEM, "</s>", "[INST]", "[/INST]", "[SYS]", "[/SYS]"),
    "DeepSeek-V3.1": tokenizer_for(DEEPSEEK_V3_1),
    "GLM-4.7": tokenizer_for(GLM_4_7, "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"),
    "Nemotron 3": tokenizer_for(NEMOTRON_3),
}


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
ROWS = {
    "one": [user("2?"), answer("Two.")],
    "two": [user("Ohm?"), answer("U = R I"), user("Power?"), answer("P = U I")],
    "system": [SYSTEM, user("2?"), answer("Two.")],
    "reasoning": [user("2?"), answer("Two.", reasoning_content="One and one.")],
    "reasoned before": [
        user("Ohm?"),
        answer("U = R I", reasoning_content="A law."),
        user("Power?"),
        answer("P = U I", reasoning_content="A product."),
    ],
    "unlearned": [user("a?"), answer("bad", weight=0), user("2?"), answer("Two.")],
}
REASONS = {"Command R7B", "MiniMax-M2", "GLM-4.7", "Nemotron 3"}
"""Families that render ``reasoning_content``."""
WITHOUT, WITH = {}, {}
for family, before, between, behind in (
    (
        "Command R7B",
        "<|END_THINKING|><|START_RESPONSE|>",
        "<|END_THINKING|><|START_RESPONSE|>",
        "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    ),
    ("MiniMax-M2", "\n</think>\n\n", "\n</think>\n\n", "[e~["),
    ("Devstral", "", None, "</s>"),
    ("DeepSeek-V3.1", "", None, "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    ("GLM-4.7", "</think>", "</think>", "<|user|>"),
    ("Nemotron 3", "</think>", "\n</think>", "<|im_end|>"),
):
    WITHOUT[family] = (before, behind)
    WITH[family] = (between, behind)


def said_of(family, message):
    """What the model has to write behind its prompt."""
    if reasoning := message.get("reasoning_content"):
        between, behind = WITH[family]
        return f"{reasoning}{between}{message['content']}{behind}"
    before, behind = WITHOUT[family]
    return f"{before}{message['content']}{behind}"


def learned(examples):
    """Example, start and end of everything that is learned."""
    for example in examples:
        mask = [*example.is_target, False]
        starts = [i for i, wanted in enumerate(mask) if wanted and (i == 0 or not mask[i - 1])]
        for start in starts:
            yield example, start, mask.index(False, start)


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("family", TOKENIZERS)
def test_an_answer_is_what_the_model_has_to_write_behind_its_prompt(family, case):
    tokenizer, messages = TOKENIZERS[family], ROWS[case]
    row = Row("x:1", {"messages": messages})
    if "reason" in case and family not in REASONS:
        with pytest.raises(DataError, match="does not render 'reasoning_content'"):
            encode_row(row, Chat(tokenizer))
        return
    spans = list(learned(encode_row(row, Chat(tokenizer))))
    wanted = [
        (index, message)
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight") != 0
    ]
    assert len(spans) == len(wanted)
    for (example, start, stop), (index, message) in zip(spans, wanted, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[:index], add_generation_prompt=True, return_dict=False
        )
        assert example.input_ids[:start] == prompt
        assert tokenizer.decode(example.input_ids[start:stop]) == said_of(family, message)


@pytest.mark.parametrize("family", TOKENIZERS)
def test_an_answer_that_comes_first_is_learned_without_a_default_system_prompt(family):
    tokenizer = TOKENIZERS[family]
    messages = [answer("Hello."), user("2?"), answer("Two.")]
    spans = list(learned(encode_row(Row("x:1", {"messages": messages}), Chat(tokenizer))))
    texts = [tokenizer.decode(example.input_ids[a:b]) for example, a, b in spans]
    behind = WITHOUT[family][1]
    assert texts[0].endswith(f"Hello.{behind}")
    assert "You are" not in texts[0]
    assert "Be good" not in texts[0]
    assert texts[1] == said_of(family, messages[2])
    assert len(texts) == 2


@pytest.mark.parametrize(
    ("family", "options", "prompt", "said"),
    [
        ("DeepSeek-V3.1", {"thinking": True}, "<think>", "</think>Two."),
        ("GLM-4.7", {"enable_thinking": False}, "</think>", "Two."),
    ],
)
def test_an_option_decides_whether_the_prompt_opens_a_block(family, options, prompt, said):
    tokenizer = TOKENIZERS[family]
    row = Row("x:1", {"messages": ROWS["one"]})
    ((example, start, stop),) = learned(encode_row(row, Chat(tokenizer, options)))
    assert tokenizer.decode(example.input_ids[:start]).endswith(prompt)
    assert tokenizer.decode(example.input_ids[start:stop]) == said + WITHOUT[family][1]


@pytest.mark.parametrize("family", TOKENIZERS)
def test_what_is_scored_is_what_is_learned(family):
    tokenizer = TOKENIZERS[family]
    chat = Chat(tokenizer)
    form = chat.form([user("2?")])
    (example,) = encode_row(Row("x:1", {"messages": ROWS["one"]}), chat)
    start = example.is_target.index(True)
    assert tokenizer.decode(example.input_ids[:start]) == form.prompt
    assert form.opening + "Two." + form.closing == said_of(family, ROWS["one"][1])
    if family in REASONS:
        written = said_of(family, answer("Two.", reasoning_content="1;\n\n2;"))
        for characters in range(written.index("Two.")):
            said = form.spoken(written[:characters])
            assert not said.has_begun or said.text == ""
        said = form.spoken(written)
        assert (said.text, said.has_begun, said.has_ended) == ("Two.", True, True)
