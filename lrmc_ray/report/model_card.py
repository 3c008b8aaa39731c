"""The README.md of a tuned model's directory, in the form that the Hugging Face Hub reads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.config import DEMO, GEMMA
from lrmc_ray.evaluate.changes import MetricChange, TaskChange
from lrmc_ray.evaluate.numbers import delta_texts, flatten, points, points_range, value_texts
from lrmc_ray.evaluate.statistics import Interval
from lrmc_ray.files.artifacts import write_atomically
from lrmc_ray.files.names import MODEL_CARD
from lrmc_ray.files.origin import read_origin
from lrmc_ray.models.template import has_chat_template
from lrmc_ray.record.taught_system import taught_system
from lrmc_ray.report.card_recipes import recipes
from lrmc_ray.report.card_subject import subject_of
from lrmc_ray.report.markdown import inert, inert_code
from lrmc_ray.report.method_words import PAPER, is_of_paper, method_tags, method_text
from lrmc_ray.report.study import Study, Verdict, load_study
from lrmc_ray.report.words import items_text, score_text, verdict_items_text
from lrmc_ray.tasks.demo import gemma_model
from lrmc_ray.tasks.demo.base_model import HUB_ID

_DEMO_DATA = "questions about countries and cities with their SQL, as lrmc_ray makes them"
TAGS = ("lrmc_ray", "fine-tuning")
"""Of every model; those of the method come before them."""
_CHAT_CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
MESSAGESOPTIONSinputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, GIVENreturn_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=128, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_PLAIN_CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
# The form in which conversations were learned. What was learned as plain text is given as it is.
inputs = tokenizer(TEXT, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=128, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def write_model_card(directory: Path, study_dir: Path, name: str | None = None) -> Path:
    """Write ``README.md`` into the directory of a study's model.

    Args:
        directory: holds the saved model and tokenizer; a chat template there decides which code
            example is given, and ``lrmc.json`` which trial it is; without it, it is the best.
        study_dir: the study that the model comes from.
        name: of the model in the examples; by default the directory's.

    Returns:
        The path of ``README.md``.

    Raises:
        IncompleteArtifactError: no trial of the study, or not this one, has scores.
        DataError: the study is damaged.
    """
    study = load_study(study_dir)
    subject = subject_of(study, read_origin(directory))
    trial, verdict = subject.trial, subject.verdict
    settings = study.file.settings
    base_model, license_name = _base_model(settings)
    tuned = {**_section(settings, "train"), **trial.entry.settings, **trial.entry.params}
    sources = _section(settings, "data").get("train", [])
    system = taught_system(sources if subject.origin is None else subject.origin.data)
    title = inert(f"{base_model.rstrip('/').split('/')[-1]}, tuned ({study.file.name})")
    parts = [
        _front_matter(base_model, license_name, [*method_tags(tuned), *TAGS]),
        f"# {title}\n",
        f"{inert_code(base_model)}, fine-tuned by lrmc_ray to learn a domain and keep what it "
        f"knew. The method: {method_text(tuned)}{f' ({PAPER})' if is_of_paper(tuned) else ''}. "
        f"{trial.name.capitalize()} of the study {inert(study.file.name)}.\n",
        subject.what(),
        "## Scores\n",
        *(
            [subject.unmeasured(study)]
            if verdict is None
            else [_scores_table(verdict), _headline(verdict)]
        ),
        "## Use\n",
        f"```python\n{_code(directory, _section(settings, 'model'), system)}```\n",
        recipes(name or directory.name),
        *(["## Where its base comes from\n", chain] if (chain := subject.chain()) else []),
        "## Training data\n",
        "".join(
            f"- {_DEMO_DATA if source == DEMO else inert(str(source))}\n" for source in sources
        ),
        "## Training settings\n",
        _two_columns("setting", [*flatten(tuned), *_recorded_in(settings)]),
        "## Limits\n",
        _limits(study, verdict),
        "## Versions\n",
        _two_columns("package", flatten(study.file.versions)),
    ]
    path = directory / MODEL_CARD
    write_atomically(path, "\n".join(filter(None, parts)).encode())
    return path


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = settings.get(name)
    return section if isinstance(section, Mapping) else {}


def _recorded_in(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The type of the base model's weights while its candidates were recorded."""
    precision = _section(settings, "record").get("precision")
    return [] if precision is None else [("record.precision", str(precision))]


