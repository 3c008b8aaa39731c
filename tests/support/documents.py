"""What the documents tell people to type, and where their links lead."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
"""What is written for people who use or change the project."""
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def all_markdown() -> list[Path]:
    """Every Markdown file of the repository."""
    hidden_or_made = {"runs", "node_modules", "site"}
    return [
        path
        for path in sorted(ROOT.rglob("*.md"))
        if not any(
            part.startswith(".") or part in hidden_or_made for part in path.relative_to(ROOT).parts
        )
    ]


def block(name: str) -> str:
    """The commands behind the marker ``name``, which stands in one document."""
    pattern = re.compile(rf"<!-- {name} -->\n```bash\n(.*?)```", re.DOTALL)
    found = [match[1] for path in DOCUMENTS for match in pattern.finditer(path.read_text("utf-8"))]
    assert len(found) == 1, f"{len(found)} documents have a block {name}"
    return found[0]


def fenced(text: str, language: str) -> list[str]:
    """The code of every fence of a language, ``""`` for none."""
    return [code for name, code in _FENCE.findall(text) if name == language]


def links(path: Path) -> list[str]:
    """Targets of all links and images of a document."""
    # A link's text may be code, so inline code is emptied and not removed.
    text = re.sub(r"`[^`\n]*`", "code", _FENCE.sub("", path.read_text("utf-8")))
    return re.findall(r"\]\(([^()\s]+)\)", text)


def anchors(path: Path) -> set[str]:
    """Names of a document's headings, as code hosts and mkdocs make them."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", _FENCE.sub("", path.read_text("utf-8")))
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def lrmc_commands(text: str) -> Iterator[list[str]]:
    """The words behind ``lrmc`` of every command in code, fenced or inline."""
    lines = "".join(fenced(text, "bash")).replace("\\\n", " ").splitlines()
    for line in [*lines, *re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))]:
        found = re.search(r"(?:^|['/ ])lrmc ([a-z].*?)'?$", line.strip())
        if found:
            yield shlex.split(found[1], comments=True)
