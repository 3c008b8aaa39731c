"""PrefixLM against lm-eval's own HFLM, request by request, and what it must save."""

import random
import string

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.prefix_batches import MIN_SHARED_TOKENS, ContextRow, prefix_families
from lrmc_ray.evaluate.prefix_lm import PrefixLM
from lrmc_ray.evaluate.prefix_sharing import Sharing
from lrmc_ray.models.loading import load_model, load_tokenizer

TOLERANCE = {"rel": 2e-5, "abs": 2e-4}
"""Of a log-likelihood in float32, a sum over up to some hundred tokens."""


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def model(tiny_model):
    torch.set_num_threads(1)
    return load_model(tiny_model)


@pytest.fixture(scope="module")
def plain(model, tokenizer):
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu")


@pytest.fixture(params=[2048, 64], ids=["one batch", "many batches"])
def shared(request, model, tokenizer):
    return PrefixLM(model, tokenizer, batch_tokens=request.param)


class Counter:
    """Counts the positions that a model runs."""

    def __init__(self, model):
        self.positions = 0
        self.shapes = []
        self._handle = model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module, _args, kwargs):
        self.positions += kwargs["input_ids"].numel()
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.remove()


def words(rng, count):
    return " ".join("".join(rng.choices(string.ascii_lowercase, k=4)) for _ in range(count))


def instances(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=index, metadata=("t", index, 1))
        for index, args in enumerate(arguments)
    ]


def contexts(seed, count=9, *, header=12):
    """Questions of unequal lengths under one header."""
    rng = random.Random(seed)
    start = words(rng, header)
    return [f"{start}\n{words(rng, rng.randint(1, 9))}:" for _ in range(count)]


def assert_equal_answers(ours, theirs):
    assert len(ours) == len(theirs)
    for (value, is_greedy), (their_value, their_greedy) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(their_value, **TOLERANCE)
        assert is_greedy == their_greedy


def choices(seed, *, tokens):
    """Four choices of each question; of one token each, or of up to four words."""
    rng = random.Random(seed)
    pairs = []
    for context in contexts(seed, header=0 if seed % 2 else 12):
        for _ in range(4):
            answer = (
                rng.choice(string.ascii_lowercase) if tokens == 1 else words(rng, rng.randint(1, 4))
            )
            pairs.append((context, f" {answer}"))
    return pairs


REQUESTS = {
    "choices of several tokens": choices(0, tokens=4),
    "choices of several tokens, no header": choices(1, tokens=4),
    "choices of one token": choices(2, tokens=1),
    "one answer each": [(c, f" {words(random.Random(i), 5)}") for i, c in enumerate(contexts(3))],
    "the same request twice": [(contexts(4)[0], " yes no")] * 2 + [(contexts(4)[1], " yes no")],
    "no context": [("", "one two three"), ("", "one"), ("", "one two four")],
    "no header": [(c, " yes") for c in contexts(5, header=0)],
    "one context is the beginning of another": [("a b c d", " e"), ("a b c d e f", " g h")],
    "longer than the model": [
        (words(random.Random(6), 700), " the end"),
        (words(random.Random(6), 700), " an end"),
    ],
}


@pytest.mark.parametrize("name", REQUESTS)
def test_loglikelihoods_are_lm_evals(name, shared, plain):
    requests = instances("loglikelihood", REQUESTS[name])
    assert_equal_answers(
        shared.loglikelihood(requests), plain.loglikelihood(requests, disable_tqdm=True)
    )


def test_a_greedy_answer_is_recognized(shared, plain):
    """Of random answers none would be; these are what the model writes."""
    prompts = contexts(7)
    written = plain.generate_until(
        instances("generate_until", [(p, {"until": [], "max_gen_toks": 6}) for p in prompts])
    )
    requests = instances("loglikelihood", list(zip(prompts, written, strict=True)))
    theirs = plain.loglikelihood(requests, disable_tqdm=True)
    assert any(is_greedy for _, is_greedy in theirs)
    assert_equal_answers(shared.loglikelihood(requests), theirs)


def test_rolling_loglikelihoods_are_lm_evals(shared, plain):
    """One text is longer than the model, so it has several windows."""
    rng = random.Random(8)
    texts = [(words(rng, count),) for count in (3, 40, 1, 900, 40)]
    requests = instances("loglikelihood_rolling", texts)
    ours = shared.loglikelihood_rolling(requests)
    assert ours == pytest.approx(plain.loglikelihood_rolling(requests, disable_tqdm=True), rel=2e-5)


def generation(seed, count=9, **settings):
    return [(c, {"max_gen_toks": 24, **settings}) for c in contexts(seed, count)]


