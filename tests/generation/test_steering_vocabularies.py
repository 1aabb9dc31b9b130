"""Steering in every vocabulary: its effect on the notes, or the reason why it does not apply."""

from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from support.random_lanes import EVERY_KIND
from support.vocabularies import figures, vocabulary

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation import grammar, sampling
from dsmr_mlx.generation.generate import finish, notes_of
from dsmr_mlx.generation.grammar import GrammarWalk, Limits
from dsmr_mlx.generation.sampling import Sampler, Sampling, keys_at, lane_keys
from dsmr_mlx.generation.steering import (
    Density,
    Dynamics,
    EndWithin,
    LoopPenalty,
    MaxNoteSeconds,
    MaxPolyphony,
    MaxSilenceSeconds,
    PitchClasses,
    PitchRange,
    Tempo,
    VelocityRange,
)
from dsmr_mlx.generation.steering.base import begins_note
from dsmr_mlx.music.loops import worst_loop
from dsmr_mlx.music.notes import Notes

pytest.importorskip("miditok")
pytest.importorskip("sentencepiece")

NAMES = ("performance", "performance bpe", "REMI", "TSD", "MIDILike unigram", "aria")
COUNTED = ("performance", "performance bpe", "MIDILike unigram", "REMI", "TSD", "aria")  # with `MaxPolyphony`
LANES = 6


@pytest.fixture(autouse=True)
def _quick_endings(monkeypatch):
    """Keys that are down at a limit are released soon."""
    monkeypatch.setattr(grammar, "RELEASE_TOKENS", 4)


@cache
def walk_of(name: str) -> GrammarWalk:
    return GrammarWalk(vocabulary(name))


@cache
def preferences(name: str) -> np.ndarray:
    """Logits `(V,)`: pressing, releasing and waiting are about equally likely, long pauses are
    seldom, and pieces of many events welcome.
    """
    t = walk_of(name).tables
    waits, length = (t.ticks > 0) | (t.phase >= 0), (t.events >= 0).sum(axis=1)
    kind = np.select([t.notes > 0, waits, t.released.any(axis=1)], [0, 1, 2], 3)
    kind = np.unique(kind, return_inverse=True)[1]
    logits = -np.log(np.bincount(kind))[kind] + 2.0 * (length > 1)
    logits = logits + (2.0 if t.contains(t.grammar.timed_later).any() else 5.0) * t.contains(t.grammar.bar)
    return logits - 3.0 * (waits & (t.ticks * t.grammar.seconds_per_tick > 0.4)) - 1.0 * (kind == 0)


def play(
    name: str,
    *processors,
    limits: Limits | None = None,
    prompt: np.ndarray | None = None,
    seed: int = 0,
    how: Sampling | None = None,
) -> list[np.ndarray]:
    """The ids of lanes that draw at random."""
    walk, limits = walk_of(name), limits or Limits(tokens=40)
    sampler = Sampler(walk, how or Sampling(), processors)
    prompt = np.array([walk.tokenizer.bos_id]) if prompt is None else prompt
    one, state = walk.begin(prompt), sampler.begin(prompt)
    music, state = tree_map(lambda array: mx.concatenate([array] * LANES), (one, state))
    bounds, keys, logits = walk.bounds(limits, music), lane_keys(seed, LANES), mx.array(preferences(name)[None])
    steps: list[np.ndarray] = []
    over = mx.array(False)
    while not over.item():
        assert len(steps) < 3000
        possible = mx.where(walk.allowed(music, bounds), logits, -mx.inf).astype(mx.float32)
        token = sampler.sample(possible, music, state, keys_at(keys, mx.array(len(steps), mx.uint32)))
        fits = (mx.take_along_axis(possible, token[:, None], axis=1) > -mx.inf).all()
        music = walk.advance(music, token)
        state = sampler.advance(state, token, music)
        over = walk.has_ended[music.state].all()
        mx.eval(token, fits, music, state, over)  # at once, which is quicker
        assert fits.item()
        steps.append(np.array(token, np.int64))
    return [finish(walk, lane) for lane in np.stack(steps, axis=1)]


