"""A whole training step on SmolLM2-135M: ours against Hugging Face Trainer and TRL SFTTrainer.

    python benchmarks/training_step.py [--batch-size 8] [--steps 3] [--rounds 2] [--precision fp32]
    python benchmarks/training_step.py --length 512 --steps 1   # peak memory at 8 x 512 tokens
    python benchmarks/training_step.py --clock cpu --variants trainer full default --micro-batches 1

All take the same samples in the same batches, with as many torch threads. Every variant runs in a
process of its own, in turn; the table shows the median step. Tokens are those of the samples before
trimming, so tokens/s compares the time per sample. Memory is the process's peak over what it held
before it had the model (on a GPU, the most that tensors held), so weights, gradients and moments
are in it.

    trainer          Hugging Face Trainer, fused AdamW, one padded batch
    sft              TRL SFTTrainer, the same, loss on the completion alone
    full, padded     our loop with full cross-entropy and fused AdamW, one padded micro-batch
    full             the same, packed: a prefix that samples share is computed once
    restricted       the paper's loss and MoClip, packed, trimmed
    anchored         the same with the anchor on prompt positions
    tail             the same with the sampled tail of 1,024
    default          as `python -m lrmc_ray.train`: the same in --micro-batches, which are 4
    ..., compiled    with train.compile_layers
    ..., selective   with train.gradient_checkpointing = "selective"
    ..., layers      with train.gradient_checkpointing = "full"

The samples are those of the NL2SQL demo, or with --data ct_radio radio exam questions (built by
scripts/build_ct_radio.py), whose prompts share the beginning of the chat template alone. With
--length they are passages of the Python documentation cut to that many tokens, the last quarter
supervised, without a common prefix. --model takes what `model.name` does.

The last line is one JSON object. Where the variants are there, `defaults_over_plain` in it is the
time of `default` over that of `full`, which is plain fine-tuning, and `trainer_over_defaults` that
of `trainer` over that of `default`.
"""

import argparse
import gc
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

RECOMPUTE: dict[str, Literal["selective", "full"]] = {
    "full, selective": "selective",
    "restricted, selective": "selective",
    "restricted, layers": "full",
}
VARIANTS = (
    *("trainer", "sft", "full, padded", "full", "restricted", "anchored", "tail", "default"),
    "default, compiled",
    *RECOMPUTE,
)
LR = 1e-5
RUN_STEPS = 24
"""Of the demo's runs, whose tails touch rows of the vocabulary."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""CPU seconds of the process; on a busy machine they are steadier, with one thread as telling."""


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """The clock that was asked for; on a GPU it waits until the work given to it is done."""
    if args.device == "cpu":
        return CLOCKS[args.clock]

    def read() -> float:
        torch.cuda.synchronize()
        return CLOCKS[args.clock]()

    return read


def status_bytes(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    assert found is not None, f"no {field} in /proc/self/status"
    return int(found.group(1)) * 1024


def make_samples(args: argparse.Namespace) -> list[Any]:
    """Recorded as Stage 0 does: tau 0.99, at most 1,024 and 64 candidates."""
    from lrmc_ray.chat.answers import Chat
    from lrmc_ray.config import ModelSettings
    from lrmc_ray.files.artifacts import cache_directory
    from lrmc_ray.method.microbatch import Sample
    from lrmc_ray.method.subsets import select_candidates
    from lrmc_ray.models.directory import local_directory
    from lrmc_ray.models.loading import load_model, load_tokenizer
    from lrmc_ray.record.encode import encode_row
    from lrmc_ray.record.rows import Row
    from lrmc_ray.tasks.built import ct_radio_files
    from lrmc_ray.tasks.demo.files import demo_files

    directory = local_directory(ModelSettings(name=args.model))
    model, tokenizer = load_model(directory).to(args.device), load_tokenizer(directory)
    number = args.batch_size * (args.steps + 1)
    inputs: list[tuple[Any, Any]] = []
    if args.length:
        import pydoc_data.topics

        text = "\n".join(
            pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)
        )
        ids_T = torch.tensor(tokenizer(text[: 8 * number * args.length])["input_ids"])
        for start in range(0, number * args.length, args.length):
            is_target_T = torch.arange(args.length) >= args.length * 3 // 4
            inputs.append((ids_T[start : start + args.length], is_target_T))
    else:
        files: Any = ct_radio_files if args.data == "ct_radio" else demo_files
        lines = files(cache_directory()).train.read_text(encoding="utf-8").splitlines()
        chat = Chat(tokenizer)
        for line in lines[:number]:
            (example,) = encode_row(Row("demo", json.loads(line)), chat)
            inputs.append((torch.tensor(example.input_ids), torch.tensor(example.is_target)))
    samples = []
    for index, (ids_T, is_target_T) in enumerate(inputs):
        with torch.inference_mode():
            logits_PV = model(input_ids=ids_T[None].to(args.device)).logits[0, :-1].cpu()
        k_max = torch.where(is_target_T[1:], 1024, 64)
        sets = select_candidates(logits_PV, ids_T[1:], tau=0.99, k_min=1, k_max=k_max)
        samples.append(
            Sample(f"{index}", ids_T, torch.arange(len(ids_T) - 1), is_target_T[1:], sets)
        )
    return samples