GENERATIONS = {
    "to the limit": generation(9, until=[]),
    "stop strings": generation(9, until=["e", "th", "\n"]),
    "two settings": generation(9, 3, until=["e"]) + generation(10, 3, until=["a"], max_gen_toks=3),
    "the same prompt twice": generation(11, 2, until=["e"]) * 2,
    "one prompt": generation(12, 1, until=["e"]),
    "longer than the model": [(words(random.Random(6), 700), {"until": [], "max_gen_toks": 8})],
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_generated_texts_are_lm_evals(name, shared, plain):
    requests = instances("generate_until", GENERATIONS[name])
    ours = shared.generate_until(requests)
    theirs = plain.generate_until(requests, disable_tqdm=True)
    assert ours == theirs
    assert any(ours)


def test_an_answer_ends_with_its_turn(model, tokenizer, shared, plain, monkeypatch):
    """The token that the model writes third ends the turn; nothing after it is part of the answer.

    lm-eval's own model needs the same end in the generation's settings.
    """
    requests = instances("generate_until", generation(13, until=[]))
    prompt = tokenizer(requests[0].args[0])["input_ids"]
    ids = list(prompt)
    while len(ids) < len(prompt) + 3:
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    *before, third = ids[len(prompt) :]
    assert third not in before
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1, third])
    ending = PrefixLM(model, tokenizer, batch_tokens=2048)
    with Counter(model) as counter:
        answers = ending.generate_until(requests[:1])
    assert counter.positions == len(prompt) + 2
    assert answers == [tokenizer.decode(before)]
    # lm-eval leaves an end that is no special token in the text.
    theirs = plain.generate_until(requests, disable_tqdm=True)
    for our_answer, their_answer in zip(ending.generate_until(requests), theirs, strict=True):
        assert their_answer in (our_answer, our_answer + tokenizer.decode([third]))


def test_an_answer_ends_with_a_stop_string(model, tokenizer, shared):
    requests = instances("generate_until", generation(13, 1, until=["e"]))
    prompt = tokenizer(requests[0].args[0])["input_ids"]
    ids = list(prompt)
    while "e" not in tokenizer.decode(ids[len(prompt) :]):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert 1 < len(ids) - len(prompt) < 24
    with Counter(model) as counter:
        shared.generate_until(requests)
    assert counter.positions == len(ids) - 1  # the last token is written, not read


@pytest.mark.parametrize("batch_tokens", [32, 300])
def test_no_pass_is_larger_than_it_may_be(batch_tokens, model, tokenizer):
    lm = PrefixLM(model, tokenizer, batch_tokens=batch_tokens)
    with Counter(model) as counter:
        for pairs in REQUESTS.values():
            lm.loglikelihood(instances("loglikelihood", pairs))
        lm.generate_until(instances("generate_until", GENERATIONS["stop strings"]))
    assert all(rows == 1 or rows * length <= batch_tokens for rows, length in counter.shapes)
    assert any(rows > 1 for rows, _ in counter.shapes)


def test_an_answer_that_never_ends_is_cut(model, shared):
    requests = instances("generate_until", generation(14, 4, until=["never to be seen"]))
    with Counter(model) as counter:
        shared.generate_until(requests)
    assert counter.positions < 4 * (24 + 100)


def test_sampling_is_left_to_lm_eval(shared, plain):
    arguments = generation(15, 3, until=["e"], do_sample=True, temperature=0.7)
    arguments += generation(15, 2, until=["e"])
    torch.manual_seed(0)
    ours = shared.generate_until(instances("generate_until", arguments))
    torch.manual_seed(0)
    theirs = plain.generate_until(instances("generate_until", arguments[:3]), disable_tqdm=True)
    assert ours[:3] == theirs
    assert ours[3:] == plain.generate_until(
        instances("generate_until", arguments[3:]), disable_tqdm=True
    )


@pytest.mark.parametrize("end", ["", "\n", " \n \n\n", "\n" * 9], ids=repr)
def test_gold_answers_are_scored_from_the_prompts_that_were_generated_from(
    end, model, tokenizer, shared, plain
):
    """White space at the end of a prompt is part of the continuation for lm-eval."""
    prompts = [prompt + end for prompt in contexts(16)]
    shared.generate_until(
        instances("generate_until", [(p, {"until": ["e"], "max_gen_toks": 9}) for p in prompts])
    )
    others = contexts(17, 2)
    gold = [(p, f"{words(random.Random(i), i % 4 + 1)}") for i, p in enumerate(prompts + others)]
    gold += [(prompts[3], "x"), (prompts[3], "another one")]
    requests = instances("loglikelihood", gold)
    with Counter(model) as counter:
        ours = shared.loglikelihood(requests)
    assert_equal_answers(ours, plain.loglikelihood(requests, disable_tqdm=True))
    if shared.batch_tokens == 2048 and len(end) < 2:
        # The two other prompts, and continuations padded to the longest.
        longest = max(len(tokenizer(answer)["input_ids"]) for _, answer in gold)
        assert counter.positions < 13 * longest + sum(
            len(tokenizer(f"{p} {words(random.Random(9), 4)}")["input_ids"]) for p in others
        )


