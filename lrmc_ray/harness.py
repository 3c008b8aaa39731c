"""Run lm-eval-harness on one model and keep every item's scores.

All tasks, ours and those of the Hub, go through lm-eval's own runner. Beside the accuracy that it
computes, the smooth scores that the objective needs are taken from the log-likelihoods that it
already has: no forward pass is added.
"""

import difflib
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lrmc_ray.errors import ConfigError, DataError

_log = logging.getLogger(__name__)

DRIFT_POSITIONS = 8
"""Positions of a text at which KL(base || tuned) is measured."""

Group = Literal["domain", "general"]


@dataclass(frozen=True)
class ScoreRequest:
    """What is to be scored."""

    tasks: tuple[tuple[str, Group], ...]
    """Names as in the settings, each with its group."""
    batch_tokens: int
    precision: Literal["fp32", "bf16"]
    limit: int | None
    split: Literal["dev", "test"]
    """Which questions the demo's own domain task asks."""
    drift_samples: int
    """Texts to choose for measuring drift, where ``drift_texts`` does not name them."""
    drift_texts: "dict[Group, list[list[int]]] | None" = None
    """Token ids of the base model's texts; a tuned model is compared on the same ones."""


@dataclass(frozen=True)
class ScoreResult:
    """What scoring gives back: plain data, small enough to send."""

    rows: list[dict[str, Any]]
    """Rows of ``items.parquet``."""
    texts: dict[Group, list[list[int]]]
    """Token ids of the texts on which drift is measured."""
    logprobs: dict[Group, np.ndarray]
    """The model's log-probabilities there, float32 [positions, vocabulary]."""


def score(model_directory: Path, request: ScoreRequest) -> ScoreResult:
    """Score the model in ``model_directory``.

    Raises:
        ConfigError: a task does not exist.
        DataError: a task cannot be run or scored.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets
    import torch

    from lrmc_ray.models import load_model, load_tokenizer
    from lrmc_ray.prefix_lm import PrefixLM

    datasets.disable_progress_bars()
    for name in ("lm_eval", "lm-eval", "evaluate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if request.precision == "bf16" else torch.float32
    model = load_model(model_directory, dtype=dtype).to(device)
    tokenizer = load_tokenizer(model_directory)
    lm = PrefixLM(model, tokenizer, batch_tokens=request.batch_tokens)
    rows: list[dict[str, Any]] = []
    texts: dict[Group, list[list[int]]] = {"domain": [], "general": []}
    with tempfile.TemporaryDirectory() as scratch:
        manager = task_manager([name for name, _ in request.tasks], Path(scratch), request.split)
        for name, group in request.tasks:
            samples = run_task(lm, manager, name, request.limit)
            rows.extend(task_rows(name, group, samples, tokenizer))
            texts[group].extend(_drift_texts(samples, tokenizer))
    chosen = request.drift_texts
    if chosen is None:
        chosen = {group: _spread(part, request.drift_samples) for group, part in texts.items()}
    return ScoreResult(
        rows,
        chosen,
        {group: lm.last_logprobs(part, DRIFT_POSITIONS) for group, part in chosen.items()},
    )


def task_manager(names: Sequence[str], scratch: Path, split: Literal["dev", "test"]) -> Any:
    """lm-eval's task manager with our tasks; its own are indexed only where they are asked for.

    Raises:
        ConfigError: a name is neither ours nor lm-eval's; the nearest names are given.
    """
    from lm_eval.tasks import TaskManager

    from lrmc_ray.tasks.registry import GROUPS, OURS, materialize

    ours = {*OURS, *(part for parts in OURS.values() for part in parts)}
    materialize(scratch, **task_data(names, split))
    foreign = [name for name in names if name not in ours]
    manager = TaskManager(include_path=str(scratch), include_defaults=bool(foreign))
    for name in foreign:
        if name not in manager.all_tasks and not Path(name).is_file():
            known = [*OURS, *GROUPS, *manager.all_tasks]
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ConfigError(
                f"task {name} is neither one of ours ({', '.join(OURS)}) nor one of lm-eval's{hint}"
            )
    return manager


def task_data(names: Sequence[str], split: Literal["dev", "test"]) -> dict[str, Path]:
    """The data files of our tasks that are not shipped, as ``materialize`` takes them.

    Raises:
        IncompleteArtifactError: one has to be built first; the message says how.
    """
    from lrmc_ray.models import cache_directory
    from lrmc_ray.tasks.registry import OURS

    def wanted(task: str) -> bool:
        return bool({task, *OURS[task]} & set(names))

    paths: dict[str, Path] = {}
    cache = cache_directory()
    if wanted("nl2sql"):
        from lrmc_ray.demo.files import demo_files

        demo = demo_files(cache)
        paths["nl2sql_test_path"] = demo.dev if split == "dev" else demo.test
        paths["database_path"] = demo.database
    if wanted("ct"):
        from lrmc_ray.tasks.built import ct_files

        ct = ct_files(cache)
        paths["ct_test_path"] = ct.dev if split == "dev" else ct.test
    if wanted("nl2sql_spider"):
        from lrmc_ray.tasks.built import built_spider_file

        paths["spider_test_path"] = built_spider_file(cache)
    return paths


def run_task(
    lm: Any, manager: Any, name: str, limit: int | None
) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's samples of every task that ``name`` stands for."""
    from lm_eval import simple_evaluate

    from lrmc_ray.tasks.registry import OURS

    samples: dict[str, list[dict[str, Any]]] = {}
    for part in OURS.get(name, (name,)):
        loaded = manager.load([part])
        metadata = [task.config.metadata or {} for task in loaded["tasks"].values()]
        chat = all(isinstance(m, Mapping) and m.get("chat_template") for m in metadata)
        results = simple_evaluate(
            model=lm,
            tasks=[part],
            task_manager=manager,
            limit=limit,
            apply_chat_template=chat,
            bootstrap_iters=0,
            log_samples=True,
        )
        if not results or not results.get("samples"):
            raise DataError(f"task {part} has no items; check its data files")
        samples.update(results["samples"])
        for task_name, task in loaded["tasks"].items():
            for sample in samples[task_name]:
                sample["output_type"] = task.OUTPUT_TYPE
                sample["metric_names"] = [m["metric"] for m in task.config.metric_list or []]
    return samples


