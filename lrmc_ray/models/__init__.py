"""Hugging Face models: where they are, which they are, loading, running and saving them."""
