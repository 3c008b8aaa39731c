"""Tasks for lm-eval: what the models are tested on."""
