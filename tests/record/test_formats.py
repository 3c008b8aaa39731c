"""Rows in the forms that people have, and the files that they are in."""

import csv
import gzip
import json

import pytest

from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.record.formats import conversation_of, format_of, without_nulls
from lrmc_ray.record.rows import Rejects, read_rows
from lrmc_ray.record.sources import find_sources, unread_files

USER = {"role": "user", "content": "2?"}
TWO = {"role": "assistant", "content": "Two."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"messages": [USER, TWO]}, "messages", [USER, TWO]),
        ({"prompt": "2?", "completion": "Two."}, "prompt and completion", [USER, TWO]),
        ({"prompt": [USER], "completion": [TWO]}, "prompt and completion", [USER, TWO]),
        (
            {"system": "Be brief.", "prompt": "2?", "completion": "Two."},
            "prompt and completion",
            [SYSTEM, USER, TWO],
        ),
        (
            {"prompt": "2?", "completion": "Two.", "label": True},
            "prompt and completion",
            [USER, TWO],
        ),
        (
            {"conversations": [{"from": "human", "value": "2?"}, {"from": "gpt", "value": "Two."}]},
            "ShareGPT",
            [USER, TWO],
        ),
        ({"instruction": "2?", "input": "", "output": "Two."}, "Alpaca", [USER, TWO]),
        (
            {"instruction": "Add.", "input": "1 1", "output": "Two."},
            "Alpaca",
            [{"role": "user", "content": "Add.\n\n1 1"}, TWO],
        ),
        ({"question": "2?", "answer": "Two."}, "question and answer", [USER, TWO]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "2?"}]}, TWO]},
            "messages",
            [USER, TWO],
        ),
        (
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "function_call": {"name": "f", "arguments": '{"x": 1}'},
                    },
                    {"role": "function", "name": "f", "content": "1"},
                    TWO,
                ]
            },
            "messages",
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "name": "f", "content": "1"},
                TWO,
            ],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "2?"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "Two."},
                ]
            },
            "ShareGPT",
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "1"},
                TWO,
            ],
        ),
    ],
)
def test_a_row_becomes_this_conversation(row, name, messages):
    assert format_of(row) == name
    assert list(conversation_of(row).messages) == messages


def test_functions_are_tools():
    row = {"messages": [USER, TWO], "functions": [{"name": "f"}], "tools": '[{"name": "g"}]'}
    assert conversation_of(row).tools == (
        {"name": "g"},
        {"type": "function", "function": {"name": "f"}},
    )


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_an_answer_with_such_a_mark_is_not_learned(mark):
    row = {"messages": [USER, {**TWO, **mark}, USER, {**TWO, "weight": 1, "train": True}]}
    assert conversation_of(row).unlearned == {1}
    with pytest.raises(DataError, match="nothing to learn"):
        conversation_of({"messages": [USER, {**TWO, **mark}]})


def test_marks_that_learn_nothing_of_others_change_nothing():
    marked = [{**SYSTEM, "weight": 0}, {**USER, "train": False, "weight": 1}, {**TWO, "weight": 1}]
    assert conversation_of({"messages": marked}) == conversation_of(
        {"messages": [SYSTEM, USER, TWO]}
    )


