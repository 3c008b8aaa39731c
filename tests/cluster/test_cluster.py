"""`ray up` of the shipped file on three hosts, a search on them, one host cut off and back.

python -m pytest -q -rs -m cluster tests/cluster      # as root, about eight minutes
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lrmc_ray.config import TrainSettings, find_space, load_settings, validate
from lrmc_ray.files.artifacts import read_manifest
from lrmc_ray.files.metrics_log import read_metrics
from lrmc_ray.files.names import LEDGER, METRICS, MODEL
from lrmc_ray.record import run as run_module
from lrmc_ray.record.actors import Recorder, recorder_options
from lrmc_ray.train.ledger import read_ledger
from tests.cluster.lab import ROOT, lab, missing
from tests.cluster.launch import write_config
from tests.support.documents import block
from tests.support.tiny import make_data, make_model
from tests.support.training import run_alone

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(missing() is not None, reason=f"NO CLUSTER WAS TRIED: {missing()}"),
]

HOSTS = ("laptop", "head", "worker1", "worker2")
STEPS = 240  # long enough to lose a host in the middle of it, on a fast machine too
SETTINGS = (
    *("search.trials=2", "evaluate.limit=4", "evaluate.drift_samples=2", "search.keep_models=all"),
    *(f"train.steps={STEPS}", "train.batch_size=16", "train.micro_batches=4"),
    *("train.checkpoint_every=5", "train.probe_every=0", "train.lr=1e-3"),
    *("resources.max_concurrent=1", "resources.resize_seconds=5"),
)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with lab(tmp_path_factory.mktemp("lab") / "lab", *HOSTS) as made:
        make_model(made.shared / "model")
        make_data(made.shared / "my.jsonl", num_rows=60)
        yield made


@pytest.fixture(scope="module")
def up(hosts):
    """The cluster file, filled in, behind `ray up`; `ray down` when the tests have ended."""
    config = write_config(hosts, cpus=1)
    hosts.run("laptop", typed("(umask", config))
    assert " 0 failed" in hosts.run("laptop", typed("lrmc doctor", config)).stdout
    hosts.run("laptop", typed("ray up", config).replace("ray up", "ray up -y"), timeout=180)
    wait_for(lambda: alive(hosts) == 3, "three nodes", seconds=150)
    return config


def typed(start: str, config: Path) -> str:
    """The documented command that begins with ``start``, for the file that is filled in."""
    lines = block("cluster").replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if line.startswith(start)]
    return line.partition("  #")[0].replace("clusters/local.yaml", str(config))


def on_head(hosts, command, **options):
    return hosts.run("head", f"source ~/.bashrc; {command}", **options)


def alive(hosts) -> int:
    """Nodes that the head holds for alive."""
    ask = (
        "from ray._raylet import GcsClient; "
        f"client = GcsClient(address='{hosts.hosts['head'].address}:6379'); "
        "print('alive', sum(node.state == 0 for node in client.get_all_node_info().values()))"
    )
    done = on_head(hosts, f'python -c "{ask}"', check=False)
    found = re.search(r"alive (\d+)", done.stdout)
    return int(found[1]) if found else 0


def wait_for(condition, what, *, seconds, while_running=None) -> float:
    """Seconds until ``condition`` holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"no {what} after {seconds} s"
        assert while_running is None or while_running.poll() is None, f"it ended before {what}"
        time.sleep(0.5)
    return time.monotonic() - start


