"""`python -m dsmr_mlx`: where the folder of scripts is not in PATH."""

import sys

from dsmr_mlx.cli import main

sys.exit(main())
