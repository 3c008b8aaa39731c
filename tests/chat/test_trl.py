"""What is learned, held against what TRL learns with its own training templates.

TRL writes a second template for each model, which marks what the assistant generates. Where the two
differ, TRL's is not what a model has to write at inference:

- it learns what the generation prompt holds already: a header (gpt-oss, DeepSeek), the line break
  behind it (Qwen2.5), the opening of a think block (Qwen3.5, Nemotron 3);
- it learns what stands behind the end of the turn, which no model is asked for: a line break, and
  the end of the text of Phi-3;
- of several turns it learns one rendering of all, so gpt-oss learns to end an earlier answer with
  ``<|end|>``, behind which it is made to go on;
- reasoning that a template leaves out is left out without a word.
"""

import pytest

from lrmc_ray.chat.answers import Chat
from lrmc_ray.errors import DataError
from lrmc_ray.record.encode import encode_row
from lrmc_ray.record.rows import Row
from tests.support.chat_templates import SPECIAL, shipped, tokenizer_for

TEMPLATES = shipped()
NAMES = [
    name.removesuffix("_training")
    for name in TEMPLATES
    if name.endswith("_training") and name.removesuffix("_training") in TEMPLATES
]
IN_PARTS = {"idefics3", "smolvlm", "llava_next"}
OPENED = {
    *("deepseek_r1_distill", "deepseekv3", "nemotron_3_5_lightning", "nemotron_3_nano"),
    *("nemotron_3_super", "nemotron_3_ultra"),
}
"""The prompt opens a think block that the rendered answer does not continue."""


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


CONVERSATIONS = {
    "one": [user("2?"), answer("Two.")],
    "two": [user("Ohm?"), answer("U = R I"), user("Power?"), answer("P = U I")],
}


def pieces(tokenizer, ids, mask):
    """The texts of the runs that are learned."""
    runs, run = [], []
    for token, wanted in zip([*ids, None], [*mask, 0], strict=True):
        if wanted:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def of_trl(name, messages):
    tokenizer = tokenizer_for(TEMPLATES[f"{name}_training"])
    if name in IN_PARTS:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    found = tokenizer.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    return pieces(tokenizer, found["input_ids"], found["assistant_masks"])


def of_ours(name, messages):
    """The texts that are learned, each with what stands before it."""
    tokenizer = tokenizer_for(TEMPLATES[name])
    for example in encode_row(Row("x:1", {"messages": messages}), Chat(tokenizer)):
        texts = iter(pieces(tokenizer, example.input_ids, example.is_target))
        starts = [
            i
            for i, wanted in enumerate(example.is_target)
            if wanted and (i == 0 or not example.is_target[i - 1])
        ]
        for start in starts:
            yield tokenizer.decode(example.input_ids[:start]), next(texts)


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_what_trl_learns_beyond_the_prompt_and_up_to_the_end_of_the_turn(name, case):
    ours = list(of_ours(name, CONVERSATIONS[case]))
    theirs = of_trl(name, CONVERSATIONS[case])
    assert len(ours) == len(theirs)
    for number, ((prompt, text), other) in enumerate(zip(ours, theirs, strict=True)):
        if name in OPENED:
            assert "</think>" in text
            assert (
                SPECIAL.sub("", text.rpartition("</think>")[2]).strip()
                == SPECIAL.sub("", other.rpartition("</think>")[2]).strip()
            )
            continue
        if (name, case, number) == ("gptoss", "two", 0):
            assert other.endswith("<|end|>")
            other = other.removesuffix("<|end|>") + "<|return|>"
        overlap = max(n for n in range(len(other) + 1) if prompt.endswith(other[:n]))
        assert other[overlap:].startswith(text)
        assert not SPECIAL.sub("", other[overlap + len(text) :]).strip()


@pytest.mark.parametrize("name", ["qwen2_5", "gemma3", "llama3"])
def test_trl_leaves_reasoning_out_where_it_is_refused_here(name):
    messages = [user("2?"), answer("Two.", reasoning_content="One and one.")]
    assert "One and one." not in "".join(of_trl(name, messages))
    with pytest.raises(DataError, match="does not render 'reasoning_content'"):
        list(of_ours(name, messages))
