"""Where a record is committed: from here on it is finished, and everybody sees it.

Before, its files lie in a directory that no other stage looks at. A command that dies before the
last line leaves them there, and the same command goes on with them.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.files.artifacts import publish, write_manifest
from lrmc_ray.files.fault_points import passed
from lrmc_ray.record.names import INDEX, REJECTS, VIEW
from lrmc_ray.record.recording import Recording


def commit(
    manifest: Mapping[str, Any],
    partial: Path,
    final: Path,
    recording: Recording,
    parts: Collection[str],
) -> None:
    """Give the directory ``partial`` its manifest, and then the name ``final``.

    Nothing happens if another command has committed the same record to the storage: it is that
    one's.

    Args:
        manifest: What the record holds.
        partial: Where it was made.
        final: Where everybody looks for it.
        recording: Its files, where they are.
        parts: Names of the files of samples.
    """
    if not recording.claim(manifest, final):
        return
    kept = {".lock", VIEW, INDEX, *parts}
    if manifest["rejects"]["count"]:
        kept.add(REJECTS)
    for name in os.listdir(partial):
        if name not in kept:
            (partial / name).unlink()
    write_manifest(partial, manifest)
    passed("record.manifest_written")
    publish(partial, final, manifest)
    passed("record.published")
