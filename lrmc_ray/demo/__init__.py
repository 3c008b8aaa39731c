"""The demo: a small chat model, a database of countries and cities, and questions about it."""
