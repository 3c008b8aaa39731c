"""Hosts on one machine, as a cluster launcher sees them: sshd, a network, processes, a home each.

Every host is a set of Linux namespaces: network, mounts, processes, name, shared memory. It has
its own ``/tmp``, ``/root``, ``/dev/shm`` and, as on a real cluster, one directory that all share,
``/mnt/shared``. All of it hangs on one process; when that ends, even with the test by kill -9,
the kernel takes everything away.
"""

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUBNET = "10.77.0"
PRIVATE = ("/tmp", "/root", "/mnt")
"""What a host does not share with the machine that it is on."""
NAMESPACES = ("--net", "--mount", "--pid", "--uts", "--ipc")
TOOLS = ("ip", "unshare", "nsenter", "rsync", "curl", "ssh", "ssh-keygen", "/usr/sbin/sshd")

_SWITCH = "ip link set lo up; ip link add lan type bridge; ip link set lan up; exec sleep infinity"
_HOST = """
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/keep
number=0
for path in {keep}; do
  mkdir /run/keep/$number; mount --bind $path /run/keep/$number; number=$((number + 1))
done
mkdir /run/home; mount --bind {home} /run/home
mkdir /run/shared; mount --bind {shared} /run/shared
mkdir /run/scratch; mount --bind {scratch} /run/scratch
for path in {private}; do mount -t tmpfs tmpfs $path; done
mkdir /mnt/shared
mount --bind /run/home /root
mount --bind /run/scratch /tmp
mount --bind /run/shared /mnt/shared
number=0
for path in {keep}; do
  mkdir -p $path; mount --bind /run/keep/$number $path; number=$((number + 1))
done
mount -t tmpfs -o size=1g tmpfs /dev/shm
hostname {name}
printf '127.0.0.1 localhost\\n{address} {name}\\n' > /run/hosts; mount --bind /run/hosts /etc/hosts
: > /run/resolv; mount --bind /run/resolv /etc/resolv.conf
ip link set lo up
until ip link set eth0 up 2> /dev/null; do sleep 0.05; done
ip address add {address}/24 dev eth0
ip route add default dev eth0
exec {command}
"""
_SSHD = """\
ListenAddress {address}
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
AcceptEnv none
"""


def missing() -> str | None:
    """Why there can be no hosts here; None if there can."""
    if os.geteuid() != 0:
        return "root is needed for namespaces"
    for tool in TOOLS:
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: openssh-server, rsync, curl, iproute2)"
    probe = ["ip", "link", "add", "probe", "type", "bridge"]
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", *probe],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        return f"namespaces cannot be made here ({tried.stderr.strip()})"
    return None


@dataclass(frozen=True)
class Host:
    """One machine of the lab."""

    name: str
    address: str
    pid: int
    """Of its first process, as the test sees it."""

    def command(self, command: str) -> list[str]:
        """``command`` for a shell of this host, to be run by the test."""
        inside = ["nsenter", "--target", str(self.pid), *NAMESPACES, "--wd=" + str(ROOT)]
        return [*inside, "bash", "-c", command]


