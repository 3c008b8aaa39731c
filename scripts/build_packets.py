"""Make the trace that the questions of the task `packet_filter` are about, with scapy.

    python scripts/build_packets.py            # writes lrmc_ray/tasks/data/packets.pcap.xz
    python scripts/build_packets.py --check    # compares, and writes nothing

Nobody needs this to use the task: the package ships the trace. Addresses are private ones and those
reserved for documentation; nothing was captured. The same scapy gives the same packets.
"""

import argparse
import lzma
import random
import struct
import sys
from collections.abc import Iterator
from typing import Any

from scapy.contrib.mpls import MPLS
from scapy.layers.dns import DNS, DNSQR, DNSRR
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrFragment,
)
from scapy.layers.l2 import ARP, GRE, Dot1Q, Ether
from scapy.packet import Packet, Raw

from lrmc_ray.tasks.demo.packet_values import VALUES, PacketValues, Site
from lrmc_ray.tasks.packet_filter import TRACE

SEED = 0
DNS_PORT = 53


class Link:
    """Packets from one host to another."""

    def __init__(self, source: tuple[Site, int], target: tuple[Site, int]) -> None:
        self.source, self.target = source, target

    def ether(self, **fields: Any) -> Packet:
        """The Ethernet header."""
        (site, number), (other, peer) = self.source, self.target
        return Ether(src=site.mac(number), dst=other.mac(peer), **fields)

    def ip(self, **fields: Any) -> Packet:
        """The IPv4 header."""
        (site, number), (other, peer) = self.source, self.target
        return IP(src=site.host(number), dst=other.host(peer), **{"id": 1, **fields})

    def ip6(self, **fields: Any) -> Packet:
        """The IPv6 header."""
        (site, number), (other, peer) = self.source, self.target
        return IPv6(src=site.host6(number), dst=other.host6(peer), **fields)

    def v4(self, payload: Packet, **fields: Any) -> Packet:
        """``payload`` over IPv4."""
        return self.ether() / self.ip(**fields) / payload

    def v6(self, payload: Packet) -> Packet:
        """``payload`` over IPv6."""
        return self.ether() / self.ip6() / payload


def data(size: int) -> Raw:
    """So many bytes."""
    return Raw(bytes(place % 251 for place in range(size)))


