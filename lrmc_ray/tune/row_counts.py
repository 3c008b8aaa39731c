"""How many rows training data have, and about how many tokens, without a tokenizer."""

from pathlib import Path

CHARACTERS_PER_TOKEN = 4.0


def count_tokens(files: list[Path], max_length: int) -> tuple[int, float]:
    """Samples, and about how many tokens they have together."""
    samples, tokens = 0, 0.0
    for path in files:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            metadata = pq.read_metadata(path)
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            samples += metadata.num_rows
            tokens += sum(group.total_byte_size for group in groups) / CHARACTERS_PER_TOKEN
            continue
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    samples += 1
                    tokens += min(float(max_length), len(line) / CHARACTERS_PER_TOKEN)
    return max(1, samples), tokens
