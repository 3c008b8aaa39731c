"""Do the scores tell learning rates apart? Smooth scores against accuracy, on the demo.

    python benchmarks/learning_rates.py [--lr 1e-5 3e-5 1e-4] [--steps 12] [--limit 120] [--seed 0]

Fine-tunes the model once per learning rate (plain cross-entropy, AdamW, the same samples in the
same order) and scores it on the demo's test questions. For every metric it shows the 95 % interval
at each learning rate, and of how many neighbours the intervals do not overlap; "paired" counts
those whose difference, by the paired bootstrap over the items, is not zero.
"""

import argparse
import itertools
import json
import logging
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lrmc_ray.chat.answers import Chat
from lrmc_ray.config import ModelSettings
from lrmc_ray.evaluate.harness import ItemChoice, run_task
from lrmc_ray.evaluate.item_rows import task_rows
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.prefix_lm import PrefixLM
from lrmc_ray.evaluate.statistics import paired_bootstrap
from lrmc_ray.evaluate.task_files import task_manager
from lrmc_ray.files.artifacts import cache_directory
from lrmc_ray.models.directory import local_directory
from lrmc_ray.models.loading import load_model, load_tokenizer
from lrmc_ray.record.encode import encode_row
from lrmc_ray.record.rows import Row
from lrmc_ray.tasks.demo.files import demo_files

METRICS = ("accuracy", "gold_probability", "score")


def fine_tuned(directory: Path, tokenizer: Any, lr: float, args: argparse.Namespace) -> Any:
    rows = demo_files(cache_directory()).train.read_text("utf-8").splitlines()
    chosen = random.Random(args.seed).sample(rows, args.steps * args.batch_size)
    chat = Chat(tokenizer)
    examples = [example for row in chosen for example in encode_row(Row("", json.loads(row)), chat)]
    model = load_model(directory).train()
    head = model.get_output_embeddings()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for start in range(0, len(examples), args.batch_size):
        batch = examples[start : start + args.batch_size]
        longest = max(len(example.input_ids) for example in batch)
        ids_BT = torch.zeros((len(batch), longest), dtype=torch.long)
        target_BT = torch.zeros((len(batch), longest), dtype=torch.bool)
        for row, example in enumerate(batch):
            ids_BT[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
            target_BT[row, : len(example.input_ids)] = torch.tensor(example.is_target)
        hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        wanted_BT = target_BT[:, 1:]
        loss = F.cross_entropy(head(hidden_BTD[:, :-1][wanted_BT]), ids_BT[:, 1:][wanted_BT])
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def scored(model: Any, tokenizer: Any, limit: int) -> Scores:
    lm = PrefixLM(model, tokenizer, batch_tokens=2048)
    with tempfile.TemporaryDirectory() as scratch:
        manager = task_manager(["nl2sql"], Path(scratch), "test")
        samples = run_task(lm, manager, "nl2sql", ItemChoice(limit))
    return Scores.from_rows(task_rows("nl2sql", "domain", samples, tokenizer))


def measure(args: argparse.Namespace) -> dict[str, object]:
    directory = local_directory(ModelSettings(name=args.model))
    tokenizer = load_tokenizer(directory)
    results: list[Scores] = []
    seconds = {"train": 0.0, "score": 0.0}
    for lr in sorted(args.lr):
        start = time.process_time()
        model = fine_tuned(directory, tokenizer, lr, args)
        middle = time.process_time()
        results.append(scored(model, tokenizer, args.limit))
        seconds["train"] += middle - start
        seconds["score"] += time.process_time() - middle
    print(f"{'metric':18s}" + "".join(f"{lr:>24g}" for lr in sorted(args.lr)) + "   apart  paired")
    metrics = {}
    for name in METRICS:
        items = [scores.metric("nl2sql", name) for scores in results]
        pairs = list(itertools.pairwise(items))
        apart = sum(a.value.high < b.value.low or b.value.high < a.value.low for a, b in pairs)
        paired = sum(
            paired_bootstrap(a.values, b.values, seed=args.seed).distinguishable for a, b in pairs
        )
        metrics[name] = {
            "values": [
                {"value": i.value.value, "low": i.value.low, "high": i.value.high} for i in items
            ],
            "neighbours_apart": apart,
            "neighbours_apart_paired": paired,
        }
        print(
            f"{name:18s}" + "".join(f"{i.value!s:>24s}" for i in items) + f"{apart:8d}{paired:8d}"
        )
    return {
        "metrics": metrics,
        "cpu_seconds": seconds,
        "items": results[0].metric("nl2sql", "score").num_items,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="directory, id, or demo")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--limit", type=int, default=120, help="test questions")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    result = measure(args)
    settings = {"benchmark": "learning_rates", "torch": torch.__version__, **vars(args)}
    print(json.dumps({**settings, **result}))


if __name__ == "__main__":
    main()
