"""Three hosts that share no disk: recording and training by way of an S3-compatible server.

A file of its own, and so a cluster of its own.
"""

import json

import torch
from safetensors.torch import load_file

from lrmc_ray.config import TrainSettings, validate
from lrmc_ray.run_files import MODEL
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


def test_hosts_that_share_no_disk_train_by_way_of_a_storage(hosts, up, tmp_path):  # noqa: F811
    """An S3-compatible server on the laptop; data, model and output are on the head alone."""
    address = f"{hosts.hosts['laptop'].address}:9000"
    hosts.start("laptop", "moto_server -H 0.0.0.0 -p 9000", tmp_path / "moto.log")
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
    uri = f"s3://runs/lrmc?endpoint_override={address}&scheme=http&region=us-east-1"
    settings = [s for s in SETTINGS if not s.startswith(("train.steps", "train.checkpoint"))]
    command = (
        f"cd ~ && python -m lrmc_ray.train --address auto --output runs --storage '{uri}' --json "
        "--space smoke --model /root/model --train-data my.jsonl train.steps=12 "
        f"train.checkpoint_every=3 'resources.workers=[2, 2]' {' '.join(settings)}"
    )
    done = on_head(hosts, command, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    manifest = json.loads(done.stdout.splitlines()[-1])
    assert manifest["world_size"] == 2
    assert manifest["ledger"]["is_exact"] is True
    theirs = hosts.directory / "home_head" / manifest["directory"]
    for name in ("worker1", "worker2"):
        home = hosts.directory / f"home_{name}"
        assert not (home / "runs").exists()
        assert list(home.glob(".cache/lrmc_ray/storage/*/models/*/model.safetensors")), name
    own = record_alone(hosts.shared, tmp_path)
    assert parts(next(theirs.parents[1].glob("records/*"))) == parts(own)
    identity = {key: value for key, value in manifest["identity"].items() if key != "record"}
    trained = validate(TrainSettings, identity, "test")
    alone = train_alone(trained, own, hosts.shared / "model", tmp_path / "alone_stored")
    one, other = (load_file(d / MODEL / "model.safetensors") for d in (theirs, alone))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert used(theirs) == used(alone)
