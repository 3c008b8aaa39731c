"""What a message holds is rendered or refused, never left out without a word."""

import pytest

from lrmc_ray.chat.answers import Chat
from lrmc_ray.errors import DataError
from lrmc_ray.record.encode import encode_row
from lrmc_ray.record.rows import Row
from tests.support.chat_templates import shipped, tokenizer_for

NAMED = (
    "{% for m in messages %}{{ '<|' + (m.name or m.role) + '|>' }}"
    "{% if m.tool_call_id %}{{ m.tool_call_id + ':' }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '[' + c.function.name + ']' }}{% endfor %}"
    "{{ m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Renders who speaks, and which call a result belongs to, as Kimi K2 does."""
TWO = {"role": "assistant", "content": "Two."}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def call(name, number):
    return {"id": number, "type": "function", "function": {"name": name, "arguments": {}}}


def result(name, number, content):
    return {"role": "tool", "name": name, "tool_call_id": number, "content": content}


def chat_of(name):
    return Chat(tokenizer_for(shipped()[name]))


def encode(chat, *messages):
    return encode_row(Row("x:1", {"messages": list(messages)}), chat)


@pytest.mark.parametrize("content", ["Be brief.", "2?", "2", "user", ""])
@pytest.mark.parametrize("role", ["developer", "human", "observer"])
def test_a_role_that_the_template_does_not_know_is_refused(role, content):
    """Also where its text is part of another message, or of the template's own words."""
    chat = chat_of("qwen2_5")
    messages = [{"role": role, "content": content}, user("2?"), TWO]
    if not content:
        assert len(encode(chat, *messages)) == 1  # nothing is lost
        return
    with pytest.raises(DataError, match=rf"does not render message 1, of the role '{role}'"):
        encode(chat, *messages)


def test_a_role_that_the_template_writes_itself_is_rendered():
    (example,) = encode(chat_of("llama3"), {"role": "human", "content": "2?"}, TWO)
    assert "<|start_header_id|>human<|end_header_id|>\n\n2?" in example.text
    (example,) = encode(chat_of("gptoss"), {"role": "developer", "content": "Hm."}, user("2?"), TWO)
    assert "# Instructions\n\nHm." in example.text


def test_the_name_of_a_speaker_is_rendered_or_refused():
    named = Chat(tokenizer_for(NAMED, "<|end|>", "<|assistant|>"))
    (example,) = encode(named, user("2?", name="Ada"), TWO)
    assert example.text == "<|Ada|>2?<|end|><|assistant|>Two.<|end|>"
    with pytest.raises(DataError, match=r"does not render 'name' of message 1 \('Ada'\); write it"):
        encode(chat_of("qwen2_5"), user("2?", name="Ada"), TWO)


CALLS = {"role": "assistant", "content": "", "tool_calls": [call("f", "c1"), call("g", "c2")]}


def test_results_in_the_order_of_their_calls_need_no_ids():
    chat = chat_of("qwen2_5")
    encode(chat, user("2?"), CALLS, result("f", "c1", "one"), result("g", "c2", "two"), TWO)
    assert chat.unrendered == {"name", "tool_call_id"}


@pytest.mark.parametrize(
    ("results", "told"),
    [
        ([result("g", "c2", "two"), result("f", "c1", "one")], "here 'c1' comes before 'c2'"),
        (
            [
                {"role": "tool", "name": name, "content": content}
                for name, content in (("g", "two"), ("f", "one"))
            ],
            "here 'f' comes before 'g'",
        ),
    ],
)
def test_results_in_another_order_need_a_template_that_tells_them_apart(results, told):
    with pytest.raises(DataError, match=f"results must stand in the order of their calls; {told}"):
        encode(chat_of("qwen2_5"), user("2?"), CALLS, *results, TWO)
    named = Chat(tokenizer_for(NAMED, "<|end|>", "<|assistant|>"))
    (example,) = encode(named, user("2?"), CALLS, *results, TWO)
    assert "[f][g]<|end|><|g|>" in example.text
    assert named.unrendered == set()


@pytest.mark.parametrize(
    ("name", "options", "writes"),
    [
        ("gptoss", {}, True),
        ("llama3_1", {}, False),  # its date is fixed
        ("llama3_2", {}, True),
        ("llama3_2", {"date_string": "26 Jul 2024"}, False),
        ("qwen3", {}, False),
        ("idefics3", {}, False),
    ],
)
def test_a_template_that_writes_the_date_is_known(name, options, writes):
    assert Chat(tokenizer_for(shipped()[name]), options).writes_date is writes
