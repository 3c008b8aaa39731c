"""``python -m lrmc_ray.evaluate``."""

import sys

from lrmc_ray.console import run_command
from lrmc_ray.evaluate.command import main

sys.exit(run_command(main))
