"""Scores of a model with lm-eval, and what changed from one model to another."""
