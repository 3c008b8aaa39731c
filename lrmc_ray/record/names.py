"""What the files of a record are called, and the command that makes them."""

MADE_BY = "python -m lrmc_ray.record"

PLAN = "plan.json"
"""What was tokenized, and the shards that it is cut into, while the record is made."""

EXAMPLES = "examples.parquet"
"""The tokenized examples of the record that is being made."""

INDEX = "index.parquet"
"""Name and domain of every sample of a record, in its order."""

REJECTS = "rejects.jsonl"
"""The rows of the training data that were left out."""

VIEW = "storage.json"
"""Where the files are of a record that is in a storage."""
