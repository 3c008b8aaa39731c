"""Files that others made: none runs code, leads out of the output, or brings a secret to light.

The canaries are harmless: code that would make a file, and made-up secrets that are looked for.
Ports are in tests/test_security.py; models with code of their own in
tests/models/test_loading.py.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from lrmc_ray.config import RunSettings
from lrmc_ray.console import public, run_command
from lrmc_ray.errors import ConfigError, DataError, LrmcError
from lrmc_ray.evaluate.allowed_python import allow_python, check_allowed
from lrmc_ray.evaluate.command import check_named_tasks, scores_directory
from lrmc_ray.evaluate.command import main as evaluate_command
from lrmc_ray.evaluate.no_code import keep_code_out
from lrmc_ray.evaluate.task_files import check_tasks, task_fingerprints
from lrmc_ray.export.blend_command import main as blend
from lrmc_ray.export.command import main as export
from lrmc_ray.export.curve import score_blend
from lrmc_ray.export.trial_model import train_again
from lrmc_ray.files.origin import origin_of, write_origin
from lrmc_ray.files.study import TrialEntry, read_study
from lrmc_ray.outputs.inventory import Sizes, inventory
from lrmc_ray.outputs.ls_command import main as ls
from lrmc_ray.outputs.prunable import prunable, remove
from lrmc_ray.outputs.prune_command import main as prune
from lrmc_ray.record import hub
from lrmc_ray.record.inspect_command import main as inspect
from lrmc_ray.report.command import main as report
from lrmc_ray.report.mlflow import register_model
from lrmc_ray.report.mlflow_command import main as mlflow_sync
from lrmc_ray.report.mlflow_mirror import in_one_line
from lrmc_ray.report.mlflow_place import check_kept_within
from lrmc_ray.report.mlflow_sync import sync
from lrmc_ray.train.sharded_state import check_metadata
from tests.support.study_with_models import make_study_with_models
from tests.support.synthetic_study import make_study

ROOT = Path(__file__).parents[1]


@pytest.fixture
def canary(tmp_path):
    """A file that appears if a planted piece of code runs."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code from data was run"


class Planted:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


# Checkpoints


def test_metadata_of_shards_run_no_code(tmp_path, canary):
    """torch reads them by pickle; those of a real run are read in tests/train."""
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps({"state_dict_metadata": Planted(canary)}))
    with pytest.raises(DataError, match=r"sizes and places of tensors alone, got pathlib.*touch"):
        check_metadata(path)


# Tasks


def task_with_python(folder: Path, canary: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "items.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (folder / "utils.py").write_text(
        f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
        "def check(doc, results):\n    return {'exact_match': 1.0}\n"
    )
    path = folder / "task.yaml"
    path.write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: items.jsonl}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\n"
        "doc_to_target: answer\nprocess_results: !function utils.check\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    return path


def test_the_python_of_a_task_is_not_run_to_take_its_digest(tmp_path, canary):
    task = task_with_python(tmp_path / "tasks", canary)
    found = task_fingerprints([str(task)], "dev")
    (tmp_path / "tasks" / "utils.py").write_text("def check(doc, results): return {}\n")
    assert task_fingerprints([str(task)], "dev") != found


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:pathlib.Path.touch",
        "!!python/object/new:pathlib.PosixPath",
        "!!python/name:os.system",
        "!!python/module:this",
    ],
)
def test_yaml_of_a_task_makes_no_objects(tmp_path, canary, tag):
    path = tmp_path / "task.yaml"
    value = f" [{str(canary)!r}]" if "object" in tag else " ''"
    path.write_text(f"task: mine\ndoc_to_text: {tag}{value}\n")
    with pytest.raises(LrmcError):
        check_tasks([str(path)], "dev")
    with pytest.raises(LrmcError):
        task_fingerprints([str(path)], "dev")


BEHIND = "{{ question.__class__ }}"
"""A template that looks behind a value. It does no harm."""


