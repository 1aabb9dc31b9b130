"""One vocabulary of every kind, each made once, and music that it can tell."""

from functools import cache

import numpy as np
from support.bands import random_band

from dsmr_mlx.music.notes import Notes, without_overlaps
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.registry import make_tokenizer
from dsmr_mlx.tokenizers.subwords import learn_subwords

# name → base, whether instruments are told apart, kind of subwords and how many pieces are learned
KINDS = {
    "performance": ("performance", False, None, 0),
    "performance bpe": ("performance", False, "bpe", 209),
    **{name: (f"miditok:{name}", False, None, 0) for name in ("REMI", "TSD", "MIDILike", "Structured", "CPWord")},
    **{name: (f"miditok:{name}", False, None, 0) for name in ("PerTok", "MuMIDI", "Octuple", "MMM", "BEAT")},
    "REMI programs": ("miditok:REMI", True, None, 0),
    "REMI bpe": ("miditok:REMI", False, "bpe", 150),
    "MIDILike unigram": ("miditok:MIDILike", False, "unigram", 60),
}
NAMES = tuple(KINDS)


@cache
def vocabulary(name: str) -> Tokenizer:
    """One of `NAMES`, with pieces of several events where it has subwords."""
    base, programs, learned, size = KINDS[name]
    tokenizer = make_tokenizer(base, programs=programs)
    if learned is None:
        return tokenizer
    music = [tokenizer.encode_notes(figures(seed)) for seed in range(10)]
    return learn_subwords(tokenizer, music, learned, tokenizer.vocab_size + size)


def figures(seed: int, n: int = 24) -> Notes:
    """n times one of four figures of a second, of few lengths and velocities, so that there is something to learn."""
    shapes, rng = np.random.default_rng(0), np.random.default_rng(seed)
    onset = np.sort(shapes.choice(8, (4, 9))) / 8
    columns = onset, onset + shapes.choice([0.1, 0.25, 0.5], (4, 9)), 48 + shapes.choice(24, (4, 9))
    onset, offset, pitch, velocity = *columns, shapes.choice([40, 64, 90], (4, 9))
    which, start = rng.integers(4, size=n), np.arange(n)[:, None]
    times = onset[which] + start, offset[which] + start
    return without_overlaps(*(column.ravel() for column in (*times, pitch[which], velocity[which])))


def music(name: str, seed: int, n: int = 40) -> Notes:
    """Random notes; of several instruments where the vocabulary tells them apart."""
    band = random_band(seed, n)
    return band if vocabulary(name).programs else band.as_piano()
