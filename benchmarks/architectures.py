"""Every causal class of transformers, tiny and random, through all that is done with a model here.

    python benchmarks/architectures.py                        # all types; writes docs/models.md
    python benchmarks/architectures.py --types gpt2,gemma3_text
    python benchmarks/architectures.py --keep rows.jsonl      # goes on where it was stopped

Each cell compares with something independent: logits, losses and gradients of the model's own
forward pass over one sample alone, scores of plain lm-eval. *works* says they are the same up to
rounding, *refused* that a command ends with an error that says why, *not built* that transformers
makes no tiny model of the type. *wrong* and *traceback* must not be there. The last line is one
JSON object with the number of types of each outcome; a type has its worst cell's.
"""

import argparse
import collections
import dataclasses
import functools
import json
import logging
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from benchmarks.tiny_models import VOCABULARY, causal_types, make, make_config, short_borders
from lrmc_ray.config import TrainSettings
from lrmc_ray.errors import LrmcError
from lrmc_ray.method.fast.packing import lay_out
from lrmc_ray.method.head import head_logits
from lrmc_ray.method.layout import pad
from lrmc_ray.method.microbatch import Sample
from lrmc_ray.method.training_loop import StepOptions, compute_gradients
from lrmc_ray.method.workers import WorkerGroup
from lrmc_ray.models.borders import longest_packed
from lrmc_ray.models.forward import batch_hidden_states, hidden_states
from lrmc_ray.models.head import head_of
from lrmc_ray.models.loading import load_model
from lrmc_ray.record.candidates import CandidateRecorder
from lrmc_ray.train import recompute
from lrmc_ray.train.learner import Learner
from lrmc_ray.train.recompute import Recomputation

Outcome = Literal["works", "refused", "not_built", "wrong", "traceback"]
OUTCOMES: tuple[Outcome, ...] = ("traceback", "wrong", "not_built", "refused", "works")
"""From the worst on."""

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

_ROTARY = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
_WITH_PARTS: Mapping[str, Any] = {"text_config": {"rope_parameters": _ROTARY}}
_NOTHING: Mapping[str, Any] = {}
MULTIMODAL: dict[str, Mapping[str, Any]] = {
    **dict.fromkeys(["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v"], _WITH_PARTS),
    **dict.fromkeys(
        [
            *("mistral3", "smolvlm", "idefics3", "llava", "llava_next", "internvl", "lfm2_vl"),
            *("paligemma", "aya_vision"),
        ],
        _NOTHING,
    ),
}
"""Types with images that people fine-tune on text, though transformers has no causal class for
them, with options for a tiny one. Gemma 3 and 4 and Llama 4 have one."""

BORDER = 24
"""Tokens of every window and chunk."""
LENGTHS = (70, 66, 40, BORDER, 9)
"""Of the samples: beyond the border, at it, and below."""
SHARED = 6
"""Tokens that all samples begin with."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one thing that is done with a model came to."""

    outcome: Outcome
    why: str = ""


class WrongError(Exception):
    """A number is not what it should be."""


class NotPackedError(Exception):
    """Samples are padded, which is always right."""


