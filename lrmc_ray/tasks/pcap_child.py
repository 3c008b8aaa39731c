"""The process that runs untrusted packet filters: a request per line on stdin, an answer on stdout.

:class:`lrmc_ray.tasks.packet_filter.FilterRunner` starts it by path, isolated from site packages,
so it may import the standard library alone. What keeps a filter from doing harm:

1. words by name: libpcap would look up any other one as a host, on the network;
2. limits of the kernel on memory, processor time, file size and open files: no socket can be
   opened once the trace is read;
3. the parent, which kills this process when an answer does not come in time.
"""

from __future__ import annotations

import ctypes
import json
import lzma
import re
import resource
import struct
import sys
from typing import Any

LIBRARIES = ("libpcap.so.0.8", "libpcap.so.1", "libpcap.so", "/usr/lib/libpcap.A.dylib")
"""Debian's name, that of others, that of development packages, that of macOS."""

_WORDS = """
    action and ah arp atalk broadcast carp decnet dst esp ether geneve greater gre host icmp icmp6
    igmp igrp ip ip6 ipx iso len less link lldp mpls multicast net mask not or pim port portrange
    pppoed pppoes proto protochain rarp sctp src stp tcp udp vlan vrrp
    icmptype icmpcode icmp-echoreply icmp-unreach icmp-sourcequench icmp-redirect icmp-echo
    icmp-routeradvert icmp-routersolicit icmp-timxceed icmp-paramprob icmp-tstamp icmp-tstampreply
    icmp-ireq icmp-ireqreply icmp-maskreq icmp-maskreply icmp6type icmp6code icmp6-echo
    icmp6-echoreply icmp6-destinationunreach icmp6-packettoobig icmp6-timeexceeded
    icmp6-parameterproblem icmp6-multicastlistenerquery icmp6-multicastlistenerreportv1
    icmp6-multicastlistenerdone icmp6-routersolicit icmp6-routeradvert icmp6-neighborsolicit
    icmp6-neighboradvert icmp6-redirect icmp6-routerrenum icmp6-nodeinformationquery
    icmp6-nodeinformationresponse icmp6-ineighbordiscoverysolicit icmp6-ineighbordiscoveryadvert
    icmp6-multicastlistenerreportv2 icmp6-homeagentdiscoveryrequest
    icmp6-homeagentdiscoveryreply icmp6-mobileprefixsolicit icmp6-mobileprefixadvert
    icmp6-certpathsolicit icmp6-certpathadvert icmp6-multicastrouteradvert
    icmp6-multicastroutersolicit icmp6-multicastroutertermination
    tcpflags tcp-fin tcp-syn tcp-rst tcp-push tcp-ack tcp-urg tcp-ece tcp-cwr
"""
WORDS = frozenset(_WORDS.split())
SERVICES = {
    "ftp-data": 20, "ftp": 21, "ssh": 22, "telnet": 23, "smtp": 25, "domain": 53, "bootps": 67,
    "bootpc": 68, "tftp": 69, "http": 80, "pop3": 110, "sunrpc": 111, "ntp": 123, "imap": 143,
    "snmp": 161, "bgp": 179, "ldap": 389, "https": 443, "syslog": 514, "imaps": 993,
}  # fmt: skip
"""Names of ports. A machine's /etc/services may say otherwise, and scores are to be the same."""
PROTOCOLS = {
    "icmp": 1, "igmp": 2, "tcp": 6, "udp": 17, "gre": 47, "esp": 50, "ah": 51, "pim": 103,
    "vrrp": 112, "sctp": 132,
}  # fmt: skip
"""Names of IP protocols, as in ``ip proto \\udp``. libpcap looks them up in /etc/protocols; where
that cannot be opened, it takes 0 for any: ``findings/libpcap_protocol_name_is_zero.sh``."""

_PROTOCOL = re.compile(rf"\\({'|'.join(PROTOCOLS)})(?![\w-])|(?<![\w\\-])(gre)(?![\w-])")
"""An escaped name, or ``gre``, which is no keyword."""
_QUALIFIER = re.compile(r"(?<![\w-])(ether\s+)?(host|net|port|portrange|proto|protochain)(?![\w-])")
_WORD = re.compile(r"(?<![\w.:])[A-Za-z][\w-]*(?:\.[\w.-]*)?(?![\w:.])")
_ADDRESS = re.compile(r"(?<![\w:.-])[0-9A-Fa-f]*(?::[0-9A-Fa-f]*){2,7}(?:/\d+)?(?![\w:.-])")
_NUMBER = re.compile(r"(?<![\w.])(?:0[xX][0-9A-Fa-f]+|\d+(?:\.\d+){0,3})(?![\w.])")
_SIGNS = re.compile(r"[\s()\[\]&|!=<>+*/%^:,\\-]*")
ETHERNET, SNAPSHOT, ANY_NETMASK = 1, 262_144, 0xFFFFFFFF


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint), ("instructions", ctypes.c_void_p))