def task_rows(
    name: str, group: Group, samples: Mapping[str, list[dict[str, Any]]], tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """The rows of one requested task; a group's subtasks become its items."""
    companions = {task + suffix for task in samples for suffix in _COMPANIONS} & samples.keys()
    for task, items in samples.items():
        if task in companions:
            continue
        further: dict[int, dict[str, float]] = {}
        for suffix, (metric, measure) in _COMPANIONS.items():
            for item in samples.get(task + suffix, []):
                further.setdefault(item["doc_id"], {})[metric] = measure(item, tokenizer)
        first_filter = items[0]["filter"] if items else None
        for item in items:
            if item["filter"] != first_filter:
                continue
            kind, metrics, weight = _metrics(task, item, tokenizer)
            metrics |= further.get(item["doc_id"], {})
            prefix = "" if len(samples) - len(companions) == 1 else f"{task}/"
            for metric, value in metrics.items():
                yield {
                    "task": name,
                    "group": group,
                    "kind": kind,
                    "metric": metric,
                    "item_id": f"{prefix}{item['doc'].get('id', item['doc_id'])}",
                    "value": float(value),
                    "weight": weight,
                    "output": _output(item) if metric == "accuracy" else None,
                }


def _metrics(
    task: str, item: Mapping[str, Any], tokenizer: Any
) -> tuple[str, dict[str, float], float]:
    """Kind of task, metrics and weight of one item."""
    output_type = item["output_type"]
    if output_type == "multiple_choice":
        likelihoods = np.array([float(answer[0]) for answer in item["filtered_resps"]])
        gold = item["target"]
        if not isinstance(gold, int) or not 0 <= gold < len(likelihoods):
            raise DataError(f"task {task}: the right choice must be one index, got {gold!r}")
        shares = np.exp(likelihoods - likelihoods.max())
        shares /= shares.sum()
        accuracy = float(item.get("acc", likelihoods.argmax() == gold))
        return "choice", {"accuracy": accuracy, "probability": float(shares[gold])}, 1.0
    if output_type == "loglikelihood_rolling":
        text = item["arguments"][0][0]
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        likelihood = _number(item["filtered_resps"][0])
        return "text", {"cross_entropy": -likelihood / tokens}, float(tokens)
    if output_type == "loglikelihood":
        likelihood, is_greedy = item["filtered_resps"][0]
        return (
            "choice",
            {"accuracy": float(is_greedy), "probability": math.exp(float(likelihood))},
            1.0,
        )
    values = {
        metric: float(item[metric])
        for metric in item["metrics"]
        if isinstance(item.get(metric), int | float | bool | np.generic)
    }
    for metric in ("execution_accuracy", "acc", "exact_match", *item["metric_names"], *values):
        if metric in values and 0 <= values[metric] <= 1:
            others = {name: v for name, v in values.items() if name != metric}
            return "generation", {"accuracy": values[metric], **others}, 1.0
    raise DataError(
        f"task {task} has no metric between 0 and 1 per item (it has {', '.join(values) or 'none'})"
        "; choose another task"
    )


def _number(answer: Any) -> float:
    return float(answer[0]) if isinstance(answer, tuple | list) else float(answer)


def _mean_token_probability(item: Mapping[str, Any], tokenizer: Any) -> float:
    """Geometric mean of the gold answer's token probabilities."""
    likelihood, _ = item["filtered_resps"][0]
    answer = item["arguments"][0][1]
    tokens = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return math.exp(float(likelihood) / max(1, tokens))


_COMPANIONS: Mapping[str, tuple[str, Callable[[Mapping[str, Any], Any], float]]] = {
    "_gold": ("gold_probability", _mean_token_probability),
    "_letter": ("letter_accuracy", lambda item, _: float(item["acc"])),
}
"""Tasks on the same items as the one that they are named after: the metric that each adds to it."""


def _output(item: Mapping[str, Any]) -> str | None:
    """What the model said, where it said something."""
    answer = item["filtered_resps"][0]
    return answer if isinstance(answer, str) else None


def _drift_texts(samples: Mapping[str, list[dict[str, Any]]], tokenizer: Any) -> list[list[int]]:
    """Token ids of the items' texts: context, and continuation where the task gives one."""
    texts = []
    for items in samples.values():
        if items and items[0]["output_type"] == "generate_until":
            continue  # no answer is given, and its prompts are those of the gold task
        for item in items:
            parts = [part for part in item["arguments"][0] if isinstance(part, str)]
            ids = tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
            if len(ids) > DRIFT_POSITIONS:
                texts.append(ids[:1024])
    return texts


def _spread(texts: list[list[int]], count: int) -> list[list[int]]:
    """``count`` of the texts, evenly spread."""
    if len(texts) <= count:
        return texts
    return [texts[index * len(texts) // count] for index in range(count)]


def mean_kl(base_PV: np.ndarray, tuned_PV: np.ndarray) -> float | None:
    """Mean over positions of KL(base || tuned), in nats; None without positions."""
    if not len(base_PV):
        return None
    divergence = (np.exp(base_PV.astype(np.float64)) * (base_PV - tuned_PV)).sum(axis=-1)
    return float(divergence.mean())
