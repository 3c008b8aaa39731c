"""Stage 1: fine-tune on the recorded candidates, on any number of workers."""
