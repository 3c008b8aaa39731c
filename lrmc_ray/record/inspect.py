"""What one looks at in a record: samples token by token, and whether every file is whole."""

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lrmc_ray.command_line import pasteable
from lrmc_ray.config import ModelSettings
from lrmc_ray.console import harmless, plain_console, progress
from lrmc_ray.errors import ConfigError, DataError, IncompleteArtifactError, LrmcError
from lrmc_ray.files.artifacts import MANIFEST, PARTIAL, is_finished
from lrmc_ray.method.microbatch import Sample
from lrmc_ray.models.directory import local_directory
from lrmc_ray.models.identity import tokenizer_fingerprint
from lrmc_ray.models.loading import load_tokenizer
from lrmc_ray.record.describe import print_summary
from lrmc_ray.record.identity import SAMPLES
from lrmc_ray.record.names import MADE_BY
from lrmc_ray.record.reader import Records

TOP = 5
"""Candidates of a position that are shown."""


def find_record(directory: Path) -> Path:
    """The record in ``directory``, which may also hold records, or be an output directory.

    Raises:
        IncompleteArtifactError: there is none, or none that is finished.
        ConfigError: there are several.
    """
    if is_finished(directory):
        return directory
    for folder in (directory, directory / "records"):
        found = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
        found = [path for path in found if path.suffix != PARTIAL]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(str(path) for path in found)
            raise ConfigError(f"{folder} must hold one record, it holds {names}; give one of them")
    raise IncompleteArtifactError(
        f"{directory} holds no finished record; run `{MADE_BY}` (again: it goes on where it "
        "stopped), or give another directory"
    )


def verify(records: Records) -> dict[str, Any]:
    """Read every file and every sample; what there is to say of it when all is well.

    Raises:
        DataError: a file is missing, damaged or another one, or a sample contradicts itself.
    """
    start = time.monotonic()
    names = {part.name for part in records.parts}
    num_bytes = 0
    seen: set[str] = set()
    with progress("Verifying", total=len(records.parts), unit="files") as bar:
        for part, info in enumerate(records.parts):
            for sample in records.samples_of_part(part):
                if sample.sample_id in seen:
                    raise DataError(
                        f"{records.directory / info.name}: sample {sample.sample_id} is in the "
                        f"record twice; remove {records.directory} and record again"
                    )
                seen.add(sample.sample_id)
            num_bytes += (records.directory / info.name).stat().st_size
            bar.advance()
    seconds = time.monotonic() - start
    if (index := records.index_path()) is not None:
        names.add(index.name)
    strays = sorted(
        path.name for path in records.directory.glob("*.parquet") if path.name not in names
    )
    return {
        "files": len(records.parts),
        "samples": len(records),
        "bytes": num_bytes,
        "bytes_per_second": round(num_bytes / max(seconds, 1e-9)),
        "stray_files": strays,
    }


