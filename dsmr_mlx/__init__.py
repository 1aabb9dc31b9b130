"""Full-piece piano-music modelling with Depth-Structured Music Recurrence (arXiv 2602.19816) on MLX.

The names below are imported on first use, so that the command line starts fast and a machine that only
trains needs no MIDI library.
"""

from dsmr_mlx.lazy import lazily

__version__ = "0.1.0"

_HOME = {
    "Corpus": "corpus",
    "DSMR": "model",
    "HorizonSchedule": "horizons",
    "ModelConfig": "config",
    "Note": "generation",
    "Notes": "midi",
    "PerformanceTokenizer": "tokenizer",
    "Player": "player",
    "RecurrentState": "state",
    "Sampling": "sampling",
    "UserError": "errors",
    "generate": "generation",
    "generate_variations": "generation",
    "load": "checkpoint",
    "read_notes": "midi",
    "recommended": "playing",
    "write_notes": "midi",
}

__all__ = sorted(_HOME)
__getattr__ = lazily(__name__, _HOME)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
