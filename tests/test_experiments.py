"""The experiments' files can be followed: each is listed, has what it needs, and is short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "experiments").glob("*.md"))
MOST_ROWS = 8


def without_code(path):
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_list_has_every_experiment_once():
    listed = re.findall(
        r"\]\(([\w-]+\.md)\) \|$", without_code(FILES[0].parent / "README.md"), re.M
    )
    assert sorted(listed) == [path.name for path in FILES if path.name != "README.md"]


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name != "README.md"], ids=lambda path: path.stem
)
def test_an_experiment_is_a_question_an_answer_a_command_limits_and_a_date(path):
    text = path.read_text(encoding="utf-8")
    assert re.match(r"# .*\?( \(negative\))?\n\n\*\*", text), "a question, and its answer in bold"
    rows = re.findall(r"^\|(?!---)", text, re.MULTILINE)
    heads = re.findall(r"^\|---", text, re.MULTILINE)
    assert len(rows) - len(heads) <= MOST_ROWS
    assert re.search(r"^## Commands?\n(.*\n)+?```bash\n", text, re.MULTILINE)
    assert re.search(r"^## Limits\n", text, re.MULTILINE)
    assert re.search(r"\n(Measured|Noted) .* November 2026", text)
