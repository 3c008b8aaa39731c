"""What the trace contains and the questions about packets ask for, divided among the splits."""

from collections.abc import Sequence
from dataclasses import dataclass

from lrmc_ray.tasks.demo.question_kinds import Split


@dataclass(frozen=True, kw_only=True)
class Site:
    """One network and its hosts; IPv6 and Ethernet addresses go by the same numbers."""

    prefix: str
    """The first three numbers of its IPv4 addresses."""
    number: int
    """Of its IPv6 network."""
    hosts: tuple[int, ...]

    @property
    def net(self) -> str:
        """The IPv4 network."""
        return f"{self.prefix}.0/24"

    @property
    def net6(self) -> str:
        """The IPv6 network."""
        return f"2001:db8:{self.number:x}::/48"

    def host(self, number: int) -> str:
        """The IPv4 address of a host."""
        return f"{self.prefix}.{number}"

    def host6(self, number: int) -> str:
        """The IPv6 address of a host."""
        return f"2001:db8:{self.number:x}::{number:x}"

    def mac(self, number: int) -> str:
        """The Ethernet address of a host."""
        return f"02:00:5e:{self.number >> 8:02x}:{self.number & 255:02x}:{number:02x}"


@dataclass(frozen=True, kw_only=True)
class PacketValues:
    """What one split's questions may be about; no value is in two splits."""

    sites: Sequence[Site]
    ports: Sequence[int]
    vlans: Sequence[int]
    labels: Sequence[int]
    """Of MPLS."""
    ttls: Sequence[int]
    lengths: Sequence[int]
    """Bytes of a whole packet."""

    @property
    def hosts(self) -> list[tuple[Site, int]]:
        """Every host of every site."""
        return [(site, number) for site in self.sites for number in site.hosts]

    def peer(self, site: Site, number: int) -> tuple[Site, int]:
        """Whom a host talks to: the host of the same place in the next site."""
        other = self.sites[(self.sites.index(site) + 1) % len(self.sites)]
        return other, other.hosts[site.hosts.index(number)]


def _sites(prefixes: Sequence[str], first: int, hosts: Sequence[tuple[int, ...]]) -> list[Site]:
    return [
        Site(prefix=prefix, number=first + 7 * place, hosts=numbers)
        for place, (prefix, numbers) in enumerate(zip(prefixes, hosts, strict=True))
    ]


VALUES: dict[Split, PacketValues] = {
    "train": PacketValues(
        sites=_sites(
            ("10.1.4", "10.20.7", "172.16.9", "172.20.31", "192.168.3", "192.168.50", "198.51.100",
             "203.0.113"),
            0x11,
            ((5, 17, 42, 130), (8, 23, 77, 201), (2, 19, 64, 150), (11, 36, 90, 212),
             (7, 21, 58, 144), (3, 30, 85, 199), (14, 47, 101, 233), (9, 26, 73, 180)),
        ),
        ports=(22, 25, 80, 110, 143, 443, 587, 993, 3306, 5060, 6379, 8080),
        vlans=(10, 20, 30, 40, 100, 110, 200, 300, 400, 1000),
        labels=(16, 100, 200, 1001, 2000, 3000, 5001, 10000, 20000, 70000),
        ttls=(2, 4, 6, 8, 10, 12, 16, 20, 30, 40),
        lengths=(100, 200, 300, 400, 600, 700, 800, 900, 1000, 1200),
    ),
    "dev": PacketValues(
        sites=_sites(("10.44.2", "172.18.60", "192.168.77"), 0x211, ((6, 81), (13, 119), (4, 160))),
        ports=(21, 389, 5432, 8443),
        vlans=(50, 250, 700),
        labels=(300, 4000, 30000),
        ttls=(3, 14, 24),
        lengths=(250, 650, 1100),
    ),
    "test": PacketValues(
        sites=_sites(
            ("10.9.33", "10.87.1", "172.25.14", "192.168.120", "192.0.2"),
            0x411,
            ((12, 52, 171), (15, 66, 222), (18, 93, 140), (10, 35, 207), (16, 61, 188)),
        ),
        ports=(23, 179, 514, 636, 5900, 9090),
        vlans=(15, 60, 333, 2001),
        labels=(17, 450, 9009, 65000),
        ttls=(5, 7, 9, 11, 18),
        lengths=(150, 350, 500, 750, 1300),
    ),
}  # fmt: skip
