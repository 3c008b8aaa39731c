"""Stage 0 under kill -9: driver, actor and raylet, at random times and at named commit points.

    python benchmarks/faults.py --stage record --kills 20 --seed 0

A small random model records a few thousand rows. Every attempt is the same command; one is killed,
the next must go on. Whenever a record is finished it is compared, row by row, with one that was
never interrupted, and the next is begun, until all kills are spent. Parts of interrupted records
are damaged on the way. At the end a finished record is damaged in many ways, each of which reading
must notice. Raylets are killed in a cluster of two worker nodes on this machine; another joins.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before Ray is imported anywhere: everything here stays on this machine.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "LRMC_TESTING": "1",
    "RAY_DEDUP_LOGS": "0",
}
DRIVER_POINTS = ("planned", "part_counted", "parts_complete", "manifest_written", "published")
ACTOR_POINTS = ("shard_started", "part_written", "part_renamed")
ACTOR_TITLE = "ray::MapWorker(MapBatches(Recorder))"


@dataclasses.dataclass(frozen=True)
class Kill:
    """What dies, and when: at a pass of a named point, or after a share of the usual time."""

    target: str
    point: str = ""
    number: int = 0
    share: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.target} at {self.point or 'random'}"


def plan_kills(num_kills: int, rng: random.Random) -> list[Kill]:
    """Every named point once (as far as there are kills), the rest at random times."""
    named = [Kill("driver", point, rng.randint(1, 4)) for point in DRIVER_POINTS]
    named = [dataclasses.replace(k, number=k.number if "part_" in k.point else 1) for k in named]
    # An actor starts again and dies again at its n-th pass: n = 1 would never get on.
    named += [Kill("actor", point, rng.randint(3, 6)) for point in ACTOR_POINTS]
    targets = ["driver", "actor", "raylet", "driver"]
    kills = named[:num_kills]
    kills += [
        Kill(targets[number % len(targets)], share=rng.random())
        for number in range(num_kills - len(kills))
    ]
    rng.shuffle(kills)
    return kills


class Cluster:
    """A head without CPUs and two worker nodes; a node that was killed is replaced."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        quick = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000}
        quick |= {"health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
        self._cluster = RayCluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": 150 << 20,
                "_system_config": quick,
            },
        )
        self._nodes = [self._new_node(), self._new_node()]

    def _new_node(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=100 << 20)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def kill_a_raylet(self) -> None:
        self._cluster.remove_node(self._nodes.pop(0), allow_graceful=False)

    def add_node(self) -> None:
        self._nodes.append(self._new_node())

    def close(self) -> None:
        self._cluster.shutdown()


class Campaign:
    """Attempts at one record after another, and what came of them."""

    def __init__(self, work: Path, model: Path, data: Path, rng: random.Random):
        self.work, self.model, self.data, self.rng = work, model, data, rng
        self.log = work / "passes.log"
        self.output = work / "runs-0"
        self.records = 0
        self.attempts = 0
        self.lost = self.duplicated = self.unreadable = self.uncommitted = 0
        self.damaged_parts = self.mended_parts = 0
        self.recorded_shards: Counter[str] = Counter()
        self.outcomes: dict[str, Counter[str]] = {}
        self.recovery_seconds: list[float] = []

    def command(self, address: str = "local") -> list[str]:
        return [
            *(sys.executable, "-m", "lrmc_ray.record"),
            *("--model", str(self.model), "--train-data", str(self.data)),
            *("--output", str(self.output), "--address", address),
            *("train.tau=0.9", "--actors", "1,2"),
        ]

    def start(self, *, fault: str = "", address: str = "local") -> subprocess.Popen[bytes]:
        self.attempts += 1
        environment = {**os.environ, "LRMC_FAULT_LOG": str(self.log)}
        if fault:
            environment["LRMC_FAULT"] = fault
        with (self.work / f"attempt-{self.attempts:03d}.log").open("wb") as log:
            return subprocess.Popen(self.command(address), env=environment, stdout=log, stderr=log)

    def passes(self, point: str) -> list[str]:
        """The notes of all passes of ``point`` so far."""
        if not self.log.exists():
            return []
        lines = [line.split(" ") for line in self.log.read_text().splitlines()]
        return [line[2] for line in lines if line[0] == f"record.{point}"]

    @property
    def finals(self) -> list[Path]:
        return [
            path
            for path in (self.output / "records").glob("*")
            if path.is_dir() and path.suffix != ".partial"
        ]

    @property
    def partials(self) -> list[Path]:
        return list((self.output / "records").glob("*.partial"))


def processes_below(pid: int, title: str) -> list[int]:
    import psutil

    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if title in " ".join(process.cmdline()):
                    found.append(process.pid)
    return found


