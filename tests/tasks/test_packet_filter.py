"""Packet filters: what they select, how answers are read, and what the child does not allow."""

import hashlib
import lzma
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lrmc_ray.cluster import beforehand, doctor
from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.tasks import child_process, pcap_child
from lrmc_ray.tasks.packet_filter import TRACE, FilterRunner, extract_filter, score
from tests.support.libpcap import needs_libpcap

pytestmark = needs_libpcap

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runner():
    with FilterRunner() as shared:
        yield shared


def test_the_trace_is_the_one_that_scapy_makes():
    digest = hashlib.sha256(lzma.decompress(TRACE.read_bytes())).hexdigest()
    assert digest == "8118e4af8a4d16b4d76ae7c034f14ff001030b5fa665e2b7da672346e57f38e4"
    pytest.importorskip("scapy", reason="the extra test brings scapy")
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/build_packets.py", "--check"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "packets.pcap.xz: the same\n"), result.stderr


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("host 10.1.4.5", "src host 10.1.4.5 or dst 10.1.4.5"),
        ("net 10.1.4.0/24", "net 10.1.4"),
        ("tcp port 80", "tcp port http"),
        ("arp", "ether proto \\arp"),
        ("icmp", "ip proto 1"),
        ("tcp[tcpflags] = tcp-syn", "tcp[13] == 2"),
        ("portrange 22-25", "port 22 or port 25 or port 23"),
        ("ether src 02:00:5e:00:11:05", "ether[6:4] = 0x02005e00 and ether[10:2] = 0x1105"),
    ],
)
def test_right_filters_are_right_however_they_are_written(one, other):
    scores = score({"filter": one}, [f"{other}\n"])
    assert scores == {"execution_accuracy": 1.0, "exact_match": 0.0, "valid_filter": 1.0}
    assert score({"filter": one}, [one])["exact_match"] == 1.0


@pytest.mark.parametrize(
    ("predicted", "valid"),
    [
        ("src host 10.1.4.5", 1.0),
        ("host 10.1.4.17", 1.0),
        ("len >= 0", 1.0),
        ("SELECT * FROM packets", 0.0),
        ("host", 0.0),
        ("", 0.0),
        ("host 10.1.4.5 and", 0.0),
        ("host 10.1.4.5.6", 0.0),
        ("host example.com", 0.0),
        ("ip host 10.1.4.5 \N{LATIN SMALL LETTER E WITH ACUTE}", 0.0),
        ("host 10.1.4.5\x00 and", 0.0),
    ],
)
def test_wrong_filters_are_wrong_and_no_error(predicted, valid):
    scores = score({"filter": "host 10.1.4.5"}, [predicted])
    assert scores == {"execution_accuracy": 0.0, "exact_match": 0.0, "valid_filter": valid}


def test_a_gold_filter_must_run():
    with pytest.raises(DataError, match=r"a gold filter must run, got .* from: hosts 1"):
        score({"filter": "hosts 1"}, ["arp"])


@pytest.mark.parametrize(
    "text",
    ["tcp port 80", "  tcp port 80\nThis shows", "```\ntcp port 80\n```", "`tcp port 80`",
     "tcpdump -n 'tcp port 80'", "```bash\n$ tcpdump -nn -v \"tcp port 80\"\n```"],
)  # fmt: skip
def test_the_filter_is_found_in_an_answer(text):
    assert extract_filter(text) == "tcp port 80"


def test_no_name_is_looked_up(runner):
    for text in ("host localhost", "net loopback", "gateway router", "host a.b", "port x-y"):
        assert "unknown word" in (runner.select(text).error or ""), text