class Lab:
    """A switch and the hosts on it.

    Args:
        directory: keys, and ``home_NAME`` and ``tmp_NAME`` of every host, with Ray's logs, which
            are there to be looked at afterwards; ``directory / "shared"`` is ``/mnt/shared``.
        hosts: their names; the first one has no sshd, it is the user's own machine.
    """

    def __init__(self, directory: Path, hosts: tuple[str, ...]) -> None:
        self.directory = directory
        self.shared = directory / "shared"
        self.shared.mkdir(parents=True)
        for name in ("key", "host_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)],
                check=True,
            )
        self._switch_process = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", _SWITCH],
            stderr=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,
        )
        self._switch = _last_child(self._switch_process.pid)
        _wait_until(lambda: self._on_switch("ip link show lan").returncode == 0)
        self.hosts = {
            name: self._add(name, f"{SUBNET}.{10 + number}", with_sshd=number > 0)
            for number, name in enumerate(hosts)
        }

    def _add(self, name: str, address: str, *, with_sshd: bool) -> Host:
        home, scratch = (self.directory / f"{kind}_{name}" for kind in ("home", "tmp"))
        home.mkdir()
        scratch.mkdir(mode=0o1777)
        config = self.directory / f"sshd_{name}"
        config.write_text(_SSHD.format(address=address, directory=self.directory))
        # Paths may go through links (python of a virtual environment).
        wanted = {ROOT, Path(sys.prefix), Path(sys.base_prefix), self.directory}
        wanted = {path.resolve() for path in wanted}
        keep = [
            str(p) for p in sorted(wanted) if str(p).startswith(tuple(f"{d}/" for d in PRIVATE))
        ]
        script = _HOST.format(
            keep=shlex.join(keep) if keep else "",
            home=home,
            scratch=scratch,
            shared=self.shared,
            private=" ".join(PRIVATE),
            name=name,
            address=address,
            command=f"/usr/sbin/sshd -D -f {config}" if with_sshd else "sleep infinity",
        )
        process = subprocess.Popen(
            [
                *("nsenter", "--target", str(self._switch), "--net", "--mount", "--pid"),
                *("unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"),
                *("bash", "-c", script),
            ],
            preexec_fn=_die_with_parent,
        )
        # nsenter, unshare, and the host's first process.
        pid = _last_child(process.pid, depth=2)
        self._on_switch(
            f"ip link add {name} type veth peer name eth0 netns {pid} && "
            f"ip link set {name} master lan up",
            check=True,
        )
        host = Host(name, address, pid)
        ready = f"ip route | grep -q default && {'ss -ltn | grep -q :22' if with_sshd else 'true'}"
        _wait_until(lambda: subprocess.run(host.command(ready), check=False).returncode == 0)
        return host

    def _on_switch(self, command: str, *, check: bool = False) -> subprocess.CompletedProcess[str]:
        inside = ["nsenter", "--target", str(self._switch), "--net", "sh", "-c", command]
        return subprocess.run(inside, capture_output=True, text=True, check=check)

    def run(
        self, name: str, command: str, *, timeout: float = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run ``command`` in a shell of host ``name``, from the checkout."""
        done = subprocess.run(
            self.hosts[name].command(command),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            env=self.environment,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, name: str, command: str, log: Path) -> subprocess.Popen[bytes]:
        """Begin ``command`` in a shell of host ``name``; what it says goes to ``log``."""
        with log.open("wb") as file:
            return subprocess.Popen(
                self.hosts[name].command(command),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                preexec_fn=_die_with_parent,
            )

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of the test's own: a host knows what its files say."""
        path = f"{Path(sys.prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        names = {"HOME": "/root", "LC_ALL": "C.UTF-8", "TERM": "dumb"}
        return {**names, "PATH": path, "PYTHONPATH": str(ROOT)}

    def unplug(self, name: str) -> None:
        """Cut ``name`` off from the others; it runs on."""
        self._on_switch(f"ip link set {name} down", check=True)

    def plug(self, name: str) -> None:
        """Connect ``name`` again."""
        self._on_switch(f"ip link set {name} up", check=True)

    def close(self) -> None:
        """End every process and take everything away."""
        os.kill(self._switch, signal.SIGKILL)
        self._switch_process.wait(30)
        _wait_until(lambda: not any(_is_alive(host.pid) for host in self.hosts.values()))


@contextlib.contextmanager
def lab(directory: Path, *hosts: str) -> Iterator[Lab]:
    """A lab for the duration of a test."""
    made = Lab(directory, hosts)
    try:
        yield made
    finally:
        made.close()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _last_child(pid: int, *, depth: int = 1) -> int:
    """The process at the end of a chain of ``depth`` children, once it is there."""
    for _ in range(depth):
        children = Path(f"/proc/{pid}/task/{pid}/children")
        _wait_until(lambda children=children: bool(children.read_text().split()))
        pid = int(children.read_text().split()[0])
    return pid


def _wait_until(condition, *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the lab did not come up"
        time.sleep(0.05)
