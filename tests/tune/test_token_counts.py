"""Tokens that training will compute: against those that go through the model in training."""

import json
import math
import shutil

import pytest

from benchmarks.tiny_models import make_config
from lrmc_ray.chat.answers import Chat
from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import DataError
from lrmc_ray.models.loading import empty_model, load_model, load_tokenizer
from lrmc_ray.models.packing import attention_cost, price_of_attention
from lrmc_ray.models.parts import body_of
from lrmc_ray.record.encode import encode_row
from lrmc_ray.record.rows import Rejects, read_rows
from lrmc_ray.record.sources import find_sources
from lrmc_ray.tune.token_counts import count_sample_tokens
from tests.support.tiny import make_data, make_model_of_type
from tests.support.training import record_of, run_alone, settings_of

RULES = "Answer with the sum alone. " * 8


def tokens_seen_in_training(settings, **places):
    """Tokens of all forward passes of a run."""
    run = run_alone(settings, **places)
    seen = []

    def count(_body, _args, options):
        seen.append(options["input_ids"].numel())

    body_of(run.learner.model).register_forward_pre_hook(count, with_kwargs=True)
    for _ in run.steps():
        pass
    return sum(seen)


@pytest.mark.parametrize(
    ("model_type", "changes", "share"),
    [
        # Tokens that are computed, of those that a sample has: the rules once in eight ...
        pytest.param("llama", {"micro_batches": 1}, (0.0, 0.5), marks=pytest.mark.slow),
        # ... also where they are in four micro-batches, unless activations are computed again.
        ("llama", {"micro_batches": 4}, (0.0, 0.5)),
        ("llama", {"micro_batches": 4, "gradient_checkpointing": "full"}, (0.5, 0.8)),
        pytest.param(
            *("llama", {"micro_batches": 4, "packing": False}, (0.95, 1.2)),
            marks=pytest.mark.slow,
        ),
        pytest.param("mamba2", {"micro_batches": 4}, (0.95, 1.2), marks=pytest.mark.slow),
        ("gemma3_text", {"micro_batches": 4}, (0.95, 1.2)),  # a window of 16 tokens
    ],
    ids=str,
)
def test_the_estimate_is_what_training_computes(model_type, changes, share, tiny_model, tmp_path):
    model = tiny_model
    if model_type != "llama":
        model = make_model_of_type(model_type, tmp_path / "model")
    path = make_data(tmp_path / "train.jsonl", num_rows=40)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    texts = [json.dumps({**row, "prompt": RULES + row["prompt"]}) + "\n" for row in rows]
    path.write_text("".join(texts))
    settings = settings_of(batch_size=8, steps=20, checkpoint_every=100, probe_every=0, **changes)
    found = count_sample_tokens(
        find_sources([str(path)]), model, settings, max_length=1024, on_gpu=False
    )
    seen = tokens_seen_in_training(
        settings,
        record=record_of(model, path, tmp_path / "record"),
        model=model,
        directory=tmp_path / "run",
    )
    assert found.computed == pytest.approx(seen / (20 * 8), rel=0.03)
    assert share[0] <= found.computed / found.alone <= share[1]
    chat = Chat(load_tokenizer(model))
    usable = read_rows(find_sources([str(path)]), Rejects())
    lengths = [len(e.input_ids) for row in usable for e in encode_row(row, chat)]
    assert found.alone == pytest.approx(sum(lengths) / len(lengths))


@pytest.mark.parametrize(
    ("on_gpu", "changes"),
    [(True, {}), (False, {"loss": "kl_to_base"}), (False, {"precision": "bf16"})],
)
def test_a_beginning_is_not_shared_by_a_step_everywhere(on_gpu, changes, tiny_model, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{RULES}{n} plus {n}?", "completion": str(2 * n)} for n in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def computed(on_gpu, **changes):
        train = TrainSettings(batch_size=8, micro_batches=4, **changes)
        sources = find_sources([str(path)])
        found = count_sample_tokens(sources, tiny_model, train, max_length=1024, on_gpu=on_gpu)
        return found.computed

    assert computed(on_gpu, **changes) > 1.5 * computed(False)


def test_the_price_of_attention_needs_no_weights(tiny_model):
    found = price_of_attention(empty_model(tiny_model))
    assert found == attention_cost(load_model(tiny_model)) < math.inf


def test_rows_that_cannot_be_used_do_not_count(tiny_model, tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "Which letters come first?", "completion": "abcdefghijklmnopqrstuvwxyz"}
    unusable = "no JSON\n" + json.dumps({"prompt": 1, "completion": "x"}) + "\n"
    path.write_text((json.dumps(row) + "\n") * 4 + unusable)
    train = TrainSettings(batch_size=2, micro_batches=1, packing=False)
    sources = find_sources([str(path)])
    whole = count_sample_tokens(sources, tiny_model, train, max_length=1024, on_gpu=False)
    most = int(whole.alone) - 4
    found = count_sample_tokens(sources, tiny_model, train, max_length=most, on_gpu=False)
    # Cut at the longest that is allowed; the last token of a sample predicts nothing.
    assert (found.alone, found.computed) == (most, most - 1)
    for text, longest in ((path.read_text(), 3), ('{"prompt": 1}\n', 1024)):
        path.write_text(text)
        with pytest.raises(DataError, match="none of the first rows"):
            count_sample_tokens(sources, tiny_model, train, max_length=longest, on_gpu=False)


@pytest.mark.parametrize(
    ("model_type", "options", "is_packed"),
    [
        ("mistral", {"sliding_window": 16}, False),
        ("mistral", {"sliding_window": 1024}, True),
        ("bloom", {}, False),
        ("mpt", {}, False),
        ("gpt2", {}, True),
    ],
)
def test_what_cannot_be_packed_is_counted_as_padded(
    model_type, options, is_packed, tiny_model, tmp_path
):
    """Samples beyond a window, and models that count positions by themselves."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    layers = {} if model_type in ("bloom", "mpt", "gpt2") else {"num_hidden_layers": 2}
    make_config(model_type, vocab_size=512, **layers, **options).save_pretrained(model)
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{RULES}{n} plus {n}?", "completion": str(2 * n)} for n in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = TrainSettings(batch_size=8, micro_batches=1)
    sources = find_sources([str(data)])
    found = count_sample_tokens(sources, model, train, max_length=1024, on_gpu=False)
    share = found.computed / found.alone
    assert share < 0.5 if is_packed else share > 0.9
