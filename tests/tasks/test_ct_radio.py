"""The domain ct_radio: parsing the packages, the split, and the task on a model."""

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lrmc_ray.config import load_settings
from lrmc_ray.errors import IncompleteArtifactError
from lrmc_ray.evaluate.harness import score
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.request import ScoreRequest
from lrmc_ray.record.sources import training_files
from lrmc_ray.tasks.built import ct_radio_directory

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location(
        "build_ct_radio", ROOT / "scripts" / "build_ct_radio.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_ct_radio"] = module
    spec.loader.exec_module(module)
    return module


AMATEUR = """E3A01 (D)
What is the separation?
A. 500 miles, if the Moon is at perigee
B. 2000 miles.
C. 5000 miles,
if the Moon is high
D. 12,000 miles
~~
"""
COMMERCIAL = "5A31 A\n If a receiver\tblocks:\nA.The gain should be reduced\nB.On\nC.Used\nD.Set\n"


def test_both_packages_formats_are_read(build):
    amateur = build.parse(AMATEUR, "hamexam-E")
    assert amateur == build.Question(
        "hamexam-E-E3A01",
        "What is the separation?",
        ("500 miles, if the Moon is at perigee", "2000 miles", "5000 miles, if the Moon is high",
         "12,000 miles"),
        3,
    )  # fmt: skip
    commercial = build.parse(COMMERCIAL, "fccexam-E5")
    assert commercial.text == "If a receiver blocks:"
    assert commercial.choices == ("The gain should be reduced", "On", "Used", "Set")
    assert commercial.answer == 0
    assert build.parse("7-15C4 B\nQ?\nA. a\nB. b\nC. c\nD. d", "p").id == "p-15C4"


@pytest.mark.parametrize(
    "text",
    ["", "no header", "1A1 A\nQ?\nA. a\nB. b\nC. c\n", "1A1 A\nA. a\nB. b\nC. c\nD. d",
     "1A1 A\nQ?\nA. a\nB. b\nC. a\nD. d", "1A1 E\nQ?\nA. a\nB. b\nC. c\nD. d"],
)  # fmt: skip
def test_what_is_no_question_with_four_choices_is_left_out(build, text):
    assert build.parse(text, "p") is None


@pytest.mark.parametrize(
    ("text", "last", "usable"),
    [
        ("What is shown in Figure E6-1?", "a diode", False),
        ("What is a diode?", "All of these choices are correct", False),
        ("What is a diode?", "None of the above", False),
        ("What is a diode?", "Both A and B", False),
        ("What is a diode?", "A & B", False),
        ("What is a diode?", "Any of these choices are correct", False),
        ("What is a noise figure meter?", "a diode", False),  # a loss that costs little
        ("What must all stations do?", "Transmit on both bands", True),
        ("What is a diode?", "A part and a device", True),
    ],
)
def test_questions_must_stand_on_their_own(build, text, last, usable):
    assert build.usable(build.Question("q", text, ("x", "y", "z", last), 0)) == usable


def pool(build, count, seed=0):
    """Questions of unlike words, a fifth of them in near-duplicate pairs, some twice."""
    rng = random.Random(seed)

    def word():
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))

    questions = []
    for index in range(count):
        words = [word() for _ in range(12)]
        choices = tuple(word() for _ in range(4))
        questions.append(build.Question(f"q{index}", " ".join(words), choices, index % 4))
        if index % 10 == 0:
            near = " ".join([*words[:-1], word()])
            questions.append(build.Question(f"q{index}n", near, choices, index % 4))
        if index % 50 == 0:
            questions.append(build.Question(f"q{index}t", " ".join(words), choices, index % 4))
    return questions


def test_no_test_question_has_a_near_duplicate_elsewhere(build):
    questions = pool(build, 500)
    parts = build.split(questions, seed=0)
    assert [len(parts[name]) for name in ("dev", "test")] == [120, 240]
    ids = [question.id for part in parts.values() for question in part]
    assert len(ids) == len(set(ids)) == 500 + 50  # equal ones once
    pairs = {f"q{index}" for index in range(0, 500, 10)}
    pairs |= {f"{name}n" for name in pairs}
    assert pairs <= {question.id for question in parts["train"]}
    again = build.split(list(reversed(questions)), seed=0)
    assert {q.text for q in again["train"]} >= {q.text for q in parts["train"] if q.id in pairs}
    assert build.split(questions, seed=0) == parts
    assert build.split(questions, seed=1) != parts


