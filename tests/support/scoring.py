"""Scores of tiny random models of any architecture, ours and those of plain lm-eval, row by row."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.tiny_models import VOCABULARY

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
WORDS = [*SPECIAL, *(f"w{index:03}" for index in range(4, VOCABULARY))]
"""By id; none is the beginning of another, since stop strings are looked for in the text."""


def tokenizer() -> Any:
    """One token for each of the words."""
    pad, bos, eos, unknown = SPECIAL
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unknown
    )


def sentence(rng: random.Random, count: int) -> str:
    """Words but for the special ones."""
    return " ".join(rng.choices(WORDS[4:], k=count))


def choices(lengths: Sequence[int], *, header: int, seed: int = 0) -> list[tuple[str, str]]:
    """Three continuations of one to five words for each context, which begin alike.

    Args:
        lengths: words of each context, the header included; it is left away where it is longer.
        header: words that the contexts begin with.
        seed: of the words.
    """
    rng = random.Random(seed)
    start = sentence(rng, header)
    pairs = []
    for length in lengths:
        rest = sentence(rng, length - header if length > header else length)
        context = f"{start} {rest}" if length > header else rest
        pairs += [(context, f" {sentence(rng, rng.randint(1, 5))}") for _ in range(3)]
    return pairs


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    """Requests of lm-eval."""
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=index, metadata=("t", index, 1))
        for index, args in enumerate(arguments)
    ]


def plain_model(model: Any) -> HFLM:
    """lm-eval's own, which runs every row alone."""
    return HFLM(
        pretrained=model, backend="causal", tokenizer=tokenizer(), batch_size=1, device="cpu"
    )


def true_loglikelihoods(model: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Of each continuation, by one forward pass of the model over its row alone."""
    encode = tokenizer()
    values = []
    for context, continuation in pairs:
        before, after = encode(context)["input_ids"], encode(continuation)["input_ids"]
        with torch.inference_mode():
            logits_TV = model(input_ids=torch.tensor([before + after])).logits[0].float()
        logprobs_CV = logits_TV[len(before) - 1 : -1].log_softmax(-1)
        values.append(float(logprobs_CV[torch.arange(len(after)), after].sum()))
    return values