def run_ours(args: argparse.Namespace, samples: Sequence[Any], name: str) -> list[float]:
    """Seconds of every step of our loop."""
    from lrmc_ray.config import ModelSettings
    from lrmc_ray.method.fast.allocator import keep_freed_memory
    from lrmc_ray.method.losses import LanguageModel, LossSettings
    from lrmc_ray.method.optimizers import make_optimizer
    from lrmc_ray.method.training_loop import StepOptions, train
    from lrmc_ray.method.vocabulary_rows import EmbeddingLookup, HeadRows
    from lrmc_ray.method.workers import WorkerGroup
    from lrmc_ray.models.borders import longest_packed
    from lrmc_ray.models.directory import local_directory
    from lrmc_ray.models.head import head_of
    from lrmc_ray.models.loading import load_model
    from lrmc_ray.models.packing import attention_cost
    from lrmc_ray.train.compiled import LENGTHS, compile_layers
    from lrmc_ray.train.recompute import Recomputation
    from lrmc_ray.train.split_forward import SplitModel, can_split

    is_full = name.startswith("full")
    compiles, name = name.endswith(", compiled"), name.removesuffix(", compiled")
    loss = LossSettings(
        "full" if is_full else "restricted",
        1024 if name in ("tail", "default") else 0,
        1.0 if name in ("anchored", "tail", "default") else 0.0,
        seed=0,
    )
    model = load_model(local_directory(ModelSettings(name=args.model))).to(args.device).train()
    recomputation = Recomputation(model, RECOMPUTE.get(name, False))
    if compiles:
        compile_layers(model)
    split = SplitModel(model, recomputation.keep)
    keep_freed_memory()
    head = head_of(model)
    parameters = dict(model.named_parameters())
    rows = None if is_full else trained_rows(model, head, samples, loss)
    if rows is not None:
        name_of = {id(weight): name for name, weight in parameters.items()}
        parameters[name_of[id(head.weight_VD)]] = rows.rows_XD
    if rows is not None or args.device == "cpu":
        EmbeddingLookup(model.get_input_embeddings(), rows)
    parts = args.micro_batches if name == "default" else 1
    shares = parts > 1 and args.device == "cpu" and args.precision == "fp32" and not compiles
    shares = shares and can_split(model)
    steps = train(
        LanguageModel(recomputation.forward, head, split, HeadRows(head, rows) if rows else None),
        make_optimizer("adamw" if is_full else "moclip", parameters.values(), lr=LR),
        lambda step: list(samples[step * args.batch_size : (step + 1) * args.batch_size]),
        loss,
        StepOptions(
            num_micro_batches=parts,
            autocast=torch.bfloat16 if args.precision == "bf16" else None,
            attention_cost=math.inf if name == "full, padded" else attention_cost(model),
            pack_up_to=longest_packed(model.config),
            share_prefix_up_to=recomputation.most_kept if shares else 0,
            lengths=LENGTHS if compiles else 1,
            plans_losses=args.device == "cuda",
            prepares_ahead=args.device == "cuda",
            after_update=(lambda lr: rows.write_back()) if rows else None,
        ),
        WorkerGroup(),
        steps=range(args.steps + 1),
        lr_of_step=lambda step: LR,
    )
    clock = clock_of(args)
    seconds, last = [], clock()
    for _ in steps:
        now = clock()
        seconds.append(now - last)
        last = now
    return seconds


