"""Run generated packet filters safely, and say whether they select what the gold filter selects.

The filters are in the language of pcap-filter(7). libpcap compiles and runs them on a trace in a
child process without root rights (:mod:`lrmc_ray.tasks.pcap_child` says how).
"""

from __future__ import annotations

import atexit
import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.tasks.child_process import ChildProcess

TRACE = Path(__file__).parent / "data" / "packets.pcap.xz"
"""The packets that all questions are about; ``scripts/build_packets.py`` made them."""

MAX_FILTER_CHARACTERS = 1_000

_CHILD = Path(__file__).with_name("pcap_child.py")


@dataclass(frozen=True, slots=True)
class Selection:
    """What a filter selects: indices of ``packets``, or the ``error`` that stopped it."""

    packets: frozenset[int] | None = None
    error: str | None = None


class FilterRunner(ChildProcess):
    """A child process that runs filters on one trace, one after the other.

    Args:
        trace: A pcap file of Ethernet packets, compressed with xz.
        filter_seconds: Processor time after which the kernel kills the child, rounded up to
            whole seconds.
        wall_seconds: Time after which this process kills a child that does not answer.
        memory_bytes: Address space of the child (RLIMIT_AS).

    Raises:
        IncompleteArtifactError: There is no such file.
    """

    def __init__(
        self,
        trace: str | os.PathLike[str] = TRACE,
        *,
        filter_seconds: float = 2.0,
        wall_seconds: float = 10.0,
        memory_bytes: int = 512 * 2**20,
    ) -> None:
        self.trace = Path(trace).resolve()
        if not self.trace.is_file():
            raise IncompleteArtifactError(
                f"the trace of a packet filter must be a file, and {self.trace} is none; correct "
                "the path"
            )
        super().__init__(_CHILD, self.trace, memory_bytes=memory_bytes, wall_seconds=wall_seconds)
        self._seconds = filter_seconds

    def select(self, text: str) -> Selection:
        """Run one filter. Whatever it is, the answer comes within ``wall_seconds``.

        Raises:
            IncompleteArtifactError: This machine has no libpcap.
            ResourceError: The child process cannot be started.
        """
        if len(text) > MAX_FILTER_CHARACTERS:
            return Selection(error=f"longer than {MAX_FILTER_CHARACTERS} characters")
        answer = self.ask({"filter": text, "seconds": self._seconds})
        if "error" in answer:
            return Selection(error=answer["error"])
        return Selection(packets=frozenset(answer["packets"]))


@functools.cache
def shared_runner() -> FilterRunner:
    """This process's runner for the shipped trace; its child ends with this process."""
    runner = FilterRunner()
    atexit.register(runner.close)
    return runner


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's ``process_results``: the metrics of one generated answer.

    Args:
        doc: A row of the test file, with the gold filter under ``filter``.
        results: The generated text, as its only element.

    Returns:
        ``execution_accuracy`` (the gold filter's packets are selected), ``exact_match`` (the filter
        is the gold one up to spacing) and ``valid_filter`` (it compiles), each 0.0 or 1.0.

    Raises:
        DataError: The gold filter itself fails.
    """
    runner = shared_runner()
    gold = runner.select(doc["filter"])
    if gold.packets is None:
        raise DataError(f"a gold filter must run, got {gold.error!r} from: {doc['filter']}")
    text = extract_filter(results[0])
    predicted = runner.select(text)
    return {
        "execution_accuracy": float(predicted.packets == gold.packets),
        "exact_match": float(text.split() == doc["filter"].split()),
        "valid_filter": float(predicted.error is None),
    }


_FENCE = re.compile(r"```(?:[ \t]*\w*[ \t]*\n)?(.*?)(?:```|$)", re.DOTALL)
_COMMAND = re.compile(r"^\s*(?:\$ )?tcpdump\s+(?:-\w+\s+)*")


def extract_filter(text: str) -> str:
    """The first filter in generated text: what a code fence holds, where there is one.

    Quotes around it and ``tcpdump`` with options without values before it are left out.
    """
    fence = _FENCE.search(text)
    if fence:
        text = fence.group(1)
    lines = text.strip().splitlines()
    return _COMMAND.sub("", lines[0] if lines else "").strip().strip("`'\"").strip()
