"""`python -m dsmr_mlx.train`, the same as `dsmr-mlx train`. From Python, a run is `dsmr_mlx.training.train`."""

import sys

from dsmr_mlx.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
