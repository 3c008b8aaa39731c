"""Teach a language model a new domain without losing what it knows: Logits Replay + MoClip on Ray."""
