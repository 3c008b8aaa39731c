"""``python -m lrmc_ray.compare``."""

import sys

from lrmc_ray.compare.command import main
from lrmc_ray.console import run_command

sys.exit(run_command(main))
