"""A time limit for calls to the Hugging Face Hub, some of which have none of their own."""

import functools

SECONDS = 60.0
"""How long a connection may take, and how long the Hub may be silent then."""


@functools.cache
def limit_hub_calls() -> None:
    """Let every later call of ``huggingface_hub`` in this process end.

    Where that package gives a call a limit, that one counts. In version 2.4.0 ``auth_check`` and
    the listing of files have none (findings/hub_calls_without_limit.sh).
    """
    from huggingface_hub import get_session, set_client_factory

    default = get_session()
    kind, hooks = type(default), default.event_hooks
    # It makes a new client after an error of the connection.
    set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=SECONDS))
