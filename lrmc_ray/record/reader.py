"""A finished record: its files, verified as they are read, and its samples by index.

A record can be read back only if it is what was written: pages carry checksums, files a SHA-256 in
the manifest, and every row is checked before it reaches a loss. Only the files that the manifest
lists are read.
"""

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from lrmc_ray.errors import DataError
from lrmc_ray.method.microbatch import Sample
from lrmc_ray.method.subsets import CandidateSets
from lrmc_ray.record.verified_files import FinishedRecord


def to_sample(table: pa.Table, row: int, *, vocabulary_size: int, source: str) -> Sample:
    """Row ``row`` of a record's table, checked.

    Raises:
        DataError: the row contradicts itself or the vocabulary.
    """

    def values(name: str) -> Any:
        return table[name][row].values.to_numpy(zero_copy_only=False)

    input_ids_T = torch.tensor(values("input_ids"), dtype=torch.int64)
    positions_P = torch.tensor(values("positions"), dtype=torch.int64)
    candidates = CandidateSets(
        offsets=torch.tensor(values("candidate_offsets"), dtype=torch.int64),
        token_ids=torch.tensor(values("candidate_ids"), dtype=torch.int32),
        logprobs=torch.tensor(values("candidate_logprobs"), dtype=torch.float16),
        gold_ids=torch.tensor(values("gold_ids"), dtype=torch.int32),
    )
    sample_id = table["sample_id"][row].as_py()
    sample = Sample(
        sample_id=sample_id,
        input_ids_T=input_ids_T,
        positions_P=positions_P,
        is_supervised_P=torch.tensor(values("is_supervised"), dtype=torch.bool),
        candidates=candidates,
        domain=table["domain"][row].as_py(),
    )
    try:
        _check(sample, vocabulary_size)
    except ValueError as error:
        raise DataError(f"{source}, sample {sample_id}: {error}; record again") from None
    return sample


def _check(sample: Sample, vocabulary_size: int) -> None:
    ids_T, positions_P = sample.input_ids_T, sample.positions_P
    if len(ids_T) and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < vocabulary_size:
        raise ValueError(f"token ids must be in [0, {vocabulary_size})")
    if len(positions_P) != sample.candidates.num_rows or len(positions_P) != len(
        sample.is_supervised_P
    ):
        raise ValueError("positions, is_supervised and candidate sets must be equally many")
    if len(positions_P):
        if int(positions_P[0]) < 0 or int(positions_P[-1]) + 1 >= len(ids_T):
            raise ValueError("positions must be in [0, number of tokens - 1)")
        if not bool((positions_P.diff() > 0).all()):
            raise ValueError("positions must ascend")
        if not torch.equal(ids_T[positions_P + 1], sample.candidates.gold_ids.long()):
            raise ValueError("gold ids must be the next tokens")
    sample.candidates.check(vocabulary_size)


class Records(FinishedRecord):
    """A finished record, read by sample index.

    The files are read as they are needed; the most recent ones stay in memory.
    """

    def __init__(self, directory: Path, *, max_cached_bytes: int = 2 << 30):
        """Open the record in ``directory``.

        Raises:
            IncompleteArtifactError: it is not finished.
            DataError: its manifest is not one of a record.
        """
        super().__init__(directory)
        self._starts = [0, *itertools.accumulate(part.rows for part in self.parts)]
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._max_cached_bytes = max_cached_bytes

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        part = bisect.bisect_right(self._starts, index) - 1
        return to_sample(
            self._table(part),
            index - self._starts[part],
            vocabulary_size=self._vocabulary_size,
            source=str(self.directory / self.parts[part].name),
        )

    def _table(self, part: int) -> pa.Table:
        if part in self._cache:
            self._cache.move_to_end(part)
            return self._cache[part]
        table = self.verify_part(part)
        self._cache[part] = table
        while len(self._cache) > 1 and (
            sum(cached.nbytes for cached in self._cache.values()) > self._max_cached_bytes
        ):
            self._cache.popitem(last=False)
        return table

    def samples_of_part(self, part: int) -> Iterator[Sample]:
        """Every sample of one file, read anew and verified.

        Raises:
            DataError: the file is not what was written, or a sample contradicts itself.
        """
        table = self.verify_part(part)
        for row in range(table.num_rows):
            yield to_sample(
                table,
                row,
                vocabulary_size=self._vocabulary_size,
                source=str(self.directory / self.parts[part].name),
            )