def test_a_prompt_that_is_all_shared_does_not_score_what_it_lacks(shared, plain):
    """The shorter prompt's only token of its own is a line break, which belongs to the answer."""
    header = contexts(21)[0]
    prompts = [f"{header}\n", f"{header}\n\n"]
    shared.generate_until(
        instances("generate_until", [(p, {"until": [], "max_gen_toks": 2}) for p in prompts])
    )
    requests = instances("loglikelihood", [(p, "yes no") for p in prompts])
    assert_equal_answers(
        shared.loglikelihood(requests), plain.loglikelihood(requests, disable_tqdm=True)
    )


def test_last_logprobs_are_the_models(model, tokenizer, shared):
    texts = [tokenizer(f"{c} {c[:20]}")["input_ids"] for c in contexts(18)]
    texts.append(texts[0])
    actual_NV = shared.last_logprobs(texts, 8)
    for index, ids in enumerate(texts):
        with torch.inference_mode():
            expected_NV = model(torch.tensor([ids])).logits[0, -9:-1].log_softmax(-1)
        torch.testing.assert_close(
            torch.from_numpy(actual_NV[8 * index : 8 * index + 8]),
            expected_NV,
            atol=1e-4,
            rtol=1e-4,
        )
    assert shared.last_logprobs([], 8).shape == (0, 512)


def test_repeated_runs_are_identical(model, tokenizer):
    def run():
        lm = PrefixLM(model, tokenizer, batch_tokens=256)
        return (
            lm.generate_until(instances("generate_until", GENERATIONS["stop strings"])),
            lm.loglikelihood(instances("loglikelihood", REQUESTS["choices of several tokens"])),
            lm.last_logprobs([tokenizer(c)["input_ids"] for c in contexts(19)], 4).tobytes(),
        )

    assert run() == run()


def test_what_is_shared_is_run_once(model, tokenizer):
    """Header once, each question once, and of each choice all but its last token."""
    lm = PrefixLM(model, tokenizer, batch_tokens=4096)
    rng = random.Random(20)
    header = words(rng, 30)
    questions = [f"{header}\n{words(rng, 3)}:" for _ in range(5)]
    pairs = [(question, f" {words(rng, 2)}") for question in questions for _ in range(4)]
    requests = instances("loglikelihood", pairs)
    encoded = [lm._encode_pair(*pair) for pair in pairs]
    beginning = min(len(context) for context, _ in encoded)
    common = next(
        (i for i in range(beginning) if len({context[i] for context, _ in encoded}) > 1), beginning
    )
    longest = max(len(context) for context, _ in encoded) - common
    continuation = max(len(answer) for _, answer in encoded) - 1
    with Counter(model) as counter:
        lm.loglikelihood(requests)
    assert counter.positions <= common + 5 * longest + 20 * continuation
    with Counter(model) as all_of_it:
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=20, device="cpu").loglikelihood(
            requests, disable_tqdm=True
        )
    assert counter.positions < all_of_it.positions / 3


@pytest.mark.parametrize("seed", range(20))
def test_families_hold_every_row_once_and_share_what_they_say(seed):
    rng = random.Random(seed)
    heads = [tuple(rng.choices(range(9), k=rng.randint(0, 40))) for _ in range(3)]
    rows = []
    for index in range(rng.randint(1, 30)):
        tokens = rng.choice(heads) + tuple(rng.choices(range(9), k=rng.randint(1, 8)))
        rows.append(ContextRow(tokens, rng.randint(1, len(tokens)), [(index, (1,))]))
    found = []
    for prefix, family in prefix_families(rows):
        assert not prefix or len(prefix) >= MIN_SHARED_TOKENS
        assert not prefix or len(family) > 1
        for row in family:
            assert row.tokens[: len(prefix)] == prefix
            assert len(prefix) < row.context_length or not prefix
            found.append(row.members[0][0])
    assert sorted(found) == list(range(len(rows)))


def test_a_prompt_must_fit(shared):
    requests = instances("generate_until", [("a", {"until": [], "max_gen_toks": 1024})])
    with pytest.raises(DataError, match="1024 of the model's 1024 positions"):
        shared.generate_until(requests)


def test_supported_models(model):
    assert Sharing(model).is_possible


def test_a_model_that_ignores_its_mask_is_not_supported(model, monkeypatch):
    inner = type(model.base_model).forward

    def forward(self, *args, **kwargs):
        return inner(self, *args, **{**kwargs, "attention_mask": None})

    monkeypatch.setattr(type(model.base_model), "forward", forward)
    assert not Sharing(model).is_possible