def trained_rows(model: Any, head: Any, samples: Sequence[Any], loss: Any) -> Any:
    """Rows that a run of ``RUN_STEPS`` steps on these samples trains; None where all are.

    For tied weights alone.
    """
    from lrmc_ray.method.restricted_loss import draw_tail
    from lrmc_ray.method.vocabulary_rows import TrainedRows, tokens_of
    from lrmc_ray.train.vocabulary import FEWEST_SPARED, LARGEST_SHARE

    size = head.vocabulary_size
    used = list(tokens_of(samples, loss.activity))
    if loss.tail_samples:
        used += [
            draw_tail(loss.tail_samples, size, seed=0, step=step).ids_R for step in range(RUN_STEPS)
        ]
    tokens = torch.unique(torch.cat(used))
    print(f"{len(tokens)} of {size} rows are touched", file=sys.stderr)
    is_tied = model.get_input_embeddings().weight is head.weight_VD
    spared = (size - len(tokens)) * head.weight_VD.shape[1]
    if not is_tied or len(tokens) > LARGEST_SHARE * size or spared < FEWEST_SPARED:
        return None
    return TrainedRows(head.weight_VD, tokens)


def run_theirs(args: argparse.Namespace, samples: Sequence[Any], name: str) -> list[float]:
    """Seconds of every step of a Trainer."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from lrmc_ray.config import ModelSettings
    from lrmc_ray.models.directory import local_directory
    from lrmc_ray.models.loading import load_model, load_tokenizer

    directory = local_directory(ModelSettings(name=args.model))
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    rows = []
    for sample in samples:
        is_target = [False, *sample.is_supervised_P.tolist()]
        ids = sample.input_ids_T.tolist()
        labels = [i if t else -100 for i, t in zip(ids, is_target, strict=True)]
        row = {"input_ids": ids, "labels": labels}
        if name == "sft":
            row = {"input_ids": ids, "completion_mask": [int(t) for t in is_target]}
        rows.append(row)
    seconds: list[float] = []
    clock = clock_of(args)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(clock() - self.start)

    def pad(batch: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)

        def filled(key: str, value: int) -> torch.Tensor:
            return torch.tensor([r[key] + [value] * (longest - len(r[key])) for r in batch])

        ones = [[1] * len(row["input_ids"]) for row in batch]
        mask = torch.tensor([o + [0] * (longest - len(o)) for o in ones])
        return {
            "input_ids": filled("input_ids", 0),
            "labels": filled("labels", -100),
            "attention_mask": mask,
        }

    with tempfile.TemporaryDirectory() as scratch:
        options: dict[str, Any] = {
            "output_dir": scratch,
            "per_device_train_batch_size": args.batch_size,
            "max_steps": args.steps + 1,
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused",
            "max_grad_norm": 0.0,
            "report_to": [],
            "logging_strategy": "no",
            "save_strategy": "no",
            "use_cpu": args.device == "cpu",
            "bf16": args.precision == "bf16",
            "disable_tqdm": True,
        }
        shared = {"model": model, "train_dataset": Dataset.from_list(rows), "callbacks": [Clock()]}
        base: type[Trainer] = Trainer
        if name == "sft":
            from trl import SFTConfig, SFTTrainer

            options |= {"max_length": None, "gradient_checkpointing": False}
            base = SFTTrainer
            extra: dict[str, Any] = {"processing_class": tokenizer}
            arguments: Any = SFTConfig(**options)
        else:
            extra = {"data_collator": pad}
            arguments = TrainingArguments(**options)

        class InOrder(base):  # type: ignore[misc, valid-type]  # its base is chosen above
            def _get_train_sampler(self, dataset: Any = None) -> Any:
                return SequentialSampler(dataset if dataset is not None else self.train_dataset)

        InOrder(args=arguments, **shared, **extra).train()
    return seconds


def child(args: argparse.Namespace) -> None:
    """One variant; prints its seconds per step and its peak memory."""
    torch.set_num_threads(args.threads)
    samples = torch.load(args.samples, weights_only=False)
    run: Callable[..., list[float]] = run_theirs if args.child in ("trainer", "sft") else run_ours
    # So that its imports are not counted as its memory.
    import transformers  # noqa: F401

    if args.child == "sft":
        import trl  # noqa: F401
    gc.collect()
    before = status_bytes("VmRSS")
    seconds = run(args, samples, args.child)
    peak = status_bytes("VmHWM") - before
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"seconds": seconds[1:], "peak_bytes": peak}))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    samples = make_samples(args)
    tokens = [len(sample.input_ids_T) for sample in samples[args.batch_size :]]
    found: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "peak_bytes": []} for name in args.variants
    }
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(samples, file.name)
        for _ in range(args.rounds):
            for name in args.variants:
                command = [*sys.argv, "--child", name, "--samples", file.name]
                result = subprocess.run(
                    [sys.executable, *command], capture_output=True, text=True, check=False
                )
                if result.returncode:
                    raise RuntimeError(f"{name} failed:\n{result.stderr[-3000:]}")
                line = json.loads(result.stdout.splitlines()[-1])
                print(f"  {name}: {line}", file=sys.stderr, flush=True)
                found[name]["seconds"] += line["seconds"]
                found[name]["peak_bytes"].append(line["peak_bytes"])
    tokens_per_step = sum(tokens) / args.steps
    print(
        f"{args.batch_size} samples of {min(tokens)} to {max(tokens)} tokens per step, "
        f"{args.precision}, {args.rounds} x {args.steps} steps on "
        + (
            f"{args.threads} thread(s)"
            if args.device == "cpu"
            else f"{torch.cuda.get_device_name()}"
        )
    )
    titles = ("s/step", "tokens/s", "speed-up", "peak MB", "memory")
    print(f"{'':22s}" + "".join(f"{title:>10s}" for title in titles) + "   relative to trainer")
    rows = {}
    for name, values in found.items():
        seconds = statistics.median(values["seconds"])
        peak = statistics.median(values["peak_bytes"])
        rows[name] = {
            "seconds_per_step": seconds,
            "tokens_per_second": tokens_per_step / seconds,
            "peak_bytes": peak,
        }
        first = rows[args.variants[0]]
        rows[name]["speedup"] = first["seconds_per_step"] / seconds
        rows[name]["memory_ratio"] = peak / first["peak_bytes"]
        print(
            f"{name:22s}{seconds:10.2f}{tokens_per_step / seconds:10.1f}"
            f"{rows[name]['speedup']:10.2f}{peak / 1e6:10.0f}{rows[name]['memory_ratio']:10.2f}"
        )
    return {"tokens_per_step": tokens_per_step, "variants": rows, **ratios(rows)}


def ratios(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The defaults against plain fine-tuning and against Trainer, where both were run."""
    seconds = {name: row["seconds_per_step"] for name, row in rows.items()}
    found = {}
    if {"default", "full"} <= seconds.keys():
        found["defaults_over_plain"] = seconds["default"] / seconds["full"]
    if {"default", "trainer"} <= seconds.keys():
        found["trainer_over_defaults"] = seconds["trainer"] / seconds["default"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--data", choices=["nl2sql", "ct_radio"], default="nl2sql")
    parser.add_argument("--length", type=int, default=0, help="tokens; default: samples of --data")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--micro-batches", type=int, default=4, help="of the variant default")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--samples", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    result = measure(args)
    settings = {k: v for k, v in vars(args).items() if k not in ("child", "samples")}
    print(
        json.dumps({"benchmark": "training_step", "torch": torch.__version__, **settings, **result})
    )


if __name__ == "__main__":
    main()
