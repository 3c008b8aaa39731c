"""Stage 1 once more, the plain way, and random inputs for it.

Every sample goes through the whole Hugging Face model, untrimmed and with its attention mask, and
every loss is taken from the full logits at one position at a time. Autograd does the rest.

Shape suffixes: those of ``lrmc_ray.method``.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lrmc_ray.method.losses import LossSettings
from lrmc_ray.method.microbatch import Sample
from lrmc_ray.method.names import NEED_BASE
from lrmc_ray.method.restricted_loss import draw_tail
from lrmc_ray.method.subsets import CandidateSets

VOCABULARY = 256


def tiny_llama(
    *, tied: bool = True, dropout: float = 0.0, dtype: torch.dtype = torch.float64, seed: int = 0
) -> LlamaForCausalLM:
    """Two random layers. In float64 all of it is: the norms of transformers would use float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_dropout=dropout,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).to(dtype)
    if dtype == torch.float64:
        for name, module in list(model.named_modules()):
            if isinstance(module, LlamaRMSNorm):
                norm = nn.RMSNorm(32, eps=module.variance_epsilon, dtype=dtype)
                norm.load_state_dict(module.state_dict())
                model.set_submodule(name, norm)
    return model


@functools.cache
def base_llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """The frozen base model of losses that need one, in these tests; not to be changed."""
    return tiny_llama(dtype=dtype, seed=1).eval().requires_grad_(False)


def random_candidates(generator: torch.Generator, gold_P: Tensor, sizes_P: Tensor) -> CandidateSets:
    """Sets of the given sizes: distinct tokens, the gold one at a random rank."""
    token_ids, logprobs = [], []
    for gold, size in zip(gold_P.tolist(), sizes_P.tolist(), strict=True):
        others = torch.randperm(VOCABULARY, generator=generator)
        others = others[others != gold][: size - 1]
        rank = int(torch.randint(size, (), generator=generator))
        token_ids += [others[:rank], torch.tensor([gold]), others[rank:]]
        # At most 0.95 in all, so that the outside mass is not 0.
        mass = torch.rand(size + 1, generator=generator) + 0.05
        logprobs.append((mass / mass.sum())[:size].sort(descending=True).values.log())
    return CandidateSets(
        F.pad(sizes_P.cumsum(0), (1, 0)),
        torch.cat(token_ids).int(),
        torch.cat(logprobs).half(),
        gold_P.int(),
    )


def random_sample(
    generator: torch.Generator,
    *,
    name: str = "sample",
    length: int | None = None,
    sizes: Sequence[int] | None = None,
) -> Sample:
    """A prompt, then an answer; about half of the candidate sets hold the gold token alone.

    One position in ten is not recorded. ``sizes`` sets the candidates per position (of all T - 1).
    """

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    length = length or (len(sizes) + 1 if sizes is not None else integer(5, 30))
    input_ids_T = torch.randint(VOCABULARY, (length,), generator=generator)
    positions_P = torch.arange(length - 1)
    if sizes is not None:
        sizes_P = torch.tensor(sizes)
    else:
        sizes_P = torch.randint(2, 9, positions_P.shape, generator=generator)
        sizes_P[torch.rand(positions_P.shape, generator=generator) < 0.5] = 1
        kept = torch.rand(positions_P.shape, generator=generator) < 0.9
        positions_P, sizes_P = positions_P[kept], sizes_P[kept]
    return Sample(
        sample_id=name,
        input_ids_T=input_ids_T,
        positions_P=positions_P,
        is_supervised_P=positions_P >= integer(1, length - 1),
        candidates=random_candidates(generator, input_ids_T[positions_P + 1], sizes_P),
    )


def sample_by_hand(name: str, ids: str, positions: str, supervised: str, sizes: str) -> Sample:
    """A sample from strings of digits; the candidates of a position are gold, gold + 10, ..."""
    input_ids_T = torch.tensor([int(c) for c in ids])
    positions_P = torch.tensor([int(c) for c in positions], dtype=torch.int64)
    gold = [int(ids[int(c) + 1]) for c in positions]
    tokens = [g + 10 * k for g, size in zip(gold, sizes, strict=True) for k in range(int(size))]
    return Sample(
        name,
        input_ids_T,
        positions_P,
        torch.tensor([c == "y" for c in supervised], dtype=torch.bool),
        CandidateSets(
            torch.tensor([0, *np.cumsum([int(c) for c in sizes])], dtype=torch.int64),
            torch.tensor(tokens, dtype=torch.int32),
            torch.full((len(tokens),), -3.0, dtype=torch.float16),
            torch.tensor(gold, dtype=torch.int32),
        ),
    )


