"""A search's output with the shape of a real one, made from a seed in a second.

The base model answers 2 % of 60 SQL questions, tuning teaches most of them, and a high learning
rate costs general knowledge.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lrmc_ray.evaluate.items import Scores
from lrmc_ray.files.artifacts import write_manifest

SEED = 5
TRAIN: dict[str, Any] = {
    "loss": "restricted", "optimizer": "moclip", "tau": 0.99, "delta_max": 45.0, "lr": 3e-5,
    "anchor_weight": 1.0, "steps": 30, "batch_size": 8, "seed": 0,
}  # fmt: skip
TRIALS: list[dict[str, Any]] = [
    {"role": "defaults", "state": "COMPLETE", "learned": 0.62, "damage": 0.010},
    {"role": "yardstick", "state": "COMPLETE", "learned": 0.64, "damage": 0.034},
    {"role": "search", "state": "COMPLETE", "learned": 0.38, "damage": 0.002},
    {"role": "search", "state": "COMPLETE", "learned": 0.72, "damage": 0.012},
    {"role": "search", "state": "FAIL", "cause": "loss is NaN for 5 steps in a row at step 12"},
    {"role": "search", "state": "COMPLETE", "learned": 0.55, "damage": 0.120},
    {"role": "search", "state": "COMPLETE", "learned": 0.70, "damage": 0.045},
    {"role": "search", "state": "PRUNED", "cause": "worse than the median at step 10"},
    {"role": "search", "state": "COMPLETE", "learned": 0.20, "damage": -0.004},
    {"role": "search", "state": "RUNNING"},
]


def item_rows(
    seed: int, learned: float, damage: float, *, split: str = "dev"
) -> list[dict[str, Any]]:
    """One model's scores. What makes an item hard is common to all models, so pairing matters.

    The domain task has other items in the split "test", the general tasks have one split only.
    """
    rng = np.random.default_rng(seed)
    items = np.random.default_rng(99 if split == "dev" else 100)
    rows: list[dict[str, Any]] = []

    def add(task, group, kind, metric, values, weights=None, outputs=None):
        for index, value in enumerate(values):
            rows.append(
                {
                    "task": task, "group": group, "kind": kind, "metric": metric,
                    "item_id": f"{task}-{index:03d}", "value": float(value),
                    "weight": 1.0 if weights is None else float(weights[index]),
                    "output": None if outputs is None else outputs[index],
                }
            )  # fmt: skip

    difficulty = items.uniform(0, 1, 60)
    right = difficulty + rng.normal(0, 0.08, 60) < learned
    gold = np.clip(0.25 + 0.9 * learned - 0.3 * difficulty + rng.normal(0, 0.04, 60), 0.01, 0.99)
    outputs = [
        f"SELECT name FROM country WHERE area > {1000 * index}" if is_right else "I can't <do> that"
        for index, is_right in enumerate(right)
    ]
    add("nl2sql", "domain", "generation", "accuracy", right, outputs=outputs)
    add("nl2sql", "domain", "generation", "gold_probability", gold)
    items, rng = np.random.default_rng(98), np.random.default_rng([seed, 1])
    for task, num_items, level in (("wordnet", 200, 0.62), ("capitals", 150, 0.85)):
        ease = items.beta(6 * level, 6 * (1 - level), num_items)
        probability = np.clip(ease - damage + rng.normal(0, 0.09, num_items), 0.001, 0.999)
        add(task, "general", "choice", "accuracy", probability > 0.45)
        add(task, "general", "choice", "probability", probability)
    tokens = items.integers(90, 256, 40)
    entropy = items.normal(3.79, 0.4, 40) * (1 + 0.4 * damage) + rng.normal(0, 0.03, 40)
    add("plain_english", "general", "text", "cross_entropy", entropy, weights=tokens)
    return rows


def write_metrics(path: Path, seed: int, *, steps: int = 30, has_angle: bool = True) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        metrics = {"train/loss": 0.15 + 1.4 * math.exp(-step / 7) * rng.uniform(0.85, 1.15)}
        if step % 10 == 0:
            metrics["subset/rho"] = 0.004 + 0.0004 * step * rng.uniform(0.8, 1.2)
        if has_angle:
            metrics["moclip/angle_deg"] = 88 - 20 / step + rng.normal(0, 2)
        lines.append(json.dumps({"step": step, "time": 1.7e9 + 2.3 * step, "metrics": metrics}))
    path.write_text("\n".join(lines) + "\n")


def save_scores(directory: Path, rows: list[dict[str, Any]], model: str) -> None:
    """Scores as evaluation leaves them: the items, and a manifest that names the model."""
    Scores.from_rows(rows).save(directory)
    write_manifest(directory, {"kind": "scores", "identity": {"model": model}})


def make_study(directory: Path) -> Path:
    """Write ``study.json``, scores and metrics of the trials above."""
    rng = np.random.default_rng(7)
    save_scores(directory / "base_scores", item_rows(1000, 0.03, 0.0), "base")
    trials = []
    for index, plan in enumerate(TRIALS):
        folder = f"trials/{index:04d}"
        is_plain = plan["role"] == "yardstick"
        is_complete = plan["state"] == "COMPLETE"
        if is_complete:
            rows = item_rows(index, plan["learned"], plan["damage"])
            save_scores(directory / folder / "scores", rows, f"model-{index}")
        write_metrics(
            directory / folder / "metrics.jsonl",
            index,
            steps=30 if is_complete else 12,
            has_angle=not is_plain,
        )
        cost = {"train_seconds": 70 + rng.uniform(-5, 5), "original_tokens": 61440}
        cost |= {"train_cores": 2, "evaluate_cores": 1}
        cost["processed_tokens"] = 61440 if is_plain else int(61440 * rng.uniform(0.7, 0.9))
        if is_complete:
            cost["evaluate_seconds"] = rng.uniform(36, 42)
        params = {
            "tau": round(rng.uniform(0.9, 0.999), 4),
            "delta_max": round(rng.uniform(15, 180), 1),
            "lr": float(f"{10 ** rng.uniform(-5, -3.8):.3g}"),
            "anchor_weight": round(rng.uniform(0, 2), 2),
        }
        overrides = {"loss": "full", "optimizer": "adamw", "lr": 2e-5}
        trials.append(
            {
                "number": index,
                "role": plan["role"],
                "state": plan["state"],
                "cause": plan.get("cause"),
                "params": {} if is_plain else params,
                "settings": TRAIN | (overrides if is_plain else params),
                "directory": folder,
                "scores": f"{folder}/scores" if is_complete else None,
                "metrics_file": f"{folder}/metrics.jsonl",
                "results": {
                    "eval/kl_base_domain": 0.31,
                    "eval/kl_base_domain_low": 0.2764,
                    "eval/kl_base_domain_high": 0.3461,
                    "eval/kl_base_general": 0.0074,
                },
                "cost": cost,
            }
        )
    study = {
        "schema": 1,
        "id": "demo-0123456789ab",
        "name": "demo",
        "state": "RUNNING",
        "created": "2026-11-22 04:40 UTC",
        "objective": "combined",
        "forgetting_weight": 1.0,
        "space": {
            "tau": {"low": 0.9, "high": 0.999},
            "delta_max": {"low": 15.0, "high": 180.0},
            "lr": {"low": 1e-5, "high": 2e-4, "log": True},
        },
        "settings": {
            "model": {"name": "demo"},
            "data": {"train": ["demo"]},
            "train": TRAIN,
            "search": {"seed": SEED},
        },
        "versions": {"lrmc_ray": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "python": "3.11.7"},
        "base_scores": "base_scores",
        "stage_seconds": {"record": 24.2, "base_evaluation": 38.5},
        "sessions": [[1.7e9, 1.7e9 + 600], [1.7e9 + 5000, 1.7e9 + 5300]],
        "forecast": {"seconds": 840.0, "trials": 10, "basis": "measured: median of 3 trials"},
        "importance": {
            "eval/domain_gain": {"lr": 0.6, "tau": 0.3, "delta_max": 0.1},
            "eval/forgetting": {"lr": 0.8, "tau": 0.05, "delta_max": 0.15},
        },
        "record": {
            "supervised_positions": 5231, "k_mean": 79.2, "k_median": 6, "capped_share": 0.013,
            "active_share": 0.83, "bytes": 1843211,
        },
        "trials": trials,
        "best": 3,
    }  # fmt: skip
    (directory / "study.json").write_text(json.dumps(study))
    return directory


def add_final(directory: Path) -> Path:
    """Score base, best and plain fine-tuning on the test questions, as a search does at its end."""
    for name, number, model in (("base", 1000, "base"), ("best", 3, "model-3"),
                                ("yardstick", 1, "model-1")):  # fmt: skip
        plan = {"learned": 0.03, "damage": 0.0} if name == "base" else TRIALS[number]
        rows = item_rows(number, plan["learned"], plan["damage"], split="test")
        save_scores(directory / "final" / name, rows, model)
    edit(directory, final={name: f"final/{name}" for name in ("base", "best", "yardstick")})
    return directory


def edit(directory: Path, **changes: Any) -> None:
    """Change top-level keys of ``study.json``; ``trials`` takes {number: changed keys}."""
    path = directory / "study.json"
    study = json.loads(path.read_text())
    for number_, change in changes.pop("trials", {}).items():
        study["trials"][number_].update(change)
    path.write_text(json.dumps(study | changes))


def rename_task(directory: Path, task: str, name: str) -> None:
    """Call ``task`` otherwise in all scores of the study."""
    for path in directory.rglob("items.parquet"):
        table = pq.read_table(path)
        names = [name if one == task else one for one in table["task"].to_pylist()]
        index = table.schema.get_field_index("task")
        field = table.schema.field(index)
        pq.write_table(table.set_column(index, field, pa.array(names, field.type)), path)
