"""From training files to tokenized shards, before a model is loaded."""

import contextlib
import dataclasses
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lrmc_ray.chat.answers import Chat
from lrmc_ray.config import DataSettings, RunSettings
from lrmc_ray.console import progress
from lrmc_ray.errors import DataError
from lrmc_ray.files.artifacts import (
    PARTIAL,
    file_digest,
    fingerprint,
    is_finished,
    lock_directory,
    read_manifest,
    write_json,
)
from lrmc_ray.files.fault_points import passed
from lrmc_ray.files.place import Place, place_of
from lrmc_ray.models.directory import local_directory
from lrmc_ray.models.loading import differing_text, load_tokenizer, vocabulary_size
from lrmc_ray.record.encode import EncodingSummary, encode_rows
from lrmc_ray.record.examples import ExamplesWriter, read_domains
from lrmc_ray.record.identity import SAMPLES, identify, why_again
from lrmc_ray.record.names import EXAMPLES, MADE_BY, PLAN, REJECTS
from lrmc_ray.record.recording import Recording, recording_of
from lrmc_ray.record.rows import Rejects, first_rows, read_rows
from lrmc_ray.record.sources import Source, training_sources, unread_files
from lrmc_ray.record.spread import spread
from lrmc_ray.record.used import UsedSamples, shards_with

_log = logging.getLogger(__name__)

SMALLEST_SHARD_TOKENS = 4096
LARGEST_SHARD_TOKENS = 16_384
"""Bounds the memory of an actor, which holds a shard's candidates: 6 bytes each, 100 MB at most."""

COMPARED_TEXTS = 512
"""Samples on which the tokenizer is compared with its file by itself."""

MAX_NAMED = 5
"""Files that are not read which a message names."""

LOOKED_AT = 1000
"""Rows of each file that are read to explain a run."""

UNRECORDED = 16
"""Tokens that are only written count as one that is recorded, where shards are cut."""

SHARDS = 64
"""Shards between these bounds; a small data set has fewer, a large one more."""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """A record that is about to be made, or that is there."""

    settings: RunSettings
    identity: Mapping[str, Any]
    model_directory: Path
    sources: Sequence[Source]
    final: Path
    used: UsedSamples | None = None
    """Which samples are recorded; None for all."""

    @property
    def partial(self) -> Path:
        """Where the record is made."""
        return self.final.with_name(self.final.name + PARTIAL)

    @cached_property
    def place(self) -> Place:
        """Where the nodes of the run find each other's files."""
        return place_of(self.settings.resources.storage)

    @cached_property
    def recording(self) -> Recording:
        """The record's files while it is made, on the shared disk or in the storage."""
        return recording_of(self.place, self.partial, self.provenance, self.final.name)

    @property
    def provenance(self) -> dict[str, str]:
        """What every file of the record says of itself."""
        return {
            **{f"lrmc.{name}": str(self.identity[name]) for name in ("model", "tokenizer", "data")},
            "lrmc.record": self.final.name,
            "lrmc.tau": repr(self.identity["tau"]),
        }


def prepare(settings: RunSettings, output: Path, used: UsedSamples | None = None) -> Preparation:
    """Read, check and tokenize the training data, unless that has been done; needs no Ray.

    Args:
        settings: of the run.
        output: holds the records.
        used: the samples that are enough. A record of all serves as well, if it is there and one of
            these is not. None for all.

    Raises:
        DataError: training data that cannot be used.
        IncompleteArtifactError: the model or the training data do not exist.
        ConfigError: the model cannot be spread over the GPUs of an actor.
    """
    sources = training_sources(settings)
    model_directory = local_directory(settings.model)
    if (gpus := settings.resources.whole_gpus_of_actor()) > 1:
        spread(model_directory, range(gpus), settings.record.precision)
    identity, sources = identify(settings, model_directory, sources)
    prepared = _prepared(settings, identity, model_directory, sources, output)
    if used is not None:
        identity = {**identity, SAMPLES: used.recipe}
        of_used = _prepared(settings, identity, model_directory, sources, output)
        # A study goes on with the record that it began with, whatever is recorded later.
        if is_finished(of_used.final) or not is_finished(prepared.final):
            prepared = dataclasses.replace(of_used, used=used)
    if is_finished(prepared.final):
        _check_rejected(
            read_manifest(prepared.final, made_by=MADE_BY)["rejects"], settings, prepared.final
        )
        return prepared
    if (
        not prepared.partial.exists()
        and (why := why_again(prepared.final, prepared.identity)) is not None
    ):
        _log.warning("%s", why)
    made = [prepared.partial, prepared.partial.parent, output]
    made = [directory for directory in made if not directory.exists()]
    with lock_directory(prepared.partial):
        if not is_finished(prepared.final):
            try:
                read_or_make_plan(prepared)
            except DataError:
                if prepared.partial in made and not (prepared.partial / REJECTS).exists():
                    _remove(made)
                raise
    return prepared


