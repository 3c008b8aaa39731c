"""`lrmc doctor`: what it sees, against the machine itself, and what it advises."""

import argparse
import contextlib
import http.server
import importlib.metadata
import json
import os
import shutil
import socket
import threading
from pathlib import Path

import pytest

from lrmc_ray.cluster import doctor
from lrmc_ray.console import run_command

ROOT = Path(__file__).parents[2]


def by_name(findings):
    return {finding.check: finding for finding in findings}


def test_versions_are_those_that_are_installed():
    seen = by_name(doctor.check_versions())
    for name in ("ray", "torch", "optuna", "mlflow"):
        assert seen[name].seen == importlib.metadata.version(name)
        assert seen[name].status == "ok"
    assert "pytest" not in seen  # an extra


def test_a_missing_or_old_package_is_named_with_what_is_needed(monkeypatch):
    wanted = ["ray[tune]>=99.1", "no-such-package>=2", "torch>=2.6", 'x>=1; extra == "demo"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    seen = by_name(doctor.check_versions())
    assert seen["ray"].status == seen["no-such-package"].status == "failed"
    assert ">=99.1 is needed" in seen["ray"].seen
    assert seen["no-such-package"].seen == "missing, >=2 is needed"
    assert "constraints.txt" in seen["ray"].remedy
    assert seen["torch"].status == "ok"
    assert "x" not in seen


def test_gpus(monkeypatch):
    import torch

    if not torch.cuda.is_available():
        assert "CPU" in doctor.check_gpus().seen
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    assert doctor.check_gpus().status == "failed"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "H100")
    assert doctor.check_gpus().seen.startswith("2 x H100")


def test_threads(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores))
    assert doctor.check_threads().status == "ok"
    assert doctor.check_threads().seen.startswith(f"{cores} cores")
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores + 1))
    assert doctor.check_threads().status == "warning"


def test_memory_is_that_of_the_machine():
    seen = by_name(doctor.check_memory())
    kilobytes = int(Path("/proc/meminfo").read_text().split()[1])
    assert float(seen["memory"].seen.split()[0]) == pytest.approx(kilobytes * 1024 / 1e9, abs=0.1)
    assert set(seen) == {"memory", "shared memory", "open files"}


def test_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path / "cache"))
    seen = by_name(doctor.check_disk(tmp_path / "a" / "b"))
    free = shutil.disk_usage(tmp_path).free / 1e9
    said = float(seen["output"].seen.rpartition(", ")[2].split()[0])
    assert said == pytest.approx(free, abs=2)
    assert not (tmp_path / "a").exists()  # nothing is changed
    (tmp_path / "file").write_text("")
    assert by_name(doctor.check_disk(tmp_path / "file"))["output"].status == "failed"
    monkeypatch.setattr(doctor, "LEAST_FREE_GB", free + 100)
    assert by_name(doctor.check_disk(tmp_path))["output"].status == "warning"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    refused = by_name(doctor.check_disk(tmp_path / "a"))["output"]
    assert refused.status == "failed"
    assert str(tmp_path) in refused.remedy


def test_a_port_that_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(doctor, "PORTS", {port: "somebody"})
        found = doctor.check_ports()
        assert found.status == "warning"
        assert f"{port} (somebody)" in found.seen
    assert doctor.check_ports().status == "ok"


@pytest.mark.parametrize(
    ("mode", "permissions", "status"),
    [
        ("token", 0o600, "ok"),
        ("token", 0o644, "failed"),
        ("token", 0o640, "failed"),
        ("token", None, "ok"),
        ("disabled", 0o600, "failed"),
    ],
)
def test_the_token(tmp_path, monkeypatch, mode, permissions, status):
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    path = tmp_path / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    if permissions is not None:
        path.write_text("very secret")
        path.chmod(permissions)
    (found,) = doctor.check_token()
    assert found.status == status
    assert "very secret" not in repr(found)
    if status == "failed" and mode == "token":
        assert found.remedy == f"chmod 600 {path}"


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
        self.wfile.write(b"OK")

    def log_message(self, *_args):
        pass