def spread_evenly(num_samples: int, number: int) -> list[int]:
    """``number`` indices of samples, evenly spread: the samples are sorted by length."""
    number = min(number, num_samples)
    return [(2 * i + 1) * num_samples // (2 * number) for i in range(number)]


def describe_sample(sample: Sample, tokenizer: Any) -> dict[str, Any]:
    """A sample as plain values, one entry for every token."""
    candidates = sample.candidates
    rho = candidates.outside_mass().tolist()
    bounds = candidates.offsets.tolist()
    tokens: list[dict[str, Any]] = [
        {"id": token, "text": _text(tokenizer, token), "role": "none"}
        for token in sample.input_ids_T.tolist()
    ]
    for row, (position, is_supervised) in enumerate(
        zip(sample.positions_P.tolist(), sample.is_supervised_P.tolist(), strict=True)
    ):
        entries = range(bounds[row], bounds[row + 1])
        tokens[position + 1] |= {
            "role": "supervised" if is_supervised else "prompt",
            "k": len(entries),
            "rho": rho[row],
            "top": [
                {
                    "id": int(candidates.token_ids[entry]),
                    "text": _text(tokenizer, int(candidates.token_ids[entry])),
                    "probability": float(candidates.logprobs[entry].double().exp()),
                }
                for entry in entries[:TOP]
            ],
        }
    return {"sample_id": sample.sample_id, "domain": sample.domain, "tokens": tokens}


def _text(tokenizer: Any, token: int) -> str:
    if tokenizer is None:
        return str(token)
    text: str = tokenizer.decode([token])
    return text


def show_sample(sample: Mapping[str, Any], console: Console, *, with_prompt: bool = False) -> None:
    """The text in colours, then a line for every token: what the base model thought of it.

    The lines begin at the first token that is learned, or at the very first ``with_prompt``.

    K, rho and candidates in a token's line are of the position before it, which predicts it.
    """
    styles = {"supervised": "green", "prompt": "dim", "none": "dim"}
    domain = f", domain {sample['domain']}" if sample["domain"] else ""
    console.print(Text(harmless(f"\nsample {sample['sample_id']}{domain}"), style="bold"))
    text = Text()
    for token in sample["tokens"]:
        text.append(harmless(token["text"]), style=styles[token["role"]])
    console.print(text)
    table = Table(box=None, pad_edge=False)
    for name in ("token", "", "K", "rho", "candidates"):
        table.add_column(name, justify="right" if name in ("K", "rho") else "left")
    roles = [token["role"] for token in sample["tokens"]]
    first = 0 if with_prompt or "supervised" not in roles else roles.index("supervised")
    for token in sample["tokens"][first:]:
        style = styles[token["role"]]
        row = [Text(repr(token["text"])[1:-1], style=style), Text(token["role"], style=style)]
        if "k" in token:
            tops = Text(no_wrap=True, overflow="ellipsis")
            for top in token["top"]:
                is_gold = top["id"] == token["id"]
                tops.append(repr(top["text"])[1:-1], style="bold" if is_gold else "")
                tops.append(f" {top['probability']:.3f}  ", style="dim")
            row += [Text(str(token["k"])), Text(f"{token['rho']:.3f}"), tops]
        table.add_row(*row)
    if first:
        console.print(f"from the first learned token; {first} before it (--prompt)", style="dim")
    console.print(table)


def _tokenizer(records: Records, model: str | None) -> Any:
    """The tokenizer that the record was made with.

    Raises:
        DataError: ``model`` has another one.
    """
    manifest = records.manifest
    directory = local_directory(ModelSettings(name=model or manifest["model"]))
    if tokenizer_fingerprint(directory) != manifest["identity"]["tokenizer"]:
        raise DataError(
            f"the record was made with another tokenizer than that of {model or manifest['model']}"
            "; give the model that was recorded with --model"
        )
    return load_tokenizer(directory)


def shown_samples(records: Records, number: int, model: str | None) -> Iterator[dict[str, Any]]:
    """``number`` samples as :func:`describe_sample` gives them, with text or at least with ids.

    Raises:
        DataError: ``model`` has another tokenizer than the record.
    """
    try:
        tokenizer = _tokenizer(records, model)
    except LrmcError as error:
        if model is not None:
            raise
        tokenizer = None
        print(f"token ids in place of text: {error}", file=sys.stderr)
    yield from (describe_sample(sample, tokenizer) for sample in _spread(records, number))


def _spread(records: Records, number: int) -> Iterator[Sample]:
    """``number`` recorded samples, evenly spread."""
    if records.manifest["identity"].get(SAMPLES) is None:
        yield from (records[index] for index in spread_evenly(len(records), number))
        return
    has_positions = [i for i in range(len(records)) if len(records[i].positions_P)]
    for place in spread_evenly(len(has_positions), number):
        yield records[has_positions[place]]


def show_record(result: Mapping[str, Any], *, with_prompts: bool = False) -> None:
    """What was asked of a record, on stdout; the keys are those of ``lrmc inspect --json``.

    Args:
        result: what is to be shown.
        with_prompts: samples from their first token on, not from the first that is learned.
    """
    directory, identity = result["directory"], result["identity"]
    if verified := result.get("verified"):
        print(
            f"OK: all {verified['files']} files are as they were recorded: "
            f"{verified['samples']:,} samples, {verified['bytes']:,} bytes, "
            f"{verified['bytes_per_second'] / 1e6:.0f} MB/s."
        )
        if verified["stray_files"]:
            print(f"Not of the record, never read: {', '.join(verified['stray_files'])}")
    print(f"The record in {directory}")
    if samples := result.get("samples", ()):
        console = plain_console()
        for sample in samples:
            show_sample(sample, console, with_prompt=with_prompts)
        return
    print_summary(result["summary"], k_max=identity.get("k_max"))
    if not verified:
        print("Made of:")
        for name, value in identity.items():
            print(f"{name:>20}  {value}")
        print(f"Next: {pasteable('lrmc', 'inspect', directory, '--sample', 3)}, or --verify")
