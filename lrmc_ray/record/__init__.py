"""Stage 0: which tokens the base model considers at every position, written once as Parquet."""
