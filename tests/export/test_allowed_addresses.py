"""What a study or a model that came from elsewhere names is contacted at the user's word alone.

A harmless server on this machine stands for the address: it must see no connection.
"""

import json
import socket
from pathlib import Path

import pytest

from lrmc_ray.config import RunSettings
from lrmc_ray.console import run_command
from lrmc_ray.errors import ConfigError
from lrmc_ray.evaluate.command import main as evaluate
from lrmc_ray.evaluate.task_sources import remote_data
from lrmc_ray.export.blend_command import main as blend
from lrmc_ray.export.command import main as export
from lrmc_ray.files.allowed_addresses import allow_addresses, check_addresses
from lrmc_ray.files.artifacts import lock_directory
from lrmc_ray.files.origin import origin_of, write_origin
from tests.support.study_with_models import make_study_with_models


class Server:
    """Listens; tells whether anybody has connected."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.host = f"127.0.0.1:{self._socket.getsockname()[1]}"

    @property
    def storage(self) -> str:
        return f"s3://bucket/here?scheme=http&endpoint_override={self.host}"

    def was_contacted(self) -> bool:
        try:
            self._socket.accept()[0].close()
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "not-a-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
    monkeypatch.chdir(tmp_path)
    one = Server()
    yield one
    one.close()


def task_behind(server: Server, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "far.yaml"
    path.write_text(
        "task: far\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: 'http://{server.host}/items.jsonl'}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\n"
        "doc_to_target: answer\nmetric_list: [{metric: exact_match}]\n"
    )
    return path


def strangers(folder: Path, base: Path, *, storage: str | None = None, task: Path | None = None):
    study = make_study_with_models(folder / "runs" / "demo-0123456789ab", base)
    settings = json.loads((study / "settings.json").read_text())
    settings["resources"]["storage"] = storage
    if task is not None:
        settings["evaluate"]["domain_tasks"] = [str(task)]
    (study / "settings.json").write_text(json.dumps(settings))
    return study


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_server_that_is_contacted_says_so(server):
    socket.create_connection(server.host.split(":")).close()
    assert server.was_contacted()
    assert not server.was_contacted()


def test_the_storage_of_a_strangers_study_is_not_contacted(server, tmp_path, tiny_model, capsys):
    study = strangers(tmp_path, tiny_model, storage=server.storage)
    remedy = f"{server.host} is named by {study}/settings.json alone; if you trust it, add "
    for command, options in ((blend, []), (export, ["--trial", "0", "--to", "exported"])):
        assert run_command(command, [str(study), *options]) == 2
        assert remedy + "--allow-network" in said(capsys)
    assert not (tmp_path / "exported").exists()
    assert not server.was_contacted()


def test_a_model_that_was_kept_is_exported_without_its_storage(server, tmp_path, tiny_model):
    study = strangers(tmp_path, tiny_model, storage=server.storage)
    assert run_command(export, [str(study), "--to", "exported"]) == 0
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    assert not server.was_contacted()


@pytest.mark.parametrize("command", [blend, export])
def test_the_users_word_is_asked_for_once(server, tmp_path, tiny_model, capsys, command):
    """A study that is in use is refused behind the question, before anything is started."""
    study = strangers(tmp_path, tiny_model, storage=server.storage)
    options = [str(study), "--trial", "0"] + (["--to", "exported"] if command is export else [])
    with lock_directory(study):
        assert run_command(command, [*options, "--allow-network"]) == 5
        assert run_command(command, options) == 5
    other = strangers(tmp_path / "other", tiny_model, storage=server.storage + "&region=x")
    options[0] = str(other)
    assert run_command(command, options) == 2
    assert "named by" in said(capsys)
    assert not server.was_contacted()


def test_data_behind_a_url_are_not_fetched_for_a_strangers_study(
    server, tmp_path, tiny_model, capsys
):
    task = task_behind(server, tmp_path / "tasks")
    study = strangers(tmp_path, tiny_model, task=task)
    assert run_command(blend, [str(study)]) == 2
    assert f"http://{server.host}/items.jsonl is named by" in said(capsys)
    with lock_directory(study):
        assert run_command(blend, [str(study), "--allow-network"]) == 5
    assert not server.was_contacted()


def test_data_behind_a_url_are_not_fetched_for_a_models_directory(
    server, tmp_path, tiny_model, capsys
):
    task = task_behind(server, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    settings = RunSettings.model_validate(
        {"model": {"name": str(tiny_model)}, "evaluate": {"domain_tasks": [str(task)]}}
    )
    write_origin(tmp_path / "model", origin_of(settings, tmp_path / "runs"))
    assert run_command(evaluate, ["--tuned", str(tmp_path / "model")]) == 2
    message = said(capsys)
    assert "model/lrmc.json alone; if you trust it, name the task with --domain-tasks" in message
    assert not server.was_contacted()


def test_what_is_on_this_machine_or_the_hub_is_no_address(tmp_path):
    (tmp_path / "items.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    task = tmp_path / "near.yaml"
    head = "task: near\ntest_split: test\n"
    local = head + "dataset_path: json\ndataset_kwargs: {data_files: {test: items.jsonl}}\n"
    task.write_text(local)
    assert remote_data(["wordnet", str(task)]) == []
    task.write_text(head + "dataset_path: somebody/something\n")
    assert remote_data([str(task)]) == []
    far = "https://example.invalid/a.jsonl"
    (tmp_path / "part.inc").write_text(local.replace("items.jsonl", f"[items.jsonl, '{far}']"))
    task.write_text("include: part.inc\n")
    assert remote_data([str(task)]) == [far]


def test_an_address_is_known_by_all_of_it_and_shown_without_a_password(tmp_path, monkeypatch):
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path))
    allow_addresses(None, "s3://a/b")
    check_addresses(None, "s3://a/b", named_by=tmp_path, remedy="ask")
    for other in ("s3://a/b/c", "s3://a", "https://user:word@host/x"):
        with pytest.raises(ConfigError, match=r"at your own wish, .* alone; .* ask$") as refused:
            check_addresses("s3://a/b", other, named_by=tmp_path, remedy="ask")
        assert "word" not in str(refused.value)
    assert "https://***@host/x" in str(refused.value)
