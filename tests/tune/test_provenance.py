"""A study is of its contents as well as of its settings, and says so when it begins anew."""

import json
import logging
import shutil

import pytest

from lrmc_ray.compare import description as comparison
from lrmc_ray.config import RunSettings
from lrmc_ray.errors import DataError
from lrmc_ray.files.artifacts import MANIFEST, fingerprint
from lrmc_ray.record.identity import why_again
from lrmc_ray.tune.description import Description, study_directory, study_identity
from lrmc_ray.tune.provenance import check_unchanged, contents
from lrmc_ray.tune.run import Search
from tests.support.synthetic_comparison import make_space
from tests.support.tiny import make_data


@pytest.fixture
def settings(tmp_path, tiny_model):
    """Of a search whose model, data and task are files of the test."""
    shutil.copytree(tiny_model, tmp_path / "model")
    make_data(tmp_path / "train.jsonl", num_rows=3)
    (tmp_path / "task.yaml").write_text(
        "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: items.jsonl}}\n"
    )
    (tmp_path / "items.jsonl").write_text("{}\n")
    return RunSettings.model_validate(
        {
            "model": {"name": str(tmp_path / "model")},
            "data": {"train": [str(tmp_path / "train.jsonl")]},
            "evaluate": {
                "domain_tasks": [str(tmp_path / "task.yaml")], "general_tasks": ["wordnet"]
            },
        }
    )  # fmt: skip


def add_line(path, line='{"prompt": "a", "completion": "b"}'):
    path.write_text(f"{path.read_text()}{line}\n")


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: add_line(folder / "train.jsonl"), {"training data"}),
        (lambda folder: (folder / "items.jsonl").write_text("{ }\n"), {"tasks"}),
        (lambda folder: add_line(folder / "task.yaml", "num_fewshot: 1"), {"tasks"}),
        (lambda folder: change_json(folder / "model/config.json", rope_theta=7.0), {"model"}),
        (lambda folder: change_json(folder / "model/tokenizer_config.json", x=1), {"tokenizer"}),
        (lambda folder: (folder / "model/chat_template.jinja").write_text("x"),
         {"tokenizer", "chat template"}),
    ],
)  # fmt: skip
def test_changed_contents_are_another_study_and_the_same_ones_the_same(
    change, named, settings, tmp_path, caplog
):
    caplog.set_level(logging.WARNING)
    before = contents(settings)
    first = Description(study_directory(settings, tmp_path, before), settings, before)
    first.end()
    assert contents(settings) == before
    assert first.file.contents == before
    check_unchanged(before, settings)
    change(tmp_path)
    now = contents(settings)
    assert {name for name in now if now[name] != before[name]} == named
    with pytest.raises(DataError, match=rf"the ({'|'.join(named)}).* must not change while"):
        check_unchanged(before, settings)
    assert not caplog.records
    second = Description(study_directory(settings, tmp_path, now), settings, now)
    assert second.directory != first.directory
    assert second.file.state == "RUNNING"
    (said,) = caplog.messages
    assert said.endswith(f"{second.directory.name} begins anew, and {first.directory.name} "
                         "stays as it is")  # fmt: skip
    assert {name for name in now if f"the {name}" in said} == named
    again = Description(study_directory(settings, tmp_path, before), settings, before)
    assert again.file.state == "FINISHED"
    assert len(caplog.messages) == 1


def test_other_scoring_code_is_another_study(settings, monkeypatch):
    before = contents(settings)
    monkeypatch.setattr("lrmc_ray.evaluate.run.SCORING", 10**6)
    now = contents(settings)
    assert [name for name in now if now[name] != before[name]] == ["scoring"]


@pytest.mark.parametrize("slots", [1, 2])
def test_data_that_change_while_the_base_is_scored_end_the_search(
    slots, settings, tmp_path, monkeypatch
):
    made_of = contents(settings)

    def evaluate(*_, **__):
        add_line(tmp_path / "train.jsonl")
        return tmp_path

    monkeypatch.setattr("lrmc_ray.tune.run.evaluate", evaluate)
    monkeypatch.setattr("lrmc_ray.tune.run.worker_slots", lambda *_: slots)
    search = Search(settings, tmp_path / "runs", made_of)

    def score():
        with search.base_scores() as base:
            search.prepare(tmp_path, base)
            base.wait()

    with pytest.raises(DataError, match="the training data must not change while a study runs"):
        score()
    assert search.description.file.base_scores is None


def test_a_study_of_an_older_version_is_not_mixed_in(settings, tmp_path, caplog):
    name = f"{settings.study_name()}-{fingerprint(study_identity(settings))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "study.json").write_text('{"schema": 1}')
    made_of = contents(settings)
    Description(study_directory(settings, tmp_path, made_of), settings, made_of)
    assert f"{name} does not say what it was trained and scored on" in caplog.text


def test_a_comparison_is_of_its_contents_and_its_report_needs_none(tmp_path, caplog):
    def made_of(model, **changes):
        made = {"model": model, "tasks": "b"}
        return comparison.Description(make_space(**changes), ["sft"], tmp_path, made)

    first = made_of("a")
    first.open()
    second = made_of("c")
    assert second.directory != first.directory
    second.go_back()
    assert second.directory == first.directory
    second = made_of("c")
    second.open()
    assert f"the model changed since {first.directory.name}: " in caplog.text
    other = made_of("d", train={"steps": 13})
    other.go_back()
    assert not other.has_begun


def test_a_record_of_the_same_data_that_is_too_small_is_named(tmp_path):
    there = {"model": "m", "data": "d", "tau": 0.99, "k_max": 64}
    directory = tmp_path / "records" / "old"
    directory.mkdir(parents=True)
    (directory / MANIFEST).write_text(json.dumps({"identity": there}))
    (tmp_path / "records" / "damaged").mkdir()
    (tmp_path / "records" / "damaged" / MANIFEST).write_text("{")
    new = tmp_path / "records" / "new"
    said = why_again(new, {**there, "tau": 0.999})
    assert "tau 0.999 (there 0.99) is asked for now, so they are recorded once more" in said
    assert "record once with the largest that you need" in said
    said = why_again(new, {**there, "tau": 0.9, "k_max": 32})
    assert "that one holds all of it: give record.tau=0.99 record.k_max=64 to use it" in said
    (directory / MANIFEST).write_text(json.dumps({"identity": {**there, "samples": {"seed": 1}}}))
    said = why_again(new, {**there, "tau": 0.9})
    assert "record once with the largest that you need" in said
    (directory / MANIFEST).write_text(json.dumps({"identity": there}))
    said = why_again(new, {**there, "tau": 0.9, "k_max": 128})
    assert "record once with the largest that you need" in said
    assert why_again(new, {**there, "tau": 0.999, "data": "e"}) is None
    assert why_again(new, there) is None
