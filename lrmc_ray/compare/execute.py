"""One run of a comparison, in a process of its own."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.compare.blends import BlendPlace, score_blends
from lrmc_ray.config import RunSettings
from lrmc_ray.evaluate.request import Split
from lrmc_ray.files.artifacts import is_finished
from lrmc_ray.files.names import MODEL
from lrmc_ray.method.names import Blend
from lrmc_ray.tune.result import RunResult
from lrmc_ray.tune.trial import attempt, leave_storage, train_and_score


def execute(
    *,
    name: str,
    split: Split,
    settings: Mapping[str, Any],
    directory: str,
    record: str,
    base_scores: str,
    general_from: str | None,
    stored_as: str,
    blends: Sequence[tuple[Blend, float]] = (),
) -> None:
    """Train and score one model, and leave the result in its directory; runs in a Ray task.

    Args:
        name: of the run, by which a test asks for a fault.
        split: which questions the domain's task asks.
        settings: of the run.
        directory: of the run.
        record: what it is trained on.
        base_scores: the base model's scores on the same split.
        general_from: scores of the same model whose general tasks are taken over.
        stored_as: name of the run in a storage.
        blends: form and weight of models between the base and this one, which are scored, too.

    Raises:
        LrmcError: the run failed; the cause is in its ``failure.json`` as well.
    """
    own, run = Path(directory), RunSettings.model_validate(dict(settings))

    def work() -> RunResult:
        training = own / "training"
        if is_finished(training) and not (training / MODEL).is_dir():
            shutil.rmtree(training)  # its model was removed: it is trained again, to the same bits
        result = train_and_score(
            run,
            own,
            Path(record),
            Path(base_scores),
            stored_as=stored_as,
            split=split,
            general_from=Path(general_from) if general_from else None,
        )
        if blends:
            places = [BlendPlace(form, weight) for form, weight in blends]
            stored_run = f"{stored_as}/training"
            score_blends(run, own, Path(base_scores), places, stored_as=stored_run)
        leave_storage(run, stored_as)
        return result

    attempt(own, name, work, result_file=f"{split}.json")
