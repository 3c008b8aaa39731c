"""The same question to a tuned model and to its base: ``lrmc chat``."""
