"""What needs training and scoring: a model that was not kept, curves, going on from a model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lrmc_ray.cluster.session import ray_session
from lrmc_ray.config import load_settings
from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.changes import compare
from lrmc_ray.evaluate.harness import score
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.names import MADE_BY
from lrmc_ray.evaluate.request import ScoreRequest
from lrmc_ray.evaluate.run import evaluate
from lrmc_ray.export.blend_command import main as blend
from lrmc_ray.export.command import main as export
from lrmc_ray.export.trial_model import train_again
from lrmc_ray.files.artifacts import read_manifest, relative_path, write_json, write_manifest
from lrmc_ray.files.blend import read_blend
from lrmc_ray.files.names import MODEL
from lrmc_ray.files.origin import origin_of, read_origin, write_origin
from lrmc_ray.files.study import StudyFile, TrialEntry, read_study, trial_directory, write_study
from lrmc_ray.models.identity import model_fingerprint
from lrmc_ray.models.loading import load_model
from lrmc_ray.models.saving import save_model
from lrmc_ray.record.run import record
from lrmc_ray.tune.choice import model_of
from lrmc_ray.tune.trial import train_and_score
from lrmc_ray.tune.used import samples_of_search
from tests.support.tiny import make_data

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
}


def write_task(folder, name):
    items = [
        {"question": f"{name} {n} and one is", "choices": ["two", "many", "none"], "answer": n % 3}
        for n in range(12)
    ]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {**TASK, "task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task))
    return str(path)


@pytest.fixture(scope="module")
def settings(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("again")
    values = {
        "model.name": str(tiny_model),
        "data.train": str(make_data(folder / "train.jsonl", num_rows=48)),
        "evaluate.domain_tasks": [write_task(folder, "own")],
        "evaluate.general_tasks": [write_task(folder, "other")],
    }
    fixed = ["train.steps=4", "train.lr=1e-2", "train.tau=0.9", "train.tail_samples=16",
             "train.checkpoint_every=2", "evaluate.drift_samples=2"]  # fmt: skip
    return load_settings(None, [*(f"{k}={json.dumps(v)}" for k, v in values.items()), *fixed])


@pytest.fixture(scope="module", params=["samples of the search", "all"])
def study(request, settings, tmp_path_factory, tiny_model):
    """A finished search of one trial, whose model is there."""
    used = None if request.param == "all" else samples_of_search(settings)
    output = tmp_path_factory.mktemp("again_runs")
    directory = output / "search-1"
    own = trial_directory(directory, 0)
    own.mkdir(parents=True)
    with ray_session("local", log=output / "ray.log"):
        recorded = record(settings, output, used)
        base = evaluate(settings, tiny_model, output, split="dev")
        result = train_and_score(settings, own, recorded, base, stored_as="x")
    identity = read_manifest(recorded, made_by="x")["identity"]
    assert ("samples" in identity) == (request.param != "all")
    sections = settings.model_dump(mode="json")
    write_json(directory / "settings.json", sections)
    entry = TrialEntry(
        number=0, role="search", state="COMPLETE", settings=result.train, results=result.results,
        scores=f"trials/0000/{result.scores}", cost=result.cost, directory="trials/0000",
    )  # fmt: skip
    write_study(
        directory,
        StudyFile(
            schema=1, id="search-1", name="search", created="now", state="FINISHED",
            forgetting_weight=1.0, settings=sections, trials=[entry], best=0,
            base_scores=relative_path(base, directory),
        ),
    )  # fmt: skip
    return directory


def test_a_model_that_was_not_kept_is_trained_again_to_the_same_bits(study, tmp_path, capsys):
    kept = tmp_path / "kept"
    shutil.move(model_of(study, 0), kept)
    shutil.rmtree(study.parent / "records")  # what `lrmc prune` removes is recorded again
    assert export([str(study), "--to", str(tmp_path / "mine"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] == model_fingerprint(kept)
    before, after = (load_file(one / "model.safetensors") for one in (kept, tmp_path / "mine"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model_fingerprint(model_of(study, 0)) == model_fingerprint(kept)
    assert not (trial_directory(study, 0) / "again").exists()


def test_other_bits_are_refused(study, settings, tmp_path):
    own = shutil.copytree(study, tmp_path / "runs" / "search-1")
    shutil.copytree(study.parent / "records", tmp_path / "runs" / "records")
    shutil.rmtree(model_of(own, 0))
    entry = read_study(own).trials[0]
    manifest = read_manifest(own / entry.scores, made_by=MADE_BY)
    manifest["identity"]["model"] = "0" * 64
    write_manifest(own / entry.scores, manifest)
    with (
        ray_session("local", log=tmp_path / "ray.log"),
        pytest.raises(DataError, match="must be trained again to the weights that were scored"),
    ):
        train_again(own, entry, settings)
    assert not model_of(own, 0).exists()


def test_a_curve_has_the_scores_of_the_models_that_export_makes(study, tmp_path, capsys):
    argv = [str(study), "--at", "0.5", "--json"]
    assert blend(argv) == 0
    told = json.loads(capsys.readouterr().out)["points"]
    assert [(row["trial"], row["weight"]) for row in told] == [(0, 0.5), (0, 1.0)]
    file = read_study(study)
    assert told[1]["eval/domain_gain"] == file.trials[0].results["eval/domain_gain"]
    assert export([str(study), "--to", str(tmp_path / "half"), "--blend", "0.5"]) == 0
    settings = file.settings["evaluate"]
    request = ScoreRequest(
        tasks=tuple((settings[f"{group}_tasks"][0], group) for group in ("domain", "general")),
        batch_tokens=settings["batch_tokens"],
        precision="fp32",
        limit=settings["limit"],
        split="dev",
        drift_samples={"domain": 0, "general": 0},
    )
    rows = score(tmp_path / "half", request).rows
    point = read_blend(study).points[0]
    scored = Scores.load(study / point.scores)
    # The search's items of the domain task are half of all.
    for task in ("own", "other"):
        of_all = dict(
            (row["item_id"], row["value"])
            for row in rows
            if (row["task"], row["metric"]) == (task, "probability")
        )
        items = scored.metric(task, "probability")
        expected = [of_all[item_id] for item_id in items.item_ids]
        torch.testing.assert_close(items.values.tolist(), expected, rtol=1e-4, atol=1e-6)
    base = Scores.load(study / file.base_scores)
    compared = compare(base, scored, forgetting_weight=1.0, seed=0)
    assert told[0]["eval/domain_gain"] == pytest.approx(compared.domain_gain.value, abs=1e-12)
    assert not list((study / "blends").glob("model*"))
    time_of = (study / point.scores / "manifest.json").stat().st_mtime_ns
    assert blend(argv) == 0  # nothing is scored again
    assert (study / point.scores / "manifest.json").stat().st_mtime_ns == time_of
    page = (study / "report.html").read_text()
    assert "--trial 0 --blend 0.5 --to my_model" in page


def test_a_curve_by_depth_has_the_scores_of_a_blend_by_depth(study, tmp_path, capsys):
    argv = [str(study), "--at", "0.5", "--by-depth", "--json"]
    assert blend(argv) == 0
    told = json.loads(capsys.readouterr().out)["points"]
    (row,) = [row for row in told if row["by_depth"] and row["weight"] < 1.0]
    point = read_blend(study).point(0, 0.5, "depth")
    manifest = read_manifest(study / point.scores, made_by="lrmc blend")
    target = tmp_path / "deep"
    assert export([str(study), "--to", str(target), "--blend", "0.5", "--by-depth"]) == 0
    assert manifest["identity"]["model"] == model_fingerprint(target)
    scored = Scores.load(study / point.scores)
    base = Scores.load(study / read_study(study).base_scores)
    compared = compare(base, scored, forgetting_weight=1.0, seed=0)
    assert row["eval/domain_gain"] == pytest.approx(compared.domain_gain.value, abs=1e-12)


def test_going_on_from_a_tuned_model(study, settings, tmp_path):
    """The tuned model is the base of everything that follows, and says where it comes from."""
    first = tmp_path / "first"
    assert export([str(study), "--to", str(first), "--blend", "0.5"]) == 0
    further = settings.model_copy(
        update={"model": settings.model.model_copy(update={"name": str(first)})}
    )
    with ray_session("local", log=tmp_path / "ray.log"):
        recorded = record(further, tmp_path)
        base = evaluate(further, first, tmp_path, split="dev")
        own = trial_directory(tmp_path / "search-2", 0)
        result = train_and_score(further, own, recorded, base, stored_as="y")
    model = own / "training" / MODEL
    assert model_fingerprint(model) != model_fingerprint(first)
    assert read_manifest(recorded, made_by="x")["identity"]["model"] == model_fingerprint(first)
    assert read_manifest(base, made_by="x")["identity"]["model"] == model_fingerprint(first)
    # Scored by itself against itself, the new base has lost and gained nothing.
    same = tmp_path / "same"
    same.mkdir()
    save_model(load_model(first), first, same)
    with ray_session("local", log=tmp_path / "ray.log"):
        again = evaluate(further, same, tmp_path, split="dev", base=base)
    compared = compare(Scores.load(base), Scores.load(again), forgetting_weight=1.0, seed=0)
    assert compared.domain_gain.value == compared.forgetting.value == 0.0
    assert result.results["eval/domain_gain"] != 0.0
    write_origin(model, origin_of(further, tmp_path))
    made = read_origin(model)
    assert made.model["name"] == str(first)
    assert [(a.base, a.study, a.trial, a.blend) for a in made.ancestors] == [
        (settings.model.name, "search-1", 0, 0.5)
    ]