def test_a_search_survives_a_host_that_is_cut_off_and_comes_back(hosts, up, tmp_path):
    more = (
        f"--space smoke --domain-tasks capitals --general-tasks plain_english {' '.join(SETTINGS)}"
    )
    command = typed("ray exec", up).rstrip().removesuffix("'") + f" {more} > /mnt/shared/log 2>&1'"
    log = hosts.shared / "log"
    # As a user does, from outside, by ssh.
    tune = hosts.start("laptop", command, tmp_path / "ray_exec.log")
    first = Trial(hosts.shared, 0)
    wait_for(lambda: first.step(2) >= 12, "step 12 on 2 hosts", seconds=150, while_running=tune)
    hosts.unplug("worker2")
    cut = time.monotonic()
    wait_for(lambda: alive(hosts) == 2, "loss noticed", seconds=90, while_running=tune)
    print(f"cut off at step {first.step()}, noticed after {time.monotonic() - cut:.0f} s", end="")
    wait_for(lambda: first.step(1) > 0, "step on 1 host", seconds=180, while_running=tune)
    print(f", went on after {time.monotonic() - cut:.0f} s", end="")
    hosts.plug("worker2")
    back = time.monotonic()
    wait_for(lambda: alive(hosts) == 3, "third node", seconds=120, while_running=tune)
    print(f"; back {time.monotonic() - back:.0f} s after the cable")
    assert tune.wait(600) == 0, log.read_text()[-5000:]

    (study,) = hosts.shared.glob("runs/*/study.json")
    trials = json.loads(study.read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE"]
    worlds = [
        [line.metrics["elastic/world_size"] for line in Trial(hosts.shared, n).lines()]
        for n in (0, 1)
    ]
    assert worlds[0][0] == 2.0
    assert 1.0 in worlds[0]
    both = worlds[0] + worlds[1]
    assert 2.0 in both[both.index(1.0) :], "the host that came back was not used"
    # Every step once per sample, whoever did it, and the result that one process gets alone.
    own = record_alone(hosts.shared, tmp_path)
    recorded = next(hosts.shared.glob("runs/records/*"))
    assert parts(recorded) == parts(own)
    for number in (0, 1):
        manifest = read_manifest(Trial(hosts.shared, number).directory, made_by="train")
        assert manifest["ledger"]["is_exact"] is True
        assert manifest["world_size"] in (1, 2)
    theirs = Trial(hosts.shared, 0).directory  # trained while the host was lost
    settings = validate(TrainSettings, trials[0]["settings"], "trial")
    alone = train_alone(settings, own, hosts.shared / "model", tmp_path / "alone")
    one, other = (load_file(d / MODEL / "model.safetensors") for d in (theirs, alone))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert used(theirs) == used(alone)


def test_mlflow_on_the_head_has_the_search(hosts, up):
    done = on_head(
        hosts,
        "curl -s -X POST -H 'Content-Type: application/json' -d "
        '\'{"experiment_ids": ["1"], "max_results": 10}\' '
        "http://127.0.0.1:5000/api/2.0/mlflow/runs/search",
    )
    runs = json.loads(done.stdout)["runs"]
    assert sorted(run["info"]["status"] for run in runs) == ["FINISHED"] * 3  # study, two trials


def test_a_host_without_the_token_is_turned_away(hosts, up):
    """Who reaches the head's port, as here from outside of the cluster, still cannot join."""
    head = hosts.hosts["head"].address
    join = f"import ray; ray.init('{head}:6379', logging_level='ERROR'); print('joined')"
    done = hosts.run("laptop", f'RAY_AUTH_MODE=disabled timeout 60 python -c "{join}"', check=False)
    assert "joined" not in done.stdout
    assert done.returncode != 0
    assert re.search("[Uu]nauthenticated|AuthenticationError", done.stdout + done.stderr)


def test_the_dashboard_and_mlflow_listen_on_the_head_alone(hosts, up):
    health = "curl -s http://127.0.0.1:5000/health || true"
    wait_for(lambda: "OK" in on_head(hosts, health).stdout, "MLflow", seconds=60)
    for name in HOSTS[1:]:
        for line in hosts.run(name, "ss -Hltnp").stdout.splitlines():
            address, users = line.split()[3], line.split()[-1]
            host, _, port = address.rpartition(":")
            if host in ("127.0.0.1", "[::1]"):
                continue
            # Ray's own processes, whose calls need the token, and ssh.
            assert re.search("sshd|ray|gcs_server|python", users), line
            assert port not in ("5000", "8265"), line


def test_no_port_of_the_cluster_serves_metrics_to_a_neighbour(hosts, up):
    """Ray's metrics ask for no token: those of the autoscaler, the dashboard and every node."""
    for name in HOSTS[1:]:
        address = hosts.hosts[name].address
        ports = {
            line.split()[3].rpartition(":")[2]
            for line in hosts.run(name, "ss -Hltn").stdout.splitlines()
        }
        assert {"44217", "44227"} & ports == set(), name
        for port in {"44217", "44227", *ports} - {"22"}:
            ask = f"curl -s -m 5 -o /dev/null -w '%{{http_code}}' http://{address}:{port}/metrics"
            status = hosts.run("laptop", ask, check=False).stdout.strip()
            # 000: closed, bound to the host itself, or no HTTP.
            assert status in ("000", "401", "403"), f"{name} answers {status} on {port}"


def test_an_output_that_is_not_shared_is_refused_at_the_start(hosts, up):
    command = (
        "python -m lrmc_ray.record --address auto --output ~/runs --model /mnt/shared/model "
        "--train-data /mnt/shared/my.jsonl"
    )
    start = time.monotonic()
    done = on_head(hosts, command, check=False)
    assert done.returncode == 3, done.stderr
    assert time.monotonic() - start < 60
    workers = [hosts.hosts[name].address for name in ("worker1", "worker2")]
    assert f"/root/runs is not by {', '.join(workers)}. Mount a shared" in done.stderr


def test_ray_down_stops_ray_on_every_host(hosts, up):
    hosts.run("laptop", typed("ray down", up).replace("ray down", "ray down -y"), timeout=120)

    def left() -> list[str]:
        """Ray's processes that live; nobody on these hosts buries the dead."""
        lines = [
            f"{name} {line}"
            for name in HOSTS[1:]
            for line in hosts.run(name, "ps -eo stat=,comm=").stdout.splitlines()
        ]
        return [line for line in lines if re.search(r" [^Z ]\S* +(raylet|gcs_server)", line)]

    wait_for(lambda: not left(), "end of Ray's processes", seconds=30)


# What one process does alone, without Ray


class Trial:
    """The files of a trial's training, while it runs."""

    def __init__(self, shared: Path, number: int) -> None:
        self._pattern = f"runs/*/trials/{number:04d}/training"
        self._shared = shared

    @property
    def directory(self) -> Path:
        (found,) = self._shared.glob(self._pattern)
        return found

    def lines(self) -> list[Any]:
        lines = [
            line
            for path in self._shared.glob(f"{self._pattern}/{METRICS}")
            for line in read_metrics(path)
        ]
        return [line for line in lines if "elastic/world_size" in line.metrics]

    def step(self, world_size: int | None = None) -> int:
        """The newest step, of those on ``world_size`` workers."""
        return max(
            (
                line.step
                for line in self.lines()
                if world_size in (None, line.metrics["elastic/world_size"])
            ),
            default=0,
        )


def record_alone(shared: Path, directory: Path) -> Path:
    def here(prepared, shards, tokenizer_size):
        recorder = Recorder(**recorder_options(prepared, tokenizer_size))
        return map(recorder.record, shards)

    settings = load_settings(
        find_space("smoke"),
        [f'model.name="{shared / "model"}"', f'data.train="{shared / "my.jsonl"}"', *SETTINGS],
    )
    before, run_module.run_actors = run_module.run_actors, here
    try:
        return run_module.record(settings, directory / "alone")
    finally:
        run_module.run_actors = before


def train_alone(settings: TrainSettings, recorded: Path, model: Path, directory: Path) -> Path:
    run_alone(settings, record=recorded, model=model, directory=directory).run()
    return directory


def used(directory: Path) -> list[list[str]]:
    """The samples of each step; of a step that was done again, those of the last time."""
    lines = {line.step: line.sample_ids for line in read_ledger(directory / LEDGER)}
    return [lines[step] for step in sorted(lines)]


def parts(recorded: Path) -> list[Any]:
    return [
        (file["name"], file["rows"], file["sha256"])
        for file in read_manifest(recorded, made_by="record")["files"]
    ]


def test_nothing_is_left_on_this_machine_when_a_test_is_killed(tmp_path):
    """The hosts hang on the test's own process, whatever ends it."""
    script = (
        "import sys, time; from pathlib import Path; from tests.cluster.lab import Lab\n"
        f"made = Lab(Path({str(tmp_path / 'lab')!r}), ('laptop', 'head'))\n"
        "print([host.pid for host in made.hosts.values()], flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    process.kill()
    process.wait()
    process.stdout.close()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "end", seconds=10)
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(lan|laptop|head|worker1)\b", links)
