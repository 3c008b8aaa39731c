"""Prompt and answer: how a model's chat template writes them, and the tokens that they are."""