@pytest.mark.parametrize(
    "changes",
    [
        {"doc_to_text": "{{question}}" + BEHIND},
        {"doc_to_target": "{{answer}}" + BEHIND},
        {"description": BEHIND},
        {"gen_prefix": BEHIND},
        {"doc_to_text": "{{ '{0.__class__}'.format(question) }}"},
        {"metric_list": [{"metric": "SCRIPT"}]},
        {"metric_list": [{"metric": "exact_match", "hf_evaluate": True}]},
    ],
)
def test_templates_and_metrics_of_a_task_run_no_code(tmp_path, canary, changes):
    task = task_with_python(tmp_path, canary)
    script = tmp_path / "metric.py"
    script.write_text((tmp_path / "utils.py").read_text())
    (tmp_path / "exact_match").mkdir()
    (tmp_path / "exact_match" / "exact_match.py").write_text(script.read_text())
    named = json.dumps(changes).replace("SCRIPT", str(script))
    plain = task.read_text().replace("process_results: !function utils.check\n", "")
    config = {**yaml.safe_load(plain), **json.loads(named)}
    task.write_text(json.dumps(config))
    with pytest.raises(LrmcError, match=r"unsafe|must be lm-eval's own"):
        check_tasks([str(task)], "dev")


def test_what_templates_are_for_still_works(tmp_path):
    from lm_eval.utils import apply_template

    keep_code_out()
    template = (
        "{% set names = choices | map('upper') | list %}{{ names[1] }} {{ '%.1f' | format(x) }} "
        "{{ '{:.2f}'.format(x) }} {{ q | regex_replace('a+', 'b') }} {{ q.replace('a', 'c') }} "
        "{% for c in choices %}{{ loop.index0 }}{{ c }}{% endfor %} {{ d.k.strip() }}\n"
    )
    doc = {"choices": ["x", "y"], "x": 1.25, "q": "aad", "d": {"k": " z "}}
    assert apply_template(template, doc) == "Y 1.2 1.25 bd ccd 0x1y z\n"


