"""A real S3-compatible server for tests: moto's, in a thread of this process."""

import contextlib
import logging
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import boto3
from moto.server import ThreadedMotoServer

KEY = "AKIATESTONLY00000000"
SECRET = "test-only/secret+not+a+real+one"
BUCKET = "lrmc-test"


@dataclass
class Server:
    """A running server; the environment of this process has credentials for it."""

    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self):
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1")

    def uri(self, prefix: str, bucket: str = BUCKET, port: int | None = None) -> str:
        return (
            f"s3://{bucket}/{prefix}?endpoint_override=127.0.0.1:{port or self.port}"
            "&scheme=http&region=us-east-1"
        )

    def names(self, prefix: str) -> list[str]:
        """Of every object below ``prefix``, relative to it; markers of folders apart."""
        below = prefix.rstrip("/") + "/"
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=below)
        keys = (entry["Key"] for page in pages for entry in page.get("Contents", []))
        return [key.removeprefix(below) for key in keys if not key.endswith("/")]

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Content of every object below ``prefix``, by its name there; none may be deleted now."""
        client, below = self.client(), prefix.rstrip("/") + "/"
        return {
            name: client.get_object(Bucket=BUCKET, Key=below + name)["Body"].read()
            for name in self.names(prefix)
        }

    def put(self, name: str, content: bytes) -> None:
        self.client().put_object(Bucket=BUCKET, Key=name, Body=content)

    def delete(self, name: str) -> None:
        self.client().delete_object(Bucket=BUCKET, Key=name)

    @contextlib.contextmanager
    def asking_for_credentials(self) -> Iterator[None]:
        """From here on the server checks who asks, and it knows nobody."""

        def reset(count: float) -> None:
            request = urllib.request.Request(
                f"{self.endpoint}/moto-api/reset-auth",
                data=str(count).encode(),
                headers={"Content-Type": "text/plain"},  # a form's content would be taken apart
                method="POST",
            )
            urllib.request.urlopen(request, timeout=10).read()

        reset(0)
        try:
            yield
        finally:
            reset(1e9)


@contextlib.contextmanager
def s3_server() -> Iterator[Server]:
    """The server, with one empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    names = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
        "no_proxy": "127.0.0.1",
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        made = Server(port)
        made.client().create_bucket(Bucket=BUCKET)
        yield made
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