def music_of(name: str, lanes: list[np.ndarray], prompt: np.ndarray | None = None) -> list[Notes]:
    walk = walk_of(name)
    prompt = np.array([walk.tokenizer.bos_id]) if prompt is None else prompt
    before = walk.begin(prompt).moments()[0]
    return [notes_of(walk, prompt, before, lane) for lane in lanes]


def together(notes: list[Notes], column: str) -> np.ndarray:
    return np.concatenate([getattr(lane, column) for lane in notes])


def most_at_once(notes: Notes) -> int:
    events = sorted([(round(t * 1e4), 1) for t in notes.onset] + [(round(t * 1e4), -1) for t in notes.offset])
    return int(np.cumsum([change for _, change in events]).max())


def prompt_of(name: str) -> np.ndarray:
    """Music cut after a little more than two seconds."""
    tokenizer = vocabulary(name)
    return tokenizer.prompt(tokenizer.first_seconds(tokenizer.encode_notes(figures(3, 4)), 2.3))


@pytest.mark.slow
@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_pitches_and_velocities_stay_in_range(name, prompted):
    processors = [PitchRange(50, 70), PitchClasses([0, 2, 4, 5, 7]), VelocityRange(50, 80)]
    prompt = prompt_of(name) if prompted else None
    notes = music_of(name, play(name, *processors, limits=Limits(tokens=60), prompt=prompt), prompt)
    assert set(together(notes, "pitch").tolist()) <= {p for p in range(50, 71) if p % 12 in (0, 2, 4, 5, 7)}
    velocities = together(notes, "velocity")
    assert 50 <= velocities.min() <= velocities.max() <= 80
    assert len(velocities) > 3 * LANES


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED)
def test_polyphony_is_limited(name):
    for keys in (1, 3):
        notes = music_of(name, play(name, MaxPolyphony(keys)))
        assert max(map(most_at_once, notes)) == keys
    free = music_of(name, play(name))
    assert max(map(most_at_once, free)) > 4


UNKNOWN = {
    **dict.fromkeys(("PerTok", "REMI programs", "REMI bpe"), "MaxPolyphony"),
    **dict.fromkeys(("REMI", "TSD", "Structured", "aria"), ""),
    **dict.fromkeys(("TSD rests",), "MaxPolyphony MaxNoteSeconds MaxSilenceSeconds EndWithin Tempo Density"),
    "BEAT": "PitchRange PitchClasses MaxPolyphony MaxNoteSeconds MaxSilenceSeconds PitchChoice Density",
}


@pytest.mark.parametrize("name", COUNTED)
def test_constraints_may_be_kept_by_a_prompt_that_breaks_them(name):
    """Notes that sound at its end, a long silence or soft notes do not make keys impossible for ever."""
    tokenizer, walk = vocabulary(name), walk_of(name)
    chord = Notes(np.zeros(5), np.full(5, 1.5), [48, 52, 55, 60, 64], np.full(5, 20))
    constraints = [MaxPolyphony(1), MaxNoteSeconds(0.5), MaxSilenceSeconds(0.2), VelocityRange(90, 127)]
    for some in (*([constraint] for constraint in constraints), constraints):
        Sampler(walk, Sampling(), some).begin(tokenizer.encode_notes(chord).astype(np.int64)[:-1])


def test_no_pause_ends_where_only_a_key_too_many_could_follow():
    """In Structured a key follows each pause: one that is allowed has to be there whatever else is forbidden."""
    tokenizer, walk = vocabulary("Structured"), walk_of("Structured")
    ids = tokenizer.encode_notes(Notes([0.0], [0.5], [60], [80])).astype(np.int64)[1:-1]
    music, limit = walk.begin(ids), MaxPolyphony(1)
    may = walk.allowed(music, walk.bounds(Limits(), music))
    left = np.array(limit(mx.where(may, 0.0, -mx.inf), music, limit.begin(walk.tables, ids)))[0] > -np.inf
    seconds = np.array(walk.ticks_taken(music))[0] * walk.grammar.seconds_per_tick
    pauses = np.array(may)[0] & (seconds > 0)
    assert set(left[pauses & (seconds < 0.499)]) == {False}
    assert set(left[pauses & (seconds > 0.501)]) == {True}


