"""Three hosts that share no disk: recording and training by way of an S3-compatible server.

A file of its own, and so a cluster of its own.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from lrmc_ray.config import TrainSettings, validate
from lrmc_ray.files.names import MODEL
from tests.cluster.test_cluster import (
    HOSTS,
    SETTINGS,
    hosts,  # noqa: F401  # a fixture
    on_head,
    parts,
    pytestmark,  # noqa: F401
    record_alone,
    train_alone,
    up,  # noqa: F401  # a fixture
    used,
    wait_for,
)


@pytest.fixture(scope="module")
def storage(hosts, up, tmp_path_factory):  # noqa: F811
    """An S3-compatible server on the laptop; data, model and output are on the head alone."""
    address = f"{hosts.hosts['laptop'].address}:9000"
    log = tmp_path_factory.mktemp("storage") / "moto.log"
    hosts.start("laptop", "moto_server -H 0.0.0.0 -p 9000", log)
    for name in HOSTS:
        home = hosts.directory / f"home_{name}" / ".aws"
        home.mkdir()
        (home / "credentials").write_text(
            "[default]\naws_access_key_id = test\naws_secret_access_key = test-secret\n"
        )
    make = f"boto3.client('s3', endpoint_url='http://{address}', region_name='us-east-1')"
    make = f"python -c \"import boto3; {make}.create_bucket(Bucket='runs')\""
    wait_for(lambda: hosts.run("laptop", make, check=False).returncode == 0, "bucket", seconds=60)
    on_head(hosts, "cp -r /mnt/shared/model /mnt/shared/my.jsonl ~")
    return f"s3://runs/lrmc?endpoint_override={address}&scheme=http&region=us-east-1"


def assert_nothing_shared(hosts):  # noqa: F811
    for name in ("worker1", "worker2"):
        home = hosts.directory / f"home_{name}"
        assert not (home / "runs").exists()
        assert list(home.glob(".cache/lrmc_ray/storage/*/models/*/model.safetensors")), name
        assert not list(home.glob(".cache/lrmc_ray/storage/*/scoring-*")), name


def assert_same_model(one, other):
    ours, theirs = (load_file(d / MODEL / "model.safetensors") for d in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_hosts_that_share_no_disk_train_by_way_of_a_storage(hosts, storage, tmp_path):  # noqa: F811
    settings = [s for s in SETTINGS if not s.startswith(("train.steps", "train.checkpoint"))]
    command = (
        f"cd ~ && python -m lrmc_ray.train --address auto --output runs --storage '{storage}' "
        "--json --space smoke --model /root/model --train-data my.jsonl train.steps=12 "
        f"train.checkpoint_every=3 'resources.workers=[2, 2]' {' '.join(settings)}"
    )
    done = on_head(hosts, command, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    manifest = json.loads(done.stdout.splitlines()[-1])
    assert manifest["world_size"] == 2
    assert manifest["ledger"]["is_exact"] is True
    theirs = hosts.directory / "home_head" / manifest["directory"]
    assert_nothing_shared(hosts)
    own = record_alone(hosts.shared, tmp_path)
    assert parts(next(theirs.parents[1].glob("records/*"))) == parts(own)
    identity = {key: value for key, value in manifest["identity"].items() if key != "record"}
    trained = validate(TrainSettings, identity, "test")
    alone = train_alone(trained, own, hosts.shared / "model", tmp_path / "alone_stored")
    assert_same_model(theirs, alone)
    assert used(theirs) == used(alone)


def test_hosts_that_share_no_disk_search_by_way_of_a_storage(hosts, storage, tmp_path):  # noqa: F811
    """Trials are trained and scored on other hosts than the one that has all their files."""
    settings = [s for s in SETTINGS if not s.startswith(("train.steps", "search.trials"))]
    command = (
        f"cd ~ && python -m lrmc_ray.tune --address auto --output runs --storage '{storage}' "
        "--space smoke --model /root/model --train-data my.jsonl train.steps=6 search.trials=3 "
        "search.early_stopping=median search.early_stopping_trials=2 search.early_stopping_items=4 "
        f"'resources.workers=[2, 2]' --json {' '.join(settings)}"
    )
    done = on_head(hosts, command, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert_nothing_shared(hosts)
    runs = hosts.directory / "home_head" / "runs"
    (study,) = (json.loads(path.read_text()) for path in runs.glob("*/study.json"))
    rungs = [trial["rung"] for trial in study["trials"]]
    for number, rung in enumerate(rungs):
        assert rung["others"] == {str(n): rungs[n]["value"] for n in range(number)}
    own = record_alone(hosts.shared, tmp_path)
    for trial in study["trials"][:2]:  # those that may not be stopped
        assert trial["state"] == "COMPLETE"
        trained = validate(TrainSettings, trial["settings"], "test")
        name = f"alone_{trial['number']}"
        alone = train_alone(trained, own, hosts.shared / "model", tmp_path / name)
        assert_same_model(runs / study["id"] / trial["directory"] / "training", alone)
    left = on_head(
        hosts,
        'python -c "from lrmc_ray.files.storage import Storage; '
        f"s = Storage('{storage}'); print(s.children('studies'), s.children('scoring'))\"",
    ).stdout
    assert left.split() == ["{}", "{}"]


TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: /root/items.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc}
"""
ITEM = '{"question": "Two and two are", "choices": ["four", "five"], "answer": 0}\n'