def same(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    """Compare two tensors by the norm of their difference.

    Raises:
        WrongError: they differ by more than ``tolerance`` of the second's norm.
    """
    difference = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    if not difference <= tolerance:
        raise WrongError(f"{what} off by {difference:.1e}")


@dataclasses.dataclass
class Subject:
    """A tiny model of a type on the disk, and the samples that it is tried with."""

    model_type: str
    made: Any
    directory: Path
    samples: list[Sample] = dataclasses.field(default_factory=list)
    note: str = ""
    """What a cell has to say though it works."""

    @functools.cached_property
    def loaded(self) -> Any:
        """The model as it is on the disk; nobody changes its weights."""
        return load_model(self.directory)

    @functools.cached_property
    def expected(self) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients by cross-entropy of the model's own logits, sample by sample."""
        return plain_gradients(self, load_model(self.directory))

    @property
    def sequences(self) -> list[Tensor]:
        """Token ids of the samples, which begin alike."""
        rng = torch.Generator().manual_seed(7)
        start_T = torch.randint(5, VOCABULARY, (SHARED,), generator=rng)
        return [
            torch.cat([start_T, torch.randint(5, VOCABULARY, (n - SHARED,), generator=rng)])
            for n in LENGTHS
        ]

    def logits(self, model: Any, ids_T: Tensor) -> Tensor:
        """The model's own, of one sample alone, [T, V]."""
        logits_TV: Tensor = model(input_ids=ids_T[None], use_cache=False).logits[0]
        return logits_TV

    def learner(self, **settings: Any) -> Learner:
        """What trains, with ordinary cross-entropy unless told otherwise."""
        plain: dict[str, Any] = {
            "loss": "full",
            "anchor_weight": 0.0,
            "tail_samples": 0,
            "batch_size": 8,
        }
        return Learner(TrainSettings(**(plain | settings)), self.directory, torch.device("cpu"))


def loads(subject: Subject) -> None:
    """The model, saved and loaded again, gives the logits that it gave before."""
    subject.made.save_pretrained(subject.directory)
    model = load_model(subject.directory)
    with torch.no_grad():
        for ids_T in subject.sequences[::2]:
            same(subject.logits(model, ids_T), subject.logits(subject.made, ids_T), 1e-5, "logits")


def has_a_head(subject: Subject) -> None:
    """Hidden states times head are the model's logits."""
    model = subject.loaded
    head = head_of(model)
    with torch.no_grad():
        for ids_T in subject.sequences[::2]:
            ours = head_logits(hidden_states(model, ids_T[None])[0], head)
            same(ours, subject.logits(model, ids_T), 1e-4, "logits")


def records(subject: Subject) -> None:
    """Recorded log-probabilities are those of every sample alone."""
    recorder = CandidateRecorder(
        subject.directory, tau=0.9, k_min=2, k_max=64, prompt_k_max=8, threads=1
    )
    rows = [
        {
            "sample_id": str(number),
            "domain": "",
            "input_ids": ids_T.tolist(),
            "is_target": [place >= len(ids_T) // 2 for place in range(len(ids_T))],
        }
        for number, ids_T in enumerate(subject.sequences)
    ]
    samples = recorder.record(rows)
    for sample in samples:
        with torch.no_grad():
            logits_TV = subject.logits(subject.loaded, sample.input_ids_T).float()
        sets = sample.candidates
        row_N = sample.positions_P[sets.row_ids]
        theirs = logits_TV.log_softmax(-1)[row_N, sets.token_ids.long()]
        same(sets.logprobs, theirs, 2e-3, "log-probabilities")  # float16 in the record
    subject.samples = samples


def plain_gradients(subject: Subject, model: Any) -> tuple[float, dict[str, Tensor]]:
    """Mean cross-entropy of the model's own logits, sample by sample, and its gradients."""
    count = sum(int(s.is_supervised_P.sum()) for s in subject.samples)
    model.zero_grad()
    total = 0.0
    for sample in subject.samples:
        positions_N = sample.positions_P[sample.is_supervised_P]
        logits_NV = subject.logits(model, sample.input_ids_T)[positions_N]
        gold_N = sample.input_ids_T[positions_N + 1]
        loss = F.cross_entropy(logits_NV.float(), gold_N, reduction="sum") / count
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def our_gradients(
    subject: Subject, learner: Learner, **options: Any
) -> tuple[float, dict[str, Tensor]]:
    """The same by the training loop, in two micro-batches."""
    chosen = StepOptions(num_micro_batches=2, **options)
    batches = chosen.divide(subject.samples, learner.loss.activity)
    parameters = list(learner.trainable.parameters.values())
    found = compute_gradients(
        learner.language_model, parameters, batches, learner.loss, chosen, WorkerGroup(), step=0
    )
    count = sum(batch.num_supervised for batch in batches)
    gradients = {n: p.grad for n, p in learner.trainable.parameters.items() if p.grad is not None}
    return found.loss_sum / count, gradients


def same_gradients(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], what: str) -> None:
    """Compare gradients tensor by tensor; one that is nearly zero by the largest one's norm.

    Raises:
        WrongError: some tensor's differ.
    """
    largest = max(float(gradient.norm()) for gradient in theirs.values())
    for name in ours.keys() | theirs.keys():
        one, other = ours.get(name), theirs.get(name)
        known = next(g for g in (one, other) if g is not None)
        one, other = (torch.zeros_like(known) if g is None else g for g in (one, other))
        scale = max(float(other.norm()), 1e-3 * largest)
        difference = float((one - other).norm()) / scale
        if not difference <= 2e-3:
            raise WrongError(f"{what} of {name} off by {difference:.1e}")


def has_gradients(subject: Subject) -> None:
    """Loss and gradients of padded micro-batches are those of cross-entropy, sample by sample."""
    learner = subject.learner(packing=False)
    learner.model.eval()  # no dropout
    theirs, expected = subject.expected
    ours, found = our_gradients(subject, learner)
    if not abs(ours - theirs) <= 1e-4 * abs(theirs):
        raise WrongError(f"loss {ours:.5g} for {theirs:.5g}")
    same_gradients(found, expected, "gradient")


def packs(subject: Subject) -> None:
    """Packed where the layout says so; gradients are those of cross-entropy, sample by sample."""
    learner = subject.learner()
    learner.model.eval()
    cost = min(learner.attention_cost, 1e-9 if learner.attention_cost < 1e9 else float("inf"))
    limit = longest_packed(learner.model.config)
    _, expected = subject.expected
    _, found = our_gradients(subject, learner, attention_cost=cost, pack_up_to=limit)
    same_gradients(found, expected, "gradient")
    short = [ids_T for ids_T in subject.sequences if len(ids_T) <= limit]
    layout = lay_out(short, cost, limit)
    if layout.is_visible_TT is None:
        raise NotPackedError("padded")
    with torch.no_grad():
        hidden_BTD = batch_hidden_states(learner.model, layout)
        for ids_T, row, columns_T in zip(short, layout.rows, layout.columns, strict=True):
            alone_TD = hidden_states(learner.model, ids_T[None])[0]
            same(hidden_BTD[row, columns_T], alone_TD, 1e-4, "hidden states")


def recomputes(subject: Subject) -> None:
    """The default way of computing activations again changes no gradient."""
    gradients = []
    many = recompute.MANY_TOKENS
    recompute.MANY_TOKENS = 1
    try:
        for which in (False, "auto"):
            recomputation = Recomputation(load_model(subject.directory).train(), which)
            torch.manual_seed(0)
            hidden_BTD = recomputation.forward(pad(subject.sequences[:2]))
            hidden_BTD.float().sin().sum().backward()  # type: ignore[no-untyped-call]
            named = recomputation.model.named_parameters()
            gradients.append({n: p.grad for n, p in named if p.grad is not None})
    finally:
        recompute.MANY_TOKENS = many
    same_gradients(gradients[1], gradients[0], "gradient")
    subject.note = recomputation.way or "all is kept"


def adapts(subject: Subject) -> None:
    """Adapters on all that can have one, trained at random, merged, saved and loaded."""
    learner = subject.learner(lora_rank=2)
    learner.model.eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in learner.trainable.parameters.values():
            parameter.copy_(0.1 * torch.randn_like(parameter))
        before = [subject.logits(learner.model, ids_T) for ids_T in subject.sequences]
        if torch.allclose(before[0], subject.logits(subject.loaded, subject.sequences[0])):
            raise WrongError("adapters change nothing")
        directory = subject.directory.with_name("merged")
        learner.save(directory)
        merged = load_model(directory)
        for ids_T, logits_TV in zip(subject.sequences, before, strict=True):
            same(subject.logits(merged, ids_T), logits_TV, 1e-3, "logits after the merge")
    assert learner.trainable.adapters is not None
    subject.note = f"{learner.trainable.adapters.share:.0%}"


def scores(subject: Subject) -> None:
    """Log-likelihoods are those of plain lm-eval, whose batches have one row."""
    from lm_eval.models.huggingface import HFLM

    from lrmc_ray.evaluate.prefix_lm import PrefixLM

    model, tokenizer = subject.loaded, words()
    requests = [
        (("", ""), ids_T.tolist(), end)
        for ids_T in subject.sequences
        for end in ([7], [8, 9, 10], [11, 12])
    ]
    ours_lm = PrefixLM(model, tokenizer, batch_tokens=256)
    theirs_lm = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", backend="causal"
    )
    ours = ours_lm._loglikelihood_tokens(requests, disable_tqdm=True)
    theirs = theirs_lm._loglikelihood_tokens(requests, disable_tqdm=True)
    for (value, greedy), (expected, is_greedy) in zip(ours, theirs, strict=True):
        if not abs(value - expected) <= 1e-3 * max(1.0, abs(expected)) or greedy != is_greedy:
            raise WrongError(f"log-likelihood {value:.4f} for {expected:.4f}")