@pytest.mark.parametrize("name", UNKNOWN)
def test_steering_needs_the_events_in_the_vocabulary(name):
    """The message names the processor and what is missing; all others work."""
    walk = walk_of(name)
    for processor in EVERY_KIND:
        kind = type(processor).__name__
        sampler = Sampler(walk, Sampling(), [processor])
        if kind in UNKNOWN[name].split():
            known = "(releases|duration|pitches)"
            with pytest.raises(UserError, match=f"{kind}: the tokens of this vocabulary have no known {known}"):
                sampler.begin(np.array([walk.tokenizer.bos_id]))
        else:
            sampler.begin(np.array([walk.tokenizer.bos_id]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_note_length_is_limited(name):
    for seconds in (0.1, 0.5):
        notes = music_of(name, play(name, MaxNoteSeconds(seconds)))
        lengths = together(notes, "offset") - together(notes, "onset")
        assert lengths.max() <= seconds + 1e-6
        assert len(lengths) > 4 * LANES


def clock(name: str, ids: np.ndarray) -> float:
    """The seconds since the beginning, also if the music begins later."""
    grammar = walk_of(name).grammar
    elapsed = grammar.elapsed(vocabulary(name).to_events(ids))
    return float(elapsed[-1]) * grammar.seconds_per_tick if len(elapsed) else 0.0


def longest_silence(name: str, lane: np.ndarray, prompt: np.ndarray, counted: float = 0.0) -> float:
    """The longest silence after the prompt in seconds; of one in the prompt only its last `counted` seconds count."""
    walk, tokenizer = walk_of(name), vocabulary(name)
    lane, begun = lane[~np.isin(lane, walk.ending)], clock(name, prompt)
    notes, end = tokenizer.decode(np.concatenate([prompt, lane])), clock(name, np.concatenate([prompt, lane]))
    begins = np.append(notes.onset, end)
    last = np.maximum.accumulate(np.append(0.0, notes.offset))
    new = begins >= begun - 1e-6
    return (begins[new] - np.maximum(last[new], begun - counted)).max()


@pytest.mark.slow
@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_silence_is_limited(name, prompted, monkeypatch):
    """Even if pauses and releases are strongly preferred."""
    t = walk_of(name).tables
    values = 6.0 * t.takes_time + 9.0 * t.released.any(axis=1) - 3.0 * t.notes
    monkeypatch.setitem(globals(), "preferences", lambda _: values)
    prompt = prompt_of(name) if prompted else np.array([vocabulary(name).bos_id])
    for seconds in (0.3, 0.8):
        lanes = play(name, MaxSilenceSeconds(seconds), limits=Limits(tokens=60), prompt=prompt)
        longest = max(longest_silence(name, lane, prompt, seconds) for lane in lanes)
        assert 0.85 * seconds <= longest <= seconds + 1e-6
        assert min(walk_of(name).tables.notes[lane].sum() for lane in lanes) > 0
    monkeypatch.setitem(globals(), "finish", lambda walk, lane: lane[~np.isin(lane, walk.ending)])
    assert max(longest_silence(name, lane, prompt) for lane in play(name, prompt=prompt)) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_piece_ends_within_the_span(name, seed):
    """By the clock and in silence: the last note has ended too."""
    start, within = 1.0, 1.5
    walk, limits = (
        walk_of(name),
        Limits(ticks=round((start + within) / walk_of(name).grammar.seconds_per_tick), may_end=True),
    )
    prompt = prompt_of(name) if seed else None
    lanes = play(name, EndWithin(start, within), limits=limits, prompt=prompt, seed=seed)
    begun = 0.0 if prompt is None else clock(name, prompt)
    for lane, notes in zip(lanes, music_of(name, lanes, prompt), strict=True):
        whole = lane if prompt is None else np.concatenate([prompt, lane])
        assert start - 1e-6 <= clock(name, whole) - begun <= start + within + 1e-6
        assert notes.offset.max(initial=0) <= start + within + 1e-6
        assert lane[-1] == walk.ending[0]


def notes_per_second(name: str, *processors) -> float:
    lanes = play(name, *processors)
    return sum(walk_of(name).tables.notes[lane].sum() for lane in lanes) / sum(
        map(walk_of(name).tokenizer.seconds, lanes)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_biases_shift_the_music(name):
    slow, fast = (notes_per_second(name, Tempo(bias)) for bias in (1.5, -1.5))
    assert slow < 0.8 * fast
    sparse, dense = (notes_per_second(name, Density(n, seconds=0.5)) for n in (1.0, 20.0))
    assert sparse < 0.6 * dense
    soft, loud = (together(music_of(name, play(name, Dynamics(bias))), "velocity").mean() for bias in (-4.0, 4.0))
    assert soft < loud - 10


def circle(name: str) -> np.ndarray:
    """Logits `(V,)` that prefer, in this order: releasing a key, pressing it, a pause, a velocity."""
    g, t = walk_of(name).grammar, walk_of(name).tables
    events = [g.release == 60, g.press == 60, g.ticks == 10, g.position >= 50, g.velocity == 20, g.duration == 10]
    single = (t.events >= 0).sum(axis=1) == 1
    ranks = [np.flatnonzero(single & t.contains(which))[:1] for which in events]
    logits = 0.5 * begins_note(t)
    for rank, ids in enumerate(ranks):
        logits[ids] = 10 - rank
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_penalty_breaks_loops(name, monkeypatch):
    """Taking the most likely id repeats itself; the penalty ends that."""
    monkeypatch.setitem(globals(), "preferences", circle)
    copies = []
    for processors in ([], [LoopPenalty(4.0)]):
        (lane, *_) = play(name, *processors, how=Sampling(temperature=0))
        loop = worst_loop(lane, walk_of(name).tables.notes)
        copies.append(loop.copies if loop else 1)
    assert copies[0] >= 6
    assert copies[1] <= copies[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["performance bpe", "MIDILike unigram", "REMI bpe", "REMI", "aria"])
@pytest.mark.parametrize("seed", range(3))
def test_constraints_hold_together_and_leave_an_id(name, seed, monkeypatch):
    """With any preference for ids of many events that press, wait and release: no constraint is skipped."""
    rng, usual = np.random.default_rng(seed), preferences(name)
    own = usual + rng.normal(0, 1.5, len(usual)) + 3.0 * (rng.random(len(usual)) < 0.05)
    set_aside = []

    def with_fallback(logits, fallback):
        set_aside.append((~(logits > -mx.inf).any(axis=-1)).sum())
        return original(logits, fallback)

    def judged(logits, verdicts):
        left = originally_judged(logits, verdicts)
        set_aside.extend(((left > -mx.inf) & ~verdict.fits).sum() for verdict in verdicts)
        return left

    original, originally_judged = sampling.with_fallback, sampling.judged
    monkeypatch.setattr(sampling, "with_fallback", with_fallback)
    monkeypatch.setattr(sampling, "judged", judged)
    monkeypatch.setitem(globals(), "preferences", lambda _: own)
    longest, keys, span = rng.choice([0.03, 0.2, 0.6]), int(rng.integers(1, 4)), (0.5, 1.0)
    processors = [MaxNoteSeconds(longest), PitchRange(52, 70), EndWithin(*span), VelocityRange(50, 80)]
    processors += [MaxSilenceSeconds(float(rng.choice([0.1, 0.4])))]
    processors += [MaxPolyphony(keys)] if name in COUNTED else []
    limits = Limits(ticks=round(sum(span) / walk_of(name).grammar.seconds_per_tick), may_end=True)
    for notes in music_of(name, play(name, *processors, limits=limits, seed=seed)):
        if len(notes):
            assert notes.pitch.min() >= 52
            assert notes.pitch.max() <= 70
            assert (notes.offset - notes.onset).max() <= longest + 1e-6
            assert notes.offset.max() <= sum(span) + 1e-6
            assert most_at_once(notes) <= keys or name not in COUNTED
    assert mx.stack(set_aside).sum().item() == 0
