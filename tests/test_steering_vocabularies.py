"""Steering in vocabularies of every kind does what it says in terms of the music, or says why it cannot."""

from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from vocabularies import figures, vocabulary

from dsmr_mlx.errors import UserError
from dsmr_mlx.generation import finish, notes_of
from dsmr_mlx.grammar import GrammarWalk, Limits
from dsmr_mlx.midi import Notes
from dsmr_mlx.sampling import Sampler, Sampling, keys_at, lane_keys
from dsmr_mlx.scoring import worst_loop
from dsmr_mlx.steering import (
    Density,
    Dynamics,
    EndWithin,
    LoopPenalty,
    MaxNoteSeconds,
    MaxPolyphony,
    PitchClasses,
    PitchRange,
    Tempo,
    VelocityRange,
)

pytest.importorskip("miditok")
pytest.importorskip("sentencepiece")

NAMES = ("performance", "performance bpe", "REMI", "MIDILike", "TSD", "CPWord", "REMI bpe", "MIDILike unigram")
HELD = ("performance", "performance bpe", "MIDILike", "MIDILike unigram")
TOLD = ("REMI", "TSD", "CPWord", "REMI bpe")
LANES = 8


@cache
def walk_of(name: str) -> GrammarWalk:
    return GrammarWalk(vocabulary(name))


@cache
def taste(name: str) -> np.ndarray:
    """`[V]` logits: what presses, what releases and what takes time are about as likely as one another, long pauses are
    seldom, and pieces of many events welcome.
    """
    t = walk_of(name).tables
    waits, length = (t.ticks > 0) | (t.phase >= 0), (t.events >= 0).sum(axis=1)
    kind = np.select([t.notes > 0, waits, t.released.any(axis=1)], [0, 1, 2], 3)
    kind = np.unique(kind, return_inverse=True)[1]
    logits = -np.log(np.bincount(kind))[kind] + 2.0 * (length > 1)
    logits = logits + 5.0 * t.contains(t.grammar.bar)
    return logits - 3.0 * (waits & (t.ticks * t.grammar.seconds_per_tick > 0.4)) - 1.0 * (kind == 0)


def play(
    name: str, *processors, limits: Limits | None = None, prompt: np.ndarray | None = None, seed: int = 0
) -> list[np.ndarray]:
    """The ids of lanes that take at random what remains."""
    walk, limits = walk_of(name), limits or Limits(tokens=70)
    sampler = Sampler(walk, Sampling(), processors)
    prompt = np.array([walk.tokenizer.bos_id]) if prompt is None else prompt
    one, state = walk.begin(prompt), sampler.begin(prompt)
    played, state = tree_map(lambda array: mx.concatenate([array] * LANES), (one, state))
    bounds, keys, logits = walk.bounds(limits, played), lane_keys(seed, LANES), mx.array(taste(name)[None])
    steps: list[np.ndarray] = []
    while not (walk.has_ended[played.state]).all().item():
        assert len(steps) < 600
        possible = mx.where(walk.allowed(played, bounds), logits, -mx.inf).astype(mx.float32)
        token = sampler.draw(possible, played, state, keys_at(keys, mx.array(len(steps), mx.uint32)))
        assert (mx.take_along_axis(possible, token[:, None], axis=1) > -mx.inf).all().item()
        played = walk.advance(played, token)
        state = sampler.advance(state, token, played)
        steps.append(np.array(token, np.int64))
    return [finish(walk, lane) for lane in np.stack(steps, axis=1)]


def music_of(name: str, lanes: list[np.ndarray], prompt: np.ndarray | None = None) -> list[Notes]:
    walk = walk_of(name)
    prompt = np.array([walk.tokenizer.bos_id]) if prompt is None else prompt
    before = walk.moments(walk.begin(prompt))[0]
    return [notes_of(walk, prompt, before, lane) for lane in lanes]


def together(notes: list[Notes], column: str) -> np.ndarray:
    return np.concatenate([getattr(lane, column) for lane in notes])


def most_at_once(notes: Notes) -> int:
    events = sorted([(round(t * 1e4), 1) for t in notes.onset] + [(round(t * 1e4), -1) for t in notes.offset])
    return int(np.cumsum([change for _, change in events]).max())


