"""The search: Ray Tune runs trials of training and scoring that Optuna proposes."""
