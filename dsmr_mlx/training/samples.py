"""The samples of a run: music from the weights of each validation, one MIDI file each."""

from pathlib import Path

import numpy as np

from dsmr_mlx.common.formatting import one_line
from dsmr_mlx.generation.generate import Variation, generate_variations
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.music.midi import write_notes
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.training.run_record import find_samples

MAX_TOKENS, UNTIMED_TOKENS = 8192, 1024  # of a sample: at most, and if the duration of tokens is unknown


def sample_path(run: Path, step: int) -> Path:
    """Return the path of the sample of a step."""
    return run / "samples" / f"step-{step:08d}.mid"


def has_sample(run: Path, step: int) -> bool:
    """Return whether the sample of a step was written."""
    return step in find_samples(run)


def set_samples_aside(run: Path, after: int, checkpoint: Path) -> None:
    """Move the samples of later steps than `after` into a checkpoint that the run does not continue from."""
    for step, path in find_samples(run).items():
        if step > after:
            (checkpoint / "samples").mkdir(exist_ok=True)
            path.replace(checkpoint / "samples" / path.name)


def generate_sample(model: DSMR, tokenizer: Tokenizer, seconds: float, seed: int) -> Variation:
    """Generate `seconds` of music, or `UNTIMED_TOKENS` if the duration of tokens is unknown."""
    grammar = tokenizer.event_grammar()
    timed = grammar is not None and grammar.has_clock
    tokens = MAX_TOKENS if timed else UNTIMED_TOKENS
    limit = seconds if timed else None
    (variation,) = generate_variations(model, tokenizer, seconds=limit, tokens=tokens, seed=seed).variations
    return variation


def write_sample(run: Path, step: int, variation: Variation) -> None:
    """Write a MIDI file, or the ids if there is no MIDI library. Raises `OSError` and `UserError` if that fails."""
    path = sample_path(run, step)
    path.parent.mkdir(exist_ok=True)
    try:
        write_notes(variation.notes, path, text=f"dsmr-mlx {one_line(run.name)} step {step}")
    except ModuleNotFoundError:
        np.save(path.with_suffix(".npy"), variation.ids)
