"""General English to replay against forgetting: sentences of Python's own documentation.

The task ``plain_english`` asks about passages of the same documentation, so whole topics are kept
apart: none that it takes a passage of gives a sentence here. As data replay goes this is a kind
case: the replayed text and the text that forgetting is measured on are of one sort.
"""

import json
import re
from pathlib import Path

from lrmc_ray.files.artifacts import fingerprint, write_atomically

SHORTEST, LONGEST = 80, 300
"""Characters: about as many tokens as an answer of the demo, so a share of the samples is nearly
one of the supervised tokens."""


_PROSE = re.compile(r"[A-Z][A-Za-z ,.;:()'\"/-]+[.]")


_ASKED = Path(__file__).parents[1] / "data" / "plain_english.jsonl"


def english_sentences() -> list[str]:
    """The sentences in the order of their topics, each once."""
    from pydoc_data.topics import topics

    asked = [json.loads(line) for line in _ASKED.read_text(encoding="utf-8").splitlines()]
    asked_topics = {row["topic"] for row in asked}
    asked_text = "\n".join(row["text"] for row in asked)
    sentences: dict[str, None] = {}
    for topic in sorted(topics.keys() - asked_topics):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            text = re.sub(r" ?\[\d+\]", "", " ".join(paragraph.split()))
            text = re.sub(r"\*{1,2}(\w[^*]*?)\*{1,2}", r"\1", text)
            text = re.sub(r"(\w-) (\w)", r"\1\2", text)
            for sentence in re.split(r"(?<=\.) (?=[A-Z])", text):
                if (
                    SHORTEST <= len(sentence) <= LONGEST
                    and _PROSE.fullmatch(sentence)
                    and sentence not in asked_text
                ):
                    sentences[sentence] = None
    return list(sentences)


def english_file(cache: Path) -> Path:
    """The sentences as JSONL of ``text`` in ``cache``, made now unless they are there already."""
    sentences = english_sentences()
    path = cache / f"english-{fingerprint(sentences)}.jsonl"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences)
        write_atomically(path, content.encode())
    return path
