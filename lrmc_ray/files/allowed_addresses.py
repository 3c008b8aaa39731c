"""Addresses that files of a study or a model name are contacted where the user has asked for it.

A study may come from anybody. Its settings may name a storage, to which a client sends requests
that are signed with this user's key, and its task files may name data behind a URL. Such an address
is contacted where a command of this user has named it before. What was named is kept in the user's
cache. The Hub is not among them: it is the user's own choice, by ``HF_ENDPOINT``.
"""

import contextlib
import hashlib
from pathlib import Path

from lrmc_ray.console import public
from lrmc_ray.errors import ConfigError
from lrmc_ray.files.artifacts import cache_directory

_FOLDER = "allowed_addresses"
"""Holds an empty file for each address that was asked for."""


def allow_addresses(*addresses: str | None) -> None:
    """Note that the user asks for these addresses; None stands for no address."""
    for address in filter(None, addresses):
        with contextlib.suppress(OSError):  # the next command is told to name it, too
            _note(address).parent.mkdir(parents=True, exist_ok=True)
            _note(address).touch()


def check_addresses(*addresses: str | None, named_by: Path, remedy: str) -> None:
    """Refuse addresses that nobody at this machine has asked for, before one is contacted.

    Args:
        *addresses: of storages and data; None stands for no address.
        named_by: the file that names them.
        remedy: how to ask for them.

    Raises:
        ConfigError: one was not asked for; the message says which.
    """
    for address in filter(None, addresses):
        if not _note(address).is_file():
            raise ConfigError(
                f"other places must be contacted at your own wish, and {public(address)} is "
                f"named by {named_by} alone; if you trust it, {remedy}"
            )


def _note(address: str) -> Path:
    return cache_directory() / _FOLDER / hashlib.sha256(address.encode()).hexdigest()
