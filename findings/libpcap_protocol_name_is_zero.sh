#!/usr/bin/env bash
# libpcap 1.10.3: in a process that may open no more files, every name of an IP protocol in a filter
# is compiled as protocol 0, also one that there is not. Nothing is refused, and the filter selects
# other packets. Names of services are refused there, as they should be.
#
# Input: filters of pcap-filter(7), compiled with files to open, then with RLIMIT_NOFILE at 3.
# Seen with Debian's libpcap0.8 1.10.3-1 (amd64), glibc 2.36:
#   ip proto \\udp     17, then 0
#   ip proto gre       47, then 0
#   ip proto nosuch    unknown ip proto 'nosuch', then 0
#   udp port domain    53, then unknown port 'domain'
# Source: pcap_nametoproto in nametoaddr.c returns 0 where getprotobyname_r fails (err != 0), and not
# PROTO_UNDEF; lookup_proto in gencode.c takes that for the number. glibc fails with ENOENT or EMFILE
# where /etc/protocols cannot be opened, and returns 0 with no entry where the name is not in it.
# Needs apt-get and dpkg-deb.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get download -qq libpcap0.8=1.10.3-1 2>log || { cat log; exit 1; }
dpkg-deb -x libpcap0.8_1.10.3-1_*.deb root
cat >compile.py <<'PYTHON'
import ctypes
import glob
import resource


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint), ("instructions", ctypes.c_void_p)]


class Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jumps", ctypes.c_ubyte * 2), ("k", ctypes.c_uint)]


(path,) = glob.glob("root/usr/lib/*/libpcap.so.0.8")
pcap = ctypes.CDLL(path)
pcap.pcap_open_dead.restype = ctypes.c_void_p
pcap.pcap_geterr.restype = ctypes.c_char_p
pcap.pcap_lib_version.restype = ctypes.c_char_p
handle = ctypes.c_void_p(pcap.pcap_open_dead(1, 65535))
print(pcap.pcap_lib_version().decode())


def compared_with(text):
    """The number that the last comparison but the fragment's is with, or what is refused."""
    program = Program()
    if pcap.pcap_compile(handle, ctypes.byref(program), text.encode(), 1, 0xFFFFFFFF):
        return pcap.pcap_geterr(handle).decode()
    code = ctypes.cast(program.instructions, ctypes.POINTER(Instruction))
    return [code[i].k for i in range(program.length) if code[i].code == 0x15][-1]


for files in ("with files", "without files"):
    for text in (r"ip proto \udp", "ip proto gre", "ip proto nosuch", "udp port domain"):
        print(f"{files}: {text}: {compared_with(text)}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
PYTHON
python3 compile.py | tee seen
grep -Fqx 'with files: ip proto \udp: 17' seen &&
    grep -Fqx 'without files: ip proto \udp: 0' seen &&
    grep -Fqx 'with files: ip proto gre: 47' seen &&
    grep -Fqx 'without files: ip proto gre: 0' seen &&
    grep -Fqx "with files: ip proto nosuch: unknown ip proto 'nosuch'" seen &&
    grep -Fqx 'without files: ip proto nosuch: 0' seen &&
    grep -Fqx 'with files: udp port domain: 53' seen &&
    grep -Fqx "without files: udp port domain: unknown port 'domain'" seen
