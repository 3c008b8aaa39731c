import itertools
import json
import math
import os
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.files.artifacts import MANIFEST, file_digest, write_manifest
from lrmc_ray.method.microbatch import Sample
from lrmc_ray.method.subsets import CandidateSets
from lrmc_ray.record import schema, verified_files
from lrmc_ray.record.reader import Records, to_sample
from lrmc_ray.record.schema import RECORD_SCHEMA, read_part, to_table, write_part

torch.set_num_threads(1)

V = 97
PROVENANCE = {"lrmc.model": "ab12", "lrmc.tokenizer": "cd34", "lrmc.data": "ef", "lrmc.record": "r"}
COLUMNS = [
    ("sample_id", "string"),
    ("domain", "string"),
    ("input_ids", "list<element: int32>"),
    ("positions", "list<element: int32>"),
    ("is_supervised", "list<element: bool>"),
    ("gold_ids", "list<element: int32>"),
    ("candidate_offsets", "list<element: int32>"),
    ("candidate_ids", "list<element: int32>"),
    ("candidate_logprobs", "list<element: halffloat>"),
    ("outside_mass", "list<element: float>"),
]
"""The contract, written down once more."""


def make_sample(seed: int, *, num_tokens: int | None = None, skip_prompt: bool = False) -> Sample:
    """A sample as Stage 0 could have recorded it, drawn without its code."""
    rng = np.random.default_rng(seed)
    length = num_tokens if num_tokens is not None else int(rng.integers(2, 30))
    ids = rng.integers(0, V, length)
    positions = np.arange(length // 3 if skip_prompt else 0, length - 1)
    is_supervised = positions >= length // 2
    offsets, tokens, logprobs = [0], [], []
    for gold in ids[positions + 1]:
        size = int(rng.integers(1, 12))
        others = rng.permutation(np.delete(np.arange(V), gold))[: size - 1]
        row = np.insert(others, rng.integers(0, size), gold)
        tokens += row.tolist()
        shares = np.sort(rng.dirichlet(np.ones(size + 1))[:size])[::-1]
        logprobs += np.log(shares).tolist()
        offsets.append(len(tokens))
    return Sample(
        sample_id=f"sample {seed} \u00fc",
        input_ids_T=torch.tensor(ids),
        positions_P=torch.tensor(positions, dtype=torch.int64),
        is_supervised_P=torch.tensor(is_supervised, dtype=torch.bool),
        candidates=CandidateSets(
            offsets=torch.tensor(offsets),
            token_ids=torch.tensor(tokens, dtype=torch.int32),
            logprobs=torch.tensor(np.minimum(np.float16(logprobs), np.float16(0))),
            gold_ids=torch.tensor(ids[positions + 1], dtype=torch.int32),
        ),
        domain=("", "sql", "radio \u00fc")[seed % 3],
    )


def assert_same(sample: Sample, expected: Sample) -> None:
    """Equal in every value, dtype and bit."""
    assert (sample.sample_id, sample.domain) == (expected.sample_id, expected.domain)
    for name in ("input_ids_T", "positions_P", "is_supervised_P"):
        left, right = getattr(sample, name), getattr(expected, name)
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    for name in ("offsets", "token_ids", "gold_ids", "logprobs"):
        left, right = getattr(sample.candidates, name), getattr(expected.candidates, name)
        assert left.dtype == right.dtype
        if name == "logprobs":
            left, right = left.view(torch.int16), right.view(torch.int16)
        assert torch.equal(left, right)


SIZES = (3, 1, 150, 20)
"""Rows of the parts; 150 is more than one row group."""


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [make_sample(seed) for seed in range(sum(SIZES))]


def write_record(directory, samples, sizes=SIZES, *, provenance=PROVENANCE):
    directory.mkdir(exist_ok=True)
    start = 0
    for number, size in enumerate(sizes):
        write_part(directory / f"part-{number}.parquet", samples[start : start + size], provenance)
        start += size
    declare(directory, sizes)
    return directory


def declare(directory, sizes=SIZES, **changes):
    """Write the manifest of what is there, as Stage 0 does."""
    names = [f"part-{number}.parquet" for number in range(len(sizes))]
    manifest = {
        "kind": "records",
        "provenance": PROVENANCE,
        "vocabulary_size": V,
        "files": [
            {"name": name, "rows": rows, "sha256": file_digest(directory / name)}
            for name, rows in zip(names, sizes, strict=True)
        ],
    }
    write_manifest(directory, manifest | changes)


@pytest.fixture
def record(tmp_path, samples):
    return write_record(tmp_path / "record", samples)


def read_all(directory) -> list[Sample]:
    return list(Records(directory))  # type: ignore[call-overload]  # list() reads it by index


def error_of(directory) -> str:
    """What reading every sample says; the first line alone would do to act on it."""
    with pytest.raises(DataError) as caught:
        read_all(directory)
    assert caught.value.exit_code == 4
    message = str(caught.value)
    assert str(directory) in message
    return message


# What is written is read


def test_the_columns_are_those_of_the_contract(tmp_path, samples):
    write_part(tmp_path / "part.parquet", samples[:3], PROVENANCE)
    schema = pq.read_schema(tmp_path / "part.parquet")
    assert [(field.name, str(field.type)) for field in schema] == COLUMNS
    assert not any(field.nullable for field in schema)
    assert schema.metadata == {
        b"lrmc.schema_version": b"2",
        **{key.encode(): value.encode() for key, value in PROVENANCE.items()},
    }


def test_what_is_read_is_what_was_written(record, samples):
    opened = Records(record)
    assert len(opened) == len(samples) == 174
    for index in random.Random(0).sample(range(174), 174):
        assert_same(opened[index], samples[index])


@given(seed=st.integers(0, 2**32 - 1), num_tokens=st.integers(1, 40), skip=st.booleans())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_any_sample_survives_the_table(seed, num_tokens, skip):
    sample = make_sample(seed, num_tokens=num_tokens, skip_prompt=skip)
    table = to_table([make_sample(1), sample], PROVENANCE)
    assert_same(to_sample(table, 1, vocabulary_size=V, source="test"), sample)


def test_every_float16_log_probability_keeps_its_bits(tmp_path):
    """All finite ones at most 0, minus zero and the subnormal ones included."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    values = values[values.isfinite() & (values <= 0)]
    assert len(values) == 31 * 1024 + 1
    sample = Sample(
        sample_id="all",
        input_ids_T=torch.tensor([0, 1]),
        positions_P=torch.tensor([0]),
        is_supervised_P=torch.tensor([True]),
        candidates=CandidateSets(
            offsets=torch.tensor([0, len(values)]),
            token_ids=torch.arange(len(values), dtype=torch.int32),
            logprobs=values,
            gold_ids=torch.tensor([1], dtype=torch.int32),
        ),
    )
    write_part(tmp_path / "part.parquet", [sample], PROVENANCE)
    table = read_part(tmp_path / "part.parquet", PROVENANCE)
    assert_same(to_sample(table, 0, vocabulary_size=len(values), source="test"), sample)


def test_outside_mass_is_one_minus_the_stored_probability(samples):
    table = to_table(samples, PROVENANCE)
    for row, sample in enumerate(samples):
        offsets = sample.candidates.offsets.tolist()
        logprobs = sample.candidates.logprobs.double().tolist()
        expected = [
            max(0.0, 1 - math.fsum(math.exp(x) for x in logprobs[start:stop]))
            for start, stop in itertools.pairwise(offsets)
        ]
        # Each stored probability is rounded down to 2^-40, the difference to float32.
        assert table["outside_mass"][row].as_py() == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_samples_are_counted_from_0_and_end(record, samples):
    opened = Records(record)
    for index in (174, 1000, -1, -174, -1000):
        with pytest.raises(IndexError):
            opened[index]
    assert [sample.sample_id for sample in opened] == [sample.sample_id for sample in samples]


def test_a_part_is_whole_or_absent(tmp_path, samples, monkeypatch):
    path = tmp_path / "part.parquet"
    write_part(path, samples[:2], PROVENANCE)
    before = path.read_bytes()
    write = pq.write_table

    def torn(table, where, **options):
        write(table, where, **options)
        os.truncate(where, 100)
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", torn)
    for target in (path, tmp_path / "new.parquet"):
        with pytest.raises(OSError, match="No space"):
            write_part(target, samples[2:3], PROVENANCE)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["part.parquet"]


# Files that are not what was written


def test_every_flipped_bit_is_noticed(record):
    path = record / "part-2.parquet"
    good = path.read_bytes()
    rng = random.Random(0)
    noticed = 0
    for _ in range(60):
        content = bytearray(good)
        content[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"part-2\.parquet is not the file that was recorded"):
            Records(record)[10]
        noticed += 1
    assert noticed == 60


def flips_that(path, table) -> Counter[str]:
    """What becomes of 100 files that each have one bit flipped."""
    good = path.read_bytes()
    rng = random.Random(0)
    outcomes: Counter[str] = Counter()
    for _ in range(100):
        content = bytearray(good)
        content[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            same = read_part(path, PROVENANCE).equals(table)
            outcomes["harmless" if same else "silent"] += 1
        except DataError:
            outcomes["noticed"] += 1
    return outcomes


def test_page_checksums_notice_flipped_bits_where_there_is_no_digest_yet(tmp_path, samples):
    """What an interrupted Stage 0 left behind is in no manifest."""
    path = tmp_path / "part.parquet"
    write_part(path, samples[4:104], PROVENANCE)
    table = read_part(path, PROVENANCE)
    outcomes = flips_that(path, table)
    assert outcomes["silent"] == 0
    assert outcomes["noticed"] > 70
    # Without checksums some of these bits would change the data, and nobody would see it.
    pq.write_table(table, path, compression="zstd", row_group_size=64)
    assert flips_that(path, table)["silent"] > 0


def test_flipped_bits_of_the_footer_never_raise_anything_else(tmp_path, samples):
    path = tmp_path / "part.parquet"
    write_part(path, samples[:1], PROVENANCE)
    good = path.read_bytes()
    footer = int.from_bytes(good[-8:-4], "little") + 8
    rng = random.Random(1)
    outcomes = set()
    for _ in range(200):
        content = bytearray(good)
        content[len(good) - 1 - rng.randrange(footer)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            table = read_part(path, PROVENANCE)
            assert_same(to_sample(table, 0, vocabulary_size=V, source="test"), samples[0])
            outcomes.add("same")
        except DataError:
            outcomes.add("noticed")
    assert outcomes == {"same", "noticed"}


DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "no Parquet": lambda content: b"sample_id,input_ids\n1,2\n" * 20,
    "JSON": lambda content: b'{"sample_id": "1"}\n',
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_the_remedy(record, damage):
    path = record / "part-1.parquet"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert_same(Records(record)[0], make_sample(0))  # the other parts are good
    message = error_of(record)
    assert message.startswith(f"{path} is not the file that was recorded")
    assert f"remove {record} and run `python -m lrmc_ray.record` again" in message
    with pytest.raises(DataError) as caught:
        read_part(path, PROVENANCE)
    assert f"{path} is damaged (" in str(caught.value)
    assert "record again" in str(caught.value)
    # Even where the manifest was made to fit.
    declare(record)
    assert f"{path} is damaged (" in error_of(record)


def test_a_missing_file_is_named_with_the_remedy(record):
    (record / "part-2.parquet").unlink()
    message = error_of(record)
    assert message.startswith(f"{record / 'part-2.parquet'} is missing; remove {record} and run")


def test_a_file_that_the_manifest_does_not_list_is_not_read(record, samples):
    write_part(record / "part-4.parquet", samples[:5], PROVENANCE)
    (record / "part-00000.parquet").write_bytes(b"no Parquet")
    (record / ".part-0.parquet.17.partial").write_bytes(b"torn")
    for sample, expected in zip(read_all(record), samples, strict=True):
        assert_same(sample, expected)


def test_swapped_files_are_noticed(tmp_path, samples):
    record = write_record(tmp_path / "record", samples, (5, 5))
    first, second, third = (record / name for name in ("part-0.parquet", "part-1.parquet", "x"))
    first.rename(third)
    second.rename(first)
    third.rename(second)
    assert "part-0.parquet is not the file that was recorded" in error_of(record)


def test_other_rows_than_the_manifest_says_are_noticed(record, samples):
    for rows in (19, 21):
        write_part(record / "part-3.parquet", samples[:rows], PROVENANCE)
        declare(record)
        assert f"part-3.parquet has {rows} rows, not 20" in error_of(record)


@pytest.mark.parametrize("key", PROVENANCE)
def test_a_file_of_another_record_is_noticed(record, samples, key):
    write_part(record / "part-1.parquet", samples[3:4], PROVENANCE | {key: "other"})
    declare(record)
    message = error_of(record)
    assert f"part-1.parquet: {key} is other, the record's is {PROVENANCE[key]}" in message
    without = {name: value for name, value in PROVENANCE.items() if name != key}
    write_part(record / "part-1.parquet", samples[3:4], without)
    declare(record)
    assert f"{key} is None, the record's is" in error_of(record)


@pytest.mark.parametrize("version", ["0", "1", "3", "2.0", ""])
def test_another_schema_version_is_refused(record, samples, version, monkeypatch):
    monkeypatch.setattr(schema, "SCHEMA_VERSION", version)
    write_part(record / "part-1.parquet", samples[3:4], PROVENANCE)
    monkeypatch.undo()
    declare(record)
    message = error_of(record)
    assert f"record schema version {version}, not 2 as read here; record again" in message


def test_a_file_without_metadata_is_refused(record, samples):
    table = to_table(samples[3:4], PROVENANCE).replace_schema_metadata(None)
    pq.write_table(table, record / "part-1.parquet")
    declare(record)
    assert "record schema version absent, not 2" in error_of(record)


def test_metadata_that_is_no_text_is_refused(record, samples):
    table = to_table(samples[3:4], PROVENANCE)
    metadata = {**table.schema.metadata, b"lrmc.data": b"\xf2"}
    pq.write_table(table.replace_schema_metadata(metadata), record / "part-1.parquet")
    declare(record)
    assert "part-1.parquet is damaged ('utf-8' codec can't decode" in error_of(record)


def as_int64(table, name):
    index = table.schema.get_field_index(name)
    column = table[name].cast(pa.list_(pa.int64()))
    return table.set_column(index, pa.field(name, column.type, nullable=False), column)


SCHEMA_CHANGES = {
    "reordered": lambda table: table.select(table.column_names[::-1]),
    "missing": lambda table: table.drop_columns(["outside_mass"]),
    "one more": lambda table: table.append_column("more", pa.array([1])),
    "renamed": lambda table: table.rename_columns({"sample_id": "id"}).replace_schema_metadata(
        table.schema.metadata
    ),
    "int64 ids": lambda table: as_int64(table, "input_ids"),
    "int64 offsets": lambda table: as_int64(table, "candidate_offsets"),
    "nullable": lambda table: table.cast(
        pa.schema([field.with_nullable(True) for field in table.schema], table.schema.metadata)
    ),
}


@pytest.mark.parametrize("change", SCHEMA_CHANGES)
def test_other_columns_are_refused(record, samples, change):
    table = SCHEMA_CHANGES[change](to_table(samples[3:4], PROVENANCE))
    pq.write_table(table, record / "part-1.parquet")
    declare(record)
    message = error_of(record)
    assert "part-1.parquet: its columns are not those of a record; record again" in message


# Rows that contradict themselves, in files that are as they were written


def three_positions() -> Sample:
    """Tokens 5 6 7 8; the candidates of the positions are 6, 9 7 and 3 8 4."""
    return Sample(
        sample_id="three",
        input_ids_T=torch.tensor([5, 6, 7, 8]),
        positions_P=torch.tensor([0, 1, 2]),
        is_supervised_P=torch.tensor([False, True, True]),
        candidates=CandidateSets(
            offsets=torch.tensor([0, 1, 3, 6]),
            token_ids=torch.tensor([6, 9, 7, 3, 8, 4], dtype=torch.int32),
            logprobs=torch.tensor([0, -1, -2, -1, -2, -3], dtype=torch.float16),
            gold_ids=torch.tensor([6, 7, 8], dtype=torch.int32),
        ),
    )


def with_column(name: str, values: list[Any]) -> pa.Table:
    table = to_table([three_positions()], PROVENANCE)
    index = table.schema.get_field_index(name)
    field = RECORD_SCHEMA.field(name)
    return table.set_column(index, field, pa.array([values], type=field.type))


def test_the_row_that_is_broken_below_is_good():
    table = with_column("input_ids", [5, 6, 7, 8])
    assert_same(to_sample(table, 0, vocabulary_size=10, source="x"), three_positions())


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("input_ids", [5, 6, 7, 10], r"token ids must be in \[0, 10\)"),
        ("input_ids", [-1, 6, 7, 8], r"token ids must be in \[0, 10\)"),
        ("input_ids", [5, 6, 9, 8], "gold ids must be the next tokens"),
        ("input_ids", [5, 6, 7], "positions must be in"),
        ("input_ids", [], "positions must be in"),
        ("gold_ids", [6, 9, 8], "gold ids must be the next tokens"),
        ("gold_ids", [7, 6, 8], "gold ids must be the next tokens"),
        ("gold_ids", [6, 7], "equally many"),
        ("gold_ids", [6, 7, 8, 8], "equally many"),
        ("positions", [0, 1], "equally many"),
        ("positions", [0, 2, 1], "positions must"),
        ("positions", [0, 2, 2], "positions must ascend"),
        ("positions", [0, 1, 3], "positions must be in"),
        ("positions", [-1, 1, 2], "positions must be in"),
        ("is_supervised", [True, True], "equally many"),
        ("candidate_ids", [6, 9, 7, 3, 8, 3], "distinct within a row"),
        ("candidate_ids", [6, 9, 7, 3, 8, 10], r"token_ids must be in \[0, 10\), got 10"),
        ("candidate_ids", [6, 9, 7, 3, 8, -1], r"token_ids must be in \[0, 10\), got -1"),
        ("candidate_ids", [6, 9, 7, 3, 5, 4], "gold token, row 2 lacks 8"),
        ("candidate_ids", [6, 9, 7, 3, 8], "offsets must"),
        ("candidate_logprobs", [0, -1, -2, -1, -2], "offsets must"),
        ("candidate_logprobs", [0, -1, -2, -1, -2, math.nan], "finite and at most 0"),
        ("candidate_logprobs", [0, -1, -2, -1, -2, -math.inf], "finite and at most 0"),
        ("candidate_logprobs", [0.5, -1, -2, -1, -2, -3], "finite and at most 0"),
        ("candidate_logprobs", [0, -2, -1, -1, -2, -3], "descend"),
        ("candidate_offsets", [0, 1, 3], "offsets must"),
        ("candidate_offsets", [0, 1, 3, 5], "offsets must rise from 0"),
        ("candidate_offsets", [1, 1, 3, 6], "offsets must rise from 0"),
        ("candidate_offsets", [0, 4, 3, 6], "offsets must rise from 0"),
        ("candidate_offsets", [0, 1, 2, 6], "gold token|descend"),
        ("candidate_offsets", [], "offsets must"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(column, values, message):
    table = with_column(column, values)
    with pytest.raises(DataError, match=message) as caught:
        to_sample(table, 0, vocabulary_size=10, source="part-0.parquet")
    assert str(caught.value).startswith("part-0.parquet, sample three: ")
    assert str(caught.value).endswith("; record again")
    assert caught.value.exit_code == 4


def test_the_vocabulary_of_the_manifest_is_the_one_that_counts(record, samples):
    largest = max(int(sample.input_ids_T.max()) for sample in samples)
    assert largest == V - 1
    declare(record, vocabulary_size=largest)
    assert f"must be in [0, {largest})" in error_of(record)


# The manifest


def test_an_unfinished_record_is_exit_code_3(record):
    (record / MANIFEST).unlink()
    with pytest.raises(IncompleteArtifactError, match=r"python -m lrmc_ray\.record") as caught:
        Records(record)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"files": None},
        {"files": [{"name": "part-0.parquet", "rows": 3}]},
        {"files": [{"name": "part-0.parquet", "rows": 3, "sha256": "", "size": 1}]},
        {"files": ["part-0.parquet"]},
    ],
)
def test_a_manifest_with_other_fields_is_exit_code_4(record, changes):
    declare(record, **changes)
    assert f"the manifest of {record} is damaged" in error_of(record)


@pytest.mark.parametrize("key", ["files", "provenance", "vocabulary_size"])
def test_a_manifest_that_lacks_a_field_is_exit_code_4(record, key):
    manifest = json.loads((record / MANIFEST).read_text())
    del manifest[key]
    write_manifest(record, manifest)
    assert f"the manifest of {record} is damaged ('{key}')" in error_of(record)


def test_the_output_of_another_stage_is_no_record(record):
    declare(record, kind="scores")
    assert "is no record but scores" in error_of(record)


# The cache


def reads_of(monkeypatch, opened: Records, indices) -> list[str]:
    """The files that are read from disk while ``indices`` are asked for."""
    read = []

    def counted(path, provenance):
        read.append(path.name)
        return read_part(path, provenance)

    monkeypatch.setattr(verified_files, "read_part", counted)
    for index in indices:
        assert opened[index].sample_id == f"sample {index} \u00fc"
    return read


def test_parts_are_read_when_they_are_needed_and_then_kept(record, monkeypatch):
    opened = Records(record)
    assert reads_of(monkeypatch, opened, [0, 1, 173, 2, 0, 172]) == [
        "part-0.parquet",
        "part-3.parquet",
    ]


def test_a_part_that_is_larger_than_the_cache_is_read_but_alone(record, monkeypatch):
    opened = Records(record, max_cached_bytes=1)
    assert reads_of(monkeypatch, opened, [0, 1, 4, 5, 0]) == [
        "part-0.parquet",
        "part-2.parquet",
        "part-0.parquet",
    ]


def test_the_part_that_was_not_used_longest_goes_first(tmp_path, monkeypatch):
    samples = [replace(make_sample(1), sample_id=f"sample {i} \u00fc") for i in range(4)]
    record = write_record(tmp_path / "record", samples, (1, 1, 1, 1))
    one = read_part(record / "part-0.parquet", PROVENANCE).nbytes
    opened = Records(record, max_cached_bytes=2 * one)
    read = reads_of(monkeypatch, opened, [0, 1, 0, 2, 0, 1, 3])
    assert read == [f"part-{number}.parquet" for number in (0, 1, 2, 1, 3)]


def test_the_cache_stays_within_its_bound(record):
    nbytes = [
        read_part(record / f"part-{number}.parquet", PROVENANCE).nbytes for number in range(4)
    ]
    bound = max(nbytes) + min(nbytes)
    opened = Records(record, max_cached_bytes=bound)
    rng = random.Random(0)
    kept = set()
    for _ in range(200):
        opened[rng.randrange(174)]
        held = sum(table.nbytes for table in opened._cache.values())
        kept.add(len(opened._cache))
        assert held <= bound
    assert max(kept) > 1


def test_a_part_that_is_damaged_after_it_left_the_cache_is_noticed(record):
    opened = Records(record, max_cached_bytes=1)
    opened[0]
    opened[3]
    (record / "part-0.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"part-0\.parquet"):
        opened[0]
