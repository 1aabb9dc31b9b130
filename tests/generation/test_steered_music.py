"""What processors guarantee, for random walks and for music of models."""

import os
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support.performance_reference import first_violation
from support.random_lanes import EVERY_KIND, LANES, PRESSES, TOKENIZER, VELOCITIES, Lanes, ReferenceLane, some_prefixes
from support.stand_ins import constant_model

from dsmr_mlx import generate
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.generate import generate_variations
from dsmr_mlx.generation.grammar import GrammarWalk, Limits
from dsmr_mlx.generation.sampling import Sampler, Sampling
from dsmr_mlx.generation.steering import (
    EndWithin,
    LoopPenalty,
    MaxNoteSeconds,
    MaxPolyphony,
    MaxSilenceSeconds,
    PitchClasses,
    PitchRange,
    VelocityRange,
)
from dsmr_mlx.music.loops import worst_loop
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.performance import (
    BOS,
    EOS,
    NOTE_OFF,
    NOTE_ON,
    TIME_SHIFT,
    VELOCITY,
    VOCAB_SIZE,
    encode_notes,
    performance_grammar,
)

G = performance_grammar()


# Invariants under any constraints.

some_constraints = st.tuples(
    st.none() | st.builds(lambda low, more: PitchRange(low, low + more), st.integers(20, 100), st.integers(11, 27)),
    st.none() | st.builds(PitchClasses, st.lists(st.integers(0, 11), min_size=1, max_size=4)),
    st.none() | st.builds(MaxPolyphony, st.integers(1, 4)),
    st.none() | st.builds(lambda low, more: VelocityRange(low, low + more), st.integers(1, 100), st.integers(3, 27)),
    st.none() | st.builds(MaxNoteSeconds, st.sampled_from([0.01, 0.1, 0.5, 2.5]), st.sampled_from([0, 5])),
    st.none() | st.builds(MaxSilenceSeconds, st.sampled_from([0.01, 0.3, 1.5])),
    st.none() | st.builds(EndWithin, st.sampled_from([0, 0.2]), st.sampled_from([0.01, 0.5]), st.booleans()),
).map(lambda some: [c for c in some if c is not None])


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(some_constraints.filter(len).flatmap(st.permutations), st.integers(0, 1000), st.sampled_from([0.0, 30.0]))
def test_constraints_hold_and_leave_an_id(constraints, seed, strength):
    lanes = Lanes(constraints, Limits(tokens=10_000, may_end=True), seed)
    lanes.preferences[:, np.random.default_rng(seed).integers(NOTE_ON, VOCAB_SIZE, 40)] += strength
    for _ in range(40):
        _, left = lanes.look()
        assert (left > -np.inf).any(axis=1).all()
        before = [replace(reference, held=dict(reference.held)) for reference in lanes.references]
        tokens = lanes.step(left)
        for reference, token, ended in zip(before, tokens, lanes.ended, strict=True):
            if not ended:
                assert [c for c in constraints if not kept(c, reference, int(token))] == []


def kept(constraint, reference: ReferenceLane, token: int) -> bool:
    """Whether a token satisfies a constraint, from the music before it, independently of the mask."""
    held, velocity, now = reference.held, reference.velocity, reference.clock + int(G.ticks[token])
    presses = token in PRESSES
    match constraint:
        case PitchRange(low, high):
            return not presses or low <= token - NOTE_ON <= high
        case PitchClasses(allowed):
            return not presses or (token - NOTE_ON) % 12 in allowed
        case MaxPolyphony(keys):
            return not presses or len(held) < keys
        case VelocityRange(low, high):
            return not presses or (velocity is not None and low <= velocity <= high)
        case MaxNoteSeconds(seconds, _):
            return all(now - tick <= round(100 * seconds) for tick in held.values())
        case MaxSilenceSeconds(seconds):
            return bool(held) or now - reference.sounded <= max(round(100 * seconds), 1)
        case EndWithin(start, within, _):
            return now <= round(100 * (start + within))
    raise AssertionError(constraint)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(some_constraints.filter(len), st.integers(0, 1000))
