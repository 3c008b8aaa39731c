"""Training data before anything is recorded: every row token by token, or why it is refused."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lrmc_ray.chat.answers import Chat
from lrmc_ray.config import ModelSettings
from lrmc_ray.console import harmless
from lrmc_ray.models.directory import tokenizer_directory
from lrmc_ray.models.loading import load_tokenizer
from lrmc_ray.record.encode import BATCH_ROWS, Example, encode_batch
from lrmc_ray.record.rows import Rejects, Row, read_rows
from lrmc_ray.record.sources import find_sources

_PLACE = re.compile(r"(?P<name>.+):(?:row )?(?P<number>\d+)", re.DOTALL)


def inspect_rows(names: Sequence[str], model: ModelSettings) -> Iterator[dict[str, Any]]:
    """One object for every sample and every refused row, in the order of the rows.

    Args:
        names: files, folders and so on, or the place of one row as messages give it.
        model: whose tokenizer renders; a directory needs no weights.

    Raises:
        IncompleteArtifactError: a name stands for no file, or the model is not there.
        DataError: a file or the tokenizer cannot be read.
    """
    chat = Chat(load_tokenizer(tokenizer_directory(model)), model.template_options)
    rows = itertools.chain.from_iterable(map(_rows_of, names))
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        for row, result in encode_batch(batch, chat):
            if isinstance(result, str):
                yield {"place": row.place, "problem": result}
                continue
            for example in result:
                yield {
                    "place": row.place,
                    "text": example.text,
                    "tokens": [
                        {"id": token, "text": text, "learned": learned}
                        for token, text, learned in zip(
                            example.input_ids,
                            _token_texts(example, chat.tokenizer),
                            example.is_target,
                            strict=True,
                        )
                    ],
                }


def _rows_of(name: str) -> Iterator[Row]:
    match = _PLACE.fullmatch(name)
    if match is None or Path(name).exists() or not Path(match["name"]).is_file():
        yield from read_rows(find_sources([name]), Rejects())
        return
    for row in read_rows(find_sources([match["name"]]), Rejects()):
        if row.place.rpartition(":")[2].removeprefix("row ") == match["number"]:
            yield row


def _token_texts(example: Example, tokenizer: Any) -> list[str]:
    """The text of every token, so that together they are the whole text where that can be.

    A token that the tokenizer itself puts before or behind a plain text is shown beside it.
    """
    texts = [str(tokenizer.decode([token])) for token in example.input_ids]
    if "".join(texts) == example.text or not getattr(tokenizer, "is_fast", False):
        return texts
    for around in (False, True):  # plain text may have a first token that is no part of it
        encoded = tokenizer(
            example.text,
            add_special_tokens=around,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            truncation=False,
        )
        if encoded["input_ids"] == example.input_ids:
            break
    else:
        return texts
    done, parts = 0, []
    for index, (start, stop) in enumerate(encoded["offset_mapping"]):
        if start == stop and encoded["special_tokens_mask"][index]:
            parts.append(texts[index])
            continue
        parts.append(example.text[done : max(done, stop)])
        done = max(done, stop)
    # A normalizer may join the last characters into one.
    last = max(
        (i for i, span in enumerate(encoded["offset_mapping"]) if span[0] < span[1]), default=0
    )
    parts[last] += example.text[done:]
    return parts


def show_row(sample: Mapping[str, Any], console: Console) -> None:
    """A sample in colours, what is learned in green; or why the row is refused."""
    console.print(Text(harmless(f"\n{sample['place']}"), style="bold"))
    if "problem" in sample:
        console.print(Text(harmless(f"refused: {sample['problem']}"), style="red"))
        return
    text = Text()
    for token in sample["tokens"]:
        text.append(harmless(token["text"]), style="green" if token["learned"] else "dim")
    console.print(text)
    learned = sum(token["learned"] for token in sample["tokens"])
    console.print(Text(f"{learned} of {len(sample['tokens'])} tokens are learned", style="dim"))
