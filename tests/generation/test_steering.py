"""Each processor against a slow reference in plain Python; settings and names."""

import json
import math
import re
from dataclasses import fields

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support.random_lanes import (
    EVERY_KIND,
    PRESSES,
    TOKENIZER,
    VELOCITIES,
    Lanes,
    ReferenceLane,
    side_by_side,
    some_prefixes,
)
from support.stand_ins import PlainTokenizer

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.grammar import GrammarWalk
from dsmr_mlx.generation.steering import (
    KINDS,
    Density,
    Dynamics,
    EndWithin,
    LoopPenalty,
    MaxNoteSeconds,
    MaxPolyphony,
    MaxSilenceSeconds,
    PitchChoice,
    PitchClasses,
    PitchRange,
    Tempo,
    VelocityRange,
    from_dicts,
    to_dicts,
)
from dsmr_mlx.generation.steering.pitches import MODES, pitch_class, pitch_classes, pitch_classes_of_key, pitch_range
from dsmr_mlx.tokenizers.performance import (
    BOS,
    NOTE_OFF,
    NOTE_ON,
    TIME_SHIFT,
    VELOCITY,
    VOCAB_SIZE,
    performance_grammar,
)
from dsmr_mlx.tokenizers.token_tables import NEVER, token_tables

G = performance_grammar()
TABLES = token_tables(TOKENIZER)
SHIFTS = set(range(TIME_SHIFT, VELOCITY))


# What each constraint forbids, as its docstring says.


def forbidden_by(processor, reference: ReferenceLane, possible: set[int]) -> set[int]:
    presses = PRESSES & possible
    match processor:
        case PitchRange(low, high):
            return {i for i in presses if not low <= i - NOTE_ON <= high}
        case PitchClasses(allowed):
            return {i for i in presses if (i - NOTE_ON) % 12 not in allowed}
        case MaxPolyphony(keys):
            return presses if len(reference.held) >= keys else set()
        case VelocityRange(low, high):
            wrong = {i for i in possible & VELOCITIES if not low <= 4 * (i - VELOCITY) + 2 <= high}
            fits = reference.velocity is not None and low <= reference.velocity <= high
            return wrong if fits or not (possible & VELOCITIES) - wrong else wrong | presses
        case MaxNoteSeconds(seconds, _):
            return forbidden_by_length(round(100 * seconds), reference, possible)
        case MaxSilenceSeconds(seconds):
            left = round(100 * seconds) - (reference.clock - reference.sounded)
            return set() if reference.held else {i for i in SHIFTS & possible if i - TIME_SHIFT + 1 > left}
    raise AssertionError(processor)


def forbidden_by_length(limit: int, reference: ReferenceLane, possible: set[int]) -> set[int]:
    ages = {pitch: reference.clock - tick for pitch, tick in reference.held.items()}
    due = {NOTE_OFF + pitch for pitch, age in ages.items() if age >= limit}
    if due & possible:
        return possible - due
    longest = max(limit - max(ages.values(), default=-NEVER), 1)
    too_long = {i for i in possible if TIME_SHIFT <= i < VELOCITY and i - TIME_SHIFT + 1 > longest}
    return too_long | (possible & PRESSES if due else set())


CONSTRAINTS = [
    PitchRange(50, 61),
    PitchClasses([1, 6, 8]),
    MaxPolyphony(2),
    VelocityRange(30, 60),
    MaxNoteSeconds(0.3),
    MaxNoteSeconds(1.2, nudge=0),
    MaxSilenceSeconds(0.05),
    MaxSilenceSeconds(1.2),
]


@pytest.mark.slow
@pytest.mark.parametrize("prefixed", [False, True], ids=["beginning", "prompt"])
@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: type(c).__name__)
def test_a_constraint_equals_its_reference(constraint, prefixed):
    lanes = Lanes([constraint], seed=1, prefixes=some_prefixes(3) if prefixed else None)
    for _ in range(70):
        possible, left = lanes.look()
        direct = np.array(constraint(mx.array(possible), lanes.music, lanes.state[0]))
        for row, after, reference in zip(possible, direct, lanes.references, strict=True):
            allowed = set(np.flatnonzero(row > -np.inf).tolist())
            expected = allowed - forbidden_by(constraint, reference, allowed)
            skipped = not expected and hasattr(constraint, "judge")  # a verdict that leaves nothing
            assert set(np.flatnonzero(after > -np.inf).tolist()) == (allowed if skipped else expected)
        lanes.step(left)


