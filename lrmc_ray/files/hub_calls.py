"""A time limit for calls to the Hugging Face Hub, some of which have none of their own."""

import functools
from typing import Any

SECONDS = 20.0
"""How long a connection may take, and how long the Hub may be silent then. A listing is asked for
six times, with pauses of 23 seconds in all."""


@functools.cache
def limit_hub_calls() -> None:
    """Let every later call of ``huggingface_hub`` in this process end.

    Where that package gives a call a limit, that one counts. In version 2.4.0 ``auth_check`` and
    the listing of files have none.
    """
    from huggingface_hub import get_session, set_client_factory

    default = get_session()
    kind, hooks = type(default), default.event_hooks
    limited = {**hooks, "request": [*hooks["request"], _limit]}
    # It makes a new client after an error of the connection.
    set_client_factory(lambda: kind(event_hooks=limited, follow_redirects=True, timeout=SECONDS))


def _limit(request: Any) -> None:
    """Give a request a limit that asks for none by name, as listings do."""
    own = request.extensions.get("timeout") or {}
    names = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {
        name: SECONDS if own.get(name) is None else own[name] for name in names
    }
