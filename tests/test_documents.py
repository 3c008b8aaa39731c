"""The documents speak of what there is: links, commands, flags, settings, tables."""

import re
import sys
from pathlib import Path

import pytest

import lrmc_ray.method
from lrmc_ray import cli, errors
from lrmc_ray.config.compare import CompareSpace
from scripts.build_settings_page import PAGE, page
from tests.support.documents import (
    DOCUMENTS,
    README,
    ROOT,
    all_markdown,
    anchors,
    fenced,
    links,
    lrmc_commands,
)

DOCS = ROOT / "docs"
FILES = ("py", "md", "json", "jsonl", "parquet", "html", "png", "csv", "toml", "yaml", "db", "txt")
"""Endings that make ``compare.html`` no setting."""


def rows(path: Path, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its head."""
    text = path.read_text("utf-8").partition(f"\n## {heading}\n")[2]
    table = re.search(r"^(\|.*\n)+", text, flags=re.M)
    assert table, f"{path} has no table below {heading}"
    cells = [re.split(r"(?<!\\)\|", line.strip("|")) for line in table[0].splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in cells]


def test_there_are_documents_to_look_at():
    assert len(DOCUMENTS) > 12
    assert {*DOCUMENTS, ROOT / "lrmc_ray" / "tasks" / "README.md"} <= set(all_markdown())


@pytest.mark.parametrize("path", all_markdown(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in links(path):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: {target.name} has no such heading"


def test_every_named_file_exists():
    pattern = re.compile(r"`((?:[\w-]+/)+[\w-]+\.(?:py|toml|yaml))`")
    named = {
        (path, name) for path in DOCUMENTS for name in pattern.findall(path.read_text("utf-8"))
    }
    assert len(named) > 20
    for path, name in named:
        found = [folder / name for folder in (ROOT, ROOT / "lrmc_ray") if (folder / name).exists()]
        assert found, f"{path.name}: there is no {name}"


def test_the_readme_fits_a_first_look():
    text = README.read_text("utf-8")
    assert len(text.encode()) <= 8192
    (shown,) = fenced(text, "")
    assert max(map(len, shown.splitlines())) <= 80
    assert not re.search(r"\([^()\]]*\([^()]*\)[^()]*\)", re.sub(r"\]\([^)]*\)", "]", text))


def test_every_named_setting_exists():
    fields = {name: field.annotation for name, field in CompareSpace.model_fields.items()}
    sections = {n: t.model_fields for n, t in fields.items() if hasattr(t, "model_fields")}
    pattern = re.compile(rf"(?<![\w./-])({'|'.join(sections)})\.([a-z][a-z0-9_]*)(?![\w/(]|\.\[)")
    seen = set()
    for path in DOCUMENTS:
        for section, key in pattern.findall(path.read_text("utf-8")):
            if key not in FILES:
                assert key in sections[section], f"{path.name}: there is no {section}.{key}"
                seen.add(f"{section}.{key}")
    assert {"train.lr", "search.objective", "resources.gpus_per_worker"} <= seen


def test_every_stage_and_flag_exists(monkeypatch, capsys):
    commands = [
        (path, words)
        for path in DOCUMENTS
        for words in lrmc_commands(path.read_text("utf-8"))
        if words[0] not in ("test", "setup")  # of the script `lrmc`
    ]
    assert len(commands) > 30
    known: dict[str, set[str]] = {}
    for stage in {words[0] for _, words in commands}:
        assert stage in cli.STAGES, stage
        monkeypatch.setattr(sys, "argv", ["lrmc", stage, "--help"])
        assert cli.main() == 0
        known[stage] = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
    for path, words in commands:
        flags = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
        assert flags <= known[words[0]], f"{path.name}: lrmc {' '.join(words)}"


def test_the_tables_are_complete():
    listed = [row[0].strip("`") for row in rows(DOCS / "get_started.md", "The commands")]
    assert {command.removeprefix("lrmc ") for command in listed} == set(cli.STAGES)
    spaces = {row[0].strip("`") for row in rows(DOCS / "tuning.md", "What is searched")}
    shipped = {path.stem for path in (ROOT / "tune_spaces").glob("*.toml")}
    assert spaces == {name for name in shipped if not name.startswith("compare")}
    listed = [row[0] for row in rows(DOCS / "footguns.md", "Exit codes")]
    codes = {code for cell in listed for code in cell.split(", ")}
    classes = [errors.LrmcError, *errors.LrmcError.__subclasses__()]
    assert {str(kind.exit_code) for kind in classes} <= codes


def test_there_is_one_notation():
    """The method's docstring has it for those who read code, the documents for the others."""
    docstring = lrmc_ray.method.__doc__ or ""
    in_code = dict(re.findall(r"^([A-Z])  +(.+)$", docstring, flags=re.M))
    assert in_code == dict(rows(DOCS / "method.md", "Notation"))


def test_the_settings_page_is_what_the_settings_say():
    assert PAGE.read_text("utf-8") == page(), "run `python scripts/build_settings_page.py`"
