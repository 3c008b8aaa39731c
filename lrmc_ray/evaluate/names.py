"""What the files of one model's scores are called, and the command that makes them."""

MADE_BY = "python -m lrmc_ray.evaluate"

SCORING = 3
"""Changes whenever the same model, asked the same questions, would get other scores, or more would
be kept of its answers."""

RECEIPT = "receipt.parquet"
"""The items that a tuned model lost and gained against its base."""

DRIFT_TEXTS = "drift_texts.json"
"""Token ids of the base model's texts on which drift is measured."""

DRIFT_LOGPROBS = "drift_logprobs.npz"
"""The base model's log-probabilities on these texts."""
