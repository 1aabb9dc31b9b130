"""How well models predict whole pieces.

losses.py           the loss of every token of every piece, and what it comes to
corpora.py          which corpus a checkpoint is measured on, and the pieces that several share
comparison.py       checkpoints side by side, also of different vocabularies
comparison_plot.py  the same as a picture
context.py          what the memory is worth: the loss where layers carry less of the past
passages.py         passages of music that can be put one after the other
motif.py            what comes back: the loss of a passage that returns after so many tokens
context_plot.py     both as a picture
estimates.py        means and their standard errors
"""

from dsmr_mlx.evaluation.context import context_curves, with_horizons
from dsmr_mlx.evaluation.losses import Evaluation, evaluate, piece_losses

__all__ = ["Evaluation", "context_curves", "evaluate", "piece_losses", "with_horizons"]