@pytest.mark.slow
def test_releases_gain_nats_from_half_of_the_limit():
    limit, nudge = 80, 4.0
    lanes = Lanes([MaxNoteSeconds(limit / 100, nudge)], seed=2, prefixes=some_prefixes(4))
    seen = set()
    for _ in range(50):
        possible, left = lanes.look()
        for row, after, reference in zip(possible, left, lanes.references, strict=True):
            for i in np.flatnonzero((after > -np.inf) & (G.ticks == 0)):
                pitch = i - NOTE_OFF
                gain = 0.0
                if 0 <= pitch < 128:
                    age = reference.clock - reference.held[pitch]
                    gain = nudge * min(max((age - limit / 2) / (limit / 2), 0), 1)
                    seen.add(round(gain, 2))
                assert after[i] - row[i] == pytest.approx(gain, abs=1e-4)
        lanes.step(left)
    assert len(seen) > 10


@pytest.mark.parametrize("kind", [MaxNoteSeconds, MaxSilenceSeconds])
@pytest.mark.parametrize(
    ("seconds", "ticks"), [(0.015, 1), (0.019999, 1), (0.02, 2), (0.29, 29), (0.999, 99), (1.1, 110), (0.001, 1)]
)
def test_a_limit_between_two_ticks_is_rounded_down(kind, seconds, ticks):
    """But to at least one tick."""
    tables = GrammarWalk(TOKENIZER).tables
    assert tables.grammar.seconds_per_tick == 0.01
    assert kind(seconds).begin(tables, np.array([BOS])).limit.item() == ticks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("constraint", "releases", "often"),
    [(MaxNoteSeconds(0.6, nudge=0), 0, 100), (MaxSilenceSeconds(0.3), 8, 30)],
    ids=["note", "silence"],
)
def test_cutting_pauses_keeps_their_probability(constraint, releases, often):
    """If pauses remain, their total probability is unchanged: the longest gets that of the forbidden ones."""
    lanes = Lanes([constraint], seed=7, prefixes=some_prefixes(5))
    lanes.preferences[:, NOTE_OFF:TIME_SHIFT] += releases
    cut = 0
    for _ in range(80):
        possible, left = lanes.look()
        for row, after in zip(possible, left, strict=True):
            forbidden, remaining = (row > -np.inf) & (after == -np.inf), (after > -np.inf) & (G.ticks > 0)
            expected = np.where(after > -np.inf, np.exp(row.astype(np.float64)), 0)
            if remaining.any():
                expected[G.ticks * remaining == (G.ticks * remaining).max()] += np.exp(
                    row[forbidden & (G.ticks > 0)]
                ).sum()
                cut += (forbidden & (G.ticks > 0)).any()
            np.testing.assert_allclose(np.exp(after), expected, 1e-4, 1e-7)
        lanes.step(left)
    assert cut > often


# Biases, in float64.


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("processor", "group", "weight"),
    [
        (Tempo(1.5), range(TIME_SHIFT, VELOCITY), lambda i: (i - TIME_SHIFT + 1) ** 1.5),
        (Tempo(-2), range(TIME_SHIFT, VELOCITY), lambda i: float(i - TIME_SHIFT + 1) ** -2),
        (Dynamics(5), range(VELOCITY, VOCAB_SIZE), lambda i: math.exp(5 * (4 * (i - VELOCITY) + 2) / 128)),
    ],
)
def test_a_tilt_multiplies_probabilities_within_its_group(processor, group, weight):
    lanes = Lanes([processor], seed=5)
    weights = np.array([weight(i) if i in group else 1.0 for i in range(VOCAB_SIZE)])
    inside = np.isin(np.arange(VOCAB_SIZE), list(group))
    for _ in range(40):
        possible, left = lanes.look()
        for row, after in zip(possible, left, strict=True):
            p = softmax(row)
            expected = p * weights
            total = p[inside].sum()
            expected[inside] *= total / expected[inside].sum() if total else 0
            np.testing.assert_allclose(softmax(after), expected, atol=1e-5)
            assert np.array_equal(after[~inside], row[~inside])
        lanes.step(left)