def settings_of(*tasks: Path) -> RunSettings:
    names = [str(task) for task in tasks] or ["nl2sql"]
    return RunSettings.model_validate({"evaluate": {"domain_tasks": names}})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache in which nothing is, and that of a user to whom nobody has shown anything."""
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path / "cache"))


def tasks_of(settings: RunSettings) -> list[str]:
    return list(settings.evaluate.domain_tasks)


def test_python_that_only_a_models_directory_names_is_refused(tmp_path, canary, cache):
    model = tmp_path / "downloaded" / "model"
    task = task_with_python(model, canary)
    settings = settings_of(task)

    def refused():
        return pytest.raises(ConfigError, match=r"must be run at your own wish, .*lrmc\.json")

    with refused():
        check_named_tasks(model, settings, settings_of())
    check_named_tasks(model, settings, settings)  # the user has named it, too
    check_named_tasks(model, settings_of(), settings_of(task))  # or another one
    other = task_with_python(tmp_path / "other", canary)
    (tmp_path / "other" / "items.jsonl").write_text('{"question": "a", "answer": "c"}\n')
    allow_python(tasks_of(settings_of(other)))
    with refused():
        check_named_tasks(model, settings, settings_of())
    copy = task_with_python(tmp_path / "own", canary)
    allow_python(tasks_of(settings_of(copy)))  # the same files, named by a command of the user's
    check_named_tasks(model, settings, settings_of())
    (model / "utils.py").write_text("def check(doc, results): return {}\n")
    with refused():
        check_named_tasks(model, settings, settings_of())
    plain = tmp_path / "plain.yaml"
    plain.write_text(task.read_text().replace("process_results: !function utils.check\n", ""))
    (tmp_path / "items.jsonl").write_text((model / "items.jsonl").read_text())
    check_named_tasks(model, settings_of(plain), settings_of())


@pytest.mark.parametrize(
    "directory", ["runs/training/x/model", "runs/demo-0123456789ab/best_model"]
)
def test_no_name_of_a_study_or_an_output_makes_a_model_ones_own(
    tmp_path, canary, cache, directory, monkeypatch
):
    """What a model says of the place at which it was made is what its maker wrote."""
    monkeypatch.chdir(tmp_path)
    model = Path(directory)
    task = task_with_python(model, canary)
    (model / "config.json").write_text("{}")
    study = make_study(Path("runs") / "demo-0123456789ab")
    for output, name in (("runs", study.name), (str(tmp_path / "runs"), study.name), (".", None)):
        origin = origin_of(settings_of(task), Path("runs"), study=name)
        write_origin(model, origin.model_copy(update={"output": output}))
        assert run_command(evaluate_command, ["--tuned", str(model)]) == 2


@pytest.mark.parametrize(
    "line",
    [
        "process_results: !function utils.check",
        "process_results: !<!function> utils.check",
        "process_results: !function 'a b.check'",
        "process_results: !function os.path.join",
        "metadata: {x: [!function utils.check]}",
        "include: other.inc",
        "include: [none.inc, other.inc]",
        "{aliased: &x !function utils.check, process_results: *x}",
    ],
)
def test_python_is_seen_however_a_task_names_it(tmp_path, canary, cache, line):
    task = task_with_python(tmp_path, canary)
    (tmp_path / "a b.py").write_text((tmp_path / "utils.py").read_text())
    (tmp_path / "other.inc").write_text("{x: !function utils.check}")
    (tmp_path / "none.inc").write_text("{x: 1}")
    task.write_text(
        task.read_text().replace("process_results: !function utils.check", line)
        if not line.startswith("{")
        else line
    )
    with pytest.raises(ConfigError, match="at your own wish"):
        check_allowed([str(task)], named_by=tmp_path / "settings.json", remedy="name it")
    allow_python([str(task)])
    check_allowed([str(task)], named_by=tmp_path / "settings.json", remedy="name it")


def test_a_link_in_a_study_leads_no_command_out_of_it(tmp_path, tiny_model):
    study, outside = tmp_path / "study", tmp_path / "outside"
    (outside / "model.partial").mkdir(parents=True)
    (outside / "model.partial" / "kept").touch()
    (study / "trials").mkdir(parents=True)
    for link in ("blends", "trials/0001"):
        (study / link).symlink_to(outside)
    settings = settings_of()
    with pytest.raises(DataError, match="a link leads to"):
        score_blend(settings, study, tiny_model, tiny_model, 0.5, study / "base_scores")
    entry = TrialEntry(number=1, role="search", state="COMPLETE")
    with pytest.raises(DataError, match="a link leads to"):
        train_again(study, entry, settings)
    assert [path.name for path in outside.rglob("*")] == ["model.partial", "kept"]


def stranger_with_python(folder: Path, base: Path, canary: Path) -> Path:
    """A study that is whole, and whose tasks name Python."""
    study = make_study_with_models(folder / "runs" / "demo-0123456789ab", base)
    task = task_with_python(study, canary)
    settings = json.loads((study / "settings.json").read_text())
    settings["evaluate"]["domain_tasks"] = [str(task)]
    (study / "settings.json").write_text(json.dumps(settings))
    return study


STUDY_COMMANDS = {
    "blend": (blend, []),
    "export": (export, ["--to", "exported"]),
    "export a blend": (export, ["--blend", "0.5", "--to", "exported"]),
    "report": (report, []),
    "mlflow-sync": (mlflow_sync, []),
    "ls": (ls, ["--size"]),
    "prune": (prune, ["--yes", "--unfinished"]),
}


@pytest.mark.parametrize("name", STUDY_COMMANDS)
def test_no_command_runs_what_a_strangers_study_names(
    tmp_path, canary, cache, name, capsys, monkeypatch, tiny_model
):
    monkeypatch.chdir(tmp_path)
    study = stranger_with_python(tmp_path, tiny_model, canary)
    command, options = STUDY_COMMANDS[name]
    where = study.parent if name in ("ls", "prune") else study
    code = run_command(command, [str(where), *options])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if name == "blend":
        assert code == 2
        assert "settings.json alone; look at it, and add --allow-python" in " ".join(said.split())
    else:
        assert code == 0, said


def test_scores_are_not_written_where_a_models_directory_points(tmp_path):
    (tmp_path / "etc").mkdir()
    origin = origin_of(settings_of(), tmp_path / "etc")
    assert scores_directory(origin) == Path("runs")
    (tmp_path / "etc" / "scores").mkdir()  # of an output directory that is there
    assert scores_directory(origin) == tmp_path / "etc"


# Outputs


def planted_output(folder: Path, outside: Path) -> Path:
    """An output directory with descriptions whose paths lead out of it, and with links."""
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (outside / "model").mkdir()
    study = folder / "study-0123456789ab"
    (study / "trials").mkdir(parents=True)
    away = os.path.relpath(outside, study)
    (study / "study.json").write_text(
        json.dumps(
            {
                "schema": 1, "id": f"../../{outside.name}", "name": "../x", "state": "FINISHED",
                "created": "2026-11-22", "objective": "combined", "forgetting_weight": 1.0,
                "base_scores": f"{away}/scores", "best": 0,
                "trials": [
                    {"number": number, "role": "search", "state": "COMPLETE",
                     "directory": f"{away}", "scores": f"{away}/scores"}
                    for number in range(3)
                ],
            }
        )
    )  # fmt: skip
    (study / "trials" / "0001").mkdir()
    (study / "trials" / "0001" / "training").symlink_to(outside)
    (folder / "records").mkdir()
    (folder / "records" / "0123456789ab").symlink_to(outside)
    (folder / "link").symlink_to(outside)
    return study


def test_prune_and_ls_stay_within_the_output(tmp_path, capsys):
    folder, outside = tmp_path / "runs", tmp_path / "outside"
    planted_output(folder, outside)
    before = sorted(path.relative_to(outside) for path in outside.rglob("*"))
    assert run_command(ls, [str(folder), "--size"]) in (0, 4)
    assert run_command(prune, [str(folder), "--yes", "--unfinished"]) in (0, 4)
    assert sorted(path.relative_to(outside) for path in outside.rglob("*")) == before
    found = prunable(inventory(folder), sizes=Sizes(), with_unfinished=True)
    remove(found)
    assert sorted(path.relative_to(outside) for path in outside.rglob("*")) == before
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("path", ["../secret", "SECRET", "link"])
def test_a_study_sends_no_file_of_others_to_a_server(tmp_path, path):
    study, secret = make_study(tmp_path / "demo-0123456789ab"), tmp_path / "secret"
    secret.write_text("of this machine alone")
    (study / "link").symlink_to(secret)
    values = json.loads((study / "study.json").read_text())
    values["artifacts"] = [{"path": path.replace("SECRET", str(secret)), "folder": ""}]
    (study / "study.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"artifacts must lie in its directory, .* is .*secret;"):
        sync(study, f"sqlite:///{tmp_path}/mlflow.db")
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("place", "database", "is_within"),
    [
        ("file:///OUT/mlartifacts/7", "/OUT/mlflow.db", True),
        ("/OUT/mlartifacts/7", "/OUT/mlflow.db", True),
        ("file:///OUT/a%20b/7", "/OUT/mlflow.db", True),
        ("file:///home/ann/.config", "/OUT/mlflow.db", False),
        ("/home/ann/.config", "/OUT/mlflow.db", False),
        ("home/ann", "/OUT/mlflow.db", False),
        ("file:///OUT/../ann", "/OUT/mlflow.db", False),
        ("file:///OUT/%2e%2e/ann", "/OUT/mlflow.db", False),
        ("file:///OUT/link/ann", "/OUT/mlflow.db", False),
        ("s3://bucket/OUT", "/OUT/mlflow.db", False),
        ("file:///home/ann/.config", "/OUT/study/../mlflow.db", False),
        ("file:///home/ann", "/home/ann/mlflow.db", True),  # a database that the user named
    ],
)
def test_files_go_where_the_output_is_or_where_the_user_said(tmp_path, place, database, is_within):
    (tmp_path / "study").mkdir()
    (tmp_path / "link").symlink_to("/home")
    place, database = (text.replace("/OUT", str(tmp_path)) for text in (place, database))
    check = partial(check_kept_within, place, f"sqlite:///{database}", tmp_path / "study")
    if is_within:
        check()
        return
    with pytest.raises(DataError, match=r"must keep a study's files in .*; remove that database"):
        check()


def test_a_database_that_came_with_a_study_sends_no_file_elsewhere(tmp_path, capsys):
    """Its artifacts would be written wherever its maker said, under names that he chose."""
    from mlflow import MlflowClient

    outside = tmp_path / "outside"
    study = make_study(tmp_path / "runs" / "demo-0123456789ab")
    values = json.loads((study / "study.json").read_text())
    values["trials"] = values["trials"][:1]
    values["artifacts"] = [{"path": "study.json", "folder": "config"}]
    (study / "study.json").write_text(json.dumps(values))
    client = MlflowClient(f"sqlite:///{study.parent}/mlflow.db")
    client.create_experiment("lrmc_ray", artifact_location=outside.as_uri())
    assert run_command(mlflow_sync, [str(study)]) == 4
    assert "MLflow must keep a study's files in" in capsys.readouterr().err
    assert not outside.exists()
    alone = Path(shutil.copytree(study, tmp_path / "own" / study.name))
    assert run_command(mlflow_sync, [str(alone)]) == 0
    assert list((tmp_path / "own" / "mlartifacts").rglob("config/study.json"))


@pytest.mark.parametrize("name", ["study.json", "compare.json", "manifest.json"])
def test_a_pickle_in_the_place_of_a_description_is_not_read(tmp_path, canary, name):
    study = tmp_path / "runs" / "study-0123456789ab"
    study.mkdir(parents=True)
    (study / name).write_bytes(pickle.dumps(Planted(canary)))
    if name == "study.json":
        with pytest.raises(LrmcError):
            read_study(study)
    assert run_command(ls, [str(tmp_path / "runs")]) in (0, 4)


# What is shown of data


def test_data_do_not_act_on_the_terminal(tmp_path, capsys, tiny_model):
    data = tmp_path / "train.jsonl"
    rows = [{"prompt": "a\x1b[2Jb", "completion": "c\x9bd"}, {"prompt": "\x1b]0;x\x07"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--data", str(data), "--model", str(tiny_model), "--sample", "2"]
    assert run_command(inspect, argv) in (0, 4)
    said = capsys.readouterr()
    assert "c�d" in said.out
    assert not {"\x1b", "\x9b", "\x07"} & set(said.out + said.err)


def test_names_of_outputs_do_not_act_on_the_terminal(tmp_path, capsys):
    study = tmp_path / "runs" / "study-0123456789ab\x1b[2J"
    (study / "trials").mkdir(parents=True)
    (study / "study.json").write_text("{}")
    for command, options in ((ls, ["--size"]), (prune, ["--dry-run", "--unfinished"])):
        run_command(command, [str(tmp_path / "runs"), *options])
    assert "\x1b" not in "".join(capsys.readouterr())


# Data of the Hub


@pytest.mark.parametrize(
    "file", ["../../../escaped.jsonl", "/etc/escaped.jsonl", "data/../../../escaped.jsonl"]
)
def test_files_of_a_hub_data_set_stay_in_the_cache(tmp_path, monkeypatch, file):
    """What a hostile description lists is asked for by name, and never written elsewhere."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "_find", lambda _: hub._Found("0" * 40, (file,)))
    hub.hub_files.cache_clear()
    with pytest.raises(LrmcError):
        hub.hub_files("org/name")
    assert not list(tmp_path.rglob("escaped*"))
    assert not Path("/etc/escaped.jsonl").exists()