@pytest.mark.parametrize(
    ("named", "numbered"),
    [
        ("ip proto gre", "ip proto 47"),
        ("not ip proto gre", "not ip proto 47"),
        (r"ip proto \icmp", "icmp"),
        (r"proto \udp and not host 10.1.4.5", "udp and not host 10.1.4.5"),
        (r"ip6 proto \tcp", "ip6 and tcp"),
        (r"ip proto (\udp or \icmp)", "ip and (udp or icmp)"),
        (r"ether proto \arp", "arp"),
        ("ip proto 17 or gre", "ip proto 17 or ip proto 47"),
        (r"host fd00::1 or proto 6 or \udp", "host fd00::1 or tcp or udp"),
        (r"ether proto \tcp", None),
        (r"ip proto 6 or port 53 or \udp", None),
        ("ip proto 6 or host 10.1.4.5 or gre", None),
        ("gre", None),
    ],
)
def test_protocols_have_their_numbers_though_no_file_can_be_opened(runner, named, numbered):
    """What libpcap itself refuses stays refused; None says so."""
    selected = runner.select(named)
    if numbered is None:
        assert selected.error
    else:
        assert selected.packets == runner.select(numbered).packets
        assert selected.packets


def test_the_kernel_holds_the_child_to_its_limits(runner):
    assert runner.select("arp").packets
    child = psutil.Process(runner._process.pid)
    assert child.rlimit(psutil.RLIMIT_AS) == (512 * 2**20, 512 * 2**20)
    assert child.rlimit(psutil.RLIMIT_NOFILE) == (3, 3)
    assert child.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    soft, _ = child.rlimit(psutil.RLIMIT_CPU)
    assert 0 < soft <= 10
    assert not child.net_connections()


def test_the_limits_stop_what_a_process_asks_for():
    code = """
import socket, sys
sys.path.insert(0, sys.argv[1])
import pcap_child
pcap_child.restrict_process(256 * 2**20)
for forbidden in (lambda: bytearray(2**29), lambda: open("/etc/hosts"), socket.socket):
    try:
        forbidden()
    except (MemoryError, OSError) as error:
        print(type(error).__name__)
pcap_child.allow_cpu_seconds(0)
while True:
    pass
"""
    folder = Path(pcap_child.__file__).parent
    result = subprocess.run(
        [sys.executable, "-u", "-c", code, folder], capture_output=True, text=True, timeout=30
    )
    assert result.stdout.split() == ["MemoryError", "OSError", "OSError"]
    assert result.returncode < 0


def test_a_child_that_is_silent_is_killed_and_the_next_filter_runs():
    with FilterRunner(wall_seconds=0.5) as runner:
        assert runner.select("arp").packets
        first = psutil.Process(runner._process.pid)
        first.suspend()
        assert runner.select("arp").error == "stopped: too much time or memory"
        assert not first.is_running()
        assert runner.select("arp").packets
        assert runner.num_restarts == 1


def test_long_filters_are_refused(runner):
    assert runner.select(" or ".join(["arp"] * 200)).error == "longer than 1000 characters"
    assert runner.select(" or ".join(["arp"] * 100)).packets


def test_without_libpcap_the_remedy_is_told_before_costs(monkeypatch, tmp_path):
    beforehand.check_packages(tasks=["packet_filter"], data=[], lora=False)
    assert doctor.check_libpcap().status == "ok"
    for room in (beforehand, doctor):
        monkeypatch.setattr(room, "load_library", lambda: None)
    with pytest.raises(IncompleteArtifactError, match=r"packet_filter needs libpcap.*apt inst"):
        beforehand.check_packages(tasks=["packet_filter"], data=[], lora=False)
    beforehand.check_packages(tasks=["nl2sql"], data=["packet_filter"], lora=False)
    finding = doctor.check_libpcap()
    assert (finding.status, finding.remedy) == ("warning", child_process.INSTALL["libpcap"])
    script = tmp_path / "pcap_child.py"
    script.write_text(Path(pcap_child.__file__).read_text().replace("libpcap.", "libnone."))
    monkeypatch.setattr("lrmc_ray.tasks.packet_filter._CHILD", script)
    with (
        FilterRunner() as runner,
        pytest.raises(IncompleteArtifactError, match="needs libpcap, which this machine does not"),
    ):
        runner.select("arp")


def test_a_trace_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(IncompleteArtifactError, match=r"none\.xz is none"):
        FilterRunner(tmp_path / "none.xz")
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 3
