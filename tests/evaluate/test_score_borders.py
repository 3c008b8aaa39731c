"""Scores beyond windows, chunks and rotary borders, against lm-eval's own of every row alone."""

import random

import pytest
import torch

from benchmarks.tiny_models import (
    causal_types,
    dynamic_ntk,
    long_rope,
    make,
    short_borders,
)
from lrmc_ray.evaluate import prefix_sharing
from lrmc_ray.evaluate.prefix_lm import PrefixLM
from lrmc_ray.evaluate.prefix_sharing import Sharing
from lrmc_ray.models.borders import Borders
from lrmc_ray.models.loading import load_model
from tests.support import scoring
from tests.support.scoring import choices, instances, sentence

WINDOW = 24
PAIRS = [
    *choices([6, 18, 21, 24, 25, 26, 30, 30, 41, 55], header=16),
    *choices([40, 60, 60], header=35, seed=1),
    *choices([5, 9, 52], header=3, seed=2),
]
"""Contexts on both sides of the window, of unequal lengths, with and without a common beginning."""

COMMON = ["mistral", "gemma3_text", "gpt_oss", "gpt_neo", "llama4_text", "doge"]
NOT_BUILT = {
    *("blt", "dots3_note", "fuyu", "gemma3n", "got_ocr2", "moss_transcribe_diarize"),
    *("musicgen", "musicgen_melody", "phi4_multimodal"),
    *("gemma4_assistant", "gemma4_unified_assistant"),
}
"""Types that are not built small, or not at all."""
WINDOWED = [
    model_type
    for model_type in causal_types()
    if model_type not in NOT_BUILT and short_borders(model_type)
]


def generations(pairs):
    return [(context, {"until": ["w009"], "max_gen_toks": 6}) for context, _ in pairs[::3]]


def assert_scored_as_alone(model, pairs, *, batch_tokens=400):
    """Log-likelihoods, generations, and gold answers from the prompts that were generated from."""
    plain = scoring.plain_model(model)
    ours = PrefixLM(model, scoring.tokenizer(), batch_tokens=batch_tokens)
    requests = instances("loglikelihood", pairs)
    theirs = plain.loglikelihood(requests, disable_tqdm=True)

    def assert_equal(answers):
        assert [is_greedy for _, is_greedy in answers] == [is_greedy for _, is_greedy in theirs]
        values = torch.tensor([value for value, _ in answers])
        expected = torch.tensor([value for value, _ in theirs])
        torch.testing.assert_close(values, expected, rtol=2e-5, atol=2e-4)

    assert_equal(ours.loglikelihood(requests))
    generate = instances("generate_until", generations(pairs))
    assert ours.generate_until(generate) == plain.generate_until(generate, disable_tqdm=True)
    assert_equal(ours.loglikelihood(requests))


@pytest.mark.parametrize("model_type", COMMON)
def test_scores_beyond_a_window_are_lm_evals(model_type):
    model = make(model_type, **short_borders(model_type, WINDOW))
    assert Sharing(model).allows(80)
    assert_scored_as_alone(model, PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(WINDOWED) - set(COMMON)))
def test_scores_beyond_a_window_are_lm_evals_for_every_type(model_type):
    assert_scored_as_alone(make(model_type, **short_borders(model_type, WINDOW)), PAIRS)


@pytest.mark.parametrize("most_proven", [WINDOW, WINDOW - 1])
def test_a_wide_window_shares_within_itself_alone(most_proven, monkeypatch):
    monkeypatch.setattr(prefix_sharing, "MOST_PROVEN", most_proven)
    model = make("gemma2", sliding_window=WINDOW)
    sharing = Sharing(model)
    assert sharing.allows(WINDOW)
    assert sharing.allows(WINDOW + 1) == (most_proven == WINDOW)
    assert_scored_as_alone(model, PAIRS)


@pytest.mark.parametrize(
    ("model_type", "options", "border"),
    [("phi3", long_rope(32), 32), ("llama", dynamic_ntk(64), 64)],
)
def test_nothing_is_shared_beyond_a_rotary_border(model_type, options, border):
    """Dynamic NTK scaling: lm-eval cuts a row at the model's length, so none is beyond it."""
    model = make(model_type, **options)
    sharing = Sharing(model)
    assert sharing.allows(border)
    assert not sharing.allows(border + 1)
    pairs = [pair for pair in PAIRS if len(pair[0].split()) + 8 < 64 or model_type == "phi3"]
    assert_scored_as_alone(model, pairs)


@pytest.mark.parametrize("model_type", ["bart", "mamba"])
def test_models_that_share_nothing_score_and_generate_as_alone(model_type):
    """BART's decoder counts padding on the left as tokens; Mamba has states in place of a cache."""
    model = make(model_type)
    assert not Sharing(model).is_possible
    assert prefix_sharing.generates_in_batches(model) == (model_type == "mamba")
    assert_scored_as_alone(model, PAIRS)


