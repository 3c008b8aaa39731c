"""A server on this machine that answers as the Hugging Face Hub does, for data sets."""

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Commits = Mapping[str, Mapping[str, bytes]]
"""By revision, the files of a data set by their paths."""


def commit_of(revision: str) -> str:
    """The commit that a revision stands for."""
    return hashlib.sha1(revision.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    sets: Mapping[str, Commits]
    asked: list[str]
    silent: str

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(json.loads(body) if body.startswith(b"{") else {})

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: Any = None) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        if self.silent and self.silent in path:
            time.sleep(60.0)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            self._tell("/".join(parts[2:4]), parts[4:], body)
        elif parts[0] == "datasets" and parts[3:4] == ["resolve"]:
            self._file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
        else:
            self._send(404, b"{}")

    def _files(self, name: str, revision: str) -> Mapping[str, bytes] | None:
        """The files of a revision; None after an answer that there are none."""
        commits = self.sets.get(name)
        if commits is None:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        by_name = {**commits, **{commit_of(revision): files for revision, files in commits.items()}}
        if revision not in by_name:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return by_name.get(revision)

    def _tell(self, name: str, rest: list[str], body: Any) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        files = self._files(name, revision)
        if files is None:
            return
        entries: list[dict[str, Any]] = [
            {"type": "file", "path": path, "size": len(content), "oid": commit_of(path)}
            for path, content in files.items()
        ]
        if rest[:1] == ["tree"]:
            self._tree("/".join([*rest[2:], ""]), entries)
        elif rest[:1] == ["paths-info"]:
            wanted = body.get("paths", []) if body else []
            self._json([entry for entry in entries if entry["path"] in wanted])
        else:
            sha = revision if len(revision) == 40 else commit_of(revision)
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "sha": sha, "siblings": siblings, "private": False})

    def _tree(self, folder: str, entries: list[dict[str, Any]]) -> None:
        """What lies in a folder, whose name ends with a slash; "" is the top."""
        inside = [entry for entry in entries if entry["path"].startswith(folder)]
        if "recursive=true" not in self.path.lower():
            names = {entry["path"].removeprefix(folder).split("/")[0] for entry in inside}
            inside = [entry for entry in inside if entry["path"].removeprefix(folder) in names]
            folders = names - {entry["path"].removeprefix(folder) for entry in inside}
            inside += [
                {"type": "directory", "path": folder + name, "size": 0, "oid": commit_of(name)}
                for name in sorted(folders)
            ]
        if folder and not inside:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            self._json(inside)

    def _file(self, name: str, revision: str, path: str) -> None:
        files = self._files(name, revision)
        if files is None:
            return
        if path not in files:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        sha = revision if len(revision) == 40 else commit_of(revision)
        etag = hashlib.sha256(files[path]).hexdigest()
        self._send(200, files[path], {"X-Repo-Commit": sha, "ETag": f'"{etag}"'})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def hub(sets: Mapping[str, Commits], *, silent: str = "") -> Iterator[tuple[str, list[str]]]:
    """Its address, which is for ``HF_ENDPOINT``, and what it was asked.

    Args:
        sets: what it has, by name.
        silent: where this is a part of the path, it takes the call and does not answer.
    """
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"sets": sets, "asked": asked, "silent": silent})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
