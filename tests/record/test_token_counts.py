"""Tokens that training will compute: against the batches that training itself lays out."""

import json
import math
import random
import shutil

import pytest
import torch

from benchmarks.tiny_models import make_config
from lrmc_ray.chat.answers import Chat
from lrmc_ray.errors import DataError
from lrmc_ray.method.fast.packing import lay_out
from lrmc_ray.models import attention_cost as measured_attention_cost
from lrmc_ray.models import load_model, load_tokenizer
from lrmc_ray.record.encode import encode_row
from lrmc_ray.record.rows import Rejects, read_rows
from lrmc_ray.record.sources import find_sources
from lrmc_ray.record.token_counts import (
    attention_cost,
    computed_tokens,
    count_sample_tokens,
    deal,
    packed_tokens,
)
from lrmc_ray.train.samples import samples_of_step
from tests.support.tiny import make_data


def random_sequences(rng):
    """Some share beginnings, some are beginnings of others, some are equal."""
    stems = [[rng.randrange(4) for _ in range(rng.randrange(0, 9))] for _ in range(3)]
    return [
        rng.choice(stems) + [rng.randrange(4) for _ in range(rng.randrange(1, 5))]
        for _ in range(rng.randrange(1, 9))
    ]


@pytest.mark.parametrize(
    ("cost", "longest"),
    [(None, math.inf), (0.0, math.inf), (0.01, math.inf), (0.3, math.inf), (0.0, 9), (0.01, 7)],
)
def test_tokens_are_those_of_the_layout_that_training_takes(cost, longest):
    rng = random.Random(0)
    layouts = set()
    for _ in range(200):
        sequences = random_sequences(rng)
        tensors = [torch.tensor(ids) for ids in sequences]
        layout = lay_out(tensors, float("inf") if cost is None else cost, longest)
        layouts.add(layout.is_visible_TT is None)
        assert computed_tokens(sequences, cost, longest) == layout.input_ids_BT.numel()
        beginnings = {tuple(ids[:end]) for ids in sequences for end in range(1, len(ids) + 1)}
        assert packed_tokens(sequences) == len(beginnings)
    assert layouts == ({True} if cost is None else {True, False})
    assert computed_tokens([], cost) == 0


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (7, [1, 1, 1, 1, 1, 0, 0])]
)
def test_a_batch_is_dealt_to_micro_batches_in_its_order(count, sizes):
    parts = deal([[i] for i in range(5)], count)
    assert [len(part) for part in parts] == sizes
    assert [ids for part in parts for ids in part] == [[i] for i in range(5)]


def test_the_cost_of_attention_is_that_of_the_loaded_model(tiny_model, tmp_path):
    model = load_model(tiny_model)
    parameters = sum(p.numel() for p in model.parameters())
    assert attention_cost(tiny_model, parameters) == pytest.approx(measured_attention_cost(model))
    (tmp_path / "config.json").write_text("{}")
    assert attention_cost(tmp_path, parameters) == 0.0


@pytest.mark.parametrize(("batch_size", "micro_batches", "packing"), [(8, 1, True), (8, 4, False)])
def test_the_estimate_is_what_many_steps_compute(
    tiny_model, tmp_path, batch_size, micro_batches, packing
):
    path = make_data(tmp_path / "train.jsonl", num_rows=120)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rules = "Answer with the sum alone. " * 8
    texts = [json.dumps({**row, "prompt": rules + row["prompt"]}) + "\n" for row in rows]
    path.write_text("".join(texts))
    sources = find_sources([str(path)])
    chat = Chat(load_tokenizer(tiny_model))
    usable = read_rows(sources, Rejects())
    ids = [example.input_ids for row in usable for example in encode_row(row, chat)]
    model = load_model(tiny_model)
    parameters = sum(p.numel() for p in model.parameters())
    cost = measured_attention_cost(model) if packing else float("inf")
    steps, computed = 60, 0
    for step in range(steps):
        chosen = samples_of_step(len(ids), step, batch_size=batch_size, seed=3)
        batch = sorted((torch.tensor(ids[i]) for i in chosen), key=len)
        for part in range(micro_batches):
            size = batch_size // micro_batches
            layout = lay_out(batch[part * size : (part + 1) * size], cost)
            computed += layout.input_ids_BT.numel()
    found = count_sample_tokens(
        sources,
        tiny_model,
        max_length=1024,
        batch_size=batch_size,
        micro_batches=micro_batches,
        packing=packing,
        parameters=parameters,
    )
    assert found.alone == pytest.approx(sum(map(len, ids)) / len(ids))
    assert found.computed == pytest.approx(computed / (steps * batch_size), rel=0.03)
    # The rules are there once in eight; padding adds to what each sample has.
    assert found.computed < 0.5 * found.alone if packing else found.computed > found.alone


def test_rows_that_cannot_be_used_do_not_count(tiny_model, tmp_path):
    path = make_data(tmp_path / "train.jsonl", num_rows=4)
    settings = {
        "max_length": 3,
        "batch_size": 2,
        "micro_batches": 1,
        "packing": False,
        "parameters": 1,
    }
    with path.open("a") as file:
        file.write("no JSON\n" + json.dumps({"prompt": 1, "completion": "x"}) + "\n")
    found = count_sample_tokens(find_sources([str(path)]), tiny_model, **settings)
    assert (found.alone, found.computed) == (3.0, 3.0)  # cut at the longest that is allowed
    path.write_text('{"prompt": 1}\n')
    with pytest.raises(DataError, match="none of the first rows"):
        count_sample_tokens(find_sources([str(path)]), tiny_model, **settings)


@pytest.mark.parametrize(("window", "is_packed"), [(16, False), (1024, True)])
def test_samples_beyond_a_window_are_counted_as_padded(window, is_packed, tiny_model, tmp_path):
    """The beginning that they share is longer than the shorter window."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    options = {"vocab_size": 512, "sliding_window": window, "num_hidden_layers": 2}
    make_config("mistral", **options).save_pretrained(model)
    data = tmp_path / "rows.jsonl"
    rules = "Answer with the sum alone. " * 8
    rows = [{"prompt": f"{rules}{n} plus {n}?", "completion": str(2 * n)} for n in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = count_sample_tokens(
        find_sources([str(data)]),
        model,
        max_length=1024,
        batch_size=8,
        micro_batches=1,
        packing=True,
        parameters=100_000,
    )
    assert found.computed < 0.5 * found.alone if is_packed else found.computed >= found.alone