def wait_for(process: subprocess.Popen[bytes], condition: Any, seconds: float = 120) -> bool:
    """Whether ``condition()`` came true before the process ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if condition():
            return True
        time.sleep(0.02)
    return False


def end_of(process: subprocess.Popen[bytes], descendants: list[int]) -> int:
    """The exit code, once everything that the command started is gone as well."""
    import psutil

    code = process.wait(timeout=600)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(psutil.pid_exists(pid) for pid in descendants):
        time.sleep(0.1)
    for pid in descendants:  # Ray's own clean-up has had its time
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return code


def descendants_of(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def attempt(campaign: Campaign, kill: Kill, seconds: float, cluster: Any) -> str:
    """One command, killed as ``kill`` says; what became of it."""
    fault = f"record.{kill.point}:kill:{kill.number}" if kill.point else ""
    start = time.monotonic()
    if kill.target == "raylet":
        process = campaign.start(address=cluster().address)
    else:
        process = campaign.start(fault=fault)
    before = len(campaign.passes("shard_started"))
    descendants: list[int] = []
    is_killed = False
    if kill.point:
        # The process kills itself; actors are replaced, the driver is not.
        while process.poll() is None:
            descendants = descendants_of(process.pid) or descendants
            time.sleep(0.05)
        is_killed = process.returncode == -signal.SIGKILL or kill.target == "actor"
    elif kill.target == "driver":
        time.sleep(kill.share * seconds)
        descendants = descendants_of(process.pid)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            is_killed = True
    else:
        is_running = wait_for(process, lambda: len(campaign.passes("shard_started")) > before)
        time.sleep(kill.share * 3)
        descendants = descendants_of(process.pid)
        if is_running and process.poll() is None:
            if kill.target == "actor":
                for pid in processes_below(process.pid, ACTOR_TITLE)[:1]:
                    os.kill(pid, signal.SIGKILL)
                    is_killed = True
            else:
                cluster().kill_a_raylet()
                time.sleep(1)
                cluster().add_node()
                is_killed = True
    code = end_of(process, descendants)
    if code == 0:
        if is_killed:
            campaign.recovery_seconds.append(time.monotonic() - start)
        return "went on" if is_killed else "too late"
    return "died" if is_killed else f"exit {code}"


def digest_of(sample: Any) -> str:
    """Of everything that is in a sample."""
    digest = hashlib.sha256(f"{sample.sample_id}\0{sample.domain}".encode())
    candidates = sample.candidates
    for tensor in (
        *(sample.input_ids_T, sample.positions_P, sample.is_supervised_P),
        *(candidates.offsets, candidates.token_ids, candidates.logprobs, candidates.gold_ids),
    ):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def rows_of(directory: Path) -> Counter[tuple[str, str]]:
    from lrmc_ray.record.reader import Records

    records = Records(directory)
    samples = (records[index] for index in range(len(records)))
    return Counter((sample.sample_id, digest_of(sample)) for sample in samples)


def audit(campaign: Campaign, reference: Counter[tuple[str, str]]) -> None:
    """Compare the finished record with the one that was never interrupted; begin another."""
    from lrmc_ray.errors import LrmcError
    from lrmc_ray.files.artifacts import is_finished
    from lrmc_ray.record.reader import Records

    (final,) = campaign.finals
    if not is_finished(final):
        campaign.uncommitted += 1
    for part in range(len(Records(final).parts)):
        try:
            Records(final).verify_part(part)
        except LrmcError:
            campaign.unreadable += 1
    rows = rows_of(final)
    campaign.lost += sum((reference - rows).values())
    campaign.duplicated += sum((rows - reference).values())
    campaign.records += 1
    campaign.output = campaign.work / f"runs-{campaign.records}"


def damage_a_part(campaign: Campaign) -> None:
    """Flip a bit in something that an interrupted command left behind."""
    files = [
        path
        for directory in campaign.partials
        for pattern in ("part-*.parquet", "examples.parquet")
        for path in directory.glob(pattern)
    ]
    if files:
        path = campaign.rng.choice(files)
        content = bytearray(path.read_bytes())
        content[campaign.rng.randrange(len(content))] ^= 1 << campaign.rng.randrange(8)
        path.write_bytes(content)
        campaign.damaged_parts += 1


def damages(directory: Path, rng: random.Random, number: int) -> Iterator[tuple[str, list[str]]]:
    """Damage the files of a finished record in place, ``number`` times; each is mended again.

    Yields the kind of damage and the names of the files that are not as they were.
    """
    paths = sorted(directory.glob("part-*.parquet"))
    good = {path: path.read_bytes() for path in paths}
    kinds = ("bit flip", "bit flip", "bit flip", "truncation", "zeroed page", "swap", "missing")
    for index in range(number):
        kind = kinds[index % len(kinds)]
        path, other = rng.sample(paths, 2)
        content = bytearray(good[path])
        touched = [path]
        if kind == "bit flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
        elif kind == "truncation":
            path.write_bytes(content[: rng.randrange(len(content))])
        elif kind == "zeroed page":
            start = rng.randrange(len(content) - 512)
            content[start : start + 512] = bytes(512)
            path.write_bytes(content)
        elif kind == "swap":
            path.write_bytes(good[other])
            other.write_bytes(good[path])
            touched.append(other)
        else:
            path.unlink()
        yield kind, [path.name for path in touched]
        for path in touched:
            path.write_bytes(good[path])


def first_bad_file(directory: Path) -> str | None:
    """The name of the file that reading the record complains of."""
    from lrmc_ray.errors import DataError
    from lrmc_ray.record.reader import Records

    records = Records(directory)
    for part, info in enumerate(records.parts):
        try:
            records.verify_part(part)
        except DataError as error:
            return info.name if info.name in str(error) else None
    return None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/faults.py --stage record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=2400, help="rows of the training data")
    parser.add_argument("--corruptions", type=int, default=350, help="of the finished record")
    parser.add_argument("--work", type=Path, help="directory to work in (default: a new one)")
    arguments = parser.parse_args(argv)
    os.environ.update(ENVIRONMENT)
    from tests.support.tiny import make_data, make_model

    rng = random.Random(arguments.seed)
    work = arguments.work or Path(tempfile.mkdtemp(prefix="lrmc_faults_"))
    work.mkdir(parents=True, exist_ok=True)
    model = make_model(work / "model")
    data = make_data(work / "train.jsonl", num_rows=arguments.rows)
    campaign = Campaign(work, model, data, rng)
    # Also for the actors of the cluster, which inherit it from here.
    os.environ["LRMC_FAULT_LOG"] = str(campaign.log)

    start = time.monotonic()
    process = campaign.start()
    if end_of(process, []):
        print((work / "attempt-001.log").read_text())
        return 1
    seconds = time.monotonic() - start
    (undisturbed,) = campaign.finals
    reference = rows_of(undisturbed)
    num_shards = len(list(undisturbed.glob("part-*.parquet")))
    num_rows = sum(reference.values())
    print(f"{num_rows} rows, {num_shards} files, undisturbed {seconds:.1f} s; {work}")
    campaign.output = work / "runs"
    first_passes = len(campaign.passes("shard_started"))

    started: list[Cluster] = []

    def cluster() -> Cluster:
        if not started:
            started.append(Cluster())
        return started[0]

    outcomes: Counter[tuple[str, str]] = Counter()
    for number, kill in enumerate(plan_kills(arguments.kills, rng), start=1):
        # A random time may come when all is done, a point may lie behind: then once more.
        outcome = "too late"
        tries = 0
        while outcome == "too late" and tries < 5:
            tries += 1
            outcome = attempt(campaign, kill, seconds, cluster)
            if campaign.finals and not campaign.partials:
                audit(campaign, reference)
            elif outcome == "died" and rng.random() < 0.3:
                damage_a_part(campaign)
            kill = dataclasses.replace(kill, share=rng.random())
        outcomes[kill.name, outcome] += 1
        print(f"kill {number:3d}  {kill.name:28s} {outcome} (try {tries})", flush=True)
    if campaign.partials or campaign.finals:
        if code := end_of(campaign.start(), []):
            print((work / f"attempt-{campaign.attempts:03d}.log").read_text())
            print(f"the last attempt ended with {code}")
        audit(campaign, reference)
    for one in started:
        one.close()

    injected: Counter[str] = Counter()
    detected: Counter[str] = Counter()
    for kind, names in damages(undisturbed, rng, arguments.corruptions):
        injected[kind] += 1
        detected[kind] += first_bad_file(undisturbed) in names
    is_clean = first_bad_file(undisturbed) is None and rows_of(undisturbed) == reference

    print("\nkills")
    for (name, outcome), count in sorted(outcomes.items()):
        print(f"  {name:32s} {outcome:10s} {count:3d}")
    print("damages of a finished record: noticed / made")
    for kind, count in injected.items():
        print(f"  {kind:32s} {detected[kind]:4d} / {count}")
    print(f"damages of interrupted records, all redone or harmless: {campaign.damaged_parts}")
    print(f"clean record refused: {'no' if is_clean else 'yes'}")
    print(f"directories seen under their name but unfinished: {campaign.uncommitted}")
    expected = num_rows * campaign.records
    started_shards = len(campaign.passes("shard_started")) - first_passes
    scoreboard = {
        "rows_expected": expected,
        "rows_lost": campaign.lost,
        "rows_duplicated": campaign.duplicated,
        "unreadable_files": campaign.unreadable,
        "recomputed_share": round(started_shards / (num_shards * campaign.records) - 1, 4),
        "corruptions_injected": sum(injected.values()),
        "corruptions_detected": sum(detected.values()),
    }
    print(f"{campaign.records} records, {campaign.attempts} commands, {work}")
    print(json.dumps(scoreboard))
    if arguments.work is None:
        shutil.rmtree(work)
    is_good = not (campaign.lost or campaign.duplicated or campaign.unreadable) and is_clean
    return 0 if is_good and injected == detected else 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main(sys.argv[1:]))
