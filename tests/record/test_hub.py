"""Data sets of the Hub, from a server on this machine that answers as the Hub does."""

import gzip
import io
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.hub import commit_of, hub

ROOT = Path(__file__).resolve().parents[2]
DATED = {"prompt": "When?", "completion": "2024-01-01", "id": 7}
"""``datasets`` would read a date from it."""
OTHER = {"prompt": "2?", "completion": "Two.", "id": 8}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(*rows):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


CONFIGURED = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: "parts/*.jsonl.gz"}
---
"""
SETS = {
    "org/name": {
        "main": {"train.jsonl": lines(DATED, OTHER), "test.jsonl": lines(OTHER), "x.txt": b"no"},
        "v1": {
            "data/train-00000-of-00002.parquet": parquet(DATED),
            "data/train-00001-of-00002.parquet": parquet(OTHER),
        },
    },
    "org/packed": {
        "main": {"README.md": CONFIGURED, "parts/a.jsonl.gz": gzip.compress(lines(OTHER))}
    },
    "org/pictures": {"main": {"train/a.png": b"png", "train/b.png": b"png"}},
}
SCRIPT = """
import json, sys, time
from lrmc_ray.errors import LrmcError
from lrmc_ray.files import hub_calls
from lrmc_ray.record import hub
from lrmc_ray.record.rows import Rejects, read_rows
from lrmc_ray.record.sources import find_sources

hub.TIMEOUT_SECONDS = 0.5
hub_calls.SECONDS = 1.0
for name in sys.argv[1:]:
    start = time.monotonic()
    try:
        sources = find_sources([name])
        rows = [[row.place, row.content] for row in read_rows(sources, Rejects())]
        said = {"rows": rows, "domains": [source.domain for source in sources]}
    except LrmcError as error:
        said = {"problem": str(error), "code": error.exit_code}
    print(json.dumps({**said, "seconds": time.monotonic() - start}))
"""


def ask(address, home, *names):
    """What a process of its own reads of each name."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *names],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_ENDPOINT": address,
            "HF_HOME": str(home / "hf"),
            "LRMC_CACHE": str(home / "own"),
            "PYTHONPATH": str(ROOT),
        },
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def answers(home):
    names = [
        *("org/name", "sql=hf://datasets/org/name@v1", "org/name:test", "org/name:dev"),
        *("org/nobody", "org/name@v9", "org/pictures", "hf://nothing", "org/packed"),
    ]
    with hub(SETS) as (address, _):
        return dict(zip(names, ask(address, home, *names), strict=True))


def test_values_are_what_the_files_say(answers):
    found = answers["org/name"]
    assert [content for _, content in found["rows"]] == [DATED, OTHER]
    places = [place for place, _ in found["rows"]]
    assert places[0].endswith(f"/snapshots/{commit_of('main')}/train.jsonl:1")
    assert places[1].endswith("train.jsonl:2")


def test_a_revision_a_split_and_a_domain(answers):
    found = answers["sql=hf://datasets/org/name@v1"]
    assert [content for _, content in found["rows"]] == [DATED, OTHER]
    assert found["domains"] == ["sql", "sql"]
    assert commit_of("v1") in found["rows"][0][0]
    assert [content for _, content in answers["org/name:test"]["rows"]] == [OTHER]
    assert [content for _, content in answers["org/packed"]["rows"]] == [OTHER]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("org/name:dev", "(it has the splits train, test, not dev)"),
        ("org/nobody", "(there is no such data set, or it is private)"),
        ("org/name@v9", "(it has no revision v9)"),
        ("org/pictures", "must consist of .jsonl, "),
        ("hf://nothing", "a data set of the Hub is written org/name, "),
    ],
)
def test_what_cannot_be_had_is_exit_code_3(answers, name, told):
    assert told in answers[name]["problem"]
    assert answers[name]["code"] == 3


def test_without_the_hub_what_was_downloaded_is_read_and_the_rest_is_refused_at_once(answers, home):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
        known, unknown = ask(closed, home, "org/name", "org/name@v2")
        server.listen()  # it takes calls, and never answers
        (silent,) = ask(closed, home, "org/name@v2")
    assert known["rows"] == answers["org/name"]["rows"]
    for answer in (unknown, silent):
        assert "is neither a file nor to be had from the Hugging Face Hub" in answer["problem"]
        assert answer["code"] == 3
        assert answer["seconds"] < 10


@pytest.mark.slow
def test_a_hub_that_falls_silent_after_its_first_answer_holds_up_nothing(tmp_path):
    """It says that the data set is there, and takes the question for its files in silence."""
    with hub(SETS, silent="/tree/") as (address, asked):
        (answer,) = ask(address, tmp_path, "org/name")
    assert sum("/tree/" in one for one in asked) == 6
    assert answer["code"] == 3
    assert answer["seconds"] < 60


CALLS = """
import sys, time
from huggingface_hub import HfApi, get_session
from lrmc_ray.files import hub_calls

hub_calls.SECONDS = 0.5
hub_calls.limit_hub_calls()
for timeout in (..., None, 0.2):
    given = {} if timeout is ... else {"timeout": timeout}
    start = time.monotonic()
    try:
        get_session().get(f"{sys.argv[1]}/x", **given)
    except Exception as error:
        print(type(error).__name__, time.monotonic() - start)
"""


def test_every_call_to_the_hub_has_a_limit():
    """Those that give none, those that give none by name, and those that have a shorter one."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", CALLS, address],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    found = [line.split() for line in done.stdout.splitlines()]
    assert [kind for kind, _ in found] == ["ReadTimeout"] * 3
    for (_, seconds), expected in zip(found, (0.5, 0.5, 0.2), strict=True):
        assert expected <= float(seconds) < expected + 1.0
