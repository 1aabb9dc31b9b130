"""Training: a run and its configuration, the trainer, checkpoints, several processes, the report."""

from dsmr_mlx.common.lazy import lazily

_HOME = {"Callback": "run", "train": "run"}

__all__ = sorted(_HOME)
__getattr__ = lazily(__name__, _HOME)