def prompt_of(name: str) -> np.ndarray:
    """Music cut after two seconds and a bit."""
    tokenizer = vocabulary(name)
    return tokenizer.prompt(tokenizer.first_seconds(tokenizer.encode_notes(figures(3, 4)), 2.3))


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_pitches_and_velocities_stay_in_their_ranges(name, prompted):
    processors = [PitchRange(50, 70), PitchClasses([0, 2, 4, 5, 7]), VelocityRange(50, 80)]
    prompt = prompt_of(name) if prompted else None
    notes = music_of(name, play(name, *processors, prompt=prompt), prompt)
    assert set(together(notes, "pitch").tolist()) <= {p for p in range(50, 71) if p % 12 in (0, 2, 4, 5, 7)}
    velocities = together(notes, "velocity")
    assert 50 <= velocities.min() <= velocities.max() <= 80
    assert len(velocities) > 3 * LANES


@pytest.mark.parametrize("name", HELD)
def test_no_more_keys_sound_than_may(name):
    for keys in (1, 3):
        notes = music_of(name, play(name, MaxPolyphony(keys)))
        assert max(map(most_at_once, notes)) == keys
    free = music_of(name, play(name))
    assert max(map(most_at_once, free)) > 4


@pytest.mark.parametrize("name", TOLD)
def test_polyphony_is_refused_where_notes_are_told_with_their_lengths(name):
    with pytest.raises(UserError, match="MaxPolyphony: the tokens of this vocabulary have no known releases"):
        play(name, MaxPolyphony(3))


@pytest.mark.parametrize("name", NAMES)
def test_no_note_is_longer_than_it_may_be(name):
    for seconds in (0.1, 0.5):
        notes = music_of(name, play(name, MaxNoteSeconds(seconds)))
        lengths = together(notes, "offset") - together(notes, "onset")
        assert lengths.max() <= seconds + 1e-6
        assert len(lengths) > 4 * LANES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_piece_ends_within_its_span(name, seed):
    """By the clock, and in silence: the last note is over, too."""
    start, within = 1.0, 1.5
    walk, limits = (
        walk_of(name),
        Limits(ticks=round((start + within) / walk_of(name).grammar.seconds_per_tick), may_end=True),
    )
    prompt = prompt_of(name) if seed else None
    lanes = play(name, EndWithin(start, within), limits=limits, prompt=prompt, seed=seed)
    begun = 0.0 if prompt is None else walk.tokenizer.seconds(prompt)
    for lane, notes in zip(lanes, music_of(name, lanes, prompt), strict=True):
        whole = lane if prompt is None else np.concatenate([prompt, lane])
        assert start - 1e-6 <= walk.tokenizer.seconds(whole) - begun <= start + within + 1e-6
        assert notes.offset.max(initial=0) <= start + within + 1e-6
        assert lane[-1] == walk.ending[0]


def notes_per_second(name: str, *processors) -> float:
    lanes = play(name, *processors)
    return sum(walk_of(name).tables.notes[lane].sum() for lane in lanes) / sum(
        map(walk_of(name).tokenizer.seconds, lanes)
    )


@pytest.mark.parametrize("name", NAMES)
def test_biases_shift_what_they_name(name):
    slow, fast = (notes_per_second(name, Tempo(bias)) for bias in (1.5, -1.5))
    assert slow < 0.8 * fast
    sparse, dense = (notes_per_second(name, Density(n, seconds=0.5)) for n in (1.0, 20.0))
    assert sparse < 0.6 * dense
    soft, loud = (together(music_of(name, play(name, Dynamics(bias))), "velocity").mean() for bias in (-4.0, 4.0))
    assert soft < loud - 10


@pytest.mark.parametrize("name", NAMES)
def test_loops_are_left(name):
    """A taste for one id of each kind goes round in circles; with a penalty it does so less often."""
    rng = np.random.default_rng(1)
    original = taste(name)
    tastes = original + 12.0 * (rng.random(len(original)) < 0.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "taste", lambda name: tastes)
        copies = []
        for processors in ([], [LoopPenalty(6.0)]):
            loops = [worst_loop(lane, walk_of(name).tables.notes) for lane in play(name, *processors)]
            copies.append(np.mean([loop.copies if loop else 1 for loop in loops]))
    assert copies[1] <= copies[0]
