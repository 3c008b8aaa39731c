import io
import json
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmc_ray.chat.answers import Chat
from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.models.loading import load_tokenizer
from lrmc_ray.record.encode import EncodingSummary, Example, encode_row, encode_rows
from lrmc_ray.record.formats import conversation_of
from lrmc_ray.record.rows import Rejects, Row, read_rows, sample_id_of
from lrmc_ray.record.sources import Source

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


def encode(sample_id, messages, tokenizer) -> Example:
    """The one example of a conversation."""
    (example,) = encode_row(Row("x:1", {"id": sample_id, "messages": messages}), Chat(tokenizer))
    return example


def messages_of(row) -> list[dict[str, str]]:
    return list(conversation_of(row).messages)


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


def test_without_a_template_the_turns_have_lines_of_their_own(tokenizer):
    tokenizer.chat_template = None
    messages = chat("Be brief.", "What is 2?", "Two.", "Sure?", "Yes.", first="system")
    example = encode("x", messages, tokenizer)
    assert targets(example, tokenizer) == f"Two.{END}Yes.{END}"
    assert decoded(example.input_ids, tokenizer) == (
        "System:\nBe brief.\n\nUser:\nWhat is 2?\n\nAssistant:\nTwo.<|im_end|>\n\n"
        "User:\nSure?\n\nAssistant:\nYes.<|im_end|>\n\n"
    )


def test_without_a_template_the_tokenizers_own_first_token_comes_first(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
    )
    assert tokenizer("one")["input_ids"][0] == 0
    example = encode("x", chat("2?", "Two."), tokenizer)
    assert decoded(example.input_ids, tokenizer) == (
        "<|im_start|>User:\n2?\n\nAssistant:\nTwo.<|im_end|>\n\n"
    )


def test_a_template_that_rewrites_earlier_turns_gives_a_sample_per_answer(tmp_path, tokenizer):
    tokenizer.chat_template = REWRITING
    reasoned = "Hm.</think>Two."
    assert targets(encode("x", chat("2?", reasoned), tokenizer), tokenizer) == f"{reasoned}{END}"
    plain = encode("x", chat("2?", "Two.", "Sure?", reasoned), tokenizer)
    assert targets(plain, tokenizer) == f"Two.{END}{reasoned}{END}"
    row = {"id": "x", "messages": chat("2?", reasoned, "Sure?", "Yes.")}
    examples, summary = encode_file(write(tmp_path / "train.jsonl", row), tokenizer)
    assert [example.sample_id for example in examples] == ["x/1", "x/2"]
    assert [decoded(example.input_ids, tokenizer) for example in examples] == [
        rendered(chat("2?", reasoned)),
        rendered(chat("2?", "Two.", "Sure?", "Yes.")),
    ]
    assert [targets(example, tokenizer) for example in examples] == [reasoned + END, f"Yes.{END}"]
    assert (summary.samples, summary.split) == (2, 1)


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