def homes(hosts, *names):  # noqa: F811
    return [hosts.directory / f"home_{name}" for name in names]


def test_doctor_names_the_host_that_cannot_reach_the_storage(hosts, storage):  # noqa: F811
    ask = f"cd ~ && lrmc doctor --json --address auto --output runs --storage '{storage}'"
    done = on_head(hosts, ask, check=False)
    findings = {f["check"]: f for f in json.loads(done.stdout.splitlines()[-1])["findings"]}
    assert findings["storage"]["status"] == findings["shared storage"]["status"] == "ok"
    assert findings["shared storage"]["seen"] == f"{storage} is read and written by every node"
    assert "cluster" not in findings
    lost = f"blackhole {hosts.hosts['laptop'].address}"
    hosts.run("worker2", f"ip route add {lost}")
    try:
        done = on_head(hosts, ask, check=False)
    finally:
        hosts.run("worker2", f"ip route del {lost}")
    assert done.returncode == 1
    findings = {f["check"]: f for f in json.loads(done.stdout.splitlines()[-1])["findings"]}
    assert findings["storage"]["status"] == "ok"  # of the head
    assert findings["cluster"]["status"] == "failed"
    assert hosts.hosts["worker2"].address in findings["cluster"]["seen"]
    assert hosts.hosts["worker1"].address not in findings["cluster"]["seen"]


def test_a_task_file_that_a_host_lacks_is_refused_until_it_is_there(hosts, storage):  # noqa: F811
    ask = (
        f"cd ~ && python -m lrmc_ray.evaluate --address auto --output runs --storage '{storage}' "
        "--model /root/model --domain-tasks /root/mine.yaml --general-tasks plain_english --json "
        "evaluate.limit=4 evaluate.drift_samples=2"
    )
    for home in homes(hosts, "head", "worker1"):
        (home / "mine.yaml").write_text(TASK)
        (home / "items.jsonl").write_text(8 * ITEM)
    done = on_head(hosts, ask, check=False)
    assert done.returncode == 3, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "mine.yaml must be on every node of the cluster, with the same content" in line
    assert f"it is not on {hosts.hosts['worker2'].address}. Copy it there" in line
    (home,) = homes(hosts, "worker2")
    (home / "mine.yaml").write_text(TASK)
    (home / "items.jsonl").write_text(7 * ITEM)
    done = on_head(hosts, ask, check=False)
    assert done.returncode == 3
    assert "items.jsonl must be on every node" in done.stderr
    (home / "items.jsonl").write_text(8 * ITEM)
    done = on_head(hosts, ask, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
