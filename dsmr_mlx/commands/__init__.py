"""The commands of `dsmr-mlx`: each module adds one to the parser and runs it."""
