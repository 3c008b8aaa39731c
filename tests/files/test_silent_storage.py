"""A storage that answers at first and falls silent later: every call ends, with one error."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lrmc_ray.errors import DiskError
from lrmc_ray.files.storage import CHUNK_BYTES, Storage
from tests.support.s3 import s3_server

LIMIT_SECONDS = 150.0
"""The client makes several attempts, each of which ends some seconds after the last byte. In all
they take 99 seconds with pyarrow 25."""


class Proxy:
    """Stands before a server; once told so, it takes what is sent and answers nothing."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._is_silent = threading.Event()
        self._is_closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def fall_silent(self) -> None:
        self._is_silent.set()

    def close(self) -> None:
        self._is_closed.set()
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            other = {client: server, server: client}
            with contextlib.suppress(OSError):
                while not self._is_closed.is_set():
                    for source in select.select([client, server], [], [], 0.1)[0]:
                        content = source.recv(1 << 16)
                        if self._is_silent.is_set():
                            self._is_closed.wait()
                        if not content:
                            return
                        other[source].sendall(content)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with s3_server() as server:
        proxy = Proxy(server.port)
        proxy.uri = server.uri("p", port=proxy.port)
        yield proxy
        proxy.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_call_of_a_storage_that_falls_silent_ends_with_one_error(proxy, tmp_path):
    storage = Storage(proxy.uri, retry_seconds=())
    storage.write("a/b", b"content")
    large = tmp_path / "large"
    large.write_bytes(b"x" * (2 * CHUNK_BYTES + 1))
    assert storage.read("a/b") == b"content"
    storage.put(large, "large")
    proxy.fall_silent()
    calls = {
        "read": lambda: storage.read("a/b"),
        "get": lambda: storage.get("large", tmp_path / "back"),
        "size": lambda: storage.size("a/b"),
        "children": lambda: storage.children("a"),
        "write": lambda: storage.write("a/c", b"content"),
        "put": lambda: storage.put(large, "large"),
        "delete": lambda: storage.delete("a/b"),
        "delete_all": lambda: storage.delete_all("a"),
        "publish": lambda: storage.publish("d", {"large": large}),
    }

    def outcome(name: str) -> tuple[str, float, str]:
        start = time.monotonic()
        try:
            calls[name]()
        except DiskError as error:
            return name, time.monotonic() - start, str(error)
        return name, time.monotonic() - start, "returned"

    pool = ThreadPoolExecutor(len(calls))
    try:
        found = list(pool.map(outcome, calls, timeout=240))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    for name, seconds, text in found:
        assert text.startswith(f"storage {proxy.uri} cannot be used: "), name
        assert "see to the address, the bucket and the credentials" in text, name
        assert seconds < LIMIT_SECONDS, name
    assert not (tmp_path / "back").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
