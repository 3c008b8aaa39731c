"""What ``lrmc inspect --data`` says of rows: their places, and the text of every token."""

import csv
import gzip
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import normalizers

from lrmc_ray.config import ModelSettings
from lrmc_ray.record.inspect_data import inspect_rows
from tests.support.chat_templates import (
    MARKED,
    byte_fallback_tokenizer,
    shipped,
    tokenizer_for,
)

TEXTS = [
    "Two.",
    "Größe von 東京",
    "👍🏽 ok 👩‍👩‍👧",
    "e\u0301 combining a\u030a",
    "say <|im_end|> or </s> now",
    "  two  spaces ",
    "\ttab\n\n\nlines",
    "zero\u200bwidth \u202eRTL",
    "ﬁ ½ ① Ω µ \ufeffmark",
    "a\r\nb",
]
TOKENIZERS = {
    "bytes": lambda: tokenizer_for(shipped()["qwen2_5"]),
    "prefix space": lambda: tokenizer_for(MARKED, "<|end|>", "</s>", prefix_space=True),
    "byte fallback": lambda: byte_fallback_tokenizer(legacy=False),
    "byte fallback, legacy": lambda: byte_fallback_tokenizer(legacy=True),
    "with a first token": lambda: byte_fallback_tokenizer(legacy=False, first=True),
}


def normalizing():
    tokenizer = tokenizer_for(shipped()["qwen2_5"])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


TOKENIZERS["normalizer"] = normalizing


def saved(tokenizer, directory) -> ModelSettings:
    tokenizer.save_pretrained(directory)
    return ModelSettings(name=str(directory))


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_texts_of_the_tokens_are_the_text(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
        for text in TEXTS
    ]
    rows += [{"text": text} for text in TEXTS]
    path = tmp_path / "my.jsonl"
    path.write_text(lines(rows))
    samples = list(inspect_rows([str(path)], saved(tokenizer, tmp_path / "model")))
    assert [sample["place"] for sample in samples] == [f"{path}:{i}" for i in range(1, 21)]
    for sample, row in zip(samples, rows, strict=True):
        assert list(sample) == ["place", "text", "tokens"]
        tokens = sample["tokens"]
        assert all(list(token) == ["id", "text", "learned"] for token in tokens)
        joined = "".join(token["text"] for token in tokens)
        is_text = "text" in row
        first = "<s>" if name == "with a first token" and is_text else ""
        assert joined == first + sample["text"]
        expected = tokenizer(sample["text"], add_special_tokens=is_text)["input_ids"]
        assert [token["id"] for token in tokens] == expected
        said = "".join(token["text"] for token in tokens if token["learned"])
        wanted = row["text"] if is_text else row["messages"][1]["content"].strip()
        assert wanted in said or (is_text and wanted.endswith(said))


GOOD = {"prompt": "2?", "completion": "Two."}
BAD = {"prompt": "2?", "completion": " "}


def write_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(GOOD)
        writer.writerows([["2?", "Two\nand two."], ["2?", " "], ["2?", "Two."]])


def write_zst(path):
    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(lines([GOOD, BAD, GOOD]).encode())


def write_arrow(path):
    table = pa.Table.from_pylist([GOOD, BAD, GOOD])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


FILES = {
    "a.csv": (write_csv, ":2", ":4", ":5"),
    "b.jsonl": (lambda path: path.write_text("\n" + lines([GOOD, BAD, GOOD])), ":2", ":3", ":4"),
    "c.jsonl.gz": (
        lambda path: path.write_bytes(gzip.compress(lines([GOOD, BAD, GOOD]).encode())),
        *(":1", ":2", ":3"),
    ),
    "d.jsonl.zst": (write_zst, ":1", ":2", ":3"),
    "e.json": (
        lambda path: path.write_text(json.dumps([GOOD, BAD, GOOD])),
        *(":row 1", ":row 2", ":row 3"),
    ),
    "f.parquet": (
        lambda path: pq.write_table(pa.Table.from_pylist([GOOD, BAD, GOOD]), path),
        *(":row 1", ":row 2", ":row 3"),
    ),
    "sub/g.arrow": (write_arrow, ":row 1", ":row 2", ":row 3"),
}


def test_every_kind_of_file_says_where_its_rows_stand(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    for name, (write, *_) in FILES.items():
        write(folder / name)
    model = saved(tokenizer_for(shipped()["qwen2_5"]), tmp_path / "model")
    samples = list(inspect_rows([str(folder)], model))
    places = [f"{folder / name}{number}" for name, (_, *all_) in FILES.items() for number in all_]
    assert [sample["place"] for sample in samples] == places
    for number, sample in enumerate(samples):
        if number % 3 == 1:
            assert list(sample) == ["place", "problem"]
            assert sample["problem"] == "'completion' is empty, so there is nothing to learn"
        else:
            assert "2?<|im_end|>\n<|im_start|>assistant\nTwo" in sample["text"]
        assert list(inspect_rows([sample["place"]], model)) == [sample]
