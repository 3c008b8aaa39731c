"""Where prompt and answer meet, inference's tokens win."""

import pytest

from lrmc_ray.chat.answers import Chat
from lrmc_ray.chat.tokens import split_ids
from lrmc_ray.errors import DataError
from lrmc_ray.record.encode import encode_row
from lrmc_ray.record.rows import Row
from tests.support.chat_templates import (
    DEFAULT_SYSTEM,
    END_AND_MORE,
    FAULTY,
    MARKED,
    RETHINKING,
    tokenizer_for,
)

LLAMA = (
    "{{ '<bos>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
HEADER = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
BREAKS = (
    "{% for m in messages %}{{ m.role + '\n' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def examples_of(tokenizer, *messages, **row):
    return encode_row(Row("x:1", {"messages": list(messages), **row}), Chat(tokenizer))


def learned_text(tokenizer, example):
    ids = [i for i, wanted in zip(example.input_ids, example.is_target, strict=True) if wanted]
    return tokenizer.decode(ids)


@pytest.mark.parametrize("template", [LLAMA, HEADER])
@pytest.mark.parametrize("said", ["Two.", " Two.", "Ohm? Ω"])
def test_a_prefix_space_is_there_only_where_inference_has_one(template, said):
    tokenizer = tokenizer_for(template, "</s>", prefix_space=True)
    (example,) = examples_of(tokenizer, user("2?"), answer(said))
    prompt = tokenizer.apply_chat_template(
        [user("2?")], add_generation_prompt=True, return_dict=False
    )
    both = tokenizer.apply_chat_template([user("2?"), answer(said)], tokenize=False)
    whole = tokenizer(both, add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] == prompt  # so the whole is what inference goes on with
    assert example.input_ids == whole
    assert example.is_target == [False] * len(prompt) + [True] * (len(whole) - len(prompt))
    if template == HEADER and said == "Two.":
        alone = tokenizer(said, add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(alone)[0].startswith("▁")
        assert not tokenizer.convert_ids_to_tokens(example.input_ids[len(prompt)]).startswith("▁")


@pytest.mark.parametrize("prefix_space", [False, True])
def test_a_token_across_the_border_is_split_as_at_inference(prefix_space):
    tokenizer = tokenizer_for(BREAKS, "</s>", prefix_space=prefix_space)
    messages = [user("2?"), answer("\n\nTwo.")]
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=False
    )
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    if not prefix_space:
        assert whole[: len(prompt)] != prompt  # two line breaks are one token
    (example,) = examples_of(tokenizer, *messages)
    assert example.input_ids[: len(prompt)] == prompt
    assert example.is_target.index(True) == len(prompt)
    assert tokenizer.decode(example.input_ids[len(prompt) :]) == "\n\nTwo.</s>"
    assert split_ids(tokenizer, "user\n2?</s>assistant\n", "\n\nTwo.</s>") == (
        prompt,
        example.input_ids[len(prompt) :],
    )


def test_an_earlier_answer_whose_prompt_has_other_tokens_is_a_sample_of_its_own():
    tokenizer = tokenizer_for(BREAKS, "</s>")
    messages = [user("2?"), answer("\n\nTwo."), user("Ohm?"), answer("U = R I")]
    first, second = examples_of(tokenizer, *messages)
    for example, end in ((first, 1), (second, 3)):
        prompt = tokenizer.apply_chat_template(
            messages[:end], add_generation_prompt=True, return_dict=False
        )
        assert example.input_ids[: len(prompt)] == prompt
        assert example.is_target.index(True) == len(prompt)
    assert learned_text(tokenizer, first) == "\n\nTwo.</s>"
    assert learned_text(tokenizer, second) == "U = R I</s>"


def test_what_stands_behind_the_end_of_the_turn_is_not_learned():
    tokenizer = tokenizer_for(END_AND_MORE, "<|end|>", "<|user|>", "<|assistant|>")
    (example,) = examples_of(tokenizer, user("2?"), answer("Two."))
    assert tokenizer.decode(example.input_ids).endswith("Two.<|end|>\n<eos>")
    assert learned_text(tokenizer, example) == "Two.<|end|>"


def test_a_default_system_prompt_is_not_learned_where_the_assistant_speaks_first():
    tokenizer = tokenizer_for(DEFAULT_SYSTEM, "</s>")
    (example,) = examples_of(tokenizer, answer("Hello."), user("2?"), answer("Two."))
    assert tokenizer.decode(example.input_ids) == (
        "[SYS]Be good.[/SYS]Hello.</s>[INST]2?[/INST]Two.</s>"
    )
    assert learned_text(tokenizer, example) == "Hello.</s>Two.</s>"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (answer("Two."), "\n</think>\n\nTwo.<|end|>"),
        (answer("Two.", reasoning_content="1 + 1"), "1 + 1\n</think>\n\nTwo.<|end|>"),
    ],
)
def test_an_answer_is_learned_behind_a_block_that_the_prompt_opens(message, said):
    tokenizer = tokenizer_for(RETHINKING, "<|end|>", "<|user|>", "<|Assistant|>")
    (example,) = examples_of(tokenizer, user("2?"), message)
    prompt = tokenizer.apply_chat_template(
        [user("2?")], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(prompt) == "<|user|>2?<|Assistant|><think>\n"
    assert example.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(example.input_ids[len(prompt) :]) == said
    assert learned_text(tokenizer, example) == said


def test_what_a_template_marks_as_generated_is_learned():
    tokenizer = tokenizer_for(MARKED, "<|end|>", "<|user|>", "<|assistant|>")
    messages = [user("Ohm?"), answer("U = R I"), user("Power?"), answer("P = U I")]
    (example,) = examples_of(tokenizer, *messages)
    marked = tokenizer.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    assert example.input_ids == marked["input_ids"]
    assert example.is_target == [bool(wanted) for wanted in marked["assistant_masks"]]


def test_whatever_a_template_raises_is_a_bad_row():
    tokenizer = tokenizer_for(FAULTY)
    with pytest.raises(DataError, match="chat template refuses this conversation: TypeError: "):
        examples_of(tokenizer, user("2?"), answer("Two."))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [user("2?"), answer("", tool_calls=[{"name": "f"}])]}, "'tool_calls'"),
        ({"messages": [user("2?"), answer("2")], "tools": [{"name": "f"}]}, "'tools'"),
        ({"messages": [user("2?"), answer("2", thinking="Hm.")]}, "'thinking'"),
    ],
)
def test_a_field_that_the_template_does_not_render_is_refused_by_its_name(row, problem):
    tokenizer = tokenizer_for(MARKED, "<|end|>", "<|user|>", "<|assistant|>")
    with pytest.raises(DataError, match=f"does not render {problem}"):
        encode_row(Row("x:1", row), Chat(tokenizer))
