"""Whether the Hugging Face Hub gives the questions of a task, asked before anything runs."""

from collections.abc import Mapping
from pathlib import Path

from lrmc_ray.errors import IncompleteArtifactError
from lrmc_ray.files.hub_calls import limit_hub_calls
from lrmc_ray.tasks.registry import GROUPS

ANSWER_SECONDS = 10.0
"""How long the Hub may take to answer."""


def check_reachable(datasets_of: Mapping[str, str]) -> None:
    """Refuse tasks whose data are neither here nor to be had.

    Args:
        datasets_of: name on the Hub by task; each is asked for once.

    Raises:
        IncompleteArtifactError: names the task, its data and what to do.
    """
    task_of = {name: task for task, name in reversed(list(datasets_of.items()))}
    for name, task in task_of.items():
        if not _is_cached(name) and (why := _why_not(name)) is not None:
            raise IncompleteArtifactError(
                f"task {task} takes its questions from {name} on the Hugging Face Hub, which does "
                f"not give them ({why}); check the name and the network, log in with `hf auth "
                f"login`, or choose tasks that need no download: "
                f"{', '.join(GROUPS['general_offline'])}"
            )


def _is_cached(name: str) -> bool:
    """Whether `datasets` has loaded it before; it is then found without a network, too."""
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    return (cache / name.replace("/", "___")).is_dir()


def _why_not(name: str) -> str | None:
    """Why the Hub does not give a data set to this user; None where it does."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    limit_hub_calls()
    api = HfApi()
    try:
        if api.dataset_info(name, timeout=ANSWER_SECONDS).gated:
            api.auth_check(name, repo_type="dataset")
    except GatedRepoError:
        return "its terms must be accepted on its page first"
    except RepositoryNotFoundError:
        return "there is none of this name, or it is private"
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code >= 500:
            return f"it answers {error.response.status_code}"
        return str(error).strip().splitlines()[0]
    except Exception as error:  # of the network; the classes differ between the client's versions
        return f"it cannot be reached: {type(error).__name__}"
    return None