def record_name(settings: RunSettings, used: UsedSamples | None = None) -> str:
    """The name of the directory of a record, be it there or not; arguments as of :func:`prepare`.

    Raises:
        IncompleteArtifactError: the model or the training data do not exist.
    """
    directory = local_directory(settings.model)
    identity, _ = identify(settings, directory, training_sources(settings))
    return fingerprint(identity if used is None else {**identity, SAMPLES: used.recipe})


def _prepared(
    settings: RunSettings,
    identity: Mapping[str, Any],
    model_directory: Path,
    sources: Sequence[Source],
    output: Path,
) -> Preparation:
    """The record of ``identity``, shown here where it is finished elsewhere."""
    prepared = Preparation(
        settings, identity, model_directory, sources, output / "records" / fingerprint(identity)
    )
    if not is_finished(prepared.final):
        prepared.recording.show_finished(prepared.final)
    return prepared


def _remove(made: Sequence[Path]) -> None:
    """Leave nothing of a record that was not begun: its directory, and those made for it."""
    shutil.rmtree(made[0])
    for directory in made[1:]:
        with contextlib.suppress(OSError):  # another command has put something there
            directory.rmdir()


def look(settings: RunSettings, model_directory: Path | None) -> None:
    """Read and tokenize the first rows of every file as :func:`prepare` does; writes nothing.

    Args:
        settings: of the run.
        model_directory: where the tokenizer is; None if it is not here, and rows are only read.

    Raises:
        DataError: rows that cannot be used, unless they may be skipped.
    """
    data, sources = settings.data, training_sources(settings)
    if data.on_bad_row == "skip":
        return
    rejects = Rejects()
    rows = first_rows(sources, rejects, LOOKED_AT)
    if model_directory is None:
        for row in rows:
            if row.problem:
                rejects.add(row.place, row.problem)
        rejects.settle()
        return
    chat = Chat(load_tokenizer(model_directory), settings.model.template_options)
    for _ in encode_rows(
        rows,
        chat,
        max_length=data.max_length if data.on_long == "error" else sys.maxsize,
        on_long="error",
        vocabulary_size=vocabulary_size(model_directory),
        summary=EncodingSummary(),
        rejects=rejects,
    ):
        pass


def read_or_make_plan(prepared: Preparation) -> dict[str, Any]:
    """The tokenized examples and the shards that they are cut into; made if they are not there."""
    partial = prepared.partial
    path = partial / PLAN
    if path.is_file():
        plan: dict[str, Any] = json.loads(path.read_text())
        examples = partial / EXAMPLES
        if examples.is_file() and file_digest(examples) == plan["examples_sha256"]:
            _check_rejected(plan["rejects"], prepared.settings, partial)
            return plan
        _log.warning("%s is not what was written there; tokenizing again", examples)
        path.unlink()
    plan = tokenize(prepared)
    write_json(path, plan)
    passed("record.planned")
    return plan


def _check_rejected(rejects: Mapping[str, int], settings: RunSettings, directory: Path) -> None:
    """An earlier command may have allowed more rows to be left out."""
    limit = settings.data.max_rejected_share
    if rejects["count"] > limit * rejects["rows"]:
        raise DataError(
            f"at most {limit:.2%} of the rows may be skipped (data.max_rejected_share), "
            f"{rejects['count']} of {rejects['rows']} were; {directory / REJECTS} lists them: mend "
            "or remove them, or raise it"
        )


def tokenize(prepared: Preparation) -> dict[str, Any]:
    """Tokenize every example into one file, and cut them into shards; returns the plan.

    Raises:
        DataError: training data that cannot be used, or a tokenizer that is not the model's.
    """
    data = prepared.settings.data
    tokenizer = load_tokenizer(prepared.model_directory)
    chat = Chat(tokenizer, prepared.settings.model.template_options)
    num_logits = vocabulary_size(prepared.model_directory)
    if len(tokenizer) > num_logits:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's head only {num_logits}; "
            "use the tokenizer that belongs to the model"
        )
    summary = EncodingSummary()
    texts: list[str] = []
    path = prepared.partial / EXAMPLES
    with (
        ExamplesWriter(path) as writer,
        _rejects(data, prepared.partial / REJECTS) as rejects,
        progress("Tokenizing", unit="samples") as bar,
    ):
        for example in encode_rows(
            read_rows(prepared.sources, rejects),
            chat,
            max_length=data.max_length,
            on_long=data.on_long,
            vocabulary_size=num_logits,
            summary=summary,
            rejects=rejects,
        ):
            bar.advance()
            writer.add(example)
            if len(texts) < COMPARED_TEXTS:
                texts.append(example.text)
    _warn(summary, rejects, prepared.final / REJECTS, chat, data.train)
    _say(summary)
    _compare_tokenizers(prepared.model_directory, tokenizer, texts)
    return {
        **{
            name: getattr(summary, name)
            for name in ("samples", "tokens", "supervised_tokens", "dropped", "truncated")
        },
        "split_conversations": summary.split,
        "formats": dict(summary.formats),
        "rejected": rejects.count,
        "rejects": {"rows": rejects.rows, "count": rejects.count},
        "vocabulary_size": num_logits,
        "tokenizer_size": len(tokenizer),
        "examples_sha256": file_digest(path),
        **_shards(prepared, path, writer.lengths),
    }