def words() -> Any:
    """A tokenizer with one token for each of the words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(
        models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w3")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make_tokenizer: Any = PreTrainedTokenizerFast
    return make_tokenizer(
        tokenizer_object=inner, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


def exports(subject: Subject) -> None:
    """The model after a step, saved and loaded again, gives the logits that it gave before."""
    learner = subject.learner(lr=1e-2)
    our_gradients(subject, learner)
    learner.optimizer.step()
    learner.model.eval()
    with torch.no_grad():
        before = [subject.logits(learner.model, ids_T) for ids_T in subject.sequences]
        directory = subject.directory.with_name("exported")
        learner.save(directory)
        loaded = load_model(directory)
        for ids_T, logits_TV in zip(subject.sequences, before, strict=True):
            same(subject.logits(loaded, ids_T), logits_TV, 1e-5, "logits after reloading")
    if type(loaded) is not type(subject.made):
        raise WrongError(f"a {type(loaded).__name__} was saved")


COLUMNS: dict[str, Callable[[Subject], None]] = {
    "load": loads,
    "head": has_a_head,
    "record": records,
    "gradients": has_gradients,
    "packing": packs,
    "recomputing": recomputes,
    "LoRA": adapts,
    "scoring": scores,
    "export": exports,
}
NEEDED = ("load", "head", "record")
"""Without these nothing else can be done."""


def make_any(model_type: str) -> Any:
    """A tiny model with short borders, whichever class transformers has for the type."""
    options = {**short_borders(model_type, BORDER), **MULTIMODAL.get(model_type, _NOTHING)}
    if model_type in causal_types():
        return make(model_type, **options)
    config = make_config(model_type, **options)
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForImageTextToText
    return auto.from_config(config, dtype=torch.float32).eval()


def examine(model_type: str) -> dict[str, Cell]:
    """All cells of a type."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            made = make_any(model_type)
            subject = Subject(model_type, made, Path(scratch) / "model")
            with torch.no_grad():
                subject.logits(made, subject.sequences[0])
        except Exception as error:  # of transformers alone
            return dict.fromkeys(COLUMNS, Cell("not_built", _told(error)))
        cells: dict[str, Cell] = {}
        for name, column in COLUMNS.items():
            stopped = next((n for n in NEEDED if n in cells and cells[n].outcome != "works"), None)
            if stopped is not None:
                cells[name] = cells[stopped]
                continue
            cells[name] = _cell(column, subject)
    return cells


