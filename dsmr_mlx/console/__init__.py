"""What the command line shows: progress on standard error, results on standard output."""

from dsmr_mlx.console.assessment import show_assessment
from dsmr_mlx.console.base import duration, err, hint_blas, out, progress, size, table
from dsmr_mlx.console.context import show_context
from dsmr_mlx.console.conversion import show_conversion, show_verification
from dsmr_mlx.console.data import show_prepare_report, show_tokens
from dsmr_mlx.console.evaluation import show_comparison, show_evaluation
from dsmr_mlx.console.generation import show_generation, show_scores
from dsmr_mlx.console.horizons import show_horizons
from dsmr_mlx.console.live import show_live, show_live_report, show_ports, show_turn
from dsmr_mlx.console.models import show_licence, show_listening, show_models
from dsmr_mlx.console.music import VELOCITY_COLOURS, show_pianoroll, show_piece
from dsmr_mlx.console.training import TrainingDisplay, show_plan

__all__ = [
    "VELOCITY_COLOURS",
    "TrainingDisplay",
    "duration",
    "err",
    "hint_blas",
    "out",
    "progress",
    "show_assessment",
    "show_comparison",
    "show_context",
    "show_conversion",
    "show_evaluation",
    "show_generation",
    "show_horizons",
    "show_licence",
    "show_listening",
    "show_live",
    "show_live_report",
    "show_models",
    "show_pianoroll",
    "show_piece",
    "show_plan",
    "show_ports",
    "show_prepare_report",
    "show_scores",
    "show_tokens",
    "show_turn",
    "show_verification",
    "size",
    "table",
]
