import html
import json
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from lrmc_ray.chat.answers import Chat
from lrmc_ray.errors import IncompleteArtifactError
from lrmc_ray.evaluate.numbers import percent, percent_range, points, points_range
from lrmc_ray.method.names import Loss, OptimizerName
from lrmc_ray.record.encode import encode_row
from lrmc_ray.record.rows import Row
from lrmc_ray.report.method_words import method_text
from lrmc_ray.report.model_card import write_model_card
from lrmc_ray.report.study import load_study
from tests.support.chat_templates import shipped, tokenizer_for
from tests.support.synthetic_study import add_final, edit, make_study, rename_task

SYSTEM = 'Answer in SQL.\ncountry("name", öäü) ``` MESSAGES'
ANSWER = {"role": "assistant", "content": "Two."}


@pytest.fixture(scope="module")
def study_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("runs") / "demo-0123")


def card_of(directory: Path, study_dir: Path) -> str:
    path = write_model_card(directory, study_dir)
    assert path == directory / "README.md"
    return path.read_text(encoding="utf-8")


def code_of(card: str) -> str:
    return re.search(r"```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)[1]


def test_the_front_matter_is_what_the_hub_reads(study_dir, tmp_path):
    from huggingface_hub import ModelCard

    data = ModelCard(card_of(tmp_path, study_dir)).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.license == "apache-2.0"
    assert {"logits-replay", "moclip"} <= set(data.tags)


def test_the_precision_of_the_record_is_said(study_dir, tmp_path):
    own = Path(shutil.copytree(study_dir, tmp_path / "study"))
    settings = json.loads((own / "study.json").read_text())["settings"]
    edit(own, settings=settings | {"record": {"precision": "bf16"}})
    assert "| record.precision | bf16 |" in card_of(tmp_path, own)


@pytest.mark.parametrize(
    ("settings", "text", "tags"),
    [
        (
            {"loss": "restricted", "optimizer": "moclip", "tail_samples": 8, "anchor_weight": 1.0},
            "Logits Replay and MoClip, with a sampled tail and an anchor to the base model",
            ["logits-replay", "moclip"],
        ),
        ({"loss": "full", "optimizer": "adamw", "tail_samples": 8, "anchor_weight": 0.0},
         "the cross-entropy over the whole vocabulary and AdamW", []),
        ({"loss": "restricted", "optimizer": "adamw", "tail_samples": 0, "anchor_weight": 0.0,
          "l2_sp_weight": 1.0, "lora_rank": 4},
         "Logits Replay and AdamW, with a penalty on the distance from the base's weights and "
         "adapters of rank 4", ["logits-replay"]),
        ({"loss": "dft", "optimizer": "moclip", "tail_samples": 0, "anchor_weight": 0.5},
         "DFT, the cross-entropy weighted by the model's own probability and MoClip, with an "
         "anchor to the base model", ["moclip"]),
        ({"loss": "frozen_tail", "optimizer": "magma", "tail_samples": 8, "anchor_weight": 0.0,
          "stm_perplexity": 2.5},
         "Logits Replay with the base model's mass outside the candidates and Magma, with tokens "
         "left out that surprised the base model", ["logits-replay"]),
    ],
)  # fmt: skip
def test_the_method_is_said_from_the_settings(settings, text, tags, study_dir, tmp_path):
    from huggingface_hub import ModelCard

    own = Path(shutil.copytree(study_dir, tmp_path / "study"))
    edit(own, trials={3: {"settings": settings, "params": {}}})
    card = card_of(tmp_path, own)
    paper = " ([arXiv 2510.09152](https://arxiv.org/abs/2510.09152))" if tags else ""
    assert f"The method: {text}{paper}." in card
    assert ModelCard(card).data.tags == [*tags, "lrmc_ray", "fine-tuning"]
    assert ("MoClip" in card) == (settings["optimizer"] == "moclip")


def test_every_loss_and_optimizer_has_words():
    for loss in get_args(Loss):
        for optimizer in get_args(OptimizerName):
            assert method_text({"loss": loss, "optimizer": optimizer})


def test_any_base_models_name_stays_one_yaml_string(study_dir, tmp_path):
    own = Path(shutil.copytree(study_dir, tmp_path / "study"))
    edit(own, settings={"model": {"name": 'models/a: "b" # c'}, "data": {"train": ["x.jsonl"]}})
    card = card_of(tmp_path, own)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == 'models/a: "b" # c'
    assert "license" not in front
    assert "- x.jsonl\n" in card


def test_scores_are_those_of_the_verdict(study_dir, tmp_path):
    own = add_final(Path(shutil.copytree(study_dir, tmp_path / "study")))
    card = card_of(tmp_path, own)
    verdict = load_study(own).verdict
    accuracy = verdict.comparison.task("nl2sql").metric("accuracy")
    assert (
        f"| nl2sql (domain) | accuracy | 60 test items "
        f"| {percent(accuracy.before.value)} ({percent_range(accuracy.before)}) "
        f"| {percent(accuracy.after.value)} ({percent_range(accuracy.after)}) "
        f"| {points(accuracy.delta.value)} ({points_range(accuracy.delta)}) |"
    ) in card
    entropy = verdict.comparison.task("plain_english").metric("cross_entropy")
    assert f"| +{entropy.delta.value:.3f} nats per token (+{entropy.delta.low:.3f} to" in card
    forgetting = verdict.comparison.forgetting
    assert f"{points(forgetting.value)} ({points_range(forgetting)})" in card
    rows = [line for line in card.splitlines() if line.startswith("| ") and "(domain)" in line]
    assert len(rows) == 3


def test_settings_limits_and_versions_are_told(study_dir, tmp_path):
    card = card_of(tmp_path, study_dir)
    params = load_study(study_dir).best.entry.params
    assert f"| tau | {params['tau']} |" in card
    assert "| optimizer | moclip |" in card
    assert "| torch | 2.13.0 |" in card
    assert "Forgetting was measured on wordnet, capitals, plain_english" in card
    assert "chosen from 7 trials by scores that include nl2sql, wordnet" in card


def test_fresh_items_need_no_caution(study_dir, tmp_path):
    own = add_final(Path(shutil.copytree(study_dir, tmp_path / "study")))
    assert "by scores that include wordnet, capitals, plain_english," in card_of(tmp_path, own)


def test_no_scores_no_card(study_dir, tmp_path):
    own = Path(shutil.copytree(study_dir, tmp_path / "study"))
    edit(own, best=None, trials={n: {"state": "FAIL", "cause": "x"} for n in range(10)})
    with pytest.raises(IncompleteArtifactError, match="no trial with scores"):
        write_model_card(tmp_path, own)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("template", [None, "tokenizer_config.json", "chat_template.jinja"])
def test_the_code_example_runs(study_dir, tmp_path, capsys, monkeypatch, template):
    """On a model of a few thousand random weights, with and without a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<eos>", "Your", "question", "prompt", "user"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(tmp_path)
    chat = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    if template == "chat_template.jinja":
        (tmp_path / template).write_text(chat)
    elif template is not None:
        config = json.loads((tmp_path / template).read_text())
        (tmp_path / template).write_text(json.dumps(config | {"chat_template": chat}))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, eos_token_id=0, bos_token_id=None, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)

    code = code_of(card_of(tmp_path, study_dir))
    assert ("apply_chat_template" in code) == (template is not None)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert set(printed.split()) <= set(words)


@pytest.mark.parametrize(
    ("template", "options", "system", "prompt"),
    [
        ("qwen3", {}, None, "<|im_start|>user\nYour question<|im_end|>\n<|im_start|>assistant\n"),
        (
            "qwen3",
            {"enable_thinking": False},
            None,
            "<|im_start|>user\nYour question<|im_end|>\n<|im_start|>assistant\n"
            "<think>\n\n</think>\n\n",
        ),
        (
            "qwen3",
            {},
            SYSTEM,
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nYour question<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (None, {}, None, "User:\nYour question\n\nAssistant:\n"),
        (None, {}, SYSTEM, f"System:\n{SYSTEM}\n\nUser:\nYour question\n\nAssistant:\n"),
    ],
)
def test_the_code_example_asks_as_the_model_was_taught(
    study_dir, tmp_path, monkeypatch, template, options, system, prompt
):
    from transformers import LlamaConfig, LlamaForCausalLM

    own = Path(shutil.copytree(study_dir, tmp_path / "study"))
    before = [{"role": "system", "content": system}] if system else []
    row = {"messages": [*before, {"role": "user", "content": "Your question"}, dict(ANSWER)]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    settings = {"model": {"name": "m", "template_options": options}}
    edit(own, settings={**settings, "data": {"train": [str(tmp_path / "train.jsonl")]}})
    model_directory = tmp_path / "model"
    tokenizer = tokenizer_for(shipped()[template] if template else None)
    tokenizer.save_pretrained(model_directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, eos_token_id=0, bos_token_id=None, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(model_directory)
    monkeypatch.chdir(model_directory)
    names: dict[str, Any] = {}
    exec(compile(code_of(card_of(model_directory, own)), "README.md", "exec"), names)
    (example,) = encode_row(Row("x:1", row), Chat(tokenizer, options))
    asked = names["inputs"]["input_ids"][0].tolist()
    assert asked == example.input_ids[: example.is_target.index(True)]
    assert tokenizer.decode(asked) == prompt


@pytest.mark.parametrize(
    "name",
    ["![p](http://127.0.0.1:9/p.png)", "<img src=x>", "a | b", "`</code><img src=x>`![p][p]"],
)
def test_names_of_others_load_no_picture_and_end_no_cell(name, study_dir, tmp_path):
    from markdown_it import MarkdownIt

    own = Path(shutil.copytree(study_dir, tmp_path / "study"))
    rename_task(own, "nl2sql", name)
    settings = json.loads((own / "study.json").read_text())["settings"]
    settings["model"]["name"] = f"someone/{name}"
    settings["data"]["train"] = [name]
    edit(own, settings=settings)
    card = card_of(tmp_path, own).split("---\n", 2)[2]
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(card)
    assert "<img" not in page
    links = re.findall(r'href="([^"]*)"', page)
    assert [link for link in links if not link.startswith("https://arxiv.org/abs/")] == []
    assert f"<td>{html.escape(name, quote=False)} (domain)</td>" in page
