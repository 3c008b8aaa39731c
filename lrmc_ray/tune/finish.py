"""The end of a search: final scores, the best model with its card, the report."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lrmc_ray.ask.mlflow_model import write_mlmodel
from lrmc_ray.console import progress
from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.run import evaluate
from lrmc_ray.files.artifacts import PARTIAL, relative_path
from lrmc_ray.files.fault_points import passed
from lrmc_ray.files.names import BEST_MODEL, SETTINGS_FILE
from lrmc_ray.files.origin import Origin, origin_of, read_origin, write_origin
from lrmc_ray.files.study import STUDY_FILE, Artifact, TrialEntry
from lrmc_ray.models.directory import local_directory
from lrmc_ray.report.figures_png import FIGURE_FILE
from lrmc_ray.report.mlflow import StudyTracker, best_model_of
from lrmc_ray.report.mlflow_note import study_note, study_scores
from lrmc_ray.report.model_card import write_model_card
from lrmc_ray.report.page import REPORT_FILE, write_study_report
from lrmc_ray.report.study import load_study
from lrmc_ray.tune.choice import model_of
from lrmc_ray.tune.description import Description


@dataclass(frozen=True)
class Finalist:
    """A model that is scored on the test items."""

    model: Path
    searched: str
    """Its scores of the search, relative to the study."""


def finalists(description: Description) -> dict[str, Finalist]:
    """``base``, and ``best`` and ``yardstick`` where there is such a trial with its model."""
    study, directory = description.file, description.directory
    assert study.base_scores is not None, "the base is scored before the finalists"
    found = {
        "base": Finalist(local_directory(description.settings.model), study.base_scores),
    }
    chosen: list[tuple[str, TrialEntry]] = []
    if study.best is not None and (best := study.trial(study.best)) is not None:
        chosen.append(("best", best))
    chosen += [
        ("yardstick", trial)
        for trial in study.trials
        if trial.role == "yardstick" and trial.state == "COMPLETE"
    ]
    for name, trial in chosen:
        model = model_of(directory, trial.number)
        if model.is_dir() and trial.scores is not None:
            found[name] = Finalist(model, trial.scores)
    return found


def score_finalists(description: Description, output: Path) -> None:
    """Score base, best and yardstick on the test items.

    Args:
        description: of the search, whose trials have ended; gets the paths of the scores.
        output: the directory of the scores that searches share.
    """
    scored = finalists(description)
    limited = description.settings.evaluate.model_copy(update={"limit": description.final_limit})
    settings = description.settings.model_copy(update={"evaluate": limited})

    def score(name: str, base: Path | None) -> Path:
        return evaluate(
            settings,
            scored[name].model,
            output,
            split="test",
            base=base,
            # The general tasks have one set of items; only the domain has fresh questions.
            general_from=(description.directory / scored[name].searched).resolve(),
        )

    title = "Scoring on the test questions"
    with progress(title, total=len(scored), unit="models") as bar:
        base = score("base", None)
        final = {"base": relative_path(base, description.directory)}
        bar.advance(1)
        others = [name for name in scored if name != "base"]
        if scored.get("best") == scored.get("yardstick"):
            others = others[:1]  # one model, one evaluation
        with ThreadPoolExecutor(max(1, len(others))) as pool:
            for name, scores in zip(
                others, pool.map(lambda name: score(name, base), others), strict=True
            ):
                final[name] = relative_path(scores, description.directory)
                bar.advance(1)
        if len(final) < len(scored):
            final["yardstick"] = final["best"]
            bar.advance(1)
    description.file.final = final
    description.file.final_limit = description.final_limit
    description.write()


def export_best(description: Description) -> Path | None:
    """Copy the best trial's model, with its model card, to ``best_model``; None without one."""
    study, directory = description.file, description.directory
    trial = None if study.best is None else study.trial(study.best)
    if trial is None:
        return None
    final = directory / BEST_MODEL
    wanted = origin_of(
        description.settings,
        directory.parent,
        train=trial.settings,
        study=study.id,
        trial=trial.number,
        limit=description.final_limit,
    )
    if _is_made_so(final, wanted):
        return final
    partial = final.with_name(BEST_MODEL + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model_of(directory, trial.number), partial)
    write_origin(partial, wanted)
    write_model_card(partial, directory, study.name)
    write_mlmodel(partial)
    passed("tune.model_copied")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final


def _is_made_so(directory: Path, wanted: Origin) -> bool:
    try:
        return read_origin(directory) == wanted
    except DataError:
        return False


def report(description: Description, tracker: StudyTracker) -> None:
    """Write the report of what there is, and send it to MLflow."""
    description.write()
    study = load_study(description.directory)
    write_study_report(study)
    tracker.describe(study_note(study), study_scores(study), best_model_of(description.directory))
    artifacts = [
        Artifact(path=SETTINGS_FILE, folder="config"),
        Artifact(path=REPORT_FILE, folder=""),
        Artifact(path=FIGURE_FILE, folder=""),
    ]
    description.file.artifacts = artifacts
    description.write()
    for artifact in artifacts:
        tracker.log_artifact(description.directory / artifact.path, artifact.folder)


def report_files(directory: Path) -> dict[str, Path]:
    """What people read of a search, by name."""
    names = (SETTINGS_FILE, STUDY_FILE, REPORT_FILE, FIGURE_FILE)
    return {name: directory / name for name in names}
