"""Questions about packets: every gold filter against scapy's own view of the packets."""

import functools
import ipaddress
import json
import lzma
import string
from collections import Counter
from typing import Any

import pytest

from lrmc_ray.errors import ConfigError
from lrmc_ray.tasks.demo.packet_kinds import KINDS
from lrmc_ray.tasks.demo.packet_questions import NUMBERS, make_examples, packet_files
from lrmc_ray.tasks.demo.packet_values import VALUES
from lrmc_ray.tasks.packet_filter import TRACE, FilterRunner
from tests.support.libpcap import needs_libpcap

pytest.importorskip("scapy", reason="the extra test brings scapy")
from scapy.contrib.mpls import MPLS
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.utils import RawPcapReader

pytestmark = needs_libpcap

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16


class View:
    """One packet as scapy takes it apart: the layers that a filter looks at."""

    def __init__(self, data):
        self.frame = Ether(data)
        self.size = len(data)
        net = self.frame.payload
        self.arp = net if isinstance(net, ARP) else None
        self.ip = net if isinstance(net, IP) else None
        self.ip6 = net if isinstance(net, IPv6) else None
        whole = self.ip is None or self.ip.frag == 0
        inner = net.payload if (self.ip or self.ip6) and whole else None
        self.tcp = inner if isinstance(inner, TCP) else None
        self.udp = inner if isinstance(inner, UDP) else None
        self.icmp = inner if isinstance(inner, ICMP) else None
        self.source = self.target = None
        if self.arp:
            self.source, self.target = self.arp.psrc, self.arp.pdst
        elif self.ip or self.ip6:
            self.source, self.target = net.src, net.dst
        self.ends = {self.source, self.target}
        ported: Any = self.tcp or self.udp
        self.sport: int | None
        self.dport: int | None
        self.sport, self.dport = (ported.sport, ported.dport) if ported else (None, None)
        self.ports = {self.sport, self.dport}
        self.flags = int(self.tcp.flags) if self.tcp and self.ip else 0
        self.tag = net if isinstance(net, Dot1Q) else None
        self.label = net if isinstance(net, MPLS) else None


@functools.cache
def within(address, net):
    return address is not None and ipaddress.ip_address(address) in ipaddress.ip_network(net)


def icmp(v, kind):
    return v.ip and v.icmp and v.icmp.type == kind


EXPECTED = {
    "host": lambda v, host: host in v.ends,
    "source": lambda v, host: v.source == host,
    "target": lambda v, host: v.target == host,
    "pair": lambda v, host, peer: v.ends == {host, peer},
    "network": lambda v, net: within(v.source, net) or within(v.target, net),
    "source network": lambda v, net: within(v.source, net),
    "networks": lambda v, net, other: within(v.source, net) and within(v.target, other),
    "port": lambda v, port: port in v.ports,
    "TCP to port": lambda v, port: v.tcp and v.dport == port,
    "TCP from port": lambda v, port: v.tcp and v.sport == port,
    "UDP port": lambda v, port: v.udp and port in v.ports,
    "port range": lambda v, low, high: any(p and low <= p <= high for p in v.ports),
    "host and port": lambda v, host, port: host in v.ends and v.tcp and port in v.ports,
    "not port": lambda v, host, port: host in v.ends and port not in v.ports,
    "ARP": lambda v, host: v.arp and host in v.ends,
    "ARP request": lambda v, host: v.arp and v.arp.op == 1 and v.source == host,
    "ICMP": lambda v, host: v.ip and v.ip.proto == 1 and host in v.ends,
    "ping": lambda v, host: icmp(v, 8) and v.source == host,
    "ping reply": lambda v, host: icmp(v, 0) and v.target == host,
    "unreachable": lambda v, net: icmp(v, 3) and within(v.target, net),
    "SYN": lambda v, port: v.flags == SYN and v.dport == port,
    "SYN ACK": lambda v, port: v.flags == SYN | ACK and v.sport == port,
    "reset": lambda v, host: v.flags & RST and v.source == host,
    "finish": lambda v, net: v.flags & FIN and within(v.source, net),
    "push": lambda v, host: v.flags & PSH and v.source == host,
    "DNS": lambda v, host: v.udp and v.dport == 53 and v.source == host,
    "VLAN": lambda v, vlan: v.tag and v.tag.vlan == vlan,
    "VLAN UDP": lambda v, vlan: v.tag and v.tag.vlan == vlan and v.frame.haslayer(UDP),
    "MPLS": lambda v, label: v.label and v.label.label == label,
    "GRE": lambda v, host: v.ip and v.ip.proto == 47 and v.source == host,
    "fragment": lambda v, host: v.ip and v.ip.frag > 0 and v.source == host,
    "TTL": lambda v, ttl: v.ip and v.ip.ttl <= ttl,
    "greater": lambda v, length: v.size >= length,
    "IPv6 host": lambda v, host: v.ip6 and host in v.ends,
    "IPv6 network": lambda v, net: v.ip6 and within(v.source, net),
    "ICMPv6": lambda v, host: v.ip6 and v.ip6.nh == 58 and v.source == host,
    "Ethernet source": lambda v, mac: v.frame.src == mac,
}


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "packets.pcap"
    path.write_bytes(lzma.decompress(TRACE.read_bytes()))
    with RawPcapReader(str(path)) as reader:
        return [View(data) for data, _ in reader]


