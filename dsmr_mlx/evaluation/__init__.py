"""How well models predict whole pieces.

    losses.py       the loss of every token of every piece, and what it comes to
"""

from dsmr_mlx.evaluation.losses import Evaluation, evaluate, piece_losses

__all__ = ["Evaluation", "evaluate", "piece_losses"]
