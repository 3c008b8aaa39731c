"""``lrmc ls`` and ``lrmc prune`` on an output whose every file is known."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrmc_ray.errors import IncompleteArtifactError
from lrmc_ray.files.artifacts import lock_directory, write_json, write_manifest
from lrmc_ray.files.sizes import size_text
from lrmc_ray.files.study import find_study
from lrmc_ray.outputs import prunable as module
from lrmc_ray.outputs.inventory import Sizes, inventory
from lrmc_ray.outputs.ls_command import main as ls
from lrmc_ray.outputs.prunable import cached, prunable, remove
from lrmc_ray.outputs.prune_command import main as prune
from lrmc_ray.report.page import write_study_report
from lrmc_ray.report.study import load_study
from tests.support.synthetic_study import edit, make_study

BEST = 3
WEIGHTS = 40_000


def write_record(output: Path, name: str) -> Path:
    directory = output / "records" / name
    directory.mkdir(parents=True)
    (directory / "part-00000.parquet").write_bytes(b"p" * 10_000)
    identity = {"tau": 0.99}
    manifest = {"kind": "records", "identity": identity, "summary": {"samples": 7}, "model": "a/b"}
    write_manifest(directory, manifest)
    return directory


def write_training(directory: Path, record: str) -> Path:
    (directory / "model").mkdir(parents=True)
    (directory / "model" / "model.safetensors").write_bytes(b"w" * WEIGHTS)
    write_json(directory / "identity.json", {"record": record, "lr": 0.1})
    return directory


@pytest.fixture
def output(tmp_path) -> Path:
    """A finished search on the record ``used``; ``shared`` has an unfinished search, too."""
    runs = tmp_path / "my runs"
    for name in ("used", "shared", "alone"):
        write_record(runs, name)
    study = make_study(runs / "demo-0123456789ab")
    for number in range(10):
        write_training(study / f"trials/{number:04d}/training", "used" if number else "shared")
    edit(study, state="FINISHED", trials={9: {"state": "FAIL"}})
    best = study / "best_model"
    best.mkdir()
    os.link(study / f"trials/{BEST:04d}/training/model/model.safetensors", best / "w.safetensors")
    other = make_study(runs / "other-00000000")
    write_training(other / "trials/0000/training", "shared")
    (runs / "records" / "begun.partial").mkdir()
    (runs / "not ours").mkdir()
    return runs


def paths_of(found, output: Path) -> set[str]:
    return {item.path.relative_to(output).as_posix() for item in found}


def models_of(study: str, numbers) -> set[str]:
    return {f"{study}/trials/{number:04d}/training/model" for number in numbers}


def test_only_what_no_report_needs_can_go(output):
    found = prunable(inventory(output), sizes=Sizes())
    others = models_of("demo-0123456789ab", set(range(10)) - {BEST})
    assert paths_of(found, output) == others | {"records/used"}
    sizes = {item.path.name: item.size_bytes for item in found}
    assert sizes["model"] == 40_960  # in blocks of 4096
    with_unfinished = prunable(inventory(output), sizes=Sizes(), with_unfinished=True)
    assert paths_of(with_unfinished, output) - paths_of(found, output) == {"records/begun.partial"}


def test_the_report_of_a_pruned_search_is_the_same(output):
    directory = output / "demo-0123456789ab"
    before = write_study_report(load_study(directory)).read_bytes()
    remove(prunable(inventory(output), sizes=Sizes(), with_unfinished=True))
    assert write_study_report(load_study(find_study(directory))).read_bytes() == before
    assert (directory / "best_model/w.safetensors").stat().st_size == WEIGHTS
    left = {path.name for path in (output / "records").iterdir()}
    assert left == {"shared", "alone"}
    assert (output / "not ours").is_dir()
    assert prunable(inventory(output), sizes=Sizes(), with_unfinished=True) == []


def test_nothing_goes_while_a_command_works_there(output):
    study = output / "demo-0123456789ab"
    for held, kept in (
        (study, models_of(study.name, range(10)) | {"records/used"}),
        (output / "other-00000000", {"records/used"}),
        (study / "trials/0001/training", models_of(study.name, [1])),
    ):
        with lock_directory(held):
            found = prunable(inventory(output), sizes=Sizes())
        assert not paths_of(found, output) & kept
    found = prunable(inventory(output), sizes=Sizes())
    with lock_directory(study / "trials/0001/training"):
        remove(found)
    left = paths_of(prunable(inventory(output), sizes=Sizes()), output)
    assert left == models_of(study.name, [1])


def test_with_a_description_that_cannot_be_read_no_record_goes(output):
    (output / "other-00000000/study.json").write_text("{")
    entries = inventory(output)
    assert {entry.name: entry.state for entry in entries}["other-00000000"] == "damaged"
    assert "records/used" not in paths_of(prunable(entries, sizes=Sizes()), output)


def test_a_kill_leaves_no_directory_that_looks_whole(output, monkeypatch):
    found = prunable(inventory(output), sizes=Sizes())

    def killed(path, **options):
        if not options:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(found)
    assert not found[0].path.exists()
    monkeypatch.undo()
    remove(found)
    assert not any(item.path.exists() for item in found)


def test_a_comparison_keeps_its_scores_alone(tmp_path):
    runs = tmp_path / "runs"
    write_record(runs, "used")
    comparison = runs / "compare-0123"
    entries = []
    for number, state in enumerate(("COMPLETE", "FAIL")):
        write_training(comparison / f"runs/{number}/training", "used")
        entries.append({"state": state, "scores": f"runs/{number}/scores"})
    values = {"runs": entries, "base_scores": {"dev": "../scores/b"}, "methods": [1, 2, 3]}
    write_json(comparison / "compare.json", values)
    (entry,) = (entry for entry in inventory(runs) if entry.kind == "comparison")
    assert (entry.state, entry.about) == ("finished", "3 methods, 1 of 2 runs")
    assert entry.scores == {(runs / "scores/b").resolve()} | {
        (comparison / f"runs/{number}/scores").resolve() for number in (0, 1)
    }
    expected = {f"compare-0123/runs/{number}/training/model" for number in (0, 1)}
    assert paths_of(prunable([entry], sizes=Sizes()), runs) == expected
    entries[0]["state"] = "RUNNING"
    write_json(comparison / "compare.json", values)
    assert prunable(inventory(runs), sizes=Sizes()) == []


def test_of_a_storage_goes_what_was_not_used_for_some_days(tmp_path):
    now = time.time()
    for name, age_days in (("old", 8), ("new", 6)):
        file = tmp_path / "a1b2/records" / name / "part.parquet"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x" * 5000)
        for path in (file, file.parent):
            os.utime(path, (now - age_days * 86_400,) * 2)
    found = cached(tmp_path, days=7, sizes=Sizes(), now=now)
    assert [(item.path.name, item.size_bytes) for item in found] == [("old", 8192)]
    assert cached(tmp_path, days=9, sizes=Sizes(), now=now) == []
    with lock_directory(tmp_path / "a1b2/records/old"):
        assert cached(tmp_path, days=7, sizes=Sizes(), now=now) == []


def test_sizes_are_those_of_du(output):
    counted = Sizes()
    total = sum(counted.of(path) for path in sorted(output.iterdir()))
    said = subprocess.run(
        ["du", "-s", "-B1", *map(str, sorted(output.iterdir())), "-c"],
        capture_output=True,
        text=True,
        check=True,
    )
    folders = sum(path.lstat().st_blocks * 512 for path in output.rglob("*") if path.is_dir())
    assert int(said.stdout.splitlines()[-1].split()[0]) - folders == total


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345, "12 kB"), (999_600, "1.0 MB"),
     (1_234_567_890, "1.2 GB"), (5_000_000_000_000_000, "5000 TB")],
)  # fmt: skip
def test_sizes_in_words(size, text):
    assert size_text(size) == text


# The commands


def test_ls_says_what_is_there(output, capsys):
    assert ls([str(output), "--size"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "demo-0123456789ab" in text
    assert "running: 9 trials" in text
    assert "7 samples, tau 0.99, b" in text
    assert ls([str(output), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    kinds = [entry["kind"] for entry in told["entries"]]
    assert kinds == ["search", "search", "record", "record", "record", "unfinished"]
    assert f"In all {size_text(sum(entry['size_bytes'] for entry in told['entries']))}" in text
    assert ls([str(output / "not ours")]) == 0
    assert "holds nothing" in capsys.readouterr().out


@pytest.mark.parametrize("command", [ls, prune])
def test_an_output_that_is_not_there_is_an_error(command, tmp_path):
    with pytest.raises(IncompleteArtifactError, match="nowhere is no directory; name the --output"):
        command([str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("options", "is_gone"), [([], False), (["--dry-run", "--yes"], False), (["--yes"], True)]
)
def test_prune_asks_first(output, options, is_gone):
    """Without a terminal nobody can agree."""
    done = subprocess.run(
        [sys.executable, "-m", "lrmc_ray", "prune", str(output), "--json", *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (0 if options else 2), done.stderr
    assert (output / "records/used").exists() != is_gone
    if not options:
        assert "nobody can be asked here; add --yes" in done.stderr
        return
    told = json.loads(done.stdout)
    assert told["removed"] == is_gone
    assert len(told["paths"]) == 10
    assert told["size_bytes"] == sum(path["size_bytes"] for path in told["paths"])
    assert all(Path(path["path"]).exists() != is_gone for path in told["paths"])


def test_the_answer_at_a_terminal_counts(output, monkeypatch, capsys):
    for answer, is_gone in (("n\n", False), ("\n", False), ("y\n", True)):

        class Terminal:
            isatty = staticmethod(lambda: True)
            readline = staticmethod(lambda answer=answer: answer)

        monkeypatch.setattr(sys, "stdin", Terminal)
        assert prune([str(output)]) == 0
        assert (output / "records/used").exists() != is_gone
    assert "Removed, 385 kB are free now." in capsys.readouterr().out
    assert prune([str(output)]) == 0
    assert "There is nothing that can go." in capsys.readouterr().out


def test_prune_refuses_negative_days(output, capsys):
    with pytest.raises(SystemExit) as end:
        prune([str(output), "--days", "-1"])
    assert end.value.code == 2
    assert "must not be negative, got -1" in capsys.readouterr().err