def test_after_any_prompt_an_id_is_left_and_range_and_polyphony_hold(constraints, seed):
    lanes = Lanes(constraints, Limits(tokens=20, may_end=True), seed, some_prefixes(seed))
    walked = [len(reference.ids) for reference in lanes.references]
    for _ in range(30):
        _, left = lanes.look()
        assert (left > -np.inf).any(axis=1).all()
        held = [len(reference.held) for reference in lanes.references]
        tokens = lanes.step(left)
        for n, token, reference, first in zip(held, tokens, lanes.references, walked, strict=True):
            due = len(reference.ids) == first + 1 and VELOCITIES & set(reference.ids[first - 1 : first])
            if token in PRESSES and not due:  # after a prompt that ends with a velocity any possible key may follow
                for c in constraints:
                    assert not isinstance(c, MaxPolyphony) or n < c.keys
                    assert not isinstance(c, PitchRange) or c.low <= token - NOTE_ON <= c.high


def test_a_key_outside_the_range_can_be_released():
    prefix = [BOS, VELOCITY + 9, NOTE_ON + 100, NOTE_ON + 20, TIME_SHIFT + 9]
    lanes = Lanes([PitchRange(60, 72), MaxPolyphony(1)], prefixes=[prefix])
    _, left = lanes.look()
    assert set(np.flatnonzero(left[0] > -np.inf)) == {NOTE_OFF + 100, NOTE_OFF + 20}


def test_no_velocity_leads_to_a_dead_end():
    """Together the constraints leave only key 61; while it is down, nothing could follow a velocity."""
    processors = [PitchRange(60, 64), PitchClasses([1, 6])]
    prefix = [BOS, VELOCITY + 9, NOTE_ON + 61, TIME_SHIFT + 9]
    _, left = Lanes(processors, prefixes=[prefix]).look()
    assert set(np.flatnonzero(left[0] > -np.inf)) == {NOTE_OFF + 61}
    _, left = Lanes(processors, prefixes=[[*prefix, NOTE_OFF + 61]]).look()
    possible = set(np.flatnonzero(left[0] > -np.inf))
    assert possible & PRESSES == {NOTE_ON + 61}
    assert possible & VELOCITIES


def test_constraints_that_leave_no_key_are_refused():
    with pytest.raises(UserError, match="`processors`: PitchRange, PitchClasses together forbid every key"):
        Lanes([PitchRange(60, 61), PitchClasses([5])])


# Endings.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "within", "preferred"),
    [(0, 0.5, "no"), (0.5, 1.5, "no"), (0.3, 0.6, "on"), (0.3, 0.6, "velocity"), (0.5, 1.5, "shift")],
)
def test_the_piece_ends_in_time_and_in_silence(start, within, preferred):
    limits = Limits(ticks=round(100 * (start + within)), may_end=True)
    lanes = Lanes([EndWithin(start, within)], limits, seed=11, prefixes=some_prefixes(12))
    lanes.preferences[:, TIME_SHIFT + 2 : VELOCITY] = 0
    kind = {"on": (NOTE_ON, NOTE_OFF), "shift": (TIME_SHIFT, VELOCITY), "velocity": (VELOCITY, VOCAB_SIZE)}
    if preferred != "no":
        lanes.preferences[:, slice(*kind[preferred])] += 20
    for _ in range(3000):
        if lanes.ended.all():
            break
        lanes.step(lanes.look()[1])
    assert lanes.ended.all()
    for reference in lanes.references:
        assert round(100 * start) <= reference.clock <= round(100 * (start + within))
        assert not reference.held
        assert reference.ids[-1] == EOS
        assert first_violation([i for i in reference.ids if i != EOS], complete=False) is None
        closing = start + 0.75 * within
        assert max(reference.presses, default=0) / 100 < closing


def chance(logits: np.ndarray, token: int) -> float:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights[token] / weights.sum()


SILENT = [BOS, VELOCITY + 9, NOTE_ON + 60, TIME_SHIFT + 9, NOTE_OFF + 60]