def _remembered(make: Callable[..., list[Sample]]) -> Callable[..., list[Sample]]:
    """``make``, which is asked for the same samples again and again; nobody may change them."""
    kept = functools.cache(make)
    return lambda *args, **kwargs: list(kept(*args, **kwargs))


@_remembered
def branching_samples(num: int, *, seed: int = 0) -> list[Sample]:
    """Samples that begin as an earlier one does: all the same, then more and more on their own."""
    generator = torch.Generator().manual_seed(seed)
    samples: list[Sample] = []
    for number in range(num):
        sample = random_sample(generator, name=f"branch-{number}", length=12 + number % 4)
        if samples:
            other = samples[int(torch.randint(len(samples), (), generator=generator))]
            common = int(torch.randint(1, len(other.input_ids_T) + 1, (), generator=generator))
            length = min(common, len(sample.input_ids_T))
            ids_T = torch.cat([other.input_ids_T[:length], sample.input_ids_T[length:]])
            candidates = random_candidates(
                generator, ids_T[sample.positions_P + 1], sample.candidates.sizes
            )
            sample = dataclasses.replace(sample, input_ids_T=ids_T, candidates=candidates)
        samples.append(sample)
    return samples


@_remembered
def samples_with_a_beginning(num: int, *, common: int, seed: int = 0) -> list[Sample]:
    """Samples whose first ``common`` tokens are the same, with 2 to 10 tokens of their own."""
    generator = torch.Generator().manual_seed(seed)
    beginning_T = torch.randint(VOCABULARY, (common,), generator=generator)
    samples = []
    for number in range(num):
        own = 2 + int(torch.randint(9, (), generator=generator))
        sizes = torch.randint(2, 9, (common + own - 1,), generator=generator).tolist()
        sample = random_sample(generator, name=f"sample-{number}", sizes=sizes)
        ids_T = torch.cat([beginning_T, sample.input_ids_T[common:]])
        candidates = random_candidates(
            generator, ids_T[sample.positions_P + 1], sample.candidates.sizes
        )
        samples.append(dataclasses.replace(sample, input_ids_T=ids_T, candidates=candidates))
    return samples


@_remembered
def random_samples(num: int, *, seed: int = 0) -> list[Sample]:
    """Samples of unequal lengths; the second has no position with a choice at all."""
    generator = torch.Generator().manual_seed(seed)
    samples = [random_sample(generator, name=f"sample-{i}") for i in range(num)]
    if num > 1:
        samples[1] = random_sample(generator, name="sample-1", sizes=[1] * 9)
    return [
        dataclasses.replace(sample, weight=1.0 / (number + 2))
        for number, sample in enumerate(samples)
    ]


def _kl(base: Tensor, model: Tensor) -> Tensor:
    return (base.exp() * (base - model)).sum()


def _position_loss(
    loss: str,
    z_V: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    gold: int,
    weights_V: Tensor,
    base_V: Tensor | None = None,
    kl_weight: float = 0.0,
) -> Tensor:
    """One position; ``weights_V`` are the sampled tail's, 0 for tokens that were not drawn."""
    if loss == "dft":
        return -z_V.detach().softmax(0)[gold] * z_V.log_softmax(0)[gold]
    if loss == "kl_to_base":
        assert base_V is not None
        return kl_weight * _kl(base_V.log_softmax(0), z_V.log_softmax(0)) - z_V.log_softmax(0)[gold]
    recorded = logprobs.to(z_V.dtype)
    if loss == "flow":
        return -z_V.log_softmax(0)[gold]
    if loss == "eaft":
        likeliest = z_V.detach().sort(descending=True).values[:20].softmax(0)
        entropy = -sum(p * math.log(p) for p in likeliest.tolist())
        return -entropy / math.log(20) * z_V.log_softmax(0)[gold]
    if loss == "asft":
        outside = z_V.softmax(0).sum() - z_V.softmax(0)[token_ids].sum()
        base = torch.cat([recorded, torch.log1p(-recorded.exp().sum())[None]])
        model = torch.cat([z_V.log_softmax(0)[token_ids], outside.log()[None]])
        dft = -z_V.detach().softmax(0)[gold] * z_V.log_softmax(0)[gold]
        return dft + kl_weight * _kl(base, model)
    if loss == "frozen_tail":
        assert base_V is not None
        # As the method's formula has it: from the base's logits in S and its outside mass.
        rho = 1 - base_V.softmax(0)[token_ids].sum()
        frozen = rho / (1 - rho) * base_V[token_ids].exp().sum()
        return (z_V[token_ids].exp().sum() + frozen).log() - z_V[gold]
    weights_V = weights_V.clone()
    weights_V[token_ids] = 1.0
    num_outside = int((weights_V > 0).sum()) - len(token_ids)
    if loss == "full" or (loss == "active_only" and len(token_ids) > 1):
        return -z_V.log_softmax(0)[gold]
    if loss == "active_only":
        return z_V.sum() * 0
    if loss == "restricted":
        return (z_V + weights_V.log()).logsumexp(0) - z_V[gold]
    if loss == "soft" or num_outside == 0:
        return _kl(recorded.log_softmax(0), z_V[token_ids].log_softmax(0))
    assert loss == "anchor"
    model_V = (z_V + weights_V.log()).log_softmax(0)
    is_outside_V = torch.ones_like(z_V, dtype=torch.bool)
    is_outside_V[token_ids] = False
    outside = model_V[is_outside_V].logsumexp(0)
    base_outside = torch.log1p(-recorded.exp().sum())
    return _kl(
        torch.cat([recorded, base_outside[None]]), torch.cat([model_V[token_ids], outside[None]])
    )


