"""How well models predict whole pieces; `music/` compares generated music with real music.

losses.py           the loss of every token of every piece, and summaries of these losses
corpora.py          the corpus on which a checkpoint is evaluated, and the pieces that several corpora share
comparison.py       checkpoints side by side, also with different vocabularies
comparison_plot.py  a comparison as a picture
context.py          the loss when layers carry less of the past
passages.py         passages of music whose ids can be concatenated
motif.py            the loss of a passage that is repeated after a number of tokens
reset.py            the loss after a boundary at which all memory is emptied (KRCU)
gaps.py             the loss of passages if what follows them is shown, and how played passages join
memory_plot.py      these four as a picture, with gaps_plot.py
estimates.py        means and their standard errors, results as JSON values
"""

from dsmr_mlx.evaluation.context import context_curves, with_horizons
from dsmr_mlx.evaluation.losses import Evaluation, evaluate, piece_losses
from dsmr_mlx.evaluation.reset import ResetCurve, measure_reset, reset_curve

__all__ = [
    "Evaluation",
    "ResetCurve",
    "context_curves",
    "evaluate",
    "measure_reset",
    "piece_losses",
    "reset_curve",
    "with_horizons",
]
