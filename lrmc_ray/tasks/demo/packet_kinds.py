"""The kinds of question about the trace: a filter with blanks, and how people ask for it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from lrmc_ray.tasks.demo.packet_values import PacketValues

Slots = Mapping[str, str | int]
"""What one question fills into the blanks, by their names."""


@dataclass(frozen=True, kw_only=True)
class PacketKind:
    """One kind of filter: how its blanks are filled, the filter, and how people ask for it."""

    name: str
    slots: Callable[[PacketValues], Iterator[Slots]]
    filter: str
    wordings: tuple[str, ...]
    """For training and development."""
    unseen_wordings: tuple[str, ...]
    """For the test alone."""


def _host(values: PacketValues) -> Iterator[Slots]:
    return ({"host": site.host(number)} for site, number in values.hosts)


def _host6(values: PacketValues) -> Iterator[Slots]:
    return ({"host": site.host6(number)} for site, number in values.hosts)


def _mac(values: PacketValues) -> Iterator[Slots]:
    return ({"mac": site.mac(number)} for site, number in values.hosts)


def _pair(values: PacketValues) -> Iterator[Slots]:
    for site, number in values.hosts:
        other, peer = values.peer(site, number)
        yield {"host": site.host(number), "peer": other.host(peer)}


def _net(values: PacketValues) -> Iterator[Slots]:
    return ({"net": site.net} for site in values.sites)


def _net6(values: PacketValues) -> Iterator[Slots]:
    return ({"net": site.net6} for site in values.sites)


def _nets(values: PacketValues) -> Iterator[Slots]:
    for site in values.sites:
        other, _ = values.peer(site, site.hosts[0])
        yield {"net": site.net, "other": other.net}


def _port(values: PacketValues) -> Iterator[Slots]:
    return ({"port": port} for port in values.ports)


def _ports(values: PacketValues) -> Iterator[Slots]:
    ports = sorted(values.ports)
    return (
        {"low": low, "high": high} for place, low in enumerate(ports) for high in ports[place + 1 :]
    )


def _host_port(values: PacketValues) -> Iterator[Slots]:
    return (
        {"host": site.host(number), "port": port}
        for site, number in values.hosts
        for port in values.ports
    )


def _vlan(values: PacketValues) -> Iterator[Slots]:
    return ({"vlan": vlan} for vlan in values.vlans)


def _label(values: PacketValues) -> Iterator[Slots]:
    return ({"label": label} for label in values.labels)


def _ttl(values: PacketValues) -> Iterator[Slots]:
    return ({"ttl": ttl} for ttl in values.ttls)


def _length(values: PacketValues) -> Iterator[Slots]:
    return ({"length": length} for length in values.lengths)


def _kind(
    name: str,
    slots: Callable[[PacketValues], Iterator[Slots]],
    text: str,
    wordings: str,
    unseen_wordings: str,
) -> PacketKind:
    return PacketKind(
        name=name,
        slots=slots,
        filter=text,
        wordings=tuple(wordings.split(" | ")),
        unseen_wordings=tuple(unseen_wordings.split(" | ")),
    )


KINDS: tuple[PacketKind, ...] = (
    _kind("host", _host, "host {host}",
          "Show all traffic of {host}. | Packets to or from {host} | Everything that involves "
          "{host}",
          "What does {host} send or receive? | Capture whatever has {host} at either end."),
    _kind("source", _host, "src host {host}",
          "Packets sent by {host} | Show what comes from {host}. | Everything with source {host}",
          "What does {host} transmit? | Only packets that originate at {host}"),
    _kind("target", _host, "dst host {host}",
          "Packets sent to {host} | Show what goes to {host}. | Everything with destination {host}",
          "What is {host} on the receiving end of? | Only packets addressed to {host}"),
    _kind("pair", _pair, "host {host} and host {peer}",
          "Traffic between {host} and {peer} | Show what {host} and {peer} send each other. "
          "| Packets exchanged by {host} and {peer}",
          "The conversation of {host} with {peer}, both directions | What passes from {host} to "
          "{peer} or back?"),
    _kind("network", _net, "net {net}",
          "Show all traffic of the network {net}. | Packets to or from {net} "
          "| Everything that involves the network {net}",
          "What do machines in {net} send or receive? | Capture whatever has an end inside {net}."),
    _kind("source network", _net, "src net {net}",
          "Packets sent from the network {net} | Show what comes out of {net}. "
          "| Everything with a source in {net}",
          "What do machines in {net} transmit? | Only packets that originate inside {net}"),
    _kind("networks", _nets, "src net {net} and dst net {other}",
          "Packets from {net} to {other} | Show what the network {net} sends to {other}. "
          "| Traffic that leaves {net} for {other}",
          "One direction only: origin in {net}, recipient in {other} | What reaches {other} out "
          "of {net}?"),
    _kind("port", _port, "port {port}",
          "Show all traffic on port {port}. | Packets to or from port {port} "
          "| Everything that uses port {port}",
          "What has {port} as either port number? | TCP or UDP, one end on {port}"),
    _kind("TCP to port", _port, "tcp dst port {port}",
          "TCP packets to port {port} | Show TCP with destination port {port}. "
          "| TCP traffic sent to port {port}",
          "Which TCP segments target {port}? | Segments of TCP whose receiver listens on {port}"),
    _kind("TCP from port", _port, "tcp src port {port}",
          "TCP packets from port {port} | Show TCP with source port {port}. "
          "| TCP traffic sent from port {port}",
          "Which TCP segments originate at {port}? | What TCP services on {port} reply"),
    _kind("UDP port", _port, "udp port {port}",
          "UDP packets on port {port} | Show UDP to or from port {port}. | UDP traffic of port "
          "{port}",
          "Which datagrams use {port} at either end? | Only UDP, and one port is {port}"),
    _kind("port range", _ports, "portrange {low}-{high}",
          "Packets on ports {low} to {high} | Show traffic with a port between {low} and {high}. "
          "| Everything on a port from {low} to {high}",
          "What uses any port in {low}..{high}? | One end's port is no less than {low}, no more "
          "than {high}"),
    _kind("host and port", _host_port, "host {host} and tcp port {port}",
          "TCP traffic of {host} on port {port} | Show TCP packets of {host} with port {port}. "
          "| {host}, TCP port {port}",
          "Which segments on {port} involve {host}? | Either end is {host}, either TCP port is "
          "{port}"),
    _kind("not port", _host_port, "host {host} and not port {port}",
          "Traffic of {host} except port {port} | Show packets of {host} that are not on port "
          "{port}. "
          "| Everything of {host} but port {port}",
          "Leave out {port}: what else involves {host}? | All that {host} sends or receives, "
          "ignoring {port}"),
    _kind("ARP", _host, "arp host {host}",
          "ARP packets about {host} | Show ARP of {host}. | ARP traffic that involves {host}",
          "Address resolution in which {host} takes part | Who resolves, or is resolved: {host}, "
          "by ARP"),
    _kind("ARP request", _host, "arp[6:2] = 1 and arp src host {host}",
          "ARP requests sent by {host} | Show the ARP requests of {host}. | ARP requests from "
          "{host}",
          "When does {host} ask for a hardware address? | Address resolution queries that {host} "
          "makes"),
    _kind("ICMP", _host, "icmp and host {host}",
          "ICMP packets of {host} | Show ICMP to or from {host}. | All ICMP that involves {host}",
          "Which control messages does {host} send or receive? | ICMP alone, {host} at either end"),
    _kind("ping", _host, "icmp[icmptype] = icmp-echo and src host {host}",
          "Ping requests from {host} | Show ICMP echo requests sent by {host}. "
          "| Echo requests of {host}",
          "When does {host} ping somebody? | {host} probes others by ICMP echo"),
    _kind("ping reply", _host, "icmp[icmptype] = icmp-echoreply and dst host {host}",
          "Ping replies to {host} | Show ICMP echo replies sent to {host}. "
          "| Echo replies that go to {host}",
          "Which pings of {host} are answered? | Answers that {host} gets to its ICMP echo"),
    _kind("unreachable", _net, "icmp[icmptype] = icmp-unreach and dst net {net}",
          "ICMP unreachable messages to {net} | Show destination unreachable sent to {net}. "
          "| ICMP unreachable that goes to the network {net}",
          "Who in {net} is told that a target cannot be reached? | Failure notices of type "
          "unreachable for {net}"),
    _kind("SYN", _port, "tcp[tcpflags] = tcp-syn and dst port {port}",
          "TCP packets to port {port} with SYN alone | Show connection requests to port {port}: "
          "SYN "
          "and no other flag. | SYN without other flags, destination port {port}",
          "Who opens a connection to {port}, first packet only? | Just the bare SYNs that "
          "target {port}"),
    _kind("SYN ACK", _port, "tcp[tcpflags] = (tcp-syn|tcp-ack) and src port {port}",
          "TCP packets from port {port} with exactly SYN and ACK | Show SYN and ACK, no other "
          "flag, "
          "source port {port}. | SYN-ACK sent from port {port}",
          "Where does {port} accept a connection, second packet only? | Just the SYN-ACKs that "
          "{port} gives"),
    _kind("reset", _host, "tcp[tcpflags] & tcp-rst != 0 and src host {host}",
          "TCP resets sent by {host} | Show packets from {host} with the RST flag. "
          "| RST set, source {host}",
          "Which connections does {host} abort? | {host} breaks off: the flag RST is on"),
    _kind("finish", _net, "tcp[tcpflags] & tcp-fin != 0 and src net {net}",
          "TCP packets with FIN from {net} | Show packets from the network {net} with the FIN "
          "flag. "
          "| FIN set, source in {net}",
          "Which connections do machines in {net} close? | Origin {net}, and the flag FIN is on"),
    _kind("push", _host, "tcp[tcpflags] & tcp-push != 0 and src host {host}",
          "TCP packets with PSH from {host} | Show packets from {host} with the PUSH flag. "
          "| PSH set, source {host}",
          "Which segments does {host} push? | Origin {host}, and the flag PSH is on"),
    _kind("DNS", _host, "udp dst port 53 and src host {host}",
          "DNS queries over UDP from {host} | Show DNS requests sent by {host} over UDP. "
          "| UDP name queries of {host}",
          "Which names does {host} look up, by UDP? | {host} asks a name server in datagrams"),
    _kind("VLAN", _vlan, "vlan {vlan}",
          "Packets in VLAN {vlan} | Show traffic of VLAN {vlan}. | Everything tagged with VLAN "
          "{vlan}",
          "Which frames carry the 802.1Q tag {vlan}? | Virtual LAN number {vlan} alone"),
    _kind("VLAN UDP", _vlan, "vlan {vlan} and udp",
          "UDP packets in VLAN {vlan} | Show UDP traffic of VLAN {vlan}. | UDP tagged with VLAN "
          "{vlan}",
          "Which datagrams carry the 802.1Q tag {vlan}? | Virtual LAN number {vlan}, UDP alone"),
    _kind("MPLS", _label, "mpls {label}",
          "MPLS packets with label {label} | Show MPLS label {label}. "
          "| Everything with the MPLS label {label}",
          "What is switched by label {label}? | Frames that have {label} as their MPLS tag"),
    _kind("GRE", _host, "ip proto 47 and src host {host}",
          "GRE packets from {host} | Show GRE sent by {host}. | GRE traffic with source {host}",
          "What does {host} send through a GRE tunnel? | {host} encapsulates by GRE"),
    _kind("fragment", _host, "ip[6:2] & 0x1fff != 0 and src host {host}",
          "IPv4 fragments from {host} with an offset | Show fragments sent by {host} other than "
          "the "
          "first. | Later IPv4 fragments of {host}",
          "Which pieces, not the beginning, of split packets does {host} send? | Origin {host}, "
          "fragment offset above zero"),
    _kind("TTL", _ttl, "ip[8] <= {ttl}",
          "IPv4 packets with a TTL of {ttl} or less | Show IPv4 with TTL at most {ttl}. "
          "| IPv4 TTL not above {ttl}",
          "Which IPv4 packets have {ttl} hops or fewer left? | Time to live (IPv4) up to {ttl}"),
    _kind("greater", _length, "greater {length}",
          "Packets of {length} bytes or more | Show packets at least {length} bytes long. "
          "| Length not below {length} bytes",
          "Which frames have a size from {length} bytes up? | Big ones: {length} bytes is the "
          "minimum"),
    _kind("IPv6 host", _host6, "ip6 host {host}",
          "IPv6 packets of {host} | Show IPv6 to or from {host}. | Everything that involves {host}",
          "What does {host} send or receive? | Capture whatever has {host} at either end."),
    _kind("IPv6 network", _net6, "ip6 src net {net}",
          "IPv6 packets from {net} | Show IPv6 with a source in {net}. "
          "| What the IPv6 network {net} sends",
          "What do machines in {net} transmit? | Only packets that originate inside {net}"),
    _kind("ICMPv6", _host6, "icmp6 and src host {host}",
          "ICMPv6 packets from {host} | Show ICMPv6 sent by {host}. | ICMPv6 with source {host}",
          "Which control messages does {host} send? | ICMPv6 alone that originates at {host}"),
    _kind("Ethernet source", _mac, "ether src {mac}",
          "Frames from {mac} | Show frames sent by {mac}. | Ethernet source {mac}",
          "What does the network card {mac} transmit? | Only frames whose sender has the hardware "
          "address {mac}"),
)  # fmt: skip
