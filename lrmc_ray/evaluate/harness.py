"""Run lm-eval-harness on one model and keep every item's scores.

All tasks, ours and those of the Hub, go through lm-eval's own runner.
"""

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrmc_ray.errors import DataError, LrmcError
from lrmc_ray.evaluate.drift import DRIFT_POSITIONS, item_texts, pick_evenly
from lrmc_ray.evaluate.item_parts import Indices, divide_items, is_divided
from lrmc_ray.evaluate.item_rows import GOLD, task_rows
from lrmc_ray.evaluate.questions import describe_item, question_rows
from lrmc_ray.evaluate.request import ALL_ITEMS, Group, KeptApart, ScoreRequest, ScoreResult, Split
from lrmc_ray.evaluate.task_checks import right_choices
from lrmc_ray.evaluate.task_files import (
    error_text,
    load_task,
    quieten,
    task_label,
    task_manager,
)
from lrmc_ray.files.beats import beat_with
from lrmc_ray.models.loading import load_model, load_tokenizer
from lrmc_ray.tasks.registry import OURS


def score(model_directory: Path, request: ScoreRequest) -> ScoreResult:
    """Score the model in ``model_directory``.

    Raises:
        ConfigError: a task does not exist, or its file is refused.
        DataError: a task cannot be run or scored.
    """
    quieten()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if request.precision == "bf16" else torch.float32
    rows: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    texts: dict[str, list[list[int]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        # Before the model is loaded: a task that does not exist is found out at once.
        manager = task_manager([name for name, _ in request.tasks], Path(scratch), request.split)
        model = load_model(model_directory, dtype=dtype).to(device)
        beat_with(model)
        tokenizer = load_tokenizer(model_directory)
        lm = _language_model(model, tokenizer, request.batch_tokens, request.template_options)
        for name, group in request.tasks:
            choice = ItemChoice(request.limit, request.split, request.kept, group)
            samples = run_task(lm, manager, name, choice)
            rows.extend(task_rows(task_label(name), group, samples, tokenizer))
            questions.extend(question_rows(task_label(name), samples))
            if request.drift_texts is None:
                texts[task_label(name)] = pick_evenly(
                    item_texts(samples, tokenizer), request.drift_samples[group]
                )
    if request.drift_texts is not None:
        labels = [task_label(name) for name, _ in request.tasks]
        texts = {label: request.drift_texts.get(label, []) for label in labels}
    logprobs = {label: lm.last_logprobs(part, DRIFT_POSITIONS) for label, part in texts.items()}
    return ScoreResult(rows, texts, logprobs, questions)


def slice_rows(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[tuple[str, Group]],
    *,
    items: int,
    batch_tokens: int,
    split: Split,
    kept: KeptApart = ALL_ITEMS,
    template_options: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the smooth scores of the first ``items`` items of each task, of a model in memory.

    Nothing is generated where a task has its gold answers' probability: that is its score then.
    The model is left in evaluation mode.

    Raises:
        ConfigError: a task does not exist, or its file is refused.
        DataError: a task cannot be run or scored.
    """
    quieten()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        manager = task_manager([name for name, _ in tasks], Path(scratch), split)
        lm = _language_model(model, tokenizer, batch_tokens, template_options)
        for name, group in tasks:
            samples = run_task(
                lm, manager, name, ItemChoice(items, split, kept, group), is_slice=True
            )
            rows.extend(task_rows(task_label(name), group, samples, tokenizer))
    return rows


def _language_model(
    model: Any, tokenizer: Any, batch_tokens: int, template_options: Mapping[str, Any] | None
) -> Any:
    """The model as lm-eval runs it."""
    # Its base class is lm-eval's, which takes seconds to import and must be quiet before.
    from lrmc_ray.evaluate.prefix_lm import PrefixLM

    return PrefixLM(model, tokenizer, batch_tokens=batch_tokens, template_options=template_options)


@dataclass(frozen=True)
class ItemChoice:
    """Which items of a task are asked."""

    limit: int | None = None
    """The first ones; None for all."""
    split: Split = "dev"
    kept: KeptApart = ALL_ITEMS
    group: Group = "general"

    def of(self, name: str, tasks: Mapping[str, Any]) -> dict[str, Indices] | None:
        """Indices of the items of ``tasks`` that are asked; None for the first ``limit``."""
        if not is_divided(name, self.group, self.kept.share):
            return None
        items = {task_name: task.eval_docs for task_name, task in tasks.items()}
        parts = divide_items(items, self.split, self.kept)
        return parts and {
            task_name: Indices(part[: self.limit]) for task_name, part in parts.items()
        }


def run_task(
    lm: Any, manager: Any, name: str, choice: ItemChoice, *, is_slice: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's samples of every task that ``name`` stands for; of a slice, the cheapest that do.

    Raises:
        ConfigError: lm-eval refuses the task's file.
        DataError: the task has no items, or its file and its data do not fit.
    """
    parts = OURS.get(name, (name,))
    if is_slice:
        parts = tuple(part for part in parts if part.endswith(GOLD)) or parts[:1]
    samples: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        loaded = load_task(manager, part)
        asked = choice.of(name, loaded["tasks"])
        samples.update(_run_loaded(lm, loaded, part, choice.limit, asked))
        for task_name, task in loaded["tasks"].items():
            for sample in samples[task_name]:
                sample["output_type"] = task.OUTPUT_TYPE
                sample["metric_names"] = list(task.aggregation())
                if task.OUTPUT_TYPE == "multiple_choice" and hasattr(task, "multiple_input"):
                    sample["right"], sample["num_choices"] = right_choices(task, sample["doc"])
                describe_item(task, sample)
    return samples


def _run_loaded(
    lm: Any,
    loaded: dict[str, Any],
    part: str,
    limit: int | None,
    asked: dict[str, Indices] | None,
) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval says of every item, by task."""
    import lm_eval

    tasks = loaded["tasks"]
    metadata = [task.config.metadata or {} for task in tasks.values()]
    chat = all(isinstance(m, Mapping) and m.get("chat_template") for m in metadata)
    _seed(tasks)
    try:
        results = lm_eval.evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit if asked is None else None,
            samples=asked,
            apply_chat_template=chat,
            fewshot_as_multiturn=True,
            bootstrap_iters=0,
            log_samples=True,
        )
    except (LrmcError, RuntimeError, MemoryError, ImportError):
        raise  # of the model, the machine or the installation
    except Exception as error:  # of templates and items
        raise DataError(
            f"task {part} cannot be run on its data: {error_text(error)}; compare the fields that "
            "its file names with those of its items"
        ) from error
    if not results or not results.get("samples"):
        raise DataError(f"task {part} has no items; check its data files")
    found: dict[str, list[dict[str, Any]]] = results["samples"]
    return found


def _seed(tasks: Mapping[str, Any]) -> None:
    """Prepare as lm-eval's ``simple_evaluate`` does; it also runs pip and a compiler, for seconds.

    Those are for its report on the machine, which nobody reads here.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.utils import set_torch_seed

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    set_torch_seed(DEFAULT_OTHER_SEED)
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