def _cell(column: Callable[[Subject], None], subject: Subject) -> Cell:
    subject.note = ""
    try:
        column(subject)
    except NotPackedError as answer:
        return Cell("works", str(answer))
    except LrmcError as error:
        return Cell("refused", _told(error))
    except WrongError as error:
        return Cell("wrong", str(error))
    except Exception as error:
        logging.getLogger(__name__).debug("%s", traceback.format_exc())
        return Cell("traceback", _told(error))
    return Cell("works", subject.note)


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, LrmcError):
        return text
    return f"{type(error).__name__}: {text[:200]}"


def counts(rows: Mapping[str, Mapping[str, Cell]]) -> dict[str, int]:
    """Types by their worst cell; one is refused where it cannot be recorded."""
    found = collections.Counter[str]()
    for cells in rows.values():
        outcomes = [cell.outcome for cell in cells.values()]
        bad: str | None = next(
            (o for o in ("traceback", "wrong", "not_built") if o in outcomes), None
        )
        if bad is None:
            is_refused = any(cells[name].outcome == "refused" for name in NEEDED)
            bad = "refused" if is_refused else "works"
        found[bad] += 1
    return {name: found[name] for name in ("works", "refused", "not_built", "wrong", "traceback")}


def page(rows: Mapping[str, Mapping[str, Cell]]) -> str:
    """The document: a row for each type that works, and a reason for each that does not."""
    found = counts(rows)
    lines = [*HEAD.format(version=transformers.__version__, **found).splitlines(), ""]
    lines += ["| type | packing | recomputing | LoRA, share of weights | other |"]
    lines += ["|---|---|---|---|---|"]
    refused: list[str] = []
    for model_type, cells in rows.items():
        stopped = next((c for n, c in cells.items() if n in NEEDED and c.outcome != "works"), None)
        if stopped is not None:
            refused.append(f"| `{model_type}` | {_word(stopped)} | {_short(stopped.why)} |")
            continue
        shown = [_shown(cells[name]) for name in ("packing", "recomputing", "LoRA")]
        others = [
            f"{name} {_shown(cell)}"
            for name, cell in cells.items()
            if name not in ("packing", "recomputing", "LoRA") and cell.outcome != "works"
        ]
        lines.append(f"| `{model_type}` | {' | '.join(shown)} | {'; '.join(others)} |")
    lines += ["", "## Refused, or not built", "", "| type | | why |", "|---|---|---|", *refused]
    return "\n".join(lines) + "\n"


