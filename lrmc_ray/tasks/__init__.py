"""Tasks for lm-eval: ours, and how to add more."""
