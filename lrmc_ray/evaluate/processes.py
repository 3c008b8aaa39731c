"""The processes that score: this one, or Ray tasks side by side."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from lrmc_ray.cluster.resources import held_cores, task_options
from lrmc_ray.config import ResourceSettings
from lrmc_ray.errors import EvaluationError, LrmcError
from lrmc_ray.evaluate.harness import score
from lrmc_ray.evaluate.request import ScoreRequest, ScoreResult
from lrmc_ray.evaluate.waiting import Watched, check_wanted, results_of
from lrmc_ray.files.place import LocalPlace, Place
from lrmc_ray.models.directory import send_model


@dataclass(frozen=True)
class ScoredModel:
    """The model that is scored, and where processes that score it find it."""

    directory: Path
    place: Place
    is_base: bool
    """A base model stays on the nodes that fetched it, as those of recording do; a tuned one does
    not."""
    stored_as: str | None = None
    """Name under which a tuned model may be in the storage already."""

    @contextmanager
    def sent(self) -> Iterator[str]:
        """What :func:`score_part` finds the model by, for as long as it is scored."""
        if self.is_base:
            yield send_model(self.place, self.directory)
        else:
            with self.place.lend(self.directory, name=self.stored_as) as sent:
                yield sent


def score_here(
    model: ScoredModel,
    requests: Sequence[ScoreRequest],
    resources: ResourceSettings,
) -> list[ScoreResult]:
    """Score in this process, while Ray gives its cores to nobody else.

    Raises:
        EvaluationError: scoring failed; the message has the cause.
    """
    cores = resources.cpus_per_worker
    with held_cores(cores):
        try:
            return [
                score_part(str(model.directory), request, cores, LocalPlace(), model.is_base, None)
                for request in requests
            ]
        except LrmcError:
            raise
        except Exception as error:
            raise EvaluationError(f"scoring {model.directory} failed: {error!r}") from error


def score_in_tasks(
    model: ScoredModel,
    requests: Sequence[ScoreRequest],
    resources: ResourceSettings,
    directory: Path,
    is_wanted: Callable[[], bool],
) -> list[ScoreResult]:
    """Score in Ray tasks side by side; one whose process or node is lost is started again.

    Args:
        model: what is scored.
        requests: the work of each task.
        resources: what a task has.
        directory: where the scores will be, by which the tasks are found if they hang.
        is_wanted: whether to go on, asked again and again.

    Raises:
        EvaluationError: scoring failed, hangs, or is not wanted; the message has the cause.
    """
    import ray

    check_wanted(is_wanted)  # else Ray, which may be shut down by now, would be started again
    remote = ray.remote(score_part).options(**task_options(resources))
    threads = resources.cpus_per_worker
    work = str(directory.resolve())
    tasks = [Watched(work, number, model.place) for number in range(len(requests))]
    try:
        with model.sent() as sent:
            references = [
                remote.remote(sent, request, threads, model.place, model.is_base, task)
                for request, task in zip(requests, tasks, strict=True)
            ]
            results: list[ScoreResult] = results_of(
                references,
                tasks,
                resources.hang_seconds,
                stop=lambda reference: ray.cancel(reference, force=True),
                is_wanted=is_wanted,
            )
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LrmcError):
            raise error.cause from None
        raise EvaluationError(f"scoring {model.directory} failed: {error.cause!r}") from error
    except ray.exceptions.RayError as error:
        raise EvaluationError(f"scoring {model.directory} failed: {error}") from error
    return results


def score_part(
    sent: str,
    request: ScoreRequest,
    threads: int,
    place: Place,
    is_base: bool,
    watched: Watched | None,
) -> ScoreResult:
    """Answer one request, in a Ray task or in the process of a trial.

    Args:
        sent: what all nodes call the model; see :meth:`ScoredModel.sent`.
        request: what is to be scored.
        threads: torch threads of this process.
        place: where this node finds the model.
        is_base: whether the node keeps what it fetches.
        watched: by whom its signs of life are looked for; a trial's own process has been giving
            them since it began.
    """
    import torch

    torch.set_num_threads(threads)
    with watched.shown() if watched else nullcontext():
        if is_base:
            return score(place.here(sent), request)
        with place.borrowed(sent) as directory:
            return score(directory, request)