def plain_sums(
    model: LlamaForCausalLM, samples: Sequence[Sample], settings: LossSettings, step: int
) -> tuple[Tensor, Tensor]:
    """The losses of all supervised and of all prompt positions, summed."""
    longest = max(len(sample.input_ids_T) for sample in samples)
    input_ids_BT = torch.full((len(samples), longest), 7)
    attention_mask_BT = torch.zeros(len(samples), longest, dtype=torch.int64)
    for row, sample in enumerate(samples):
        input_ids_BT[row, : len(sample.input_ids_T)] = sample.input_ids_T
        attention_mask_BT[row, : len(sample.input_ids_T)] = 1
    logits_BTV = model(input_ids=input_ids_BT, attention_mask=attention_mask_BT).logits

    base_BTV = None
    if settings.loss in NEED_BASE:
        base_BTV = base_llama(logits_BTV.dtype)(
            input_ids=input_ids_BT, attention_mask=attention_mask_BT
        ).logits
    tail_V = torch.zeros(logits_BTV.shape[-1], dtype=logits_BTV.dtype)
    if settings.tail_samples:
        ids, logweights = draw_tail(
            settings.tail_samples, len(tail_V), seed=settings.seed, step=step
        )
        tail_V[ids] = logweights.to(tail_V.dtype).exp()
    main = anchor = logits_BTV.new_zeros(())
    for number, (logits_TV, sample) in enumerate(zip(logits_BTV, samples, strict=True)):
        offsets = sample.candidates.offsets.tolist()
        for row, position in enumerate(sample.positions_P.tolist()):
            entries = slice(offsets[row], offsets[row + 1])
            arguments = (
                logits_TV[position],
                sample.candidates.token_ids[entries].long(),
                sample.candidates.logprobs[entries],
                int(sample.input_ids_T[position + 1]),
                tail_V,
            )
            if sample.is_supervised_P[row]:
                base_V = None if base_BTV is None else base_BTV[number, position]
                weight = sample.weight if settings.loss == "flow" else 1.0
                main = main + weight * _position_loss(
                    settings.loss, *arguments, base_V, settings.base_kl_weight
                )
            elif settings.anchor_weight:
                anchor = anchor + _position_loss("anchor", *arguments)
    return main, anchor


def plain_gradients(
    model: LlamaForCausalLM, samples: Sequence[Sample], settings: LossSettings, step: int = 0
) -> list[Tensor]:
    """The gradient of every parameter; the parameters' own ``grad`` is left alone."""
    supervised = sum(int(sample.is_supervised_P.sum()) for sample in samples)
    prompt = sum(len(sample.positions_P) for sample in samples) - supervised
    main, anchor = plain_sums(model, samples, settings, step)
    loss = main / supervised
    if settings.anchor_weight:
        loss = loss + settings.anchor_weight * anchor / prompt
    return list(torch.autograd.grad(loss, list(model.parameters())))


def largest_difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest absolute difference over all tensors; NaN counts as infinite."""
    worst = [
        float((a - b).abs().nan_to_num(math.inf).max())
        for a, b in zip(actual, expected, strict=True)
    ]
    return max(worst)
