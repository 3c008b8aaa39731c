"""``python -m lrmc_ray.report``."""

import sys

from lrmc_ray.console import run_command
from lrmc_ray.report.command import main

sys.exit(run_command(main))