@pytest.mark.parametrize(
    "name", ["../x/y", "org/../../x", "org/name@../../x y", "org/name:a/b", "a\0/b"]
)
def test_names_that_are_no_data_set_are_no_path(name):
    hub.hub_files.cache_clear()
    with pytest.raises(LrmcError):
        hub.hub_files(f"hf://{name}")


# Compiled code and secrets


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://ann:hunter2@tracking.example/x", "https://***@tracking.example/x"),
        ("postgresql://ann:hun%40ter2@db/mlflow", "postgresql://***@db/mlflow"),
        ("postgresql://db/x?password=hunter2&a=b", "postgresql://db/x?password=***&a=b"),
        ("https://hunter2token@tracking.example", "https://***@tracking.example"),
        ("sqlite:////data/runs/mlflow.db", "sqlite:////data/runs/mlflow.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
    ],
)
def test_the_password_of_a_tracking_server_is_not_shown(uri, shown):
    assert public(uri) == shown
    assert in_one_line(OSError(f"no answer from {uri}\nmore")) == f"OSError: no answer from {shown}"


def test_a_server_that_does_not_answer_is_named_without_its_password(tmp_path, caplog, capsys):
    study = make_study(tmp_path / "demo-0123456789ab")
    secret = "http://ann:hunter2@127.0.0.1:9"
    with pytest.raises(LrmcError) as caught:
        register_model(study, tmp_path, "x", secret)
    said = f"{caught.value}{caplog.text}{capsys.readouterr()}"
    assert "***@127.0.0.1:9" in said
    assert "hunter2" not in said


def test_compiled_code_is_not_taken_from_the_working_directory(tmp_path):
    """numba keeps what it compiles; of that, nothing is looked for where others may write."""
    code = (
        "import os; from lrmc_ray.method.fast import moclip_kernel as k\n"
        "import numba; print(numba.config.CACHE_DIR)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert not list(tmp_path.rglob("*.nb*")), done.stdout