def _base_model(settings: Mapping[str, Any]) -> tuple[str, str | None]:
    """Name of the base model, and its license where known."""
    name = str(_section(settings, "model").get("name", DEMO))
    if name == DEMO:
        return HUB_ID, "apache-2.0"
    if name == GEMMA:
        return gemma_model.HUB_ID, "gemma"
    return name, None


def _front_matter(base_model: str, license_name: str | None, tags: Sequence[str]) -> str:
    """The YAML block; JSON strings and lists are valid YAML, whatever they contain."""
    fields: dict[str, Any] = {
        "base_model": base_model,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(tags),
    }
    if license_name is not None:
        fields["license"] = license_name
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---", ""])


def _scores_table(verdict: Verdict) -> str:
    comparison = verdict.comparison
    rows = ["| task | metric | items | base | this model | change |", "|---|---|---|---|---|---|"]
    for group in ("domain", "general"):
        for task in comparison.tasks:
            if task.group == group:
                items = f"{task.num_items} {items_text([task.task], verdict.fresh_tasks)}"
                rows += [_score_row(task, change, items) for change in task.metrics]
    return "\n".join(rows) + "\n"


def _score_row(task: TaskChange, change: MetricChange, items: str) -> str:
    def value(interval: Interval) -> str:
        text, ends = value_texts(change, interval)
        return f"{text} ({ends})"

    delta, ends = delta_texts(change)
    unit = " nats per token" if change.metric == "cross_entropy" else ""
    name = inert(task.task)
    cells = (
        f"{name} ({task.group})",
        change.metric.replace("_", " "),
        items,
        value(change.before),
        value(change.after),
        f"{delta}{unit} ({ends})",
    )
    return f"| {' | '.join(cells)} |"


def _headline(verdict: Verdict) -> str:
    comparison = verdict.comparison
    gain, forgetting = comparison.domain_gain, comparison.forgetting
    doubt = "" if forgetting.distinguishable else ", not distinguishable from none"
    return (
        f"Domain gain {points(gain.value)} points of 100 ({points_range(gain)}); forgetting on "
        f"the general tasks {points(forgetting.value)} ({points_range(forgetting)}){doubt} "
        f"({inert(verdict_items_text(verdict))}). {inert(score_text(comparison))} In brackets "
        "are 95 % intervals over the items; changes are paired item by item.\n"
    )


def _limits(study: Study, verdict: Verdict | None) -> str:
    inherited = "- It has the base model's limits, and was not tested for safety."
    if verdict is None:
        return f"{inherited}\n"
    general = [task.task for task in verdict.comparison.tasks if task.group == "general"]
    stale = [task for task in verdict.base.tasks if task not in verdict.fresh_tasks]
    lines = [
        f"- Forgetting was measured on {inert(', '.join(general))} only. Other abilities may have "
        "changed.",
        "- The intervals cover the choice of test items, not the training seed.",
        inherited,
    ]
    if stale and len(study.compared) > 1:
        lines.append(
            f"- It was chosen from {len(study.compared)} trials by scores that include "
            f"{inert(', '.join(stale))}, so these lean to the lucky side."
        )
    return "\n".join(lines) + "\n"


def _two_columns(title: str, rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {title} | value |", "|---|---|"]
    lines += [f"| {inert(name)} | {inert(value)} |" for name, value in rows]
    return "\n".join(lines) + "\n"


def _code(directory: Path, model: Mapping[str, Any], system: str | None) -> str:
    """Code that renders a question as the model was taught, behind the same system message."""
    if not has_chat_template(directory):
        before = f"System:\n{system}\n\n" if system else ""
        text = json.dumps(f"{before}User:\nYour question\n\nAssistant:\n", ensure_ascii=False)
        return _PLAIN_CODE.replace("TEXT", text)
    messages = 'messages = [{"role": "user", "content": "Your question"}]\n'
    if system:
        content = json.dumps(system, ensure_ascii=False)
        messages = (
            f"system = {content}  # of all training data\n"
            'messages = [{"role": "system", "content": system},\n'
            '            {"role": "user", "content": "Your question"}]\n'
        )
    options = model.get("template_options")
    line = (
        f"options = {dict(options)!r}  # of the chat template, as in training\n" if options else ""
    )
    given = "**options, " if options else ""
    code = _CHAT_CODE.replace("OPTIONS", line).replace("GIVEN", given)
    return code.replace("MESSAGES", messages)