def encode_file(
    paths, tokenizer, *, max_length=1000, on_long="error", rejects=None, vocabulary_size=2**21
):
    summary = EncodingSummary()
    rejects = rejects or Rejects()
    paths = paths if isinstance(paths, list) else [paths]
    sources = [path if isinstance(path, Source) else Source(path) for path in paths]
    examples = list(
        encode_rows(
            read_rows(sources, rejects),
            Chat(tokenizer),
            max_length=max_length,
            on_long=on_long,
            vocabulary_size=vocabulary_size,
            summary=summary,
            rejects=rejects,
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
        ({}, "needs 'messages', or 'prompt' and 'completion', or 'text', or the fields of"),
        ({}, "has nothing"),
        ({"prompt": "2?", "answer": "Two."}, "has answer, prompt"),
        ({"completion": "Two."}, "has completion"),
        ({"prompt": 2, "completion": "Two."}, "'prompt' and 'completion' must be strings"),
        ({"prompt": "2?", "completion": None}, "has prompt"),
        ({"prompt": "2?", "completion": ["Two."]}, "each message needs the strings"),
        ({"prompt": "2?", "completion": ""}, "'completion' is empty"),
        ({"prompt": "2?", "completion": " \n\t"}, "'completion' is empty"),
        ({"messages": None}, "has nothing"),
        ({"messages": []}, "'messages' must be a non-empty list"),
        ({"messages": {"role": "user"}}, "'messages' must be a non-empty list"),
        ({"messages": ["2?", "Two."]}, "each message needs the strings 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, "each message needs the strings 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": 2}]}, "each message needs the strings"),
        ({"messages": [{"role": None, "content": "2"}]}, "each message needs the strings"),
        ({"messages": chat("2?")}, "no assistant message with text"),
        ({"messages": chat("2?", " ")}, "no assistant message with text"),
        ({"messages": [{"role": "bot", "content": "Two."}]}, "no assistant message with text"),
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


def test_thousands_of_copies_take_no_longer_than_thousands_of_texts(tmp_path, tokenizer):
    def seconds(prompts) -> float:
        path = write(tmp_path / "train.jsonl", *[{"prompt": p, "completion": "x"} for p in prompts])
        start = time.process_time()
        examples, _ = encode_file(path, tokenizer)
        assert len({example.sample_id for example in examples}) == len(prompts)
        return time.process_time() - start

    different = seconds([str(number) for number in range(2000)])
    assert seconds(["1"] * 2000) < 5 * different


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
            domains=Counter({"": 3}),
            formats=Counter({"prompt and completion": 3}),
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
    assert message.endswith("raise data.max_length or mend the rows")


# Plain text


def test_every_token_of_plain_text_but_the_first_is_learned(tmp_path, tokenizer):
    text = "Ohm's law: U = R I.\n\nIn words, voltage is resistance times current."
    row = {"text": text, "source": "book"}
    (example,), summary = encode_file(write(tmp_path / "train.jsonl", row), tokenizer)
    assert example.input_ids == tokenizer(text)["input_ids"]
    assert example.is_target == [False] + [True] * (len(example.input_ids) - 1)
    assert decoded(example.input_ids, tokenizer) == text
    assert summary.supervised_tokens == summary.tokens - 1


def test_a_conversation_wins_over_text_and_half_of_one_does_not(tmp_path, tokenizer):
    path = write(
        tmp_path / "train.jsonl", {**GOOD, "text": "other"}, {"prompt": "2?", "text": "b c"}
    )
    (conversation, text), _ = encode_file(path, tokenizer)
    assert targets(conversation, tokenizer) == f"Two.{END}"
    assert decoded(text.input_ids, tokenizer) == "b c"


def test_text_that_is_longer_than_max_length_is_cut(tmp_path, tokenizer):
    path = write(tmp_path / "train.jsonl", {"text": "one two three four five"})
    (whole,), _ = encode_file(path, tokenizer)
    (cut,), summary = encode_file(path, tokenizer, max_length=3, on_long="truncate")
    assert cut.input_ids == whole.input_ids[:3]
    assert (summary.truncated, summary.supervised_tokens) == (1, 2)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'text' is empty"),
        (" \n", "'text' is empty"),
        (7, "'text' must be a string, got 7"),
        (None, "needs 'messages'"),
        ("I", "none of its first 1 tokens is to be learned"),
    ],
)
def test_text_without_anything_to_learn_is_a_bad_row(tmp_path, tokenizer, text, problem):
    path = write(tmp_path / "train.jsonl", GOOD, {"text": text})
    assert f"{path}:2: {problem}" in error_of(path, tokenizer)


# Domains


def test_a_row_is_of_its_own_domain_or_of_its_files(tmp_path, tokenizer):
    first = write(tmp_path / "a.jsonl", {**GOOD, "domain": "sql"}, {"text": "one two"})
    second = write(tmp_path / "b.jsonl", {"text": "three four"}, {"text": "5 6", "domain": ""})
    examples, summary = encode_file([first, Source(second, "radio")], tokenizer)
    assert [example.domain for example in examples] == ["sql", "", "radio", ""]
    assert summary.domains == {"sql": 1, "": 2, "radio": 1}


@pytest.mark.parametrize("domain", [7, ["sql"]])
def test_a_domain_is_a_string(tmp_path, tokenizer, domain):
    path = write(tmp_path / "train.jsonl", GOOD, {"text": "one two", "domain": domain})
    assert f"{path}:2: 'domain' must be a string, got {domain!r}" in error_of(path, tokenizer)


# The end of the turn

WITHOUT_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_that_never_ends_an_answer_is_refused(tmp_path, tokenizer):
    quoted = {"prompt": "What ends a turn?", "completion": f"It is {END}"}
    path = write(tmp_path / "train.jsonl", GOOD, quoted)
    tokenizer.chat_template = WITHOUT_END
    message = error_of(path, tokenizer)
    assert message.startswith("2 unusable row(s)")
    assert f"{path}:2: an answer must end with a special token, this one ends with" in message
    tokenizer.chat_template = None
    assert len(encode_file(path, tokenizer)[0]) == 2  # the end of text follows each answer
    tokenizer.eos_token = None
    assert "use a chat template that writes one" in error_of(path, tokenizer)


def test_a_quoted_end_does_not_end_the_answer(tokenizer):
    example = encode("x", chat("What ends a turn?", f"It is {END}, here."), tokenizer)
    assert targets(example, tokenizer) == f"It is {END}, here.{END}"


def test_a_token_that_is_marked_as_special_ends_a_turn_as_well(tokenizer):
    """Llama 3 names its end-of-turn token nowhere but among the added ones."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("<|eot|>", special=True)])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|eot|>")
    example = encode("x", chat("2?", "Two."), tokenizer)
    assert targets(example, tokenizer) == "Two.<|eot|>"


# The vocabulary


def test_a_token_that_the_head_lacks_is_a_bad_row(tmp_path, tokenizer):
    path = write(tmp_path / "train.jsonl", GOOD, {"text": "a b"})
    examples, _ = encode_file(path, tokenizer)
    largest = [max(example.input_ids) for example in examples]
    assert largest[0] != largest[1]
    assert len(encode_file(path, tokenizer, vocabulary_size=max(largest) + 1)[0]) == 2
    message = error_of(path, tokenizer, vocabulary_size=max(largest))
    assert f"{path}:{1 + largest.index(max(largest))}: the tokenizer gives token" in message
    assert message.count("\n") == 1


# Rows that are left out


def skipping(max_share: float) -> tuple[Rejects, io.StringIO]:
    file = io.StringIO()
    return Rejects(file, max_share=max_share), file


def test_rows_that_are_skipped_are_noted_with_place_and_problem(tmp_path, tokenizer):
    rows = [GOOD, b"{", {"prompt": "2?"}, {"prompt": "3?", "completion": "Three."}]
    path = write(tmp_path / "train.jsonl", *rows)
    rejects, file = skipping(0.5)
    examples, summary = encode_file(path, tokenizer, rejects=rejects)
    assert len(examples) == summary.samples == 2
    assert (rejects.rows, rejects.count) == (4, 2)
    noted = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [note["place"] for note in noted] == [f"{path}:2", f"{path}:3"]
    assert noted[0]["problem"].startswith("not valid JSON")
    assert noted[1]["problem"].startswith("needs 'messages'")


@pytest.mark.parametrize(("max_share", "is_fine"), [(0.25, True), (0.2499, False), (0.0, False)])
def test_no_more_rows_are_skipped_than_is_allowed(tmp_path, tokenizer, max_share, is_fine):
    rows = [GOOD, {"text": "a b"}, {"text": ""}, {"text": "c d"}]
    path = write(tmp_path / "train.jsonl", *rows)
    rejects, _ = skipping(max_share)
    if is_fine:
        assert len(encode_file(path, tokenizer, rejects=rejects)[0]) == 3
        return
    message = error_of(path, tokenizer, rejects=rejects)
    assert f"at most {max_share:.2%} of the rows may be skipped" in message
    assert "1 of 4 are unusable" in message
    assert f"{path}:3: 'text' is empty" in message


def test_nothing_left_is_an_error_however_much_may_be_skipped(tmp_path, tokenizer):
    rejects, _ = skipping(1.0)
    message = error_of(write(tmp_path / "train.jsonl", {"text": ""}), tokenizer, rejects=rejects)
    assert "no sample is left (0 dropped" in message
    assert "1 unusable)" in message


def test_a_line_that_is_too_long_is_a_bad_row_and_the_next_is_read(
    tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr("lrmc_ray.record.rows.MAX_LINE_BYTES", 100)
    long = json.dumps({"text": "x" * 250}).encode()
    exact = b'{"text": "a ' + b"b" * 85 + b'"}'
    assert len(exact) == 99
    path = write(tmp_path / "train.jsonl", long, GOOD, long[:-1], exact)
    message = error_of(path, tokenizer)
    assert message.startswith("2 unusable row(s)")
    assert f"{path}:1: longer than 100 bytes" in message
    assert f"{path}:3: longer than 100 bytes" in message


def test_a_line_of_100_megabytes_is_refused_without_reading_it_whole(tmp_path, tokenizer):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * (100 << 20) + b'"}\n' + json.dumps(GOOD).encode())
    assert f"{path}:1: longer than {64 << 20} bytes" in error_of(path, tokenizer)


# Parquet


def parquet(path, columns, **options):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, **options)
    return path


def test_parquet_gives_what_jsonl_gives(tmp_path, tokenizer):
    rows = [
        {"messages": chat("2?", "Two.", "3?", "Three."), "domain": "a", "id": "x"},
        {"messages": chat("4?", "Four."), "domain": "b", "id": "y"},
    ]
    lines, _ = encode_file(write(tmp_path / "train.jsonl", *rows), tokenizer)
    import pyarrow as pa

    path = parquet(tmp_path / "train.parquet", pa.Table.from_pylist(rows), row_group_size=1)
    assert encode_file(path, tokenizer)[0] == lines
    # The order of columns, others beside them, and the width of strings change nothing.
    table = pa.Table.from_pylist([{"n": 1, **row} for row in rows]).select(
        ["n", "id", "messages", "domain"]
    )
    table = table.set_column(3, "domain", table["domain"].cast(pa.large_string()))
    path = parquet(tmp_path / "other.parquet", table)
    assert encode_file(path, tokenizer)[0] == lines


def test_parquet_rows_of_different_kinds_leave_the_other_columns_null(tmp_path, tokenizer):
    columns = {
        "prompt": ["What is 2?", None, "3?"],
        "completion": ["Two.", None, None],
        "text": [None, "one two", None],
        "domain": [None, "d", None],
    }
    path = parquet(tmp_path / "train.parquet", columns)
    message = error_of(path, tokenizer)
    assert f"{path}:row 3: needs 'messages', or 'prompt' and 'completion'" in message
    assert message.endswith("has prompt")
    rejects, _ = skipping(0.5)
    examples, _ = encode_file(path, tokenizer, rejects=rejects)
    assert examples[0].sample_id == sample_id_of(GOOD)  # as from JSONL
    assert [example.domain for example in examples] == ["", "d"]


PARQUET_DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "no Parquet": lambda content: b'{"text": "a b"}\n' * 9,
    "broken footer": lambda content: content[:-12] + b"\xff" * 4 + content[-8:],
}


@pytest.mark.parametrize("damage", PARQUET_DAMAGES)
def test_a_damaged_parquet_file_is_exit_code_4_whatever_may_be_skipped(tmp_path, tokenizer, damage):
    path = parquet(tmp_path / "train.parquet", {"text": ["one two", "three four"]})
    path.write_bytes(PARQUET_DAMAGES[damage](path.read_bytes()))
    rejects, _ = skipping(1.0)
    message = error_of(path, tokenizer, rejects=rejects)
    assert message.startswith(f"{path} is no readable Parquet file (")
    assert message.endswith("save it again")


def test_a_flipped_bit_in_a_parquet_file_with_checksums_is_noticed(tmp_path, tokenizer):
    """In a file whose bits are text: without the checksum another letter would be learned."""
    texts = [f"word {number} and a few more" for number in range(200)]
    options = {"compression": "none", "use_dictionary": False}
    for has_checksums in (False, True):
        path = tmp_path / f"train-{has_checksums}.parquet"
        parquet(path, {"text": texts}, write_page_checksum=has_checksums, **options)
        content = bytearray(path.read_bytes())
        content[content.index(b"word 57")] ^= 4  # no page header holds this one
        path.write_bytes(content)
    assert "is no readable Parquet file (" in error_of(path, tokenizer)
    assert len(encode_file(tmp_path / "train-False.parquet", tokenizer)[0]) == 200


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"n": ["2?"]}, "needs a column messages, or prompt and completion, or text, or those of"),
        ({"text": [7]}, "row 1: 'text' must be a string, got 7"),
        ({"text": [["a"]]}, "row 1: 'text' must be a string, got ['a']"),
        ({"text": [b"a b"]}, "row 1: 'text' must be a string, got b'a b'"),
        ({"prompt": ["2?"]}, "row 1: needs 'messages'"),
        ({"messages": ["2?"]}, "row 1: 'messages' must be a non-empty list"),
        ({"messages": [[{"role": "user", "content": None}]]}, "row 1: each message needs"),
        ({"messages": [[{"role": "assistant"}]]}, "row 1: each message needs the strings"),
        ({"text": ["a b", "c d"], "id": [1.5, 2.5]}, "row 1: 'id' must be a string or an integer"),
        ({"text": ["a b", "c d"], "id": [7, 7]}, "row 2: id '7' was used before"),
        ({"text": ["a b"], "domain": [3]}, "row 1: 'domain' must be a string, got 3"),
        ({"text": [None, None]}, "row 2: needs 'messages'"),
        ({}, "of another known form; has none"),
    ],
)
def test_bad_columns_and_rows_of_parquet_are_exit_code_4(tmp_path, tokenizer, columns, problem):
    path = parquet(tmp_path / "train.parquet", columns)
    assert problem in error_of(path, tokenizer)


def test_a_parquet_file_without_rows_is_exit_code_4(tmp_path, tokenizer):
    path = parquet(tmp_path / "train.parquet", {"text": []})
    assert error_of(path, tokenizer).startswith(f"{path}: no rows")


def test_text_that_is_no_utf8_is_exit_code_4(tmp_path, tokenizer):
    import pyarrow as pa

    binary = pa.array([b"one two", b"\xc3\x28"], type=pa.binary())
    path = parquet(tmp_path / "train.parquet", {"text": binary.view(pa.string())})
    assert "is no readable Parquet file (" in error_of(path, tokenizer)


def test_ids_of_plain_text_rows_are_made_of_the_content(tokenizer):
    row = Row("x:1", {"text": "one two", "domain": "d"})
    (example,) = encode_row(row, Chat(tokenizer))
    ids = tokenizer("one two")["input_ids"]
    mask = [False] + [True] * (len(ids) - 1)
    assert example == Example(sample_id_of(row.content), ids, mask, "d")
