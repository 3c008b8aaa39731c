"""The whole method in one loop of plain torch, without Ray.

    python examples/minimal_loop.py [--data rows.jsonl] [--model DIRECTORY] [--steps 20]

Stage 0 records, at every position, the tokens that the base model finds likely. Stage 1 trains on
these alone: the restricted loss with its sampled tail on the answers, the anchor on the prompts,
and MoClip. A row is {"prompt": ..., "completion": ...}, or "messages" that end with the answer. One
row in five is held out: its loss, over the whole vocabulary, says what was learned.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrmc_ray.config import ModelSettings
from lrmc_ray.files.artifacts import cache_directory
from lrmc_ray.method.baselines.vocabulary_loss import full_cross_entropy
from lrmc_ray.method.head import OutputHead, head_logits
from lrmc_ray.method.moclip import MoClip
from lrmc_ray.method.restricted_loss import anchor_kl, draw_tail, restricted_cross_entropy
from lrmc_ray.method.subsets import select_candidates
from lrmc_ray.models.directory import local_directory
from lrmc_ray.models.forward import hidden_states
from lrmc_ray.models.head import head_of
from lrmc_ray.models.loading import load_model, load_tokenizer
from lrmc_ray.tasks.demo.files import demo_files


def encode(row: dict[str, Any], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids [T], and at which of the T - 1 positions the next token is one of the answer."""
    messages = row.get("messages") or [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    texts = [
        tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True),
        messages[-1]["content"] + tokenizer.eos_token,
    ]
    prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return torch.tensor(prompt + answer), torch.arange(1, len(prompt + answer)) >= len(prompt)


@torch.no_grad()
def answer_nll(model: Any, head: OutputHead, samples: list[tuple[Tensor, Tensor]]) -> float:
    """Mean loss of an answer's token over the whole vocabulary, in nats."""
    total = count = 0.0
    for ids_T, is_answer in samples:
        hidden_ND = hidden_states(model, ids_T[None])[0, :-1][is_answer]
        total += float(full_cross_entropy(hidden_ND, head, ids_T[1:][is_answer]))
        count += len(hidden_ND)
    return total / count


def main() -> None:
    """Record, train, and print the loss on held-out answers before and after."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="JSONL; by default 40 questions of the demo")
    parser.add_argument("--model", default="demo", help="directory of a causal LM")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-5)
    args = parser.parse_args()
    directory = local_directory(ModelSettings(name=args.model))
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    head = head_of(model)
    lines = (args.data or demo_files(cache_directory()).train).read_text(encoding="utf-8")
    samples = [encode(json.loads(line), tokenizer) for line in lines.splitlines()[:40]]
    held_out = samples[::5]
    samples = [sample for index, sample in enumerate(samples) if index % 5]
    print(f"before: {answer_nll(model, head, held_out):.4f} nats per token of a held-out answer")

    sets = []
    with torch.no_grad():  # Stage 0
        for ids_T, _ in samples:
            logits_PV = head_logits(hidden_states(model, ids_T[None])[0, :-1], head)
            sets.append(select_candidates(logits_PV, ids_T[1:], tau=0.99))

    optimizer = MoClip(model.parameters(), lr=args.lr)
    for step in range(args.steps):  # Stage 1
        batch = [(8 * step + i) % len(samples) for i in range(8)]
        num_answer = sum(int(samples[i][1].sum()) for i in batch)
        num_prompt = sum(int((~samples[i][1]).sum()) for i in batch)
        tail = draw_tail(min(1024, head.vocabulary_size), head.vocabulary_size, seed=0, step=step)
        optimizer.zero_grad()
        for i in batch:
            (ids_T, is_answer), recorded = samples[i], sets[i]
            hidden_PD = hidden_states(model, ids_T[None])[0, :-1]
            answer, prompt = recorded.rows(is_answer), recorded.rows(~is_answer)
            loss = restricted_cross_entropy(hidden_PD[is_answer], head, answer, tail=tail)
            anchor = anchor_kl(hidden_PD[~is_answer], head, prompt, tail=tail)
            torch.autograd.backward(loss / num_answer + anchor / num_prompt)
        optimizer.step()
    print(f"after:  {answer_nll(model, head, held_out):.4f}, {args.steps} steps of 8 samples")


if __name__ == "__main__":
    main()
