"""Checkpoints of other frameworks. Lives in `convert/` of the repository, installed as `dsmr_mlx.convert`."""
