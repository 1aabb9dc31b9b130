"""One vocabulary of every kind, each made once, and music that it can encode."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from support.bands import random_band

from dsmr_mlx.music.notes import Notes, without_overlaps
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.registry import make_tokenizer
from dsmr_mlx.tokenizers.subwords import learn_subwords

# name → base, whether it encodes instruments, type of subwords and how many are learned
KINDS = {
    "performance": ("performance", False, None, 0),
    "performance bpe": ("performance", False, "bpe", 209),
    **{name: (f"miditok:{name}", False, None, 0) for name in ("REMI", "TSD", "MIDILike", "Structured")},
    **{name: (f"miditok:{name}", False, None, 0) for name in ("PerTok", "BEAT", "TSD rests")},
    "REMI programs": ("miditok:REMI", True, None, 0),
    "aria": ("aria:2675", False, None, 0),
    "REMI bpe": ("miditok:REMI", False, "bpe", 150),
    "MIDILike unigram": ("miditok:MIDILike", False, "unigram", 60),
}
# One for each way to write music, for tests of all vocabularies: with and without releases, bars, a clock, instruments,
# subwords and a pedal. The others differ from these in their tokens only; tests of single vocabularies use them.
NAMES = (
    *("performance", "performance bpe", "REMI", "Structured", "BEAT", "TSD rests", "REMI programs", "MIDILike unigram"),
    "aria",
)


@cache
def vocabulary(name: str) -> Tokenizer:
    """Return one of `KINDS`, with tokens of several events if it has subwords."""
    base, programs, model_type, size = KINDS[name]
    tokenizer = with_rests("TSD") if name == "TSD rests" else make_tokenizer(base, programs=programs)
    if model_type is None:
        return tokenizer
    music = [tokenizer.encode_notes(figures(seed)) for seed in range(10)]
    return learn_subwords(tokenizer, music, model_type, tokenizer.vocab_size + size)


@cache
def with_rests(name: str) -> Tokenizer:
    """Return a MidiTok tokenizer with rests, which has no clock."""
    with TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.json"
        settings.write_text(json.dumps({"use_rests": True, "beat_res_rest": {"0_2": 50, "2_20": 10}}))
        return make_tokenizer(f"miditok:{name}", settings)


def figures(seed: int, n: int = 24) -> Notes:
    """Return n random choices of four figures of a second with few lengths and velocities: there is much to learn."""
    shapes, rng = np.random.default_rng(0), np.random.default_rng(seed)
    onset = np.sort(shapes.choice(8, (4, 9))) / 8
    columns = onset, onset + shapes.choice([0.1, 0.25, 0.5], (4, 9)), 48 + shapes.choice(24, (4, 9))
    onset, offset, pitch, velocity = *columns, shapes.choice([40, 64, 90], (4, 9))
    which, start = rng.integers(4, size=n), np.arange(n)[:, None]
    times = onset[which] + start, offset[which] + start
    return without_overlaps(*(column.ravel() for column in (*times, pitch[which], velocity[which])))


def music_for(name: str, seed: int, n: int = 40) -> Notes:
    """Return random notes, of several instruments if the vocabulary encodes them."""
    band = random_band(seed, n)
    return band if vocabulary(name).programs else band.as_piano()
