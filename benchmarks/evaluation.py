"""Scoring one model on the demo's items: as evaluation does it, and as plain lm-eval does it.

    python benchmarks/evaluation.py [--model demo] [--limit 60] [--split dev] [--batch-size 8]

Both use lm-eval's runner, the same task files, items, model and data type, in one run; only the
class that answers the requests differs. Times are CPU seconds, so a busy machine counts for less.
"differs by" is the largest difference of any item's score (probabilities and accuracies between
0 and 1, cross-entropies in nats per token); "other texts" counts unequal generated texts.
"""

import argparse
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

TASKS = ("nl2sql", "wordnet", "capitals", "plain_english")


def measure(args: argparse.Namespace) -> dict[str, object]:
    from lm_eval.models.huggingface import HFLM

    from lrmc_ray.config import ModelSettings
    from lrmc_ray.evaluate.harness import ItemChoice, run_task
    from lrmc_ray.evaluate.item_rows import task_rows
    from lrmc_ray.evaluate.prefix_lm import PrefixLM
    from lrmc_ray.evaluate.task_files import task_manager
    from lrmc_ray.models.directory import local_directory
    from lrmc_ray.models.loading import load_model, load_tokenizer

    directory = local_directory(ModelSettings(name=args.model))
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    start = time.process_time()
    ours: Any = PrefixLM(model, tokenizer, batch_tokens=args.batch_tokens)
    making = time.process_time() - start
    plain: Any = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size, device=str(model.device)
    )
    tasks: dict[str, dict[str, Any]] = {}
    header = ("plain s", "ours s", "ratio", "differs by", "other texts")
    print(f"{'task':16s}{'items':>8s}" + "".join(f"{title:>13s}" for title in header))
    with tempfile.TemporaryDirectory() as scratch:
        manager = task_manager(args.tasks, Path(scratch), args.split)
        for name in args.tasks:
            seconds, rows = [], []
            for lm in (plain, ours):
                start = time.process_time()
                samples = run_task(lm, manager, name, ItemChoice(args.limit))
                seconds.append(time.process_time() - start)
                rows.append(list(task_rows(name, "general", samples, tokenizer)))
            differences = [abs(a["value"] - b["value"]) for a, b in zip(*rows, strict=True)]
            tasks[name] = {
                "items": len({row["item_id"] for row in rows[0]}),
                "plain_seconds": seconds[0],
                "seconds": seconds[1],
                "ratio": seconds[0] / seconds[1],
                "largest_difference": max(differences),
                "other_texts": sum(a["output"] != b["output"] for a, b in zip(*rows, strict=True)),
            }
            task = tasks[name]
            print(
                f"{name:16s}{task['items']:8d}{seconds[0]:13.1f}{seconds[1]:13.1f}"
                f"{task['ratio']:13.2f}{max(differences):13.1e}{task['other_texts']:13d}"
            )
    totals = [sum(task[key] for task in tasks.values()) for key in ("plain_seconds", "seconds")]
    print(f"{'all':24s}{totals[0]:13.1f}{totals[1]:13.1f}{totals[0] / totals[1]:13.2f}")
    return {"tasks": tasks, "ratio": totals[0] / totals[1], "check_seconds": making}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="directory, id, or demo")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--limit", type=int, default=60, help="items per task")
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--batch-size", type=int, default=8, help="of plain lm-eval")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="ours")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    result = measure(args)
    settings = {"benchmark": "evaluation", "torch": torch.__version__, **vars(args)}
    print(json.dumps({**settings, **result}))


if __name__ == "__main__":
    main()