def test_answers_within_a_prompt_are_not_learned():
    row = {"prompt": [USER, TWO, USER], "completion": [TWO]}
    assert conversation_of(row).unlearned == {1}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "2?", "chosen": "Two.", "rejected": "3"}, "'chosen' and 'rejected' compare"),
        ({"prompt": "2?", "completion": "3", "label": False}, "'label' is False, so the"),
        ({"prompt": "2?", "completion": "3", "label": 0}, "'label' is 0, so the"),
        ({"prompt": "2?", "completion": "3", "label": "false"}, "'label' is 'false', so the"),
        ({"messages": [USER, {**TWO, "weight": 0.5}]}, "'weight' of a message must be 0 or 1"),
        ({"messages": [USER, {**TWO, "train": "no"}]}, "'train' of a message must be true or"),
        ({"messages": [{**USER, "train": True}, TWO]}, "of the role 'user' is true, and only"),
        ({"messages": [{**SYSTEM, "train": True}, TWO]}, "of the role 'system' is true, and only"),
        ({"messages": [USER, {**TWO, "weight": 2}]}, "must be 0 or 1, got 2"),
        (
            {"messages": [USER, TWO, USER, {**TWO, "content": " "}]},
            "message 4 is an answer without",
        ),
        ({"prompt": [USER, {**TWO, "train": True}], "completion": [TWO]}, "only the completion"),
        ({"messages": [USER, {**TWO, "audio": {"id": "x"}}]}, "'audio' of a message cannot be"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, TWO]}, "got 'image'"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "'from' must be one of human"),
        ({"messages": [SYSTEM, USER, TWO], "system": "x"}, "keep one of the two"),
        ({"question": "2?", "answer": " "}, "'answer' is empty"),
        ({"messages": [USER, TWO], "chat_template_kwargs": {"a": 1}}, "model.template_options"),
    ],
)
def test_what_cannot_be_learned_is_refused_by_its_name(row, problem):
    with pytest.raises(DataError, match=problem):
        conversation_of(row)


def test_null_means_not_given_at_any_depth():
    value = {"a": None, "b": [{"c": None, "d": 1}, None], "e": {"f": None}}
    assert without_nulls(value) == {"b": [{"d": 1}, None], "e": {}}


# Files

ROWS = [{"messages": [USER, TWO]}, {"prompt": "3?", "completion": "Three\nof them."}]


def contents(*names, rejects=None):
    rows = read_rows(find_sources(map(str, names)), rejects or Rejects())
    return [(row.place, row.content or row.problem) for row in rows]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "array.json", "array.json.gz"])
def test_json_in_lines_and_arrays_packed_and_not(tmp_path, name):
    content = json.dumps(ROWS, indent=1).encode() if "array" in name else lines(ROWS)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    place = "row " if "array" in name else ""
    assert contents(path) == [(f"{path}:{place}{i}", row) for i, row in enumerate(ROWS, 1)]


def test_zstandard(tmp_path):
    import pyarrow as pa

    path = tmp_path / "a.jsonl.zst"
    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(lines(ROWS))
    assert [content for _, content in contents(path)] == ROWS
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be unpacked"):
        contents(path)


def test_a_row_of_csv_has_the_line_where_it_begins(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion", "id"])
        writer.writerows([["2?", "Two\nof them", "a"], ["3?", "Three", ""]])
    assert contents(path) == [
        (f"{path}:2", {"prompt": "2?", "completion": "Two\nof them", "id": "a"}),
        (f"{path}:4", {"prompt": "3?", "completion": "Three"}),
    ]
    path.write_text("prompt,completion\n2?,Two,3\n")
    assert contents(path) == [(f"{path}:2", "must have 2 cells")]
    path.write_text("x,y\n1,2\n")
    with pytest.raises(DataError, match="needs a column messages"):
        contents(path)


def test_what_datasets_saved_is_read(tmp_path):
    import datasets

    rows = [{"prompt": "2?", "completion": "Two."}, {"prompt": "3?", "completion": None}]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(str(tmp_path / "one"))
    splits = datasets.DatasetDict({"train": data, "test": data.select([0])})
    splits.save_to_disk(str(tmp_path / "both"))
    wanted = [rows[0], {"prompt": "3?"}]
    assert [content for _, content in contents(tmp_path / "one")] == wanted
    assert [content for _, content in contents(tmp_path / "both")] == wanted
    assert unread_files([str(tmp_path / "both")]) == [tmp_path / "both" / "test"]
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(str(tmp_path / "neither"))
    with pytest.raises(IncompleteArtifactError, match="holds the splits a, b; give the folder"):
        contents(tmp_path / "neither")


def test_a_folder_says_what_it_does_not_read(tmp_path):
    for name in ("a.jsonl", "README.md", "b.csv.gz", ".hidden", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [source.path.name for source in find_sources([str(tmp_path)])] == ["a.jsonl", "b.csv.gz"]
    assert [path.name for path in unread_files([str(tmp_path)])] == ["README.md", "notes.txt"]