class _Header(ctypes.Structure):
    _fields_ = (
        ("seconds", ctypes.c_long),
        ("microseconds", ctypes.c_long),
        ("captured", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
    )


def load_library() -> ctypes.CDLL | None:
    """libpcap, or None where this machine has none."""
    for name in LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.pcap_open_dead.restype = ctypes.c_void_p
        library.pcap_open_dead.argtypes = (ctypes.c_int, ctypes.c_int)
        library.pcap_geterr.restype = ctypes.c_char_p
        library.pcap_geterr.argtypes = (ctypes.c_void_p,)
        library.pcap_compile.argtypes = (
            ctypes.c_void_p, ctypes.POINTER(_Program), ctypes.c_char_p, ctypes.c_int,
            ctypes.c_uint32,
        )  # fmt: skip
        library.pcap_offline_filter.argtypes = (
            ctypes.POINTER(_Program), ctypes.POINTER(_Header), ctypes.c_char_p,
        )  # fmt: skip
        library.pcap_freecode.argtypes = (ctypes.POINTER(_Program),)
        return library
    return None


def read_trace(path: str) -> list[bytes]:
    """The packets of a little-endian pcap file of Ethernet, compressed with xz."""
    with lzma.open(path) as file:
        data = file.read()
    if data[:4] != b"\xd4\xc3\xb2\xa1" or struct.unpack_from("<I", data, 20) != (ETHERNET,):
        raise ValueError(f"{path} must be a little-endian pcap file of Ethernet packets")
    packets, position = [], 24
    while position < len(data):
        (captured,) = struct.unpack_from("<I", data, position + 8)
        packets.append(data[position + 16 : position + 16 + captured])
        position += 16 + captured
    return packets


def with_numbers(text: str) -> str:
    """``text`` with the numbers of services and protocols in place of their names.

    Raises:
        ValueError: A word that is none of the language's: a host's name, for example.
    """

    def known(match: re.Match[str]) -> str:
        word = match[0]
        if word not in WORDS and word not in SERVICES:
            raise ValueError(f"unknown word {word}")
        return str(SERVICES.get(word, word))

    text = _PROTOCOL.sub(_protocol_number, text)
    # Addresses first: an IPv6 address may begin with a letter.
    pieces, position = [], 0
    for address in _ADDRESS.finditer(text):
        pieces += [_WORD.sub(known, text[position : address.start()]), address[0]]
        position = address.end()
    pieces.append(_WORD.sub(known, text[position:]))
    rest = _NUMBER.sub(" ", _WORD.sub(" ", _ADDRESS.sub(" ", text)))
    if not _SIGNS.fullmatch(rest):
        raise ValueError(f"neither words, numbers nor signs: {rest.split()}")
    return "".join(pieces)


def _protocol_number(match: re.Match[str]) -> str:
    """The number of an IP protocol, where its name can be one: what stands before it says so."""
    qualifiers = list(_QUALIFIER.finditer(match.string, 0, match.start()))
    if not qualifiers or qualifiers[-1][1] or qualifiers[-1][2] not in ("proto", "protochain"):
        return match[0]
    return str(PROTOCOLS[match[1] or match[2]])


def run(library: ctypes.CDLL, handle: int, packets: list[bytes], text: str) -> dict[str, Any]:
    """Run one filter: ``{"packets": [index, ...]}`` or ``{"error": "..."}``."""
    if not text.strip():
        return {"error": "an empty filter"}
    program = _Program()
    try:
        expression = with_numbers(text).encode("ascii")
    except ValueError as error:
        return {"error": str(error)}
    if library.pcap_compile(handle, program, expression, 1, ANY_NETMASK) != 0:
        return {"error": library.pcap_geterr(handle).decode("utf-8", "replace")}
    try:
        header = _Header()
        selected = []
        for index, packet in enumerate(packets):
            header.captured = header.length = len(packet)
            if library.pcap_offline_filter(program, header, packet):
                selected.append(index)
    finally:
        library.pcap_freecode(program)
    return {"packets": selected}


def restrict_process(memory_bytes: int) -> None:
    """Let the kernel hold this process to its memory; no file grows, none is opened."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def allow_cpu_seconds(seconds: int) -> None:
    """Let the kernel kill this process ``seconds`` of processor time from now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def main(trace: str, memory_bytes: str) -> None:
    """Answer requests until stdin closes."""
    library = load_library()
    if library is None:
        print(json.dumps({"missing": "libpcap"}), flush=True)
        return
    packets = read_trace(trace)
    handle = library.pcap_open_dead(ETHERNET, SNAPSHOT)
    restrict_process(int(memory_bytes))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        allow_cpu_seconds(int(request["seconds"]) + 1)
        print(json.dumps(run(library, handle, packets, request["filter"])), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