def test_density_follows_the_recent_notes():
    wanted, window, strength = 6.0, 1.5, 1.25
    lanes = Lanes([Density(wanted, window, strength)], seed=6, prefixes=some_prefixes(8))
    begins = np.array([i in PRESSES or i in VELOCITIES for i in range(VOCAB_SIZE)])
    pause = G.ticks > 0
    lengths = [sum(G.ticks[reference.ids]) / 100 for reference in lanes.references]
    errors = set()
    for _ in range(100):
        possible, left = lanes.look()
        for row, after, reference, prompt in zip(possible, left, lanes.references, lengths, strict=True):
            now = reference.clock / 100
            heard = sum(math.exp((tick / 100 - now) / window) for tick in reference.presses) / window
            heard += wanted * math.exp(-(prompt + now) / window)
            error = min(max(math.log(wanted / heard), -math.log(4)), math.log(4))
            errors.add(round(error, 2))
            expected = softmax(row)
            total = expected[pause].sum()
            expected[pause] *= G.ticks[pause].astype(float) ** (-strength * error)
            expected[pause] *= total / expected[pause].sum() if total else 0
            expected[begins] *= math.exp(strength * error)
            np.testing.assert_allclose(softmax(after), expected / expected.sum(), atol=2e-5)
        lanes.step(left)
    assert min(errors) < -0.5
    assert max(errors) > 0.3


@pytest.mark.slow
def test_density_and_tempo_change_the_music():
    def rates(*processors) -> float:
        lanes = Lanes(list(processors), seed=9)
        lanes.preferences[:] = 0
        for _ in range(120):
            lanes.step(lanes.look()[1])
        return np.mean([len(reference.presses) / max(reference.clock, 1) * 100 for reference in lanes.references])

    free = rates()
    assert rates(Density(free / 2)) < 0.75 * free
    assert rates(Density(free * 2)) > 1.4 * free
    assert rates(Tempo(1)) < 0.8 * free
    assert rates(Tempo(-1)) > 1.3 * free


# Loops.

KEYS = [NOTE_ON + 60, NOTE_ON + 64, NOTE_OFF + 60, TIME_SHIFT + 9, VELOCITY - 1]


def slow_penalties(ids: list[int], p: LoopPenalty) -> dict[int, float]:
    """Next id → nats that it loses, by comparing slices of the music."""
    lost = {}
    for c in range(1, p.max_cycle + 1):
        copies = 1
        cycle = ids[len(ids) - c :]
        if len(ids) < c or not PRESSES & set(cycle):
            continue
        while len(ids) >= (copies + 1) * c and ids[len(ids) - (copies + 1) * c : len(ids) - copies * c] == cycle:
            copies += 1
        if copies >= p.copies:
            lost[cycle[0]] = max(lost.get(cycle[0], 0.0), p.penalty * (copies - p.copies + 1))
    return lost


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(KEYS), max_size=5).map(lambda ids: 3 * ids), max_size=5),
    st.integers(0, 20),
    st.builds(LoopPenalty, st.sampled_from([0.5, 2.0]), st.integers(1, 9), st.integers(2, 4)),
)
def test_the_loop_penalty_equals_its_reference(music, prompt, processor):
    ids = [i for part in music for i in part]
    state = processor.begin(TABLES, np.array(ids[:prompt], np.int64))
    music = GrammarWalk(TOKENIZER).begin(np.array([BOS]))
    shapes = [array.shape for _, array in tree_flatten(state)]
    for n in range(len(ids[:prompt]), len(ids) + 1):
        found = np.array(processor(mx.zeros((1, VOCAB_SIZE)), music, state))[0]
        expected = np.zeros(VOCAB_SIZE)
        for i, nats in slow_penalties(ids[:n], processor).items():
            expected[i] = -nats
        np.testing.assert_allclose(found, expected, atol=1e-6)
        if n < len(ids):
            state = processor.advance(state, mx.array([ids[n]]), music)
    assert [array.shape for _, array in tree_flatten(state)] == shapes, "its memory does not grow"


def test_lanes_have_separate_loops():
    processor = LoopPenalty(1.0, max_cycle=4)
    loop, other = [KEYS[0], KEYS[3]] * 3, [KEYS[0], KEYS[3], KEYS[1], KEYS[2]]
    state = side_by_side([processor.begin(TABLES, np.array(ids)) for ids in (other, loop)])
    music = GrammarWalk(TOKENIZER).begin(np.array([BOS])).take([0, 0])
    found = np.array(processor(mx.zeros((2, VOCAB_SIZE)), music, state))
    assert not found[0].any()
    assert np.flatnonzero(found[1]).tolist() == [KEYS[0]]
    assert found[1, KEYS[0]] == -2


