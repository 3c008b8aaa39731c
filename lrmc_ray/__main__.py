"""``python -m lrmc_ray`` is the command ``lrmc``."""

import sys

from lrmc_ray.cli import main

sys.exit(main())