@pytest.mark.parametrize(
    "model_type",
    [
        "mamba2",
        pytest.param("mamba", marks=pytest.mark.slow),
        pytest.param("falcon_mamba", marks=pytest.mark.slow),
        pytest.param("hy_v4", marks=pytest.mark.slow),
        pytest.param("gpt_oss", marks=pytest.mark.slow),
    ],
)
def test_bf16_scores_are_near_those_of_float32(model_type, tmp_path):
    """Loaded as the product does: some weights stay float32."""
    model = make(model_type)
    model.save_pretrained(tmp_path)
    short = load_model(tmp_path, dtype=torch.bfloat16)
    lm = PrefixLM(short, scoring.tokenizer(), batch_tokens=400)
    values = torch.tensor([v for v, _ in lm.loglikelihood(instances("loglikelihood", PAIRS))])
    expected = torch.tensor(scoring.true_loglikelihoods(model, PAIRS))
    # Rounding sends a token to another expert now and then.
    assert (values - expected).abs().median() < 0.1
    assert lm.generate_until(instances("generate_until", generations(PAIRS)))
    assert lm.last_logprobs([[5, 6, 7, 8, 9, 10, 11, 12]], 4).shape == (4, 128)


@pytest.mark.parametrize(
    ("model_type", "options", "lengths"),
    [
        ("mistral", {"sliding_window": WINDOW}, (18, 20, 22)),  # a gap, within the window
        ("phi3", long_rope(32), (26, 28, 28)),
    ],
)
def test_a_gold_answer_may_end_beyond_the_border_that_its_prompt_is_within(
    model_type, options, lengths
):
    """The prompts are kept from generating 2 tokens; the answers have 9."""
    model = make(model_type, **options)
    rng = random.Random(3)
    prompts = [sentence(rng, length) for length in lengths]
    ours = PrefixLM(model, scoring.tokenizer(), batch_tokens=400)
    ours.generate_until(
        instances("generate_until", [(p, {"until": [], "max_gen_toks": 2}) for p in prompts])
    )
    requests = instances("loglikelihood", [(p, f" {sentence(rng, 9)}") for p in prompts])
    values = [value for value, _ in ours.loglikelihood(requests)]
    plain = scoring.plain_model(model)
    expected = [value for value, _ in plain.loglikelihood(requests, disable_tqdm=True)]
    assert values == pytest.approx(expected, rel=2e-5, abs=2e-4)


def test_prompts_beyond_a_window_are_generated_from_in_one_batch():
    """Padded on the left; of unequal lengths they would run one by one otherwise."""
    model = make("gemma3_text", sliding_window=WINDOW)
    lm = PrefixLM(model, scoring.tokenizer(), batch_tokens=800)
    rng = random.Random(4)
    prompts = [sentence(rng, length) for length in (40, 43, 47, 51)]
    shapes = []
    handle = model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    requests = [(p, {"until": [], "max_gen_toks": 3}) for p in prompts]
    lm.generate_until(instances("generate_until", requests))
    handle.remove()
    assert shapes[0] == (4, 51)
    assert shapes[1:] == [(4, 1), (4, 1)]


def test_a_gap_that_the_model_counts_as_tokens_is_noticed():
    model = make("mistral", sliding_window=8)
    assert Sharing(model).is_possible
    hidden = Sharing(model)
    hidden.borders = Borders()
    assert not hidden.is_possible


def test_a_model_that_fails_beyond_its_window_shares_within_it_alone(monkeypatch):
    """Its masks are right for short rows; longer ones are padded as if padding were tokens."""
    model = make("mistral", sliding_window=WINDOW)
    inner = type(model.base_model).forward

    def forward(self, *args, **kwargs):
        mask_BT = kwargs.get("attention_mask")
        if mask_BT is not None and mask_BT.shape[1] > WINDOW:
            kwargs["attention_mask"] = None
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(type(model.base_model), "forward", forward)
    sharing = Sharing(model)
    assert sharing.allows(WINDOW)
    assert not sharing.allows(WINDOW + 1)


def test_an_answer_that_crosses_a_rotary_border_is_written_as_alone():
    model = make("phi3", **long_rope(32))
    rng = random.Random(5)
    prompts = [sentence(rng, length) for length in (20, 24, 28, 30, 31, 32, 33, 40)]
    requests = [(p, {"until": [], "max_gen_toks": 24}) for p in prompts]
    generate = instances("generate_until", requests)
    ours = PrefixLM(model, scoring.tokenizer(), batch_tokens=400).generate_until(generate)
    assert ours == scoring.plain_model(model).generate_until(generate, disable_tqdm=True)


def test_what_is_shared_beyond_a_window_is_run_once():
    """The header, each question and of each answer all but its last token: no more than that."""
    model = make("gemma3_text", sliding_window=WINDOW)
    rng = random.Random(0)
    header = sentence(rng, 60)
    contexts = [f"{header} {sentence(rng, 10)}" for _ in range(5)]
    pairs = [(context, f" {sentence(rng, 3)}") for context in contexts for _ in range(4)]
    lm = PrefixLM(model, scoring.tokenizer(), batch_tokens=400)
    assert Sharing(model).allows(80)
    positions = []
    handle = model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: positions.append(kwargs["input_ids"].numel()),
        with_kwargs=True,
    )
    requests = instances("loglikelihood", pairs)
    lm.loglikelihood(requests)
    first = sum(positions)
    positions.clear()
    lm.loglikelihood(requests)
    handle.remove()
    assert sum(positions) == 60 + 5 * 10 + 20 * 2
    assert first > sum(positions)  # what was tried out before the first long row
