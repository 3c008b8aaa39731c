"""Who can reach a running command: every port off loopback asks for the token."""

import ipaddress
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest

from tests.support.tiny import make_data

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[1]
METHODS = (
    "InternalKVGcsService/InternalKVKeys",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Pull",
    "CoreWorkerService/GetCoreWorkerStats",
    "ReporterService/GetTraceback",
)
"""One call of each kind of Ray's processes. Of others a process says that it does not know them."""


def listeners(command: psutil.Process) -> dict[tuple[str, int], str]:
    """Address and port of every listening socket of a command's processes, and whose it is."""
    found = {}
    for process in [command, *command.children(recursive=True)]:
        try:
            for socket in process.net_connections(kind="tcp"):
                if socket.status == psutil.CONN_LISTEN:
                    found[socket.laddr.ip, socket.laddr.port] = process.name()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def answers_to_calls(host: str, port: int) -> set[str]:
    """What Ray's calls without a token get: the names of gRPC's codes, OK for one that works."""
    codes = set()
    with grpc.insecure_channel(f"{host}:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
        for method in METHODS:
            call = channel.unary_unary(f"/ray.rpc.{method}")
            try:
                call(b"", timeout=5)
                codes.add("OK")
            except grpc.RpcError as error:
                codes.add(error.code().name)
    return codes


def answer_to_http(host: str, port: int) -> int | None:
    """The status of a page without a token; None if it does not speak HTTP."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{host}:{port}/metrics", timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
    except Exception:  # what is no HTTP at all
        return None


def test_no_port_off_loopback_serves_without_the_token(tmp_path, tiny_model):
    data = make_data(tmp_path / "train.jsonl", num_rows=400)
    token = tmp_path / "token"
    environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(token)}
    environment.pop("RAY_AUTH_MODE", None)  # what a user has
    with (tmp_path / "log").open("wb") as log:
        command = subprocess.Popen(
            [
                *(sys.executable, "-m", "lrmc_ray.record", "--model", str(tiny_model)),
                *("--train-data", str(data), "--output", str(tmp_path / "runs")),
            ],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=environment,
        )
    try:
        deadline = time.monotonic() + 120
        seen: dict[tuple[str, int], str] = {}
        while not any(re.search("ray::.*Recorder|ray::_MapWorker", n) for n in seen.values()):
            assert time.monotonic() < deadline, seen
            assert command.poll() is None, (tmp_path / "log").read_text()
            seen = listeners(psutil.Process(command.pid))
            time.sleep(0.1)
        # Nothing moves while it is looked at.
        processes = [psutil.Process(command.pid)]
        processes[0].suspend()
        open_ports = {where: name for where, name in seen.items() if not is_loopback(where[0])}
        assert open_ports  # Ray's own: they listen on every address, whatever one asks for
        guarded = set()
        for (address, port), name in open_ports.items():
            host = "127.0.0.1" if address in ("::", "0.0.0.0") else address
            status = answer_to_http(host, port)
            assert status in (None, 401, 403), f"{name} answers {status} on {address}:{port}"
            if name != psutil.Process(command.pid).name():
                codes = answers_to_calls(host, port)
                assert "OK" not in codes, f"{name} obeys on {address}:{port}"
                guarded |= {name} if "UNAUTHENTICATED" in codes else set()
        assert {"gcs_server", "raylet"} <= guarded
        assert token.stat().st_mode & 0o777 == 0o600
    finally:
        psutil.Process(command.pid).resume()
        command.terminate()
        command.wait(60)