def _shards(prepared: Preparation, examples: Path, lengths: Sequence[int]) -> dict[str, Any]:
    """The shards, and how many samples are recorded where that is not all."""
    if prepared.used is None:
        return {"shards": cut_into_shards(lengths)}
    indices = prepared.used.choose(read_domains(examples))
    costs = [n if i in indices else n // UNRECORDED for i, n in enumerate(lengths)]
    shards = shards_with(cut_into_shards(costs), indices)
    return {"shards": shards, "recorded_samples": len(indices)}


@contextlib.contextmanager
def _rejects(data: DataSettings, path: Path) -> Iterator[Rejects]:
    """Where rows that cannot be used are counted; listed in ``path`` if they may be skipped."""
    if data.on_bad_row != "skip":
        yield Rejects()
        return
    with path.open("w", encoding="utf-8") as file:
        yield Rejects(file, max_share=data.max_rejected_share)


def _warn(
    summary: EncodingSummary, rejects: Rejects, listed: Path, chat: Chat, names: Sequence[str]
) -> None:
    """Say what the user may not expect of the training data."""
    if rejects.count:
        _log.warning(
            "%d of %d rows cannot be used and were left out; %s lists them",
            *(rejects.count, rejects.rows, listed),
        )
    if not chat.has_template and set(summary.formats) - {"text"}:
        _log.warning(
            "the tokenizer has no chat template; conversations are rendered in the plain format "
            "'User:', 'Assistant:', each in a line of its own, here and in scoring",
        )
    if chat.writes_date and set(summary.formats) - {"text"}:
        _log.warning(
            "the chat template writes the day's date into every prompt, so records and scores of "
            "different days differ; set an option of the template that fixes it, such as "
            "model.template_options.date_string of Llama 3",
        )
    if chat.unrendered:
        _log.warning(
            "the chat template does not render %s of tools' results; each is taken for that of the "
            "call in the same place, which is so in all rows",
            " and ".join(map(repr, sorted(chat.unrendered))),
        )
    if unread := unread_files(names):
        _log.warning(
            "%d file(s) in the folders of the training data are not read: %s%s",
            len(unread),
            ", ".join(str(path) for path in unread[:MAX_NAMED]),
            ", ..." if len(unread) > MAX_NAMED else "",
        )


def _compare_tokenizers(directory: Path, tokenizer: Any, texts: Sequence[str]) -> None:
    """Warn where other programs, which read ``tokenizer.json`` alone, see other tokens."""
    if (text := differing_text(directory, tokenizer, texts)) is not None:
        _log.warning(
            "%s: transformers builds the tokenizer from the class in tokenizer_config.json (%s), "
            "and tokenizer.json by itself gives other tokens, first for %r; if tokenizer.json "
            'is right, set "tokenizer_class": "PreTrainedTokenizerFast", else save it again',
            *(directory, type(tokenizer).__name__, text[:60]),
        )


def _say(summary: EncodingSummary) -> None:
    """Which forms the rows have, and where a row became more than one sample."""
    forms = ", ".join(f"{count} of {name}" for name, count in summary.formats.items())
    _log.info("Rows of the training data: %s", forms)
    if summary.split:
        _log.info(
            "%d conversation(s) became one sample per answer: the chat template renders an "
            "earlier answer differently once a later turn follows",
            summary.split,
        )


def cut_into_shards(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Consecutive ranges of samples that have about equally many tokens."""
    target = max(SMALLEST_SHARD_TOKENS, min(sum(lengths) // SHARDS, LARGEST_SHARD_TOKENS))
    shards: list[dict[str, Any]] = []
    start = tokens = 0
    for index, length in enumerate(lengths):
        tokens += length
        if tokens >= target or index == len(lengths) - 1:
            name = f"part-{len(shards):05d}.parquet"
            shards.append({"name": name, "start": start, "stop": index + 1})
            start, tokens = index + 1, 0
    return shards