def packets_of_host(there: Link, back: Link, values: PacketValues, place: int) -> Iterator[Packet]:
    """What one host and its peer send each other."""
    (site, number), (other, peer) = there.source, there.target
    high = 40_000 + place
    for port in values.ports:
        yield there.v4(TCP(sport=high, dport=port, flags="S", seq=1))
        yield back.v4(TCP(sport=port, dport=high, flags="SA", seq=9, ack=2))
        yield there.v4(UDP(sport=high, dport=port) / data(20))
    port = values.ports[place % len(values.ports)]
    for flags in ("A", "PA", "FA", "R", "RA"):
        size = 40 if "P" in flags else 0
        yield there.v4(TCP(sport=high, dport=port, flags=flags, seq=2, ack=10) / data(size))
    yield Ether(src=site.mac(number), dst="ff:ff:ff:ff:ff:ff") / ARP(
        op=1, hwsrc=site.mac(number), psrc=site.host(number), pdst=other.host(peer)
    )
    yield back.ether() / ARP(
        op=2, hwsrc=other.mac(peer), psrc=other.host(peer),
        hwdst=site.mac(number), pdst=site.host(number),
    )  # fmt: skip
    yield there.v4(ICMP(type=8, id=place, seq=1) / data(56))
    yield back.v4(ICMP(type=0, id=place, seq=1) / data(56))
    asked = there.ip() / UDP(sport=high, dport=9) / data(8)
    yield back.v4(ICMP(type=3, code=3) / asked)
    yield back.v4(ICMP(type=11, code=0) / asked)
    yield there.v4(ICMP(type=8, id=place, seq=2) / data(64), flags="MF", id=place + 2)
    yield there.v4(data(64), proto=1, frag=9, id=place + 2)
    yield there.v4(UDP(sport=high, dport=port) / data(56), flags="MF", id=place + 3)
    yield there.v4(data(48), proto=17, frag=8, id=place + 3)
    query = DNSQR(qname=f"host{place}.example")
    yield there.v4(UDP(sport=high, dport=DNS_PORT) / DNS(id=place, qd=query))
    answer = DNSRR(rrname=f"host{place}.example", rdata=site.host(number), ttl=60)
    yield back.v4(UDP(sport=DNS_PORT, dport=high) / DNS(id=place, qr=1, qd=query, an=answer))
    yield there.ether() / there.ip() / GRE() / back.ip() / UDP(sport=high, dport=port) / data(30)
    yield there.v6(TCP(sport=high, dport=port, flags="S", seq=1))
    yield back.v6(UDP(sport=port, dport=high) / data(25))
    yield there.v6(ICMPv6EchoRequest(id=place, data=bytes(16)))
    yield back.v6(ICMPv6EchoReply(id=place, data=bytes(16)))
    yield there.v6(ICMPv6ND_NS(tgt=other.host6(peer)))
    yield there.ether() / there.ip6() / IPv6ExtHdrFragment(nh=17, offset=4, id=place) / data(24)
    ttl = values.ttls[place % len(values.ttls)]
    yield there.v4(UDP(sport=high, dport=33_434) / data(12), ttl=ttl)
    length = values.lengths[place % len(values.lengths)]
    for size in (length - 1, length, length + 1):
        yield there.v4(UDP(sport=high, dport=9_999) / data(size - 42))


def packets_of_split(values: PacketValues) -> Iterator[Packet]:
    """Everything that is sent among the hosts of one split."""
    links = []
    for place, source in enumerate(values.hosts):
        target = values.peer(*source)
        there, back = Link(source, target), Link(target, source)
        links.append((there, back))
        yield from packets_of_host(there, back, values, place)
    for place, vlan in enumerate(values.vlans):
        there, back = links[place % len(links)]
        tag = there.ether() / Dot1Q(vlan=vlan)
        yield tag / there.ip() / TCP(sport=50_000, dport=values.ports[0], flags="S")
        yield tag / there.ip() / UDP(sport=50_000, dport=values.ports[1]) / data(18)
        yield tag / there.ip() / ICMP(type=8, id=vlan) / data(32)
        yield back.ether() / Dot1Q(vlan=vlan) / back.ip6() / UDP(sport=1, dport=2) / data(10)
    for place, label in enumerate(values.labels):
        there, _ = links[place % len(links)]
        shim = there.ether(type=0x8847) / MPLS(label=label, s=1, ttl=60)
        yield shim / there.ip() / TCP(sport=50_001, dport=values.ports[0], flags="S")
        yield shim / there.ip() / UDP(sport=50_001, dport=values.ports[1]) / data(22)


def trace() -> bytes:
    """A pcap file, uncompressed; a packet a millisecond."""
    packets = [bytes(packet) for values in VALUES.values() for packet in packets_of_split(values)]
    random.Random(SEED).shuffle(packets)
    parts = [struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262_144, 1)]
    for place, packet in enumerate(packets):
        seconds, milliseconds = divmod(place, 1_000)
        size = len(packet)
        parts.append(struct.pack("<IIII", seconds, 1_000 * milliseconds, size, size) + packet)
    return b"".join(parts)


def main() -> int:
    """Write or compare the trace; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    content = trace()
    if parser.parse_args().check:
        same = lzma.decompress(TRACE.read_bytes()) == content
        print(f"{TRACE.name}: {'the same' if same else 'differs'}")
        return 0 if same else 1
    TRACE.write_bytes(lzma.compress(content, preset=9))
    print(f"{TRACE}: {TRACE.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
