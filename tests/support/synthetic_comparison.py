"""A comparison whose runs are made up in milliseconds: models, scores and costs from a table.

``FakeRay`` stands for Ray: what is started runs at once, in this process, by writing what a real
run would leave.
"""

import json
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.compare.jobs import Job
from lrmc_ray.compare.run import Comparing
from lrmc_ray.config.compare import CompareSpace
from lrmc_ray.files.artifacts import write_json, write_manifest
from tests.support.synthetic_study import item_rows, save_scores, write_metrics

METHODS: dict[str, Any] = {
    "sft": {"title": "full SFT", "train": {"loss": "full", "optimizer": "adamw"}},
    "lrmc": {"title": "restricted + MoClip", "train": {"loss": "restricted"}},
    "lora": {
        "title": "LoRA",
        "train": {"loss": "full", "optimizer": "adamw", "lora_rank": 4},
        "learning_rates": [1e-4, 1e-3],
    },
}
RATES = (1e-5, 3e-5, 1e-4)


def make_space(**changes: Any) -> CompareSpace:
    """Three methods, three learning rates, three seeds."""
    values: dict[str, Any] = {
        "compare": {"name": "made-up", "learning_rates": list(RATES), "seeds": [0, 1, 2]},
        "train": {"steps": 12, "batch_size": 8, "anchor_weight": 0.0},
        "methods": METHODS,
    }
    for key, value in changes.items():
        merged = isinstance(value, dict) and key != "methods"
        values[key] = {**values.get(key, {}), **value} if merged else value
    return CompareSpace.model_validate(values)


def skill(job: Job) -> tuple[float, float]:
    """(learned, damage): what a run makes of its learning rate and seed."""
    step = job.lr / (10 if job.method == "lora" else 1)
    learned = {1e-5: 0.45, 3e-5: 0.62, 1e-4: 0.70}[round(step, 9)] + 0.02 * job.seed
    damage = {1e-5: 0.004, 3e-5: 0.015, 1e-4: 0.60}[round(step, 9)]
    return learned, damage * (0.5 if job.method == "lrmc" else 1.0)


def write_base(comparing: Comparing) -> None:
    """What ``prepare`` leaves: record and base scores on both splits."""
    for split in ("dev", "test"):
        rows = item_rows(1000, 0.03, 0.0, split=split)
        save_scores(comparing.output / "scores" / split, rows, "base")
    comparing.description.values["base_scores"] = {
        split: f"../scores/{split}" for split in ("dev", "test")
    }
    comparing.description.values["record"] = {
        "directory": "../records/r",
        "summary": {"samples": 192},
    }
    comparing.description.values["stage_seconds"] = {
        "record": 100.0, "record_cores": 2, "base_dev": 50.0, "base_test": 50.0,
    }  # fmt: skip
    comparing.description.write()


def write_run(
    comparing: Comparing, job: Job, make: Callable[[Job], tuple[float, float]] = skill
) -> None:
    """What a finished run leaves in its directory."""
    directory = comparing.description.run_directory(job)
    learned, damage = make(job)
    number = 10 * job.seed + comparing.space.learning_rates_of(job.method).index(job.lr)
    save_scores(
        directory / "scores" / job.split,
        item_rows(number, learned, damage, split=job.split),
        job.run,
    )
    write_metrics(directory / "training" / "metrics.jsonl", number, steps=12)
    (directory / "training" / "model").mkdir(exist_ok=True)
    write_manifest(directory / "training", {"kind": "training"})
    drift = {"eval/kl_base_domain": 0.2 + 0.1 * job.seed}
    if job.split == "dev" or job.seed:
        drift["eval/kl_base_general"] = 0.01 * (1 + job.seed)
    write_json(
        directory / f"{job.split}.json",
        {
            "results": drift,
            "scores": f"scores/{job.split}",
            "train": json.loads(comparing.description.train_settings(job).model_dump_json()),
            "cost": {
                "train_seconds": 150.0 + 10 * job.seed,
                "evaluate_seconds": 75.0,
                "processed_tokens": 6000,
                "original_tokens": 9000,
                "train_cpu_seconds": 140.0 + 10 * job.seed,
                "peak_memory_bytes": 3_000_000_000,
            },
        },
    )


class _Reference:
    def __init__(self, fault: BaseException | None) -> None:
        self.fault = fault


class FakeRay(types.ModuleType):
    """Runs what is started at once, and remembers it; ``faults`` by the run's name and split."""

    class RayError(Exception):
        pass

    class RayTaskError(RayError):
        def __init__(self, cause: BaseException) -> None:
            super().__init__(str(cause))
            self.cause = cause

    def __init__(self, comparing: Comparing, faults: Mapping[str, BaseException] = {}) -> None:
        super().__init__("ray")
        self.comparing = comparing
        self.faults = faults
        self.started: list[str] = []
        self.at_once: list[int] = []
        self._open = 0
        self.exceptions = types.SimpleNamespace(
            RayError=self.RayError, RayTaskError=self.RayTaskError
        )

    def remote(self, **_: Any) -> Any:
        return lambda function: types.SimpleNamespace(remote=self._start)

    def _start(self, *, name: str, split: str, directory: str, **_: Any) -> Any:
        self.started.append(f"{name}, {split}")
        self._open += 1
        self.at_once.append(self._open)
        fault = self.faults.get(f"{name}, {split}")
        if isinstance(fault, KeyboardInterrupt | SystemExit):
            raise fault
        if fault is None:
            method, rate, seed = name.split("-", 2)[0], *name.partition("-lr")[2].split("-seed")
            job = Job(method, float(rate), int(seed), "dev" if split == "dev" else "test")
            assert self.comparing.description.run_directory(job) == Path(directory)
            write_run(self.comparing, job)
        return _Reference(fault)

    def wait(self, references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        self._open -= 1
        return references[:1], references[1:]

    def get(self, reference: Any) -> None:
        if reference.fault is not None:
            raise reference.fault
