from pathlib import Path

import pytest

from lrmc_ray.errors import ConfigError, IncompleteArtifactError
from lrmc_ray.record.sources import Source, find_sources, split_domain


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files in the current directory, so that patterns are short."""
    monkeypatch.chdir(tmp_path)
    for name in (
        *("b.jsonl", "a.parquet", "notes.txt", ".hidden.jsonl"),
        *("sub/c.jsonl", "sub/deep/d.json", ".git/e.jsonl", "empty/readme.md"),
    ):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def found(*names: str) -> list[str]:
    return [
        f"{source.domain}={source.path}" if source.domain else str(source.path)
        for source in find_sources(names)
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["b.jsonl"], ["b.jsonl"]),
        (["notes.txt"], ["notes.txt"]),  # a file that is named is read, whatever its suffix
        (["."], ["a.parquet", "b.jsonl", "sub/c.jsonl", "sub/deep/d.json"]),
        (["sub"], ["sub/c.jsonl", "sub/deep/d.json"]),
        (["*.jsonl"], ["b.jsonl"]),
        (["**/*.json*"], ["b.jsonl", "sub/c.jsonl", "sub/deep/d.json"]),
        (["[ab].*"], ["a.parquet", "b.jsonl"]),
        (["b.jsonl", "a.parquet"], ["b.jsonl", "a.parquet"]),
        (["b.jsonl", "*.jsonl", "./b.jsonl"], ["b.jsonl"]),
        (
            ["sql=b.jsonl", "radio=sub"],
            ["sql=b.jsonl", "radio=sub/c.jsonl", "radio=sub/deep/d.json"],
        ),
    ],
)
def test_names_stand_for_files(folder, names, expected):
    assert found(*names) == expected


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none.jsonl", "training data none.jsonl does not exist"),
        ("*.csv", r"training data \*.csv matches no file"),
        ("sql=none.jsonl", "training data none.jsonl does not exist"),
        ("empty", "training data empty is a folder without .jsonl"),
        ("", "training data '' is no name"),
        ("sql=", "training data sql= does not exist"),
        ("a\0b", "does not exist"),
    ],
)
def test_a_name_that_stands_for_nothing_is_exit_code_3(folder, name, problem):
    with pytest.raises(IncompleteArtifactError, match=problem) as caught:
        find_sources([name])
    assert caught.value.exit_code == 3


def test_a_file_has_one_domain(folder):
    with pytest.raises(ConfigError, match=r"b\.jsonl has 'sql' and ''; name it once"):
        find_sources(["sql=b.jsonl", "*.jsonl"])


def test_a_path_with_an_equals_sign_is_still_a_path(folder):
    Path("x=y.jsonl").touch()
    assert found("x=y.jsonl") == ["x=y.jsonl"]
    assert found("sql=x=y.jsonl") == ["sql=x=y.jsonl"]
    assert find_sources(["sql=x=y.jsonl"]) == [Source(Path("x=y.jsonl"), "sql")]
    assert split_domain("/data/a=b.jsonl") == ("", "/data/a=b.jsonl")


def test_links_to_one_file_are_one_file(folder):
    Path("link.jsonl").symlink_to("b.jsonl")
    assert found("b.jsonl", "link.jsonl") == ["b.jsonl"]