@pytest.fixture(scope="module")
def packages(build, tmp_path_factory):
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb on this machine: the packages were not read")
    folder = tmp_path_factory.mktemp("debs")
    debs: list[Path] = []
    for package in build.PACKAGES:
        root = folder / package
        files = root / "usr/share" / package / "E"
        files.mkdir(parents=True)
        (root / "DEBIAN").mkdir()
        (root / "DEBIAN/control").write_text(
            f"Package: {package}\nVersion: 1\nArchitecture: all\nMaintainer: n <n@example.org>\n"
            "Description: d\n"
        )
        (files / "ask.awk").write_text("not a question")
        for index, question in enumerate(pool(build, 250, seed=len(package) + len(debs))):
            letter = "ABCD"[question.answer]
            choices = "".join(
                f"{name}. {text}\n" for name, text in zip("ABCD", question.choices, strict=True)
            )
            (files / f"1A{index:03}").write_text(
                f"1A{index:03} ({letter})\n{question.text}\n{choices}"
            )
        deb = folder / f"{package}.deb"
        subprocess.run(["dpkg-deb", "--build", root, deb], check=True, capture_output=True)
        debs.append(deb)
    return debs


@pytest.fixture(scope="module")
def built(build, packages, tmp_path_factory):
    """The files in a cache, as the command makes them."""
    cache = tmp_path_factory.mktemp("cache")
    script = ROOT / "scripts/build_ct_radio.py"
    for output in (ct_radio_directory(cache), cache / "again"):
        result = subprocess.run(
            [sys.executable, script, "--output", output, "--deb", *packages],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert "120 dev, 240 test, " in result.stdout
    for path in ct_radio_directory(cache).iterdir():
        assert path.read_bytes() == (cache / "again" / path.name).read_bytes()
    return cache


def test_too_few_questions_are_refused(packages, tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/build_ct_radio.py", "--output", tmp_path / "ct_radio",
         "--deb", packages[0]],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 4
    assert "both hamexam and fccexam are needed" in result.stderr
    assert not (tmp_path / "ct_radio").exists()


def test_a_missing_package_is_named(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/build_ct_radio.py", "--output", tmp_path / "ct_radio",
         "--deb", tmp_path / "none.deb"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 3
    assert "none.deb" in result.stderr
    assert "--deb" in result.stderr


@pytest.mark.parametrize("split", ["dev", "test"])
def test_the_task_scores_texts_and_letters(split, built, tiny_model, monkeypatch):
    monkeypatch.setenv("LRMC_CACHE", str(built))
    request = ScoreRequest(
        tasks=(("ct_radio", "domain"),), batch_tokens=512, precision="fp32", limit=9, split=split,
        drift_samples={"domain": 2, "general": 2},
    )  # fmt: skip
    result = score(tiny_model, request)
    scores = Scores.from_rows(result.rows)
    items = [
        json.loads(line)
        for line in (ct_radio_directory(built) / f"{split}.jsonl").read_text().splitlines()
    ]
    assert scores.tasks == ("ct_radio",)
    assert {metric for _, metric in scores.metrics} == {
        "accuracy",
        "probability",
        "letter_accuracy",
    }
    for metric in scores.metrics.values():
        assert set(metric.item_ids) == {item["id"] for item in items[:9]}
        assert metric.kind == "choice"
    assert scores.objective("ct_radio").metric == "probability"

    # By hand: what the model says after the chat prompt, without a space before the answer.
    import torch

    from lrmc_ray.models.loading import load_model, load_tokenizer

    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    item = items[0]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": item["question"]}], tokenize=False, add_generation_prompt=True
    )
    totals = []
    for choice in item["choices"]:
        ids = tokenizer(prompt + choice)["input_ids"]
        start = len(tokenizer(prompt.rstrip())["input_ids"])
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        totals.append(sum(float(logprobs[t - 1, ids[t]]) for t in range(start, len(ids))))
    shares = np.exp(totals - np.max(totals))
    probability = scores.metric("ct_radio", "probability")
    index = probability.item_ids.index(item["id"])
    assert probability.values[index] == pytest.approx(
        shares[item["answer"]] / shares.sum(), abs=1e-4
    )


def test_the_training_data_are_found_by_name(built, monkeypatch):
    monkeypatch.setenv("LRMC_CACHE", str(built))
    (path,) = training_files(load_settings(None, ["data.train=ct_radio"]))
    row = json.loads(path.read_text().splitlines()[0])
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_questions_that_were_not_built_are_missing_input(tmp_path, monkeypatch, tiny_model):
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path))
    with pytest.raises(
        IncompleteArtifactError, match=r"build them with `python scripts/build_ct_radio"
    ):
        training_files(load_settings(None, ["data.train=ct_radio"]))
    request = ScoreRequest(
        tasks=(("ct_radio", "domain"),), batch_tokens=512, precision="fp32", limit=9, split="dev",
        drift_samples={"domain": 2, "general": 2},
    )  # fmt: skip
    with pytest.raises(IncompleteArtifactError, match="build them"):
        score(tiny_model, request)
