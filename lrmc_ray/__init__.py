"""Teach a language model a new domain without losing what it knows."""
