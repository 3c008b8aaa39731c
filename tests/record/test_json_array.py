"""JSON arrays, one element after the other."""

import io
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmc_ray.errors import DataError
from lrmc_ray.record import json_array
from lrmc_ray.record.json_array import elements_of
from lrmc_ray.record.rows import Rejects, read_rows
from lrmc_ray.record.sources import Source

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def elements(content: str, *, longest: int = 1 << 20) -> list[Any]:
    return list(elements_of(io.BytesIO(content.encode()), longest))


@given(
    values=st.lists(VALUES, max_size=5),
    indent=st.sampled_from([None, 0, 3]),
    chunk=st.integers(1, 40),
    mark=st.booleans(),
)
@settings(deadline=None, max_examples=200, derandomize=True)
def test_elements_are_those_of_json_however_little_is_read_at_a_time(values, indent, chunk, mark):
    content = ("\ufeff" if mark else "") + json.dumps(values, indent=indent, ensure_ascii=False)
    before, json_array.CHUNK = json_array.CHUNK, chunk
    try:
        assert elements(content + "\n ") == values
    finally:
        json_array.CHUNK = before


@pytest.mark.parametrize("chunk", [1, 2, 1000])
@pytest.mark.parametrize(
    "content",
    ["[", "[1", "[1,", "[1,]", "[1 2]", "[1,,2]", "[,1]", "[1] 2", "[1]]", '["a]', "[nul]", "{}"],
)
def test_what_json_refuses_is_refused(content, chunk, monkeypatch):
    monkeypatch.setattr(json_array, "CHUNK", chunk)
    with pytest.raises(ValueError, match=r"."):
        json.loads(content + ("," if content == "{}" else ""))
    with pytest.raises(ValueError, match=r"."):
        elements(content)


def test_a_long_element_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(json_array, "CHUNK", 64)
    assert elements(json.dumps(["x" * 100]), longest=200) == ["x" * 100]
    with pytest.raises(ValueError, match="longer than 200 characters"):
        elements(json.dumps(["x" * 10_000]), longest=200)


ROW = {"prompt": "2?", "completion": "Two."}


def test_a_broken_array_ends_the_command_where_it_breaks(tmp_path):
    """Also where bad rows may be skipped: nobody knows how many rows stand behind it."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ROW, ROW])[:-9])
    rejects = Rejects(io.StringIO(), max_share=1.0)
    with pytest.raises(DataError, match=r"a\.json:row 2: not readable as JSON.*mend the array"):
        list(read_rows([Source(path)], rejects))


def test_an_element_that_is_no_row_has_its_place(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ROW, 7, {"prompt": "\ud800", "completion": "x"}, ROW]))
    rows = list(read_rows([Source(path)], Rejects()))
    assert [row.content for row in rows] == [ROW, {}, {}, ROW]
    assert rows[1].problem == "not a JSON object"
    assert "surrogates not allowed" in rows[2].problem
    assert [row.place.rpartition(":")[2] for row in rows] == ["row 1", "row 2", "row 3", "row 4"]


def test_a_large_array_is_not_held_in_memory(tmp_path):
    path = tmp_path / "large.json"
    row = {"prompt": "2?", "completion": "Two. " * 200}
    with path.open("w") as file:
        file.write("[" + ", ".join([json.dumps(row)] * 20_000) + "]")
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows([Source(path)], Rejects())) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
