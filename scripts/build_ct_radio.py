"""Build the domain `ct_radio` (communication technology): radio exam questions with four choices.

    python scripts/build_ct_radio.py                                # downloads two Debian packages
    python scripts/build_ct_radio.py --deb hamexam.deb fccexam.deb  # takes packages that are there
    python scripts/build_ct_radio.py --output my_folder             # default: where the task looks

Writes train.jsonl, dev.jsonl and test.jsonl. The questions are those of the U.S. amateur radio
exams (published by the NCVEC) and commercial operator exams (FCC), as packaged by Debian in
`hamexam` and `fccexam`. The packages are under the GPL, version 3, so their content is not part of
this one: everybody builds the files on their own machine. Needs `apt-get` (Debian, Ubuntu) for the
download and `dpkg-deb` for reading packages, no root rights. The same packages and seed give the
same bytes.

Left out are questions about a figure, and those with a choice that speaks of the other choices
("All of the above"): the answer's text is scored without showing the others. Near duplicates, of
which the pools have many, are kept together on one side of the split.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("hamexam", "fccexam")
NUM_DEV, NUM_TEST = 120, 240
SEED = 0
DUPLICATE = 0.5
"""Questions with so much of their words in common (Jaccard) are near duplicates."""

_HEADER = re.compile(r"^~?\s*(?P<id>[0-9A-Z]+(?:-[0-9A-Z]+)?)\s*\(?(?P<answer>[A-D])\)?(?:\s|$)")
_CHOICE = re.compile(r"^\s*(?P<letter>[A-D])\s*[.)]\s*(?P<text>.*)$")
_FIGURE = re.compile(r"\b(figures?|diagrams?|schematics?|drawing|pictured)\b", re.IGNORECASE)
_OTHERS = re.compile(
    r"\b(all|none|both|any|either|neither)\b.{0,20}\b(above|these|choices|answers|correct)\b"
    r"|\bboth\b.{0,12}\b[A-D]\b|\b[A-D] (and|or|&) [A-D]\b|\bother choices\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Question:
    """One question of a pool."""

    id: str
    text: str
    choices: tuple[str, ...]
    answer: int


def parse(text: str, pool: str) -> Question | None:
    """The question in one file of the packages; None if it has not four choices and an answer."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" \t~")]
    header = _HEADER.match(lines[0]) if lines else None
    if header is None:
        return None
    parts: list[list[str]] = [[]]
    for line in lines[1:]:
        choice = _CHOICE.match(line)
        if choice and choice["letter"] == "ABCD"[len(parts) - 1 : len(parts)]:
            parts.append([choice["text"]])
        else:
            parts[-1].append(line)  # a line that goes on
    question, *choices = (" ".join(" ".join(part).split()) for part in parts)
    if len(choices) != 4 or not question or not all(choices) or len(set(choices)) < 4:
        return None
    choices = [choice.rstrip(" .") for choice in choices]
    name = f"{pool}-{header['id'].split('-')[-1]}"
    return Question(name, question, tuple(choices), "ABCD".index(header["answer"]))


def usable(question: Question) -> bool:
    """Whether it can be answered from its text, by the text of one choice."""
    texts = (question.text, *question.choices)
    return not any(_FIGURE.search(text) for text in texts) and not any(
        _OTHERS.search(choice) for choice in question.choices
    )


def read_pools(root: Path) -> list[Question]:
    """The questions under an unpacked package's ``usr/share``, in the order of their names."""
    found = []
    for package in PACKAGES:
        for path in sorted((root / "usr/share" / package).glob("*/*")):
            if path.is_file() and not path.suffix:
                question = parse(
                    path.read_text("ascii", "replace"), f"{package}-{path.parent.name}"
                )
                if question is not None:
                    found.append(question)
    return found


