"""CPU seconds of turning rows of training data into tokens and label masks.

    python benchmarks/encoding.py [--rows 100000] [--repeats 3] [--against DIR]

The rows are those of the demo, and as many made ones: questions with answers, conversations of
three turns, prompts with completions, plain text. Each measurement is a process of its own. With
--against another checkout encodes the same files in turn with this one, so that the machine's other
work hits both alike.
"""

import argparse
import importlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEXT = """
the a of to and in is current voltage power unit measured between two points law circuit
resistance grows with length while area makes it smaller select name from city where country
population order by limit answer question because therefore however value ten hundred Ω µF
"""


def make_rows(path: Path, count: int) -> None:
    """Write ``count`` rows of four forms to ``path``."""
    rng, words = random.Random(0), TEXT.split()

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(least, most))) + "."

    def message(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            row: dict[str, Any]
            if index % 10 < 6:
                row = {
                    "messages": [message("user", text(8, 30)), message("assistant", text(5, 60))]
                }
            elif index % 10 < 8:
                roles = ("user", "assistant") * 3
                row = {"messages": [message(role, text(5, 30)) for role in roles]}
            elif index % 10 == 8:
                row = {"prompt": text(8, 30), "completion": text(5, 60)}
            else:
                row = {"text": text(40, 120)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(model: Path, data: Path) -> dict[str, float]:
    """Encode ``data`` with the package that is on the path, and count."""
    before = _cpu_seconds()
    start = time.perf_counter()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    summary, examples = _encoder(tokenizer, data)
    loaded, loaded_at = _cpu_seconds(), time.perf_counter()
    for _ in examples:
        pass
    return {
        "samples": summary.samples,
        "tokens": summary.tokens,
        "supervised_tokens": summary.supervised_tokens,
        "loading": loaded - before,
        "cpu": _cpu_seconds() - loaded,
        "wall": time.perf_counter() - loaded_at,
        "from_start": time.perf_counter() - start,
    }


def _encoder(tokenizer: Any, data: Path) -> tuple[Any, Any]:
    """Summary and examples; commits before the room ``chat`` have other modules for them."""
    module: Any
    renders: Any
    reading: Any
    source_of: Any
    try:
        from lrmc_ray.chat.answers import Chat
        from lrmc_ray.record import encode, rows, sources

        module, renders = encode, Chat(tokenizer)
        reading, source_of = rows, sources.Source
    except ImportError:
        module = importlib.import_module("lrmc_ray.data.examples")
        reading, source_of = module, importlib.import_module("lrmc_ray.data.sources").Source
        renders = tokenizer
    summary, rejects = module.EncodingSummary(), reading.Rejects()
    examples = module.encode_rows(
        reading.read_rows([source_of(data)], rejects),
        renders,
        max_length=100_000,
        on_long="error",
        vocabulary_size=len(tokenizer),
        summary=summary,
        rejects=rejects,
    )
    return summary, examples


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measured_in(tree: Path, model: Path, data: Path) -> dict[str, float]:
    """The same in a process of its own, with the package of ``tree``."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", str(model), str(data)],
        env={**os.environ, "PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print medians of CPU and wall seconds for both data sets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", type=Path, metavar="DIR")
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    sys.path.insert(0, str(ROOT))
    from lrmc_ray.config import ModelSettings
    from lrmc_ray.files.artifacts import cache_directory
    from lrmc_ray.models.directory import local_directory
    from lrmc_ray.tasks.demo.files import demo_files

    model = local_directory(ModelSettings())
    trees = {"here": ROOT, **({"there": arguments.against} if arguments.against else {})}
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made.jsonl"
        make_rows(made, arguments.rows)
        for name, data in (("demo", demo_files(cache_directory()).train), ("made", made)):
            found: dict[str, list[dict[str, float]]] = {tree: [] for tree in trees}
            for repeat in range(arguments.repeats):
                order = sorted(trees, reverse=bool(repeat % 2))
                for tree in order:
                    found[tree].append(measured_in(trees[tree], model, data))
            for tree, results in found.items():
                medians = {key: statistics.median(r[key] for r in results) for key in results[0]}
                print(f"{name} {tree}: {json.dumps(medians)}", flush=True)


if __name__ == "__main__":
    main()
