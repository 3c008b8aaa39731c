import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmc_ray.data.examples import (
    EncodingSummary,
    Example,
    encode,
    encode_rows,
    messages_of,
    read_rows,
    sample_id_of,
)
from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.models import load_tokenizer

END = "<|im_end|>"
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Takes the reasoning out of earlier answers, as some reasoning models do."""
STRICT = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + REWRITING
)


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def shared_tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def chat(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """Contents in turn, beginning with the user (or behind a system message)."""
    roles = ["user", "assistant"] * len(contents)
    if first == "system":
        roles.insert(0, "system")
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def rendered(messages) -> str:
    """The tiny model's chat template by hand."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}{END}\n" for m in messages)


def mask_by_offsets(messages, tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of the whole text, and which of them lie within an answer or its end-of-turn."""
    text, spans = "", []
    for message in messages:
        text += f"<|im_start|>{message['role']}\n"
        start = len(text)
        text += message["content"] + END
        if message["role"] == "assistant":
            spans.append((start, len(text)))
        text += "\n"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [
        any(start <= left and right <= stop for start, stop in spans)
        for left, right in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], mask


def decoded(ids, tokenizer) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def targets(example: Example, tokenizer) -> str:
    """The text that is learned."""
    ids = [i for i, wanted in zip(example.input_ids, example.is_target, strict=True) if wanted]
    return decoded(ids, tokenizer)


# The label mask

CONVERSATIONS = {
    "one turn": chat("What is 3 plus 4?", "It is 7."),
    "two turns": chat("What is 3 plus 4?", "It is 7.", "And 1 more?", "It is 8, of course."),
    "system": chat("You are brief.", "What is 2?", "Two.", "Sure?", "Yes.", first="system"),
    "question last": chat("What is 2?", "Two.", "Sure?"),
    "answer twice": [*chat("2?", "Two."), {"role": "assistant", "content": "Or 2.0."}],
    "unicode": chat("Größe von 東京?", "Ungefähr 2.194 km² 🗼."),
    "sql": chat("How many?", "SELECT COUNT(*)\nFROM city\nWHERE name = 'Rome';"),
    "spaces": chat(" 2? ", " Two,  I  think. "),
    "user quotes the assistant": chat("Say: assistant\nIt is 7.", "It is 7."),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_mask_is_that_of_the_string_offsets(name, tokenizer):
    messages = CONVERSATIONS[name]
    ids, mask = mask_by_offsets(messages, tokenizer)
    example = encode("x", messages, tokenizer)
    assert example.input_ids == ids
    assert example.is_target == mask
    assert 0 < sum(mask) < len(mask)


def test_the_end_of_turn_is_learned_and_the_newline_behind_it_is_not(tokenizer):
    example = encode("x", chat("What is 2?", "Two."), tokenizer)
    end = tokenizer.convert_tokens_to_ids(END)
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    assert example.input_ids[-2:] == [end, newline]
    assert example.is_target[-2:] == [True, False]
    # The user's end of turn is not learned.
    first = example.input_ids.index(end)
    assert first < len(example.input_ids) - 2
    assert not example.is_target[first]


words = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), max_size=20)
answers = words.filter(str.strip)


@given(turns=st.lists(st.tuples(words, answers), min_size=1, max_size=3), system=st.booleans())
@settings(deadline=None, max_examples=100, derandomize=True)
def test_what_is_learned_is_what_the_assistant_said(turns, system, shared_tokenizer):
    contents = [content for turn in turns for content in turn]
    messages = chat("Be brief.", *contents, first="system") if system else chat(*contents)
    example = encode("x", messages, shared_tokenizer)
    assert decoded(example.input_ids, shared_tokenizer) == rendered(messages)
    said = "".join(m["content"] + END for m in messages if m["role"] == "assistant")
    assert targets(example, shared_tokenizer) == said
    assert len(example.input_ids) == len(example.is_target)
    assert not example.is_target[0]


def test_the_tokens_of_the_prompt_are_those_of_inference(tokenizer):
    """The answer's first token must not merge with the prompt's last."""
    messages = chat("What is 2?", "\nTwo.")
    prompt = tokenizer(rendered(messages[:1]) + "<|im_start|>assistant\n", add_special_tokens=False)
    example = encode("x", messages, tokenizer)
    length = len(prompt["input_ids"])
    assert example.input_ids[:length] == prompt["input_ids"]
    assert example.is_target.index(True) == length


def test_the_header_of_a_first_answer_is_not_learned(tokenizer):
    messages = [{"role": "assistant", "content": "Hello."}, *chat("What is 2?", "Two.")]
    example = encode("x", messages, tokenizer)
    assert targets(example, tokenizer) == f"Hello.{END}Two.{END}"
    assert decoded(example.input_ids, tokenizer) == rendered(messages)
    assert (example.input_ids, example.is_target) == mask_by_offsets(messages, tokenizer)


def test_prompt_and_completion_are_a_conversation_of_one_turn(tokenizer):
    row = {"prompt": "What is 2?", "completion": "Two."}
    messages = {"messages": chat("What is 2?", "Two.")}
    assert messages_of(row) == messages_of(messages) == messages["messages"]
    assert encode("x", messages_of(row), tokenizer) == encode(
        "x", chat("What is 2?", "Two."), tokenizer
    )


def test_other_fields_of_a_message_are_left_out():
    row = {"messages": [{**m, "weight": 1} for m in chat("2?", "Two.")], "source": "web"}
    assert messages_of(row) == chat("2?", "Two.")


@pytest.mark.parametrize("eos", [END, None])
def test_without_a_template_answers_end_with_the_end_of_text(tokenizer, eos):
    tokenizer.chat_template = None
    tokenizer.eos_token = eos
    end = eos or ""
    example = encode("x", chat("Q: 2?\nA:", " Two.", "\nQ: 3?\nA:", " Three."), tokenizer)
    assert targets(example, tokenizer) == f" Two.{end} Three.{end}"
    text = decoded(example.input_ids, tokenizer)
    assert text == f"Q: 2?\nA: Two.{end}\nQ: 3?\nA: Three.{end}"


def test_a_first_token_is_never_learned(tokenizer):
    """Nothing comes before it that could predict it."""
    tokenizer.chat_template = None
    example = encode("x", [{"role": "assistant", "content": "one two three"}], tokenizer)
    assert example.is_target == [False] + [True] * (len(example.input_ids) - 1)
    assert decoded(example.input_ids, tokenizer) == f"one two three{END}"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = REWRITING
    reasoned = "Hm.</think>Two."
    assert targets(encode("x", chat("2?", reasoned), tokenizer), tokenizer) == f"{reasoned}{END}"
    plain = encode("x", chat("2?", "Two.", "Sure?", reasoned), tokenizer)
    assert targets(plain, tokenizer) == f"Two.{END}{reasoned}{END}"
    with pytest.raises(DataError, match=r"renders an earlier turn differently.* split the conv"):
        encode("x", chat("2?", reasoned, "Sure?", "Yes."), tokenizer)


def test_a_conversation_that_the_template_refuses_is_a_bad_row(tokenizer):
    tokenizer.chat_template = STRICT
    messages = chat("Be brief.", "2?", "Two.", first="system")
    with pytest.raises(DataError, match=r"chat template refuses .*: System role not supported"):
        encode("x", messages, tokenizer)


# Rows


def write(path, *rows: object) -> object:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


GOOD = {"prompt": "What is 2?", "completion": "Two."}


def encode_file(paths, tokenizer, *, max_length=1000, on_long="error"):
    summary = EncodingSummary()
    paths = paths if isinstance(paths, list) else [paths]
    examples = list(
        encode_rows(
            read_rows(paths), tokenizer, max_length=max_length, on_long=on_long, summary=summary
        )
    )
    return examples, summary


def error_of(path, tokenizer, **options) -> str:
    with pytest.raises(DataError) as caught:
        encode_file(path, tokenizer, **options)
    assert caught.value.exit_code == 4
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (b'{"prompt": "2?", "completion": ', "not valid JSON"),
        (b"{'prompt': '2?', 'completion': 'Two'}", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"prompt": "\xc3\x28", "completion": "Two."}', "can't decode byte 0xc3"),
        (b'{"prompt": "2?", "completion": "\\ud800"}', "surrogates not allowed"),
        (b'{"prompt": "2?", "completion": "Two."}\0', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 5000, "not valid JSON"),
        (b'["prompt", "completion"]', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        ({}, "needs 'messages', or 'prompt' and 'completion'; has nothing"),
        ({"prompt": "2?", "answer": "Two."}, "has answer, prompt"),
        ({"completion": "Two."}, "has completion"),
        ({"prompt": 2, "completion": "Two."}, "'prompt' and 'completion' must be strings"),
        ({"prompt": "2?", "completion": None}, "'prompt' and 'completion' must be strings"),
        ({"prompt": "2?", "completion": ["Two."]}, "'prompt' and 'completion' must be strings"),
        ({"prompt": "2?", "completion": ""}, "'completion' is empty"),
        ({"prompt": "2?", "completion": " \n\t"}, "'completion' is empty"),
        ({"messages": None}, "'messages' must be a non-empty list"),
        ({"messages": []}, "'messages' must be a non-empty list"),
        ({"messages": {"role": "user"}}, "'messages' must be a non-empty list"),
        ({"messages": ["2?", "Two."]}, "each message needs the strings 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, "each message needs the strings 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": 2}]}, "each message needs the strings"),
        ({"messages": [{"role": None, "content": "2"}]}, "each message needs the strings"),
        ({"messages": chat("2?")}, "no assistant message with text"),
        ({"messages": chat("2?", " ")}, "no assistant message with text"),
        ({"messages": [{"role": "bot", "content": "Two."}]}, "no assistant message with text"),
        ({**GOOD, "id": None}, "'id' must be a string or an integer, got None"),
        ({**GOOD, "id": ["a"]}, "'id' must be a string or an integer, got ['a']"),
        ({**GOOD, "id": True}, "'id' must be a string or an integer, got True"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path, tokenizer, row, problem):
    path = write(tmp_path / "train.jsonl", GOOD, b"", row, {"prompt": "3?", "completion": "Three."})
    message = error_of(path, tokenizer)
    assert message.startswith("1 unusable row(s); mend or remove them:\n")
    assert f"  {path}:3: " in message
    assert problem in message
    assert message.count("\n") == 1


def test_all_bad_rows_are_counted_and_the_first_20_listed(tmp_path, tokenizer):
    rows = [GOOD, *[{"prompt": f"{i}?"} for i in range(2, 47)], {"prompt": "2?", "completion": "2"}]
    message = error_of(write(tmp_path / "train.jsonl", *rows), tokenizer)
    lines = message.split("\n")
    assert lines[0] == "45 unusable row(s); mend or remove them:"
    listed = [int(line.split("train.jsonl:")[1].split(":")[0]) for line in lines[1:-1]]
    assert listed == list(range(2, 22))
    assert lines[-1] == "  ... and 25 more"


def test_exactly_20_bad_rows_are_all_listed(tmp_path, tokenizer):
    path = write(tmp_path / "train.jsonl", *[b"{"] * 20)
    message = error_of(path, tokenizer)
    assert message.startswith("20 unusable row(s)")
    assert message.count("train.jsonl:") == 20
    assert "more" not in message


def test_lines_are_counted_per_file(tmp_path, tokenizer):
    first = write(tmp_path / "a.jsonl", GOOD, b"{")
    second = write(tmp_path / "b.jsonl", b"[]", {"prompt": "3?", "completion": "Three."})
    message = error_of([first, second], tokenizer)
    assert f"{first}:2: not valid JSON" in message
    assert f"{second}:1: not a JSON object" in message


def test_byte_order_mark_crlf_empty_lines_and_no_last_newline_are_fine(tmp_path, tokenizer):
    plain = write(tmp_path / "plain.jsonl", GOOD, {"prompt": "Größe?", "completion": "2 m²"})
    expected, _ = encode_file(plain, tokenizer)
    odd = tmp_path / "odd.jsonl"
    lines = [json.dumps(GOOD), "", "   ", '{"prompt": "Größe?", "completion": "2 m²"}']
    odd.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert encode_file(odd, tokenizer)[0] == expected
    # Two files, each with its mark.
    again = tmp_path / "again.jsonl"
    again.write_bytes(odd.read_bytes().replace(b"Two", b"2"))
    assert len(encode_file([odd, again], tokenizer)[0]) == 4


def test_separators_of_unicode_do_not_end_a_line(tmp_path, tokenizer):
    text = "one\u2028two\u0085three\x0cfour"
    row = {"prompt": text, "completion": text}
    path = write(tmp_path / "train.jsonl", json.dumps(row, ensure_ascii=False).encode())
    (example,), _ = encode_file(path, tokenizer)
    assert targets(example, tokenizer) == text + END


@pytest.mark.parametrize("content", [b"", b"\n\n", b"  \r\n"])
def test_a_file_without_rows_is_exit_code_4(tmp_path, tokenizer, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    message = error_of(path, tokenizer)
    assert message.startswith(f"{path}: no rows")


def test_a_missing_file_is_exit_code_3(tmp_path, tokenizer):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(IncompleteArtifactError, match="does not exist") as caught:
            encode_file(path, tokenizer)
        assert caught.value.exit_code == 3
        assert str(path) in str(caught.value)


# Identities


def test_ids_are_the_rows_own_or_made_of_the_content(tmp_path, tokenizer):
    # printf '{"completion": "Two.", "prompt": "What is 2?"}' | sha256sum
    made = "7afa9a394c0378a2"
    assert sample_id_of(GOOD) == sample_id_of(dict(reversed(GOOD.items()))) == made
    rows = [{**GOOD, "id": "a"}, {**GOOD, "id": 7}, GOOD, {**GOOD, "completion": "2."}]
    examples, _ = encode_file(write(tmp_path / "train.jsonl", *rows), tokenizer)
    ids = [example.sample_id for example in examples]
    assert ids[:3] == ["a", "7", made]
    assert len(ids[3]) == 16
    assert ids[3] != made


def test_the_same_text_twice_is_two_samples(tmp_path, tokenizer):
    other = {"prompt": "3?", "completion": "Three."}
    first = write(tmp_path / "a.jsonl", GOOD, other, GOOD)
    second = write(tmp_path / "b.jsonl", GOOD, other)
    examples, summary = encode_file([first, second], tokenizer)
    made, of_other = sample_id_of(GOOD), sample_id_of(other)
    assert [e.sample_id for e in examples] == [
        made,
        of_other,
        f"{made}#1",
        f"{made}#2",
        f"{of_other}#1",
    ]
    assert summary.samples == 5
    assert examples[0].input_ids == examples[2].input_ids


class Letters:
    """A tokenizer that takes no time: a token per letter."""

    chat_template = None
    eos_token = "."
    all_special_ids = (ord("."),)

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}


def test_thousands_of_copies_take_no_longer_than_thousands_of_texts(tmp_path):
    def seconds(prompts) -> float:
        path = write(tmp_path / "train.jsonl", *[{"prompt": p, "completion": "x"} for p in prompts])
        start = time.process_time()
        examples, _ = encode_file(path, Letters())
        assert len({example.sample_id for example in examples}) == len(prompts)
        return time.process_time() - start

    different = seconds([str(number) for number in range(10_000)])
    assert seconds(["1"] * 10_000) < 5 * different


def test_an_id_that_is_used_twice_names_both_places(tmp_path, tokenizer):
    first = write(tmp_path / "a.jsonl", {**GOOD, "id": "7"}, {**GOOD, "id": "8"})
    second = write(tmp_path / "b.jsonl", {"prompt": "3?", "completion": "Three.", "id": 7})
    message = error_of([first, second], tokenizer)
    assert f"{second}:1: id '7' was used before, at {first}:1" in message


# Length

LONG = {"prompt": "What is 2?", "completion": "It is two, two and two again."}


@pytest.fixture
def long_file(tmp_path):
    return write(tmp_path / "train.jsonl", GOOD, LONG, {"prompt": "3?", "completion": "Three."})


def test_a_sample_of_exactly_max_length_is_taken_whole(long_file, tokenizer):
    examples, _ = encode_file(long_file, tokenizer)
    longest = len(examples[1].input_ids)
    assert longest == max(len(example.input_ids) for example in examples)
    for policy in ("error", "drop", "truncate"):
        same, summary = encode_file(long_file, tokenizer, max_length=longest, on_long=policy)
        assert same == examples
        assert summary == EncodingSummary(
            samples=3,
            tokens=sum(len(example.input_ids) for example in examples),
            supervised_tokens=sum(sum(example.is_target) for example in examples),
        )


def test_too_long_is_an_error_by_default(long_file, tokenizer):
    examples, _ = encode_file(long_file, tokenizer)
    longest = len(examples[1].input_ids)
    message = error_of(long_file, tokenizer, max_length=longest - 1)
    assert message.startswith("1 unusable row(s)")
    assert f"{long_file}:2: {longest} tokens, more than data.max_length = {longest - 1}" in message
    assert "data.on_long" in message


def test_too_long_is_dropped_and_counted(long_file, tokenizer):
    examples, _ = encode_file(long_file, tokenizer)
    limit = len(examples[1].input_ids) - 1
    kept, summary = encode_file(long_file, tokenizer, max_length=limit, on_long="drop")
    assert kept == [examples[0], examples[2]]
    assert (summary.samples, summary.dropped, summary.truncated) == (2, 1, 0)
    assert summary.tokens == sum(len(example.input_ids) for example in kept)


def test_too_long_is_cut_and_counted(long_file, tokenizer):
    examples, _ = encode_file(long_file, tokenizer)
    limit = len(examples[1].input_ids) - 4
    kept, summary = encode_file(long_file, tokenizer, max_length=limit, on_long="truncate")
    cut = examples[1]
    expected = Example(cut.sample_id, cut.input_ids[:limit], cut.is_target[:limit])
    assert kept == [examples[0], expected, examples[2]]
    assert (summary.samples, summary.dropped, summary.truncated) == (3, 0, 1)
    assert summary.tokens == sum(len(example.input_ids) for example in kept)
    assert summary.supervised_tokens == sum(sum(example.is_target) for example in kept)


def test_a_cut_that_leaves_nothing_to_learn_is_an_error(long_file, tokenizer):
    message = error_of(long_file, tokenizer, max_length=5, on_long="truncate")
    assert message.startswith("3 unusable row(s)")
    assert f"{long_file}:1: none of its first 5 tokens is to be learned" in message
    assert "raise data.max_length" in message


def test_all_dropped_is_an_error_with_the_remedy(long_file, tokenizer):
    message = error_of(long_file, tokenizer, max_length=5, on_long="drop")
    assert "no sample is left (3 dropped" in message
    assert message.endswith("raise data.max_length")