@pytest.mark.parametrize(("clock", "longest"), [(0, 100), (100, 74), (169, 5), (173, 1), (174, 0)])
def test_no_pause_reaches_the_last_quarter_in_silence(clock, longest):
    """There no note begins, and no end may follow a pause, so nothing could."""
    lanes = Lanes([EndWithin(1.0, 1.0)], Limits(ticks=200, may_end=True), prefixes=[SILENT])
    lanes.music = lanes.music._replace(ticks=lanes.music.prompt_ticks + clock)
    possible = np.flatnonzero(lanes.look()[1][0] > -np.inf)
    assert [int(G.ticks[i]) for i in possible if G.ticks[i]] == list(range(1, longest + 1))
    assert (EOS in possible) == (clock >= 100)
    assert PRESSES & set(possible.tolist())


def test_silence_in_the_last_quarter_ends_the_piece():
    lanes = Lanes([EndWithin(1.0, 1.0)], Limits(ticks=200, may_end=True), prefixes=[SILENT])
    lanes.music = lanes.music._replace(ticks=lanes.music.prompt_ticks + 175)
    assert np.flatnonzero(lanes.look()[1][0] > -np.inf).tolist() == [EOS]


def test_an_ending_gets_more_likely_with_time():
    chances = []
    for clock in (0, 99, 100, 130, 160, 174):
        lanes = Lanes([EndWithin(1.0, 1.0)], Limits(ticks=200, may_end=True), prefixes=[SILENT])
        lanes.music = lanes.music._replace(ticks=lanes.music.prompt_ticks + clock)
        lanes.preferences[:] = 0
        chances.append(chance(lanes.look()[1][0], EOS))
    assert chances[:2] == [0, 0]
    assert chances[2] < chances[3] < chances[4] < chances[5]
    assert chances[5] > 0.9


# From end to end.


def test_a_steered_step_can_be_compiled():
    """Traced, not run: no value is read by the host, and no shape changes."""
    walk = GrammarWalk(TOKENIZER)
    sampler = Sampler(walk, Sampling(temperature=((0, 1.0), (9, 0.5)), top_p=0.9), EVERY_KIND)
    lanes = Lanes(EVERY_KIND)

    def step(logits, music, state, keys, bounds):
        token = sampler.sample(mx.where(walk.allowed(music, bounds), logits, -mx.inf), music, state, keys)
        music = walk.advance(music, token)
        return token, music, sampler.advance(state, token, music)

    mx.enable_compile()
    try:
        token, music, state = mx.compile(step)(
            mx.zeros((LANES, VOCAB_SIZE)), lanes.music, lanes.state, mx.zeros((LANES, 2), mx.uint32), lanes.bounds
        )
    finally:
        restore_compile()
    assert token.shape == (LANES,)
    described = [(a.shape, a.dtype) for _, a in tree_flatten((lanes.music, lanes.state))]
    assert [(a.shape, a.dtype) for _, a in tree_flatten((music, state))] == described


def restore_compile() -> None:
    if os.environ.get("MLX_DISABLE_COMPILE"):
        mx.disable_compile()


def prompt_notes() -> Notes:
    rng = np.random.default_rng(0)
    onset = np.cumsum(rng.integers(1, 40, 40)) / 100
    return Notes.sorted(
        onset, onset + rng.integers(5, 90, 40) / 100, rng.integers(30, 100, 40), rng.integers(1, 128, 40)
    )


def most_at_once(notes: Notes) -> int:
    events = sorted([(round(t * 100), 1) for t in notes.onset] + [(round(t * 100), -1) for t in notes.offset])
    return int(np.cumsum([change for _, change in events]).max())


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [None, prompt_notes()], ids=["nothing", "prompt"])
def test_guarantees_hold_for_the_notes(model, prompt):
    pitches = [PitchRange(48, 71), PitchClasses.key("D minor")]
    processors = [*pitches, VelocityRange(40, 80), MaxNoteSeconds(0.8), MaxPolyphony(4)]
    options = {"prompt": prompt, "tokens": 70, "processors": processors}
    for variation in generate_variations(model, TOKENIZER, 3, **options).variations:
        notes = variation.notes
        assert len(notes) > 10
        assert notes.pitch.min() >= 48
        assert notes.pitch.max() <= 71
        assert set((notes.pitch % 12).tolist()) <= {2, 4, 5, 7, 9, 10, 0}
        assert 40 <= notes.velocity.min() <= notes.velocity.max() <= 80
        assert (notes.offset - notes.onset).max() <= 0.8 + 1e-9
        assert most_at_once(notes) <= 4
        whole = np.concatenate([TOKENIZER.prompt(encode_notes(prompt) if prompt else np.empty(0, int)), variation.ids])
        assert first_violation(whole) is None


