"""``python -m lrmc_ray.train``."""

import sys

from lrmc_ray.console import run_command
from lrmc_ray.train.command import main

sys.exit(run_command(main))
