"""What an actor does with its rows, and the numbers of a file, against plain counting."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.peak_memory import peak_bytes
from lrmc_ray.method.head import OutputHead, head_logits
from lrmc_ray.method.microbatch import Sample
from lrmc_ray.method.subsets import cut, select_candidates
from lrmc_ray.record import candidates as recording
from lrmc_ray.record.candidates import batches
from lrmc_ray.record.describe import describe, summarize
from lrmc_ray.record.schema import write_part
from tests.support.cases import rest_is_slow

torch.set_num_threads(1)

TAU, V = 0.9, 60


def rows_of(lengths):
    return [{"input_ids": [0] * length} for length in lengths]


@pytest.mark.parametrize("seed", range(20))
def test_batches_are_consecutive_full_and_within_the_budget(seed, monkeypatch):
    rng = random.Random(seed)
    budget = rng.randint(1, 200)
    monkeypatch.setattr(recording, "BATCH_TOKENS", budget)
    rows = rows_of(sorted(rng.randint(1, 60) for _ in range(rng.randint(1, 80))))
    made = list(batches(rows))
    assert [row for batch in made for row in batch] == rows
    sizes = [(len(batch), max(len(row["input_ids"]) for row in batch)) for batch in made]
    for (number, longest), following in zip(sizes, [*made[1:], None], strict=True):
        assert number * longest <= budget or number == 1
        if following is not None:  # the next row would not have fitted
            widest = max(longest, len(following[0]["input_ids"]))
            assert (number + 1) * widest > budget


def make_sample(seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(3, 20, (), generator=generator))
    ids = torch.randint(V, (length,), generator=generator)
    logits = 4 * torch.randn(length - 1, V, generator=generator)
    logits[0, ids[1]] += 40  # one position of which the base model is sure
    is_supervised = torch.arange(length - 1) >= length // 3
    is_supervised[0] = True
    caps = torch.where(is_supervised, 9, 4)
    return Sample(
        sample_id=str(seed),
        input_ids_T=ids,
        positions_P=torch.arange(length - 1),
        is_supervised_P=is_supervised,
        candidates=select_candidates(logits, ids[1:], tau=TAU, k_min=2, k_max=caps),
        domain=("", "sql")[seed % 2],
    )


@pytest.fixture(scope="module")
def samples():
    return [make_sample(seed) for seed in range(150)]  # more than two row groups


@pytest.fixture(scope="module")
def part(samples, tmp_path_factory):
    path = tmp_path_factory.mktemp("part") / "part.parquet"
    write_part(path, samples, {"lrmc.tau": repr(TAU)})
    return SimpleNamespace(path=path, **describe(path, tokenizer_size=50))


def counted(samples):
    """(sample, row, candidate ids, log-probabilities) of every position, one at a time."""
    for sample in samples:
        bounds = sample.candidates.offsets.tolist()
        for row in range(sample.candidates.num_rows):
            entries = slice(bounds[row], bounds[row + 1])
            yield (
                sample,
                row,
                sample.candidates.token_ids[entries].tolist(),
                sample.candidates.logprobs[entries].double().exp(),
            )


def test_positions_and_candidates_are_counted_by_kind(samples, part):
    counts = {"supervised": 0, "prompt": 0}
    candidates = {"supervised": 0, "prompt": 0}
    active = capped = padding = 0
    sizes = []
    for sample, row, ids, probabilities in counted(samples):
        kind = "supervised" if sample.is_supervised_P[row] else "prompt"
        counts[kind] += 1
        candidates[kind] += len(ids)
        padding += sum(token >= 50 for token in ids)
        if kind == "supervised":
            sizes.append(len(ids))
            capped += float(probabilities.sum()) < TAU - 1e-6
            own = cut(sample.candidates.rows(torch.tensor([row])), TAU)
            active += int(own.sizes[0]) > 1
    assert (part.supervised, part.prompt) == (counts["supervised"], counts["prompt"])
    assert part.supervised_candidates == candidates["supervised"]
    assert part.prompt_candidates == candidates["prompt"]
    assert part.active == active < part.supervised
    assert part.capped == capped > 0
    assert part.padding_candidates == padding > 0
    assert dict(zip(part.k_values, part.k_counts, strict=True)) == {
        size: sizes.count(size) for size in sizes
    }
    assert part.rows == len(samples)


def test_domains_are_counted(samples, part):
    assert part.domains == {
        name: [
            sum(sample.domain == name for sample in samples),
            sum(int(s.is_supervised_P.sum()) for s in samples if s.domain == name),
        ]
        for name in ("", "sql")
    }


def test_bytes_are_those_of_the_columns(part):
    import pyarrow.parquet as pq

    layout = pq.read_metadata(part.path)
    assert layout.num_row_groups == 3
    total = sum(
        layout.row_group(group).column(column).total_compressed_size
        for group in range(3)
        for column in range(layout.num_columns)
    )
    assert 0 < part.position_bytes < part.candidate_bytes
    assert part.candidate_bytes + part.position_bytes < total < part.bytes
    assert part.bytes == part.path.stat().st_size


def test_a_summary_adds_files_up(part):
    plan: dict[str, Any] = dict.fromkeys(("samples", "tokens", "dropped", "truncated"), 1)
    plan |= {"rejected": 0, "split_conversations": 0, "formats": {}}
    fields = vars(part)
    one, two = summarize(plan, [fields]), summarize(plan, [fields, fields])
    for name in ("supervised_positions", "prompt_positions", "padding_candidates", "bytes"):
        assert two[name] == 2 * one[name]
    for name in ("k_mean", "k_median", "k_95", "active_share", "capped_share", "prompt_k_mean"):
        assert two[name] == one[name]
    assert two["domains"]["sql"]["samples"] == 2 * one["domains"]["sql"]["samples"]
    assert one["supervised_bytes"] + one["prompt_bytes"] == (
        part.candidate_bytes + part.position_bytes
    )
    assert one["bytes_per_supervised_position"] == pytest.approx(
        one["supervised_bytes"] / part.supervised, abs=0.05
    )


def tree_of_rows(seed: int) -> list[dict[str, object]]:
    """Rows with beginnings in common, some supervised there and some not, in shuffled order."""
    rng = random.Random(seed)
    trunk = [rng.randrange(512) for _ in range(12)]
    rows: list[dict[str, object]] = []
    for number in range(14):
        if number == 13:  # one that shares nothing
            trunk = [(token + 7) % 512 for token in trunk]
        ids = trunk[: rng.randint(1, 12)] + [rng.randrange(512) for _ in range(rng.randint(1, 9))]
        start = rng.randint(1, len(ids) - 1)
        target = [index >= start for index in range(len(ids))]
        name = f"{number}"
        rows.append({"sample_id": name, "domain": "", "input_ids": ids, "is_target": target})
    rows += [{**rows[3], "sample_id": "twin"}]
    rng.shuffle(rows)
    return rows


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("prompt_k_max", [0, 5])
@pytest.mark.parametrize("seed", rest_is_slow(range(3), [0]))
def test_shared_prefixes_change_no_set(tiny_model, seed, prompt_k_max, packed, monkeypatch):
    """Against one forward pass of transformers per row, and one selection per position."""
    from transformers import AutoModelForCausalLM

    from lrmc_ray.record.candidates import CandidateRecorder

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    recorder = CandidateRecorder(
        tiny_model, tau=TAU, k_min=2, k_max=9, prompt_k_max=prompt_k_max, threads=1
    )
    assert recorder._attention_cost < 1
    recorder._attention_cost = 0.0 if packed else float("inf")
    monkeypatch.setattr(recording, "BATCH_TOKENS", 150)  # several batches
    monkeypatch.setattr(recording, "LOGITS_ELEMENTS", 512 * 10)  # of several pieces each
    rows = tree_of_rows(seed)
    run = 0
    forward = type(recorder._model.base_model).forward

    def counting(*arguments, **options):
        nonlocal run
        run += options["input_ids"].numel()
        return forward(*arguments, **options)

    monkeypatch.setattr(type(recorder._model.base_model), "forward", counting)
    recorded = recorder.record(rows)
    monkeypatch.undo()
    lengths = [len(row["input_ids"]) for row in rows]
    assert (run < sum(lengths)) if packed else (run >= sum(lengths))
    assert [sample.sample_id for sample in recorded] == [row["sample_id"] for row in rows]
    for row, sample in zip(rows, recorded, strict=True):
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            logits_TV = model(input_ids=ids[None]).logits[0]
        supervised = row["is_target"][1:]
        chosen = [p for p in range(len(ids) - 1) if prompt_k_max or supervised[p]]
        assert sample.input_ids_T.tolist() == ids.tolist()
        assert sample.positions_P.tolist() == chosen
        assert sample.is_supervised_P.tolist() == [supervised[p] for p in chosen]
        for index, p in enumerate(chosen):
            expected = select_candidates(
                logits_TV[p : p + 1],
                ids[p + 1 : p + 2],
                tau=TAU,
                k_min=2,
                k_max=9 if supervised[p] else prompt_k_max,
            )
            actual = sample.candidates.rows(torch.tensor([index]))
            assert actual.gold_ids.tolist() == [int(ids[p + 1])]
            assert actual.token_ids.tolist() == expected.token_ids.tolist()
            # float16, rounded down: two forward passes may fall on both sides of a step.
            torch.testing.assert_close(
                actual.logprobs.float(), expected.logprobs.float(), atol=1e-5, rtol=2e-3
            )


@pytest.mark.parametrize("tied", [True, False])
def test_bf16_keeps_the_probabilities_of_the_rounded_model(tmp_path, tied, monkeypatch):
    """Against a float64 softmax over the same bf16 hidden states and bf16 head."""
    from safetensors.torch import load_file

    from lrmc_ray.record.candidates import CandidateRecorder
    from tests.support.tiny import make_model

    make_model(tmp_path, tied=tied)
    recorder = CandidateRecorder(
        tmp_path, tau=TAU, k_min=2, k_max=300, prompt_k_max=300, precision="bf16", threads=1
    )
    assert recorder._attention_cost < 1
    seen = []

    def watched(*arguments):
        seen.append(batch_hidden_states(*arguments))
        return seen[-1]

    batch_hidden_states = recording.batch_hidden_states
    monkeypatch.setattr(recording, "batch_hidden_states", watched)
    ids = [(7 * n * n + n) % 512 for n in range(60)]
    row = {"sample_id": "a", "domain": "", "input_ids": ids, "is_target": [True] * 60}
    (sample,) = recorder.record([row])
    (hidden_BTD,) = seen
    assert hidden_BTD.dtype == torch.bfloat16
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    weight_VD = load_file(tmp_path / "model.safetensors")[name].bfloat16().double()
    logprobs_NV = (hidden_BTD[0, :-1].double() @ weight_VD.T).log_softmax(-1)
    sets = sample.candidates
    exact = logprobs_NV[sets.row_ids, sets.token_ids.long()]
    # float16, rounded down: at most a step of it below, which is 2^-10 of the number.
    below = exact - sets.logprobs.double()
    assert below.min() > -1e-5
    assert (below <= exact.abs() * 2**-10 + 1e-5).all()
    # The likeliest ones, and in order: neighbours closer than float32 can tell may be swapped.
    left_NV = logprobs_NV.clone()
    left_NV[sets.row_ids, sets.token_ids.long()] = -torch.inf
    least = [float(exact[(sets.row_ids == n) & ~sets.is_gold].min()) for n in range(59)]
    assert (left_NV.amax(-1) <= torch.tensor(least) + 1e-5).all()
    assert (left_NV.exp().sum(-1) < 1 - TAU + 1e-4).all()


@pytest.mark.parametrize("shape", [{}, {"logit_scale": 0.5}, {"softcap": 30.0}])
def test_a_selection_takes_no_second_block_of_logits(shape):
    """Over 262,144 tokens, by the resident memory of the process."""
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(2**18, 32, generator=generator)
    hidden_ND = torch.randn(recording.LOGITS_ELEMENTS // 2**18, 32, generator=generator)
    gold_N = torch.randint(2**18, (len(hidden_ND),), generator=generator)
    head = OutputHead(weight_VD, **shape)

    def select(rows: int = len(hidden_ND)) -> None:
        with torch.inference_mode():
            logits_NV = head_logits(hidden_ND[:rows], head)
            select_candidates(logits_NV, gold_N[:rows], tau=0.99, k_min=2, k_max=1024)

    select(rows=1)  # compiles
    peak = peak_bytes(select, torch.device("cpu"))
    if peak is None:
        pytest.skip("the system does not say how much memory is resident")
    assert 1.0 <= peak / (4 * recording.LOGITS_ELEMENTS) < 1.4
