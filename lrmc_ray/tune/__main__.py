"""``python -m lrmc_ray.tune``."""

import sys

from lrmc_ray.console import run_command
from lrmc_ray.tune.command import main

sys.exit(run_command(main))
