"""Scoring a model with a window of attention beyond it, against plain lm-eval, in CPU seconds.

    python benchmarks/window_scoring.py

A random Gemma 3 of 4 layers and a window of 128 tokens. Questions have four answers each, and
contexts of some 300 tokens, with and without a common beginning.
"""

import random
import time
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from benchmarks.tiny_models import make
from lrmc_ray.evaluate import prefix_sharing
from lrmc_ray.evaluate.prefix_lm import PrefixLM
from tests.support.scoring import instances, sentence, tokenizer

WINDOW = 128
QUESTIONS = 10


def requests(header: int) -> tuple[list[Any], list[Any]]:
    """Choices, and prompts to generate from.

    Args:
        header: tokens that all contexts begin with.
    """
    rng = random.Random(0)
    start = sentence(rng, header)
    contexts = [f"{start} {sentence(rng, rng.randint(20, 60))}" for _ in range(QUESTIONS)]
    if not header:
        contexts = [sentence(rng, rng.randint(270, 310)) for _ in range(QUESTIONS)]
    pairs = [(context, f" {sentence(rng, rng.randint(1, 8))}") for context in contexts * 4]
    prompts = [(context, {"until": ["w009"], "max_gen_toks": 24}) for context in contexts]
    return instances("loglikelihood", pairs), instances("generate_until", prompts)


def seconds(lm: Any, choices: list[Any], prompts: list[Any]) -> tuple[float, float]:
    """CPU seconds of the choices, and of the prompts."""
    times = [time.process_time()]
    lm.loglikelihood(choices, disable_tqdm=True)
    times.append(time.process_time())
    lm.generate_until(prompts, disable_tqdm=True)
    times.append(time.process_time())
    return times[1] - times[0], times[2] - times[1]


def main() -> None:
    """Print a row for each kind of contexts and of window."""
    torch.set_num_threads(1)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 64}
    model = make("gemma3_text", sliding_window=WINDOW, vocab_size=2048, **sizes)
    print("| common beginning | window | choices | prompts |\n|---|---|---|---|")
    for header in (0, 250):
        choices, prompts = requests(header)
        plain = HFLM(model, backend="causal", tokenizer=tokenizer(), batch_size=8, device="cpu")
        for kind, most_proven in (("shared beyond", 1024), ("not shared beyond", 0)):
            prefix_sharing.MOST_PROVEN = most_proven
            ratios = []
            for _ in range(3):
                ours = seconds(PrefixLM(model, tokenizer(), batch_tokens=2048), choices, prompts)
                theirs = seconds(plain, choices, prompts)
                ratios.append([mine / other for mine, other in zip(ours, theirs, strict=True)])
            best = [sorted(column)[1] for column in zip(*ratios, strict=True)]
            print(f"| {header} | {kind} | {best[0]:.2f} | {best[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
