"""The chat template of a model's directory, wherever the tokenizer keeps it, and its digest."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.chat.template import PLAIN_FORMAT
from lrmc_ray.errors import DataError


def _chat_template(directory: Path) -> Any:
    """The chat template, wherever the tokenizer keeps it; None without.

    Raises:
        DataError: the file that holds it is not readable.
    """
    template: Any = None
    try:
        if (file := directory / "chat_template.jinja").is_file():
            template = file.read_text(encoding="utf-8")
        for name in ("chat_template.json", "tokenizer_config.json"):
            if template is None and (file := directory / name).is_file():
                template = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{file} is not readable ({error}); save the tokenizer again") from None
    return template


def has_chat_template(directory: Path) -> bool:
    """Whether the tokenizer of a model directory says how a conversation is written."""
    return bool(_chat_template(directory))


def template_fingerprint(directory: Path, options: Mapping[str, Any] | None = None) -> str:
    """SHA-256 of the chat template, wherever the tokenizer keeps it, and of what it is given.

    Without a template it is that of the plain format that stands in for one.

    Raises:
        DataError: the file that holds it is not readable.
    """
    rendered = _chat_template(directory) or PLAIN_FORMAT
    if options:
        rendered = [rendered, dict(options)]
    return hashlib.sha256(json.dumps(rendered, sort_keys=True).encode()).hexdigest()
