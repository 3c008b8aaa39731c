"""``python -m lrmc_ray.record``."""

import sys

from lrmc_ray.console import run_command
from lrmc_ray.record.command import main

sys.exit(run_command(main))
