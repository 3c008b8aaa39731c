"""Run lm-eval-harness on one model and keep every item's scores.

All tasks, ours and those of the Hub, go through lm-eval's own runner. Beside the accuracy that it
computes, the smooth scores that the objective needs are taken from the log-likelihoods that it
already has: no forward pass is added.
"""

import difflib
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lrmc_ray.errors import ConfigError, DataError, LrmcError
from lrmc_ray.evaluate.drift import DRIFT_POSITIONS, evenly_spread, texts_for_drift
from lrmc_ray.evaluate.request import Group, ScoreRequest, ScoreResult
from lrmc_ray.files.artifacts import file_digest

_log = logging.getLogger(__name__)


def score(model_directory: Path, request: ScoreRequest) -> ScoreResult:
    """Score the model in ``model_directory``.

    Raises:
        ConfigError: a task does not exist, or its file is refused.
        DataError: a task cannot be run or scored.
    """
    _quieten()
    import torch

    from lrmc_ray.evaluate.prefix_lm import PrefixLM
    from lrmc_ray.models import load_model, load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if request.precision == "bf16" else torch.float32
    rows: list[dict[str, Any]] = []
    texts: dict[str, list[list[int]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        # Before the model is loaded: a task that does not exist is found out at once.
        manager = task_manager([name for name, _ in request.tasks], Path(scratch), request.split)
        model = load_model(model_directory, dtype=dtype).to(device)
        tokenizer = load_tokenizer(model_directory)
        lm = PrefixLM(model, tokenizer, batch_tokens=request.batch_tokens)
        for name, group in request.tasks:
            samples = run_task(lm, manager, name, request.limit)
            rows.extend(task_rows(task_label(name), group, samples, tokenizer))
            if request.drift_texts is None:
                texts[task_label(name)] = evenly_spread(
                    texts_for_drift(samples, tokenizer), request.drift_samples[group]
                )
    if request.drift_texts is not None:
        labels = [task_label(name) for name, _ in request.tasks]
        texts = {label: request.drift_texts.get(label, []) for label in labels}
    logprobs = {label: lm.last_logprobs(part, DRIFT_POSITIONS) for label, part in texts.items()}
    return ScoreResult(rows, texts, logprobs)


def slice_rows(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[tuple[str, Group]],
    *,
    items: int,
    batch_tokens: int,
    split: Literal["dev", "test"],
) -> list[dict[str, Any]]:
    """Rows of the smooth scores of the first ``items`` items of each task, of a model in memory.

    Nothing is generated where a task has its gold answers' probability: that is its score then.
    The model is left in evaluation mode.

    Raises:
        ConfigError: a task does not exist, or its file is refused.
        DataError: a task cannot be run or scored.
    """
    _quieten()
    from lrmc_ray.evaluate.prefix_lm import PrefixLM

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        manager = task_manager([name for name, _ in tasks], Path(scratch), split)
        lm = PrefixLM(model, tokenizer, batch_tokens=batch_tokens)
        for name, group in tasks:
            samples = run_task(lm, manager, name, items, is_slice=True)
            rows.extend(task_rows(task_label(name), group, samples, tokenizer))
    return rows


def _quieten() -> None:
    """Before the first task: no progress bars, and only errors of what lm-eval uses."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets

    datasets.disable_progress_bars()
    for name in ("lm_eval", "lm-eval", "evaluate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def task_label(name: str) -> str:
    """How scores call the task: a file by its name without folder and suffix."""
    return Path(name).stem if Path(name).is_file() else name


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
    # Reading the names of lm-eval's 15,000 tasks takes some 10 seconds.
    manager = TaskManager(
        include_path=str(scratch), include_defaults=any(map(_may_need_others, foreign))
    )
    for name in foreign:
        if name not in manager.all_tasks and not Path(name).is_file():
            known = [*OURS, *GROUPS, *manager.all_tasks]
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ConfigError(
                f"task {name} is neither one of ours ({', '.join(OURS)}) nor one of lm-eval's{hint}"
            )
    return manager


def _may_need_others(name: str) -> bool:
    """Whether a task is one of lm-eval's, or a file of a group that may name some of them."""
    return not Path(name).is_file() or "group:" in Path(name).read_text("utf-8", "replace")


def task_data(names: Sequence[str], split: Literal["dev", "test"]) -> dict[str, Path]:
    """The data files of our tasks that are not shipped, as ``materialize`` takes them.

    Raises:
        IncompleteArtifactError: one has to be built first; the message says how.
    """
    from lrmc_ray.files.artifacts import cache_directory
    from lrmc_ray.tasks.registry import OURS

    def wanted(task: str) -> bool:
        return bool({task, *OURS[task]} & set(names))

    paths: dict[str, Path] = {}
    cache = cache_directory()
    if wanted("nl2sql"):
        from lrmc_ray.tasks.demo.files import demo_files

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


def task_fingerprints(names: Sequence[str], split: Literal["dev", "test"]) -> dict[str, str]:
    """Digests of the local files that decide what is asked: built data, task files of one's own."""
    files = {str(key): path for key, path in task_data(names, split).items()} | own_files(names)
    return {name: file_digest(path) for name, path in files.items() if path.is_file()}


def own_files(names: Sequence[str]) -> dict[str, Path]:
    """Task files of one's own among ``names``, and the data that they name."""
    files: dict[str, Path] = {}
    for name in names:
        if Path(name).is_file():
            files |= {name: Path(name)}
            files |= {f"{name}: {path}": path for path in _data_files(Path(name))}
    return files


def _data_files(task_file: Path) -> list[Path]:
    """The local files that a task file names under ``data_files``."""
    text = task_file.read_text(encoding="utf-8", errors="replace")
    words = re.findall(r"""["']?(/[^"'\s,}\]]+)["']?""", text)
    return [Path(word) for word in words if Path(word).is_file()]


def run_task(
    lm: Any, manager: Any, name: str, limit: int | None, *, is_slice: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's samples of every task that ``name`` stands for; of a slice, the cheapest that do.

    Raises:
        ConfigError: lm-eval refuses the task's file.
        DataError: the task has no items, or its file and its data do not fit.
    """
    import lm_eval

    from lrmc_ray.tasks.registry import OURS

    samples: dict[str, list[dict[str, Any]]] = {}
    parts = OURS.get(name, (name,))
    if is_slice:
        parts = tuple(part for part in parts if part.endswith(_GOLD)) or parts[:1]
    for part in parts:
        try:
            loaded = manager.load([part])
        except Exception as error:  # whatever YAML, datasets and lm-eval may raise
            raise ConfigError(
                f"lm-eval refuses the task {part}: {_told(error)}; correct the task file (its data "
                "must be where `data_files` says), or choose another task"
            ) from error
        tasks = loaded["tasks"]
        if not tasks:
            raise ConfigError(f"the task {part} has no tasks in it; correct its file")
        for task_name, task in tasks.items():
            if not len(task.eval_docs):
                raise DataError(f"task {task_name} has no items; check its data files")
        metadata = [task.config.metadata or {} for task in tasks.values()]
        chat = all(isinstance(m, Mapping) and m.get("chat_template") for m in metadata)
        _seed(tasks)
        try:
            results = lm_eval.evaluate(
                lm=lm,
                task_dict=loaded,
                limit=limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=True,
                bootstrap_iters=0,
                log_samples=True,
            )
        except (LrmcError, RuntimeError, MemoryError, ImportError):
            raise  # of the model, the machine or the installation
        except Exception as error:  # of templates and items
            raise DataError(
                f"task {part} cannot be run on its data: {_told(error)}; compare the fields that "
                "its file names with those of its items"
            ) from error
        if not results or not results.get("samples"):
            raise DataError(f"task {part} has no items; check its data files")
        samples.update(results["samples"])
        for task_name, task in tasks.items():
            for sample in samples[task_name]:
                sample["output_type"] = task.OUTPUT_TYPE
                sample["metric_names"] = [m["metric"] for m in task.config.metric_list or []]
    return samples


def _seed(tasks: Mapping[str, Any]) -> None:
    """Prepare as lm-eval's ``simple_evaluate`` does; it also runs pip and a compiler, for seconds.

    Those are for its report on the machine, which nobody reads here.
    """
    import random

    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.utils import set_torch_seed

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    set_torch_seed(DEFAULT_OTHER_SEED)
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _told(error: Exception) -> str:
    """An error in one line, with its innermost cause."""
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:300]}" if text else type(cause).__name__


def task_rows(
    name: str, group: Group, samples: Mapping[str, list[dict[str, Any]]], tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """The rows of one requested task; a group's subtasks become its items."""
    own = [task for task in samples if task.startswith("lrmc_")]
    companions = {task + suffix for task in own for suffix in _COMPANIONS} & samples.keys()
    for task, items in samples.items():
        if task in companions:
            continue
        further: dict[int, dict[str, float]] = {}
        for suffix, (metric, measure) in _COMPANIONS.items():
            for item in samples[task + suffix] if task + suffix in companions else ():
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
    if output_type == "loglikelihood" and task.startswith("lrmc_") and task.endswith(_GOLD):
        # On its own, of a slice: its answers are not generated.
        return "generation", {"gold_probability": _mean_token_probability(item, tokenizer)}, 1.0
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


_GOLD = "_gold"


_COMPANIONS: Mapping[str, tuple[str, Callable[[Mapping[str, Any], Any], float]]] = {
    _GOLD: ("gold_probability", _mean_token_probability),
    "_letter": ("letter_accuracy", lambda item, _: float(item["acc"])),
}
"""Tasks on the same items as the one that they are named after: the metric that each adds to it."""


def _output(item: Mapping[str, Any]) -> str | None:
    """What the model said, where it said something."""
    answer = item["filtered_resps"][0]
    return answer if isinstance(answer, str) else None
