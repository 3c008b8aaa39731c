"""``study.json``: what is written is read back, and nothing that is there gets lost."""

import json

import pytest

from lrmc_ray.errors import ConfigError, DataError, IncompleteArtifactError
from lrmc_ray.files.study import (
    FoundRange,
    StudyFile,
    TrialEntry,
    TrialLine,
    find_study,
    read_outline,
    read_study,
    trial_directory,
    write_study,
)

LEAST = {
    "schema": 1,
    "id": "demo-1",
    "name": "demo",
    "created": "now",
    "state": "RUNNING",
    "forgetting_weight": 1.0,
}


def written(directory):
    return json.loads((directory / "study.json").read_text())


def test_only_what_was_set_is_written(tmp_path):
    study = StudyFile(**LEAST)
    write_study(tmp_path, study)
    assert written(tmp_path) == LEAST
    study.best = None
    study.ranges = {"tau": FoundRange(0.8, 0.99, "why")}
    study.trials = [TrialEntry(number=0, role="defaults", state="FAIL", cause="c")]
    write_study(tmp_path, study)
    assert written(tmp_path) == LEAST | {
        "best": None,
        "ranges": {"tau": {"low": 0.8, "high": 0.99, "reason": "why"}},
        "trials": [{"number": 0, "role": "defaults", "state": "FAIL", "cause": "c"}],
    }


def test_a_file_that_is_read_and_written_again_is_the_same(tmp_path):
    """Whole numbers stay whole, and keys of a newer version stay."""
    trial = {
        "number": 3,
        "role": "search",
        "state": "COMPLETE",
        "cost": {"train_seconds": 3.0, "processed_tokens": 61440},
        "rung": {"value": 0.5, "others": {"1": 2}},
        "newer": [1, 2.0, None],
    }
    content = LEAST | {
        "trials": [trial],
        "sessions": [[1.5, 2.5]],
        "stage_seconds": {"record": 24, "base_evaluation": 38.5},
        "datasets": [{"name": "d", "digest": "ab", "source": "/d", "newer": True}],
        "newer": {"a": {"b": 1e-5}},
    }
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (tmp_path / "study.json").write_text(text)
    study = read_study(tmp_path)
    write_study(tmp_path, study)
    assert (tmp_path / "study.json").read_text() == text
    assert study.trial(3) is study.trials[0]
    assert study.trial(0) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schema": 2},
            r"study\.json: schema: Input should be 1; remove the file",
        ),
        ({"trials": [{"number": 0, "state": "FAIL"}]}, r"study\.json: trials\.0\.role: Field requ"),
        ({"sessions": [[1.0]]}, r"study\.json: sessions\.0\.1: Field required"),
    ],
)
def test_a_damaged_file_is_refused_by_field(tmp_path, change, message):
    (tmp_path / "study.json").write_text(json.dumps(LEAST | change))
    for read in (read_study, read_outline):
        with pytest.raises(DataError, match=message):
            read(tmp_path)


def test_an_outline_says_of_trials_what_they_are_counted_by(tmp_path):
    trials = [
        {"number": 0, "role": "defaults", "state": "FAIL", "cause": "c"},
        {
            "number": 1,
            "role": "search",
            "state": "COMPLETE",
            "scores": "trials/0001/scores",
            "settings": {"lr": 1e-4},
            "results": {"eval/domain_gain": 0.5, "eval/forgetting": -0.25, "eval/combined": 0.75},
        },
    ]
    settings = {"data": {"train": ["a.jsonl"]}}
    content = LEAST | {"best": 1, "trials": trials, "settings": settings, "final": {"base": "b"}}
    (tmp_path / "study.json").write_text(json.dumps(content))
    outline = read_outline(tmp_path)
    gain = {"eval/domain_gain": 0.5, "eval/forgetting": -0.25}
    first = TrialLine(0, "FAIL", None, {})
    assert outline.trials == [first, TrialLine(1, "COMPLETE", "trials/0001/scores", gain)]
    whole = read_study(tmp_path).model_dump(exclude={"trials"})
    assert outline.model_dump(exclude={"trials"}) == whole


def test_no_file_is_an_unfinished_input(tmp_path):
    with pytest.raises(IncompleteArtifactError, match=r"has no study\.json: no search has started"):
        read_study(tmp_path)


def test_a_study_is_found_in_or_below_the_directory(tmp_path):
    with pytest.raises(IncompleteArtifactError, match=r"python -m lrmc_ray\.tune --output"):
        find_study(tmp_path)
    (tmp_path / "runs" / "first-1").mkdir(parents=True)
    (tmp_path / "runs" / "first-1" / "study.json").write_text("{}")
    for start in ("runs/first-1", "runs", "."):
        assert find_study(tmp_path / start) == tmp_path / "runs" / "first-1"
    (tmp_path / "second-2").mkdir()
    (tmp_path / "second-2" / "study.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds several; name one: .*second-2, .*first-1"):
        find_study(tmp_path)


def test_trials_have_directories_by_number(tmp_path):
    assert trial_directory(tmp_path, 7) == tmp_path / "trials" / "0007"