HEAD = """# Models

This page is generated: `python benchmarks/architectures.py` writes it, and checks an update of
transformers. Every causal class of transformers {version}, tiny and random, goes through all that
is done with a model here. Each number is compared with the model's own forward pass over one
sample alone, and scores with plain lm-eval, at lengths below, at and beyond every window.

{works} types work, {refused} are refused with a reason, and of {not_built} transformers makes no
tiny model. {wrong} give a wrong number, {traceback} end in a traceback.

## Works

Loading, the head, recording, loss and gradients, scoring, export and reload work for all of these.

- *packing*: samples with a common beginning are computed as one row; else they are padded.
- *recomputing*: what `train.gradient_checkpointing=auto` computes again in long micro-batches.
- *LoRA*: adapters are trained, merged, saved and loaded; the share is that of the tiny model."""


def _word(cell: Cell) -> str:
    return cell.outcome.replace("_", " ")


def _shown(cell: Cell) -> str:
    if cell.outcome == "works":
        return cell.why or "works"
    return f"{_word(cell)}: {_short(cell.why)}"


def _short(why: str) -> str:
    """One line of a table, without names of temporary directories and classes' addresses."""
    why = re.sub(r"\S*/tmp\S*/model", "its directory", why).replace("|", "/")
    why = re.sub(r"<class '([\w.]+)'>", lambda m: m[1].rpartition(".")[2], why)
    return why if len(why) <= 240 else why[:237] + "..."


def _kept(path: Path) -> dict[str, dict[str, Cell]]:
    """The rows that an earlier run has kept."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {
        model_type: {name: Cell(*cell) for name, cell in cells.items()}
        for model_type, cells in map(json.loads, lines)
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the table; the status is 1 where a cell is wrong or has a traceback."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--types", help="comma-separated; by default all, and the page is written")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="keep what is found here, and go on with it"
    )
    args = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    types: Iterable[str] = args.types.split(",") if args.types else [*causal_types(), *MULTIMODAL]
    rows = _kept(args.keep) if args.keep else {}
    for model_type in sorted(set(types) - set(rows)):
        rows[model_type] = examine(model_type)
        if args.keep:
            with args.keep.open("a", encoding="utf-8") as file:
                cells = {name: dataclasses.astuple(c) for name, c in rows[model_type].items()}
                file.write(json.dumps([model_type, cells]) + "\n")
        said = None
        for name, cell in rows[model_type].items():
            if cell != said or cell.outcome == "works":
                print(f"{model_type:28} {name:12} {cell.outcome:9} {cell.why[:400]}", flush=True)
            said = cell
    if not args.types:
        PAGE.write_text(page(dict(sorted(rows.items()))), encoding="utf-8")
    found = counts(rows)
    print(json.dumps(found))
    return int(bool(found["wrong"] or found["traceback"]))


if __name__ == "__main__":
    # Of the whole process: tests that call `main` keep theirs.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.exit(main())