@pytest.fixture(scope="module")
def examples():
    return {split: make_examples(split, number, seed=0) for split, number in NUMBERS.items()}


def test_every_filter_selects_what_scapy_says_some_packets_and_not_all(views, examples):
    assert len(views) == 3080
    kinds = {kind.name: kind for kind in KINDS}
    asked = {example["filter"]: example["kind"] for rows in examples.values() for example in rows}
    tried = 0
    with FilterRunner() as runner:
        for split, values in VALUES.items():
            for name, kind in kinds.items():
                for slots in kind.slots(values):
                    text = kind.filter.format_map(slots)
                    if text not in asked:
                        continue
                    assert asked.pop(text) == name
                    tried += 1
                    selected = runner.select(text).packets
                    assert selected is not None
                    assert 0 < len(selected) < len(views), text
                    right = {i for i, view in enumerate(views) if EXPECTED[name](view, **slots)}
                    assert selected == right, (split, text)
    assert not asked
    assert tried > 500


def test_there_are_as_many_of_each_kind_and_all_differ(examples):
    assert NUMBERS == {"train": 600, "dev": 60, "test": 120}
    assert len(KINDS) == len({kind.name for kind in KINDS}) == len(EXPECTED) == 37
    for split, rows in examples.items():
        assert len({row["question"] for row in rows}) == len(rows) == NUMBERS[split]
        counts = Counter(row["kind"] for row in rows)
        assert len(counts) == 37
        assert max(counts.values()) - min(counts.values()) <= 1
        assert all(row["messages"][1]["content"] == row["question"] for row in rows)
        assert all(row["messages"][2]["content"] == row["filter"] for row in rows)


def test_the_test_asks_about_other_values_in_other_words(examples):
    values = {}
    for split in VALUES:
        found = set()
        for kind in KINDS:
            for slots in kind.slots(VALUES[split]):
                found |= {(name, value) for name, value in slots.items()}
        values[split] = found
    assert not values["train"] & values["test"]
    assert not values["dev"] & values["test"]
    assert not values["train"] & values["dev"]
    seen = {row["filter"] for split in ("train", "dev") for row in examples[split]}
    assert not seen & {row["filter"] for row in examples["test"]}
    for kind in KINDS:
        assert (len(kind.wordings), len(kind.unseen_wordings)) == (3, 2)
    known = {wording for kind in KINDS for wording in kind.wordings}
    assert not known & {wording for kind in KINDS for wording in kind.unseen_wordings}


def test_no_network_or_port_range_of_the_test_reaches_into_another_split():
    nets = {
        split: [ipaddress.ip_network(site.net) for site in values.sites]
        + [ipaddress.ip_network(site.net6) for site in values.sites]
        for split, values in VALUES.items()
    }
    for net in nets["test"]:
        for other in (*nets["train"], *nets["dev"]):
            assert net.version != other.version or not net.overlaps(other)


def test_every_question_says_all_that_the_filter_needs():
    for kind in KINDS:
        blanks = {field for _, field, _, _ in string.Formatter().parse(kind.filter) if field}
        for wording in (*kind.wordings, *kind.unseen_wordings):
            named = {field for _, field, _, _ in string.Formatter().parse(wording) if field}
            assert named == blanks, wording


def test_the_files_are_the_examples_and_made_once(tmp_path, examples):
    files = packet_files(tmp_path)
    for split, rows in examples.items():
        path = getattr(files, split)
        assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    before = files.test.stat().st_mtime_ns
    assert packet_files(tmp_path) == files
    assert files.test.stat().st_mtime_ns == before
    assert make_examples("test", 120, seed=1) != examples["test"]


def test_more_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"number must be at most \d+ for dev, got 100000"):
        make_examples("dev", 100_000, seed=0)