def test_without_known_pitches_every_cycle_is_a_loop():
    tables = GrammarWalk(PlainTokenizer()).tables
    processor = LoopPenalty(1.0)
    state = processor.begin(tables, np.array([8, 3, 3, 3]))
    music = GrammarWalk(PlainTokenizer()).begin(np.array([8]))
    assert np.array(processor(mx.zeros((1, 10)), music, state))[0].tolist() == [0, 0, 0, -2, 0, 0, 0, 0, 0, 0]


# Settings, names, files.


def test_settings_survive_json():
    assert {type(p) for p in EVERY_KIND} == set(KINDS.values())
    written = json.loads(json.dumps(to_dicts(EVERY_KIND)))
    assert from_dicts(written) == EVERY_KIND
    assert written[0] == {"kind": "PitchRange", "low": 40, "high": 80}


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_keys_are_refused(kind):
    (processor,) = (p for p in EVERY_KIND if type(p).__name__ == kind)
    with pytest.raises(UserError, match=rf"state.safetensors: {kind}: unknown key volume; known are "):
        from_dicts([processor.to_dict() | {"volume": 11}], "state.safetensors")
    for name in (f.name for f in fields(processor)):
        with pytest.raises(UserError, match=rf"processors: {kind}: {name} = "):
            from_dicts([processor.to_dict() | {name: "much"}])


