"""Full-piece piano-music modelling with Depth-Structured Music Recurrence (arXiv 2602.19816) on MLX.

    prepare, read_notes, write_notes                    MIDI files and corpora
    load, DSMR, ModelConfig, HorizonSchedule            models
    generate, generate_variations, fill, Player         music; steering: Tempo, PitchRange, EndWithin and others
    evaluate, TrainConfig, build_config                 perplexity and training; a run is `dsmr_mlx.training.train`

Names are imported on first use, so that the command line starts fast.
"""

from pathlib import Path

from dsmr_mlx.common.lazy import lazily

__version__ = "0.1.0"

if not Path(__file__).with_name("convert").is_dir():
    __path__.append(str(Path(__file__).parents[1]))  # in a clone, `convert` lies beside this folder

_HOME = {
    "Corpus": "data.corpus",
    "DSMR": "model.dsmr",
    "Density": "generation.steering",
    "Dynamics": "generation.steering",
    "EndWithin": "generation.steering",
    "HorizonSchedule": "model.horizons",
    "Limits": "generation.grammar",
    "LoopPenalty": "generation.steering",
    "MaxNoteSeconds": "generation.steering",
    "MaxPolyphony": "generation.steering",
    "MaxSilenceSeconds": "generation.steering",
    "ModelConfig": "model.config",
    "Note": "generation.generate",
    "Notes": "music.notes",
    "PerformanceTokenizer": "tokenizers.performance",
    "PitchChoice": "generation.steering",
    "PitchClasses": "generation.steering",
    "PitchRange": "generation.steering",
    "Player": "generation.player",
    "RecurrentState": "model.state",
    "Sampling": "generation.sampling",
    "Tempo": "generation.steering",
    "TrainConfig": "training.config",
    "UserError": "common.errors",
    "VelocityRange": "generation.steering",
    "build_config": "training.settings",
    "evaluate": "evaluation.losses",
    "fill": "generation.filling",
    "generate": "generation.generate",
    "generate_variations": "generation.generate",
    "load": "model.checkpoint",
    "prepare": "data.prepare",
    "read_notes": "music.midi",
    "recommended": "generation.options",
    "write_notes": "music.midi",
}

__all__ = sorted(_HOME)
__getattr__ = lazily(__name__, _HOME)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
