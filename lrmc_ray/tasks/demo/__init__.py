"""The demo's data: a database of countries and cities, questions about it, a base model."""