@pytest.mark.slow
def test_a_model_that_never_releases_is_steered():
    """It always prefers to press keys and to hold them."""
    preferences = np.zeros(VOCAB_SIZE, np.float32)
    preferences[NOTE_ON:NOTE_OFF], preferences[TIME_SHIFT : TIME_SHIFT + 30] = 30, 25
    model = constant_model(preferences)
    processors = [MaxPolyphony(3), MaxNoteSeconds(0.5), EndWithin(2, 2)]
    options = {"seconds": 4.0, "may_end": True, "processors": processors}
    for variation in generate_variations(model, TOKENIZER, 2, **options).variations:
        assert most_at_once(variation.notes) == 3
        assert (variation.notes.offset - variation.notes.onset).max() <= 0.5 + 1e-9
        assert 2 <= variation.notes.offset.max() <= 4


def test_a_model_that_prefers_silence_presses_a_key_in_time():
    """After a prompt that ends with 1 s of silence, and from then on; nothing else changes."""
    preferences = np.zeros(VOCAB_SIZE, np.float32)
    preferences[NOTE_OFF:TIME_SHIFT], preferences[TIME_SHIFT + 99] = 40, 30
    prompt = encode_notes(Notes.sorted(np.array([0.0]), np.array([0.5]), np.array([60]), np.array([64])))
    prompt = np.concatenate([TOKENIZER.prompt(prompt), [TIME_SHIFT + 99]])
    options = {"prompt": prompt, "seconds": 20.0, "processors": [MaxSilenceSeconds(2.0)]}
    (variation,) = generate_variations(constant_model(preferences), TOKENIZER, **options).variations
    notes = TOKENIZER.decode(np.concatenate([prompt, variation.ids]))
    assert notes.onset[:2].tolist() == [0.0, 2.5], "1 s more of silence"
    assert len(notes) == 8
    np.testing.assert_allclose(notes.onset[1:] - notes.offset[:-1], 2.0)


@pytest.mark.slow
def test_the_penalty_breaks_a_loop():
    """A greedy model without memory repeats itself; the penalty breaks the cycle."""
    preferences = np.zeros(VOCAB_SIZE, np.float32)
    for rank, i in enumerate([NOTE_OFF + 60, NOTE_ON + 60, TIME_SHIFT + 9, VELOCITY + 9, NOTE_ON + 62]):
        preferences[i] = 9 - rank / 2
    options = {"tokens": 80, "sampling": Sampling(temperature=0)}
    model = constant_model(preferences)
    ids = list(generate(model, TOKENIZER, **options))
    assert worst_loop(np.array(ids), G.press).copies > 20
    broken = list(generate(model, TOKENIZER, **options, processors=[LoopPenalty(1.0)]))
    assert worst_loop(np.array(broken), G.press).copies < 12


@pytest.mark.slow
def test_a_function_is_a_processor(model):
    def white_keys(logits, music):
        return mx.where(
            mx.array([i in PRESSES and (i - NOTE_ON) % 12 in (1, 3, 6, 8, 10) for i in range(VOCAB_SIZE)]), -30, logits
        )

    (variation,) = generate_variations(model, TOKENIZER, tokens=50, processors=[white_keys]).variations
    assert set((variation.notes.pitch % 12).tolist()) <= {0, 2, 4, 5, 7, 9, 11}


@pytest.mark.slow
def test_the_same_settings_give_the_same_music(model):
    options = {"tokens": 30, "seed": 4, "prompt": prompt_notes()}
    free = list(generate(model, TOKENIZER, **options))
    assert list(generate(model, TOKENIZER, **options, processors=[])) == free
    steered = [list(generate(model, TOKENIZER, **options, processors=EVERY_KIND[:5])) for _ in range(2)]
    assert steered[0] == steered[1] != free