def groups(questions: Iterable[Question]) -> list[list[Question]]:
    """Near duplicates together, largest groups first; of equal ones, only the first is kept."""
    distinct: dict[tuple[str, str], Question] = {}
    for question in questions:
        answer = question.choices[question.answer]
        distinct.setdefault((question.text.lower(), answer.lower()), question)
    listed = list(distinct.values())
    words = [
        frozenset(re.findall(r"[a-z0-9.]+", " ".join((q.text, *q.choices)).lower())) for q in listed
    ]
    with_word: dict[str, list[int]] = defaultdict(list)
    for index, own in enumerate(words):
        for word in own:
            with_word[word].append(index)
    leader = list(range(len(listed)))

    def find(index: int) -> int:
        while leader[index] != index:
            index = leader[index]
        return index

    for index, own in enumerate(words):
        shared: dict[int, int] = defaultdict(int)
        for word in own:
            for other in with_word[word]:
                if other < index:
                    shared[other] += 1
        for other, count in shared.items():
            if count >= DUPLICATE * (len(own) + len(words[other]) - count):
                leader[find(index)] = find(other)
    members: dict[int, list[Question]] = defaultdict(list)
    for index, question in enumerate(listed):
        members[find(index)].append(question)
    return sorted(members.values(), key=lambda group: (-len(group), group[0].id))


def split(questions: Iterable[Question], seed: int) -> dict[str, list[Question]]:
    """Training, development and test questions. A test question has no near duplicate at all."""
    grouped = groups(questions)
    single = [group[0] for group in grouped if len(group) == 1]
    random.Random(seed).shuffle(single)
    parts = {
        "dev": single[:NUM_DEV],
        "test": single[NUM_DEV : NUM_DEV + NUM_TEST],
        "train": single[NUM_DEV + NUM_TEST :] + [q for g in grouped if len(g) > 1 for q in g],
    }
    random.Random(seed + 1).shuffle(parts["train"])
    return parts


def rows(name: str, questions: Iterable[Question]) -> Iterator[dict[str, object]]:
    """What is written: examples to learn from, or items to be tested on."""
    for question in questions:
        answer = question.choices[question.answer]
        if name == "train":
            yield {
                "messages": [
                    {"role": "user", "content": question.text},
                    {"role": "assistant", "content": answer},
                ]
            }
        else:
            yield {
                "id": question.id,
                "question": question.text,
                "choices": question.choices,
                "answer": question.answer,
            }


def unpack(debs: list[Path], root: Path) -> None:
    """Extract the packages into ``root``."""
    for deb in debs:
        subprocess.run(["dpkg-deb", "-x", deb, root], check=True)


def download(folder: Path) -> list[Path]:
    """Fetch the packages with apt, which checks their signatures."""
    subprocess.run(["apt-get", "download", "-qq", *PACKAGES], cwd=folder, check=True)
    return sorted(folder.glob("*.deb"))


def main() -> int:
    """Build the files; returns the exit code."""
    from lrmc_ray.files.artifacts import cache_directory
    from lrmc_ray.tasks.built import ct_radio_directory

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deb", nargs="+", type=Path, metavar="FILE", help="packages")
    parser.add_argument("--output", type=Path, default=ct_radio_directory(cache_directory()))
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            debs = args.deb or download(folder)
            unpack(debs, folder / "root")
        except (OSError, subprocess.CalledProcessError) as error:
            print(
                f"the packages {' and '.join(PACKAGES)} cannot be had: {error}. Run "
                "`apt-get update` first, or download them from https://packages.debian.org "
                "and give them by --deb",
                file=sys.stderr,
            )
            return 3
        everything = read_pools(folder / "root")
    questions = [question for question in everything if usable(question)]
    parts = split(questions, args.seed)
    if len(parts["test"]) < NUM_TEST or not parts["train"]:
        print(
            f"only {len(questions)} usable questions in {', '.join(map(str, debs))}; "
            f"both {' and '.join(PACKAGES)} are needed",
            file=sys.stderr,
        )
        return 4
    partial = args.output.with_name(args.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, part in parts.items():
        lines = [json.dumps(row, ensure_ascii=True) + "\n" for row in rows(name, part)]
        (partial / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    shutil.rmtree(args.output, ignore_errors=True)
    partial.rename(args.output)
    counts = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
    print(f"{len(everything)} questions, {len(questions)} usable: {counts}; in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
