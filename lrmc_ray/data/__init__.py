"""The Parquet contract, the examples that enter it, and the order in which it is read."""
