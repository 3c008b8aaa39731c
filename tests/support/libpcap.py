"""For tests that run packet filters."""

import pytest

from lrmc_ray.tasks import pcap_child

needs_libpcap = pytest.mark.skipif(
    pcap_child.load_library() is None, reason="NO PACKET FILTER WAS TRIED: no libpcap here"
)
