"""Why did the workers fail: was it a loss of workers, or an error of the training?"""

from collections.abc import Iterable

_INNER = ("_base_exc", "controller_failure", "health_check_failure", "cause", "__cause__")
"""Where errors of Ray keep what they wrap."""


def telling_cause(error: BaseException) -> BaseException:
    """The innermost error of what Ray Train wraps several times."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return telling_cause(_most_telling(failures.values()))
    for attribute in _INNER:
        inner = getattr(error, attribute, None)
        if isinstance(inner, BaseException) and inner is not error:
            return telling_cause(inner)
    return error


def _most_telling(errors: Iterable[BaseException]) -> BaseException:
    """An error of the loop itself, if there is one: it breaks the others' collectives."""
    causes = list(errors)
    own = [
        e for e in causes if not is_worker_loss(telling_cause(e)) and "gloo" not in str(e).lower()
    ]
    return (own or causes)[0]


def is_worker_loss(cause: BaseException) -> bool:
    """Whether a process or a node died, rather than the loop raising an error."""
    modules = {kind.__module__.partition(".")[0] for kind in type(cause).__mro__}
    is_collective = any(kind.__module__ == "torch.distributed" for kind in type(cause).__mro__)
    return "ray" in modules or is_collective or "gloo" in str(cause).lower()


def cause_text(cause: BaseException) -> str:
    """The cause in one line."""
    lines = str(cause).strip().splitlines()
    first = lines[0] if lines else ""
    return first if isinstance(cause, FloatingPointError) else f"{type(cause).__name__}: {first}"