def test_mlflow(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        assert doctor.check_mlflow(uri).seen == f"{uri} answers OK"
        assert doctor.check_mlflow(f"{uri}/").status == "ok"
        server.shutdown()
    gone = doctor.check_mlflow(uri)
    assert gone.status == "failed"
    assert f"`lrmc mlflow-sync DIR --tracking-uri {uri}`" in gone.remedy
    assert doctor.check_mlflow(f"sqlite:///{tmp_path}/new/mlflow.db").status == "ok"


@pytest.mark.parametrize(
    "start",
    [
        "http://ann:hunter2@127.0.0.1:1",
        "http://ann:hunter2@127.0.0.1",
        "postgresql://ann:hunter2@db",
    ],
)
def test_the_password_of_mlflow_is_not_shown(start):
    found = doctor.check_mlflow(f"{start}/x")
    assert "hunter2" not in f"{found.seen} {found.remedy}"
    assert "://***@" in found.seen


def test_a_cluster_file_that_is_not_filled_in(capsys):
    assert run_command(doctor.main, ["--cluster", str(ROOT / "cluster.yaml"), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    seen = [finding["seen"] for finding in findings if finding["status"] == "failed"]
    assert any("ImageId is 'ami-CHANGE'" in text for text in seen)
    assert all("CHANGE" in text for text in seen)


def test_a_cluster_file_that_is_filled_in_and_one_that_ray_refuses(tmp_path):
    text = (ROOT / "cluster.yaml").read_text()
    good = tmp_path / "good.yaml"
    good.write_text(text.replace("ami-CHANGE", "ami-0123456789abcdef0").replace("CHANGE", "0"))
    assert [f.status for f in doctor.check_cluster_file(good)] == ["ok"]
    bad = tmp_path / "bad.yaml"
    bad.write_text(good.read_text() + "\nnumber_of_workers: 3\n")
    found = list(doctor.check_cluster_file(bad))
    assert found[0].status == "failed"
    assert found[0].seen.startswith("Ray refuses it")


def test_a_cluster_that_does_not_answer_is_a_finding(tmp_path, monkeypatch):
    from lrmc_ray.errors import ResourceError

    def refuse(*_args, **_options):
        raise ResourceError("no Ray cluster answers at nowhere")

    monkeypatch.setattr("lrmc_ray.cluster.doctor.ray_session", refuse)
    (found,) = doctor.check_cluster("nowhere", tmp_path)
    assert (found.check, found.status) == ("cluster", "failed")


def test_a_storage_is_tried_here_and_on_the_nodes_of_a_cluster(tmp_path, monkeypatch):
    import ray

    uri = (tmp_path / "files").as_uri()
    found = doctor.check_stored(uri)
    assert (found.status, found.seen) == ("ok", f"{uri} can be written, read and cleared from here")
    assert list((tmp_path / "files").iterdir()) == []
    asked = {}

    @contextlib.contextmanager
    def joined(address, **options):
        asked[address] = options["storage"]
        yield

    def slots(storage):
        asked["slots"] = storage

    monkeypatch.setattr(doctor, "ray_session", joined)
    monkeypatch.setattr(doctor, "check_trial_slots", slots)
    monkeypatch.setattr(doctor, "cluster_nodes", list)
    assert not ray.is_initialized()
    (seen,) = doctor.check_cluster("auto", tmp_path, uri)
    assert (seen.check, seen.seen) == ("shared storage", f"{uri} is read and written by every node")
    assert asked == {"auto": uri, "slots": uri}


def test_the_exit_code_says_whether_something_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LRMC_CACHE", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert run_command(doctor.main, ["--output", str(tmp_path)]) == 0
    assert "0 failed" in capsys.readouterr().out
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert run_command(doctor.main, ["--output", str(tmp_path)]) == 1
    assert "FAILED   authentication: RAY_AUTH_MODE=disabled" in capsys.readouterr().out


def test_every_failure_has_a_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    arguments = argparse.Namespace(
        **{"cluster": None, "address": None, "output": tmp_path / "file"},
        **{"tracking_uri": "http://127.0.0.1:9", "storage": f"file://{tmp_path}/file/below"},
    )
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    failed = [finding for finding in doctor.examine(arguments) if finding.status == "failed"]
    assert {"output", "authentication", "mlflow", "storage"} <= {
        finding.check for finding in failed
    }
    assert all(finding.remedy for finding in failed)