def test_invalid_descriptions_are_refused():
    with pytest.raises(UserError, match="processors: kind 'Reverb', expected one of PitchRange, "):
        from_dicts([{"kind": "Reverb"}])
    with pytest.raises(UserError, match="processors: kind None, expected one of PitchRange, "):
        from_dicts(["PitchRange"])
    with pytest.raises(UserError, match="processors: expected a list of processors, found dict"):
        from_dicts({"kind": "PitchRange"})
    with pytest.raises(UserError, match="cannot be stored, expected one of PitchRange"):
        to_dicts([lambda logits, music: logits])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PitchRange(-1, 60), "low = -1: expected MIDI pitches 0 ≤ low ≤ high ≤ 127"),
        (lambda: PitchRange(60, 59), "high = 59: expected MIDI pitches 0 ≤ low ≤ high ≤ 127"),
        (lambda: PitchClasses([]), "allowed = []: expected at least one pitch class from 0 (C) to 11 (B)"),
        (lambda: PitchClasses([12]), "allowed = [12]: expected at least one pitch class from 0 (C) to 11 (B)"),
        (lambda: PitchClasses("C"), "allowed = 'C': expected list[int]"),
        (lambda: PitchClasses.without(range(12)), "expected at least one remaining pitch class"),
        (lambda: VelocityRange(0, 60), "low = 0: expected MIDI velocities 1 ≤ low ≤ high ≤ 127"),
        (lambda: VelocityRange(60, 50), "high = 50: expected MIDI velocities 1 ≤ low ≤ high ≤ 127"),
        (lambda: MaxPolyphony(0), "keys = 0: expected at least 1"),
        (lambda: MaxPolyphony(2.5), "keys = 2.5: expected int"),
        (lambda: MaxNoteSeconds(0), "seconds = 0.0: expected more than 0"),
        (lambda: MaxNoteSeconds(1, -1), "nudge = -1.0: expected 0 or more"),
        (lambda: MaxSilenceSeconds(0), "seconds = 0.0: expected more than 0"),
        (lambda: PitchChoice(0), "temperature = 0.0: expected at least 0.01"),
        (lambda: PitchChoice(tonality=math.inf), "tonality = inf: expected a finite number"),
        (lambda: PitchChoice(notes=0), "notes = 0.0: expected at least 1"),
        (lambda: Tempo(math.nan), "bias = nan: expected a finite number"),
        (lambda: Dynamics("loud"), "bias = 'loud': expected float"),
        (lambda: Density(0), "notes_per_second = 0.0: expected more than 0"),
        (lambda: Density(5, seconds=0), "seconds = 0.0: expected at least 0.001"),
        (lambda: Density(5, strength=-1), "strength = -1.0: expected 0 or more"),
        (lambda: LoopPenalty(-1), "penalty = -1.0: expected 0 or more"),
        (lambda: LoopPenalty(max_cycle=0), "max_cycle = 0: expected from 1 to 4096"),
        (lambda: LoopPenalty(copies=1), "copies = 1: expected at least 2"),
        (lambda: EndWithin(-1, 5), "start = -1.0: expected 0 or more"),
        (lambda: EndWithin(1, 0), "within = 0.0: expected more than 0"),
        (lambda: Tempo(1e38), "bias = 1e+38: expected at most 1,000,000, and at least −1,000,000"),
        (lambda: Dynamics(-2e6), "bias = -2000000.0: expected at most 1,000,000, and at least −1,000,000"),
        (lambda: Density(5, strength=1e39), "strength = 1e+39: expected at most 1,000,000"),
        (lambda: Density(5, seconds=1e-9), "seconds = 1e-09: expected at least 0.001"),
        (lambda: LoopPenalty(copies=10**12), "copies = 1000000000000: expected at most 1,000,000"),
        (lambda: EndWithin(1e308, 1), "start = 1e+308: expected at most 1,000,000"),
    ],
)
def test_invalid_settings_are_refused(build, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build()


@pytest.mark.slow
@pytest.mark.parametrize(
    "processor",
    [
        *(Tempo(1e6), Tempo(-1e6), Dynamics(-1e6), Density(1e6, 1e-3, 1e6), Density(1e-6), LoopPenalty(1e6)),
        *(PitchChoice(0.01, 1e6), PitchChoice(1e6, -1e6, 1.0), PitchChoice(0.01, -1e6, 1e6)),
        *(MaxNoteSeconds(1e6, 1e6), MaxNoteSeconds(1e-6), EndWithin(1e6, 1e-6)),
        *(MaxSilenceSeconds(1e6), MaxSilenceSeconds(1e-6)),
    ],
    ids=repr,
)
def test_the_largest_settings_give_finite_logits(processor):
    lanes = Lanes([processor], seed=4, prefixes=some_prefixes(6))
    for _ in range(20):
        _, left = lanes.look()
        assert not np.isnan(left).any()
        assert (left > -np.inf).any(axis=1).all()
        lanes.step(left)


def test_a_velocity_range_between_two_bins_is_refused():
    with pytest.raises(UserError, match="60 to 61 contains none of the vocabulary's velocities: 2, 6, 10, "):
        VelocityRange(60, 61).begin(TABLES, np.array([BOS]))


@pytest.mark.parametrize("processor", EVERY_KIND, ids=lambda p: type(p).__name__)
def test_a_vocabulary_without_the_needed_events_is_refused(processor):
    tables = GrammarWalk(PlainTokenizer()).tables
    if isinstance(processor, LoopPenalty):
        processor.begin(tables, np.array([8]))
        return
    with pytest.raises(UserError, match=rf"{type(processor).__name__}: the tokens of this vocabulary have no known"):
        processor.begin(tables, np.array([8]))


def test_names_of_keys_and_pitches():
    assert pitch_classes_of_key("C major") == pitch_classes_of_key("a minor") == [0, 2, 4, 5, 7, 9, 11]
    assert pitch_classes_of_key("Bb dorian") == pitch_classes_of_key("B♭  Dorian") == pitch_classes_of_key("Ab major")
    assert pitch_classes_of_key("Am") == pitch_classes_of_key("C") == pitch_classes_of_key("C major")
    assert pitch_classes_of_key("f#m") == pitch_classes_of_key("F# minor")
    assert pitch_classes_of_key("F# harmonic minor") == [1, 2, 5, 6, 8, 9, 11]
    assert pitch_classes_of_key("Cb major") == pitch_classes_of_key("B major")
    assert PitchClasses.key("G major").allowed == [0, 2, 4, 6, 7, 9, 11]
    assert PitchClasses.without([1, 3]).allowed == [0, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert all(steps == tuple(sorted(set(steps))) and steps[0] == 0 for steps in MODES.values())
    assert pitch_classes("C, Eb,7,b") == [0, 3, 7, 11]
    assert [pitch_class(name) for name in ("0", "11", "B#", "Fb", "F##")] == [0, 11, 0, 4, 7]
    assert pitch_range("48-84") == pitch_range("C3-C6") == pitch_range(" c3 - B#5 ") == (48, 84)
    assert pitch_range("C-1-G9") == (0, 127)
    for wrong in ("H major", "Hm", "Cmm", "C  majeur", "", "major"):
        with pytest.raises(UserError, match="expected a tonic from A to G and one of major, minor"):
            pitch_classes_of_key(wrong)
    for wrong in ("12", "-1", "H", "", "C4", "1" * 5000):
        with pytest.raises(UserError, match="expected a pitch class, 0 to 11 or a name"):
            pitch_class(wrong)
    for wrong in ("60", "C4", "60-", "high-low", "60-72-84", "60-" + "9" * 5000, "C4-C" + "9" * 5000):
        with pytest.raises(UserError, match="expected two pitches such as 48-84 or C3-C6"):
            pitch_range(wrong)
