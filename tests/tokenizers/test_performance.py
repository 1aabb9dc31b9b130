"""The performance codec against a plain loop, on the grid, in the grammar, and for arbitrary ids."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.performance_reference import first_violation

from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers import performance as p
from dsmr_mlx.tokenizers.performance import decode_ids, encode_notes, performance_grammar, token_names

NAMES = token_names()


def encode_by_loop(notes: Notes) -> list[int]:
    """Return the canonical stream, written one event after another."""
    start = min(notes.onset)
    kept: dict[tuple[int, int], tuple[int, int]] = {}  # (pitch, on) → (off, bin); the greatest is kept
    for on, off, pitch, velocity in zip(notes.onset, notes.offset, notes.pitch, notes.velocity, strict=True):
        key = (int(pitch), round((on - start) * 100))
        kept[key] = max(kept.get(key, (-1, -1)), (round((off - start) * 100), (int(velocity) - 1) // 4))
    events = []
    for (pitch, on), (off, velocity_bin) in kept.items():
        off = max(off, on + 1)
        off = min([off, *(other for key, other in kept if key == pitch and other > on)])
        events += [(on, 1, pitch, velocity_bin), (off, 0, pitch, 0)]
    ids, now, running = [], 0, None
    for time, is_on, pitch, velocity_bin in sorted(events):
        while time - now > 100:
            ids.append(NAMES.index("TIME_SHIFT_100"))
            now += 100
        if time > now:
            ids.append(NAMES.index(f"TIME_SHIFT_{time - now}"))
            now = time
        if is_on and velocity_bin != running:
            ids.append(NAMES.index(f"VELOCITY_{velocity_bin}"))
            running = velocity_bin
        ids.append(NAMES.index(f"NOTE_{'ON' if is_on else 'OFF'}_{pitch}"))
    return ids


def decode_by_loop(ids) -> list[tuple[int, int, int, int]]:
    """Return notes (on, off, pitch, velocity) in ticks, decoded one id after another."""
    now, velocity_bin, showing = 0, p.DEFAULT_BIN, False
    sounding: dict[int, tuple[int, int]] = {}
    done: dict[tuple[int, int], tuple[int, int]] = {}

    def release(pitch: int) -> None:
        on, velocity_bin = sounding.pop(pitch)
        done[on, pitch] = (max(now, on + 1), 4 * velocity_bin + 2)

    for i in ids:
        showing = i == p.FILL or (showing and i != p.PLAY)
        if showing:
            continue
        kind, _, value = NAMES[i].rpartition("_") if 0 <= i < len(NAMES) else ("", "", "")
        if kind == "TIME_SHIFT":
            now += int(value)
        elif kind == "VELOCITY":
            velocity_bin = int(value)
        elif kind == "NOTE_OFF" and int(value) in sounding:
            release(int(value))
        elif kind == "NOTE_ON":
            if int(value) in sounding:
                release(int(value))
            sounding[int(value)] = (now, velocity_bin)
    for pitch in list(sounding):
        release(pitch)
    return [(on, off, pitch, velocity) for (on, pitch), (off, velocity) in sorted(done.items())]


def grid(notes: Notes) -> list[tuple[int, int, int, int]]:
    """Return notes (on, off, pitch, velocity) in ticks, after checking that all times are whole ticks."""
    on, off = np.rint(notes.onset * 100), np.rint(notes.offset * 100)
    assert np.array_equal(on / 100, notes.onset)
    assert np.array_equal(off / 100, notes.offset)
    columns = (on.astype(int), off.astype(int), notes.pitch, notes.velocity)
    return [tuple(map(int, row)) for row in zip(*columns, strict=True)]


def build(events) -> Notes:
    """Return notes from rows (onset, length, pitch, velocity)."""
    return Notes.sorted(*zip(*[(on, on + length, pitch, v) for on, length, pitch, v in events], strict=True))


# few pitches and velocities close in time: many overlaps, doubles and chords
any_notes = st.lists(
    st.tuples(
        st.one_of(st.floats(0, 0.2), st.floats(0, 30)),
        st.one_of(st.just(0.0), st.floats(0, 0.1), st.floats(0, 5)),
        st.one_of(st.integers(60, 62), st.integers(0, 127)),
        st.one_of(st.integers(60, 66), st.integers(1, 127)),
    ),
    min_size=1,
    max_size=40,
).map(build)

any_ids = st.lists(
    st.one_of(st.integers(0, p.VOCAB_SIZE - 1), st.sampled_from([63, 64, 191, 192, 259, 358, 380, p.FILL, p.PLAY]))
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(any_notes)
def test_encoding_equals_the_loop(notes):
    ids = encode_notes(notes)
    assert ids.dtype == np.uint16
    assert ids.tolist() == encode_by_loop(notes)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(any_ids)
def test_decoding_equals_the_loop(ids):
    assert grid(decode_ids(ids)) == decode_by_loop(ids)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(any_notes)
def test_encoded_streams_are_grammatical_and_round_trip_exactly(notes):
    """`recovered` is what decoding would give."""
    ids = encode_notes(notes)
    assert first_violation(ids) is None
    assert first_violation([p.BOS, *ids, p.EOS]) is None
    decoded = decode_ids(ids)
    assert np.array_equal(encode_notes(decoded), ids)
    assert decode_ids(encode_notes(decoded)) == decoded
    recovered = p.PerformanceTokenizer().recovered(notes, np.array([p.BOS, *ids, p.EOS]))
    assert recovered == (notes.count_common(decoded), decoded.duration) == (len(decoded), decoded.duration)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(any_notes)
def test_times_move_by_half_a_tick_and_velocities_by_two(notes):
    decoded = decode_ids(encode_notes(notes))
    start = notes.onset[0]
    for on, off, pitch, velocity in zip(decoded.onset, decoded.offset, decoded.pitch, decoded.velocity, strict=True):
        near = (notes.pitch == pitch) & (np.abs(notes.onset - start - on) <= 0.005 + 1e-9)
        assert near.any()
        assert (np.abs(notes.velocity[near].astype(int) - int(velocity)) <= 2).any()
        exact = np.abs(notes.offset[near] - start - off) <= 0.005 + 1e-9
        shortest = off - on < 0.0101
        pressed_again = np.isclose(decoded.onset[decoded.pitch == pitch], off).any()
        assert exact.any() or shortest or pressed_again
    for on, pitch in zip(notes.onset - start, notes.pitch, strict=True):
        assert (np.abs(decoded.onset[decoded.pitch == pitch] - on) <= 0.005 + 1e-9).any()


def test_a_known_stream():
    notes = build([(0, 0.5, 60, 64), (0, 2.5, 64, 64), (0.5, 2.0, 60, 127)])
    assert [NAMES[i] for i in encode_notes(notes)] == [
        "VELOCITY_15",
        "NOTE_ON_60",
        "NOTE_ON_64",
        "TIME_SHIFT_50",
        "NOTE_OFF_60",
        "VELOCITY_31",
        "NOTE_ON_60",
        "TIME_SHIFT_100",
        "TIME_SHIFT_100",
        "NOTE_OFF_60",
        "NOTE_OFF_64",
    ]


def test_the_vocabulary_is_that_of_the_paper():
    assert len(NAMES) == len(set(NAMES)) == p.VOCAB_SIZE == 393
    assert NAMES[:3] == ("PAD", "BOS", "EOS")
    assert [NAMES[i] for i in (3, 130, 131, 258)] == ["NOTE_ON_0", "NOTE_ON_127", "NOTE_OFF_0", "NOTE_OFF_127"]
    assert [NAMES[i] for i in (259, 358, 359, 390, 391, 392)] == [
        "TIME_SHIFT_1",
        "TIME_SHIFT_100",
        "VELOCITY_0",
        "VELOCITY_31",
        "FILL",
        "PLAY",
    ]
    velocity = np.arange(1, 128)
    bins = p.velocity_bins(velocity)
    assert np.abs(p.bin_velocities(bins).astype(int) - velocity).max() == 2
    assert np.array_equal(p.velocity_bins(p.bin_velocities(np.arange(32))), np.arange(32))


def test_empty_streams():
    assert encode_notes(Notes.empty()).tolist() == []
    assert first_violation([]) is None
    assert len(decode_ids([])) == 0


# Decoding never raises


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(), any_ids.map(lambda ids: ids[0] if ids else 0)), max_size=60))
def test_any_integers_decode(ids):
    known = [i for i in ids if 0 <= i < p.VOCAB_SIZE]
    assert decode_ids(ids) == decode_ids(known)
    first_violation(ids)
    encoded = encode_notes(decode_ids(ids))
    assert first_violation(encoded) is None


def test_any_shape_and_type_decodes():
    ids = np.array([[371, 63, 358], [191, 64, 300]])
    expected = decode_ids(ids.ravel())
    assert len(expected) == 2
    for dtype in (np.uint16, np.int32, np.uint64, np.float32, object):
        assert decode_ids(ids.astype(dtype)) == expected
    assert decode_ids(ids.tolist()) == expected


# What is shown


MUSIC, SHOWN = [380, 63, 258 + 40, 191], [p.FILL, 258 + 90, 370, 70, 258 + 7, p.PLAY]
TOKENIZER = p.PerformanceTokenizer()


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        ([*MUSIC, *SHOWN, *MUSIC], "....======...."),
        ([*SHOWN, *SHOWN], "============"),
        ([63, p.PLAY, 64], ".=."),  # a PLAY without a FILL stands alone
        ([63, p.FILL, 64, p.FILL, 65, p.PLAY, 66], ".=====."),  # the first PLAY ends what is shown
        ([63, p.FILL, 64, 65], ".==="),  # without a PLAY everything is shown
        ([p.BOS, 10**9, p.FILL, -1, p.EOS, p.PLAY, p.EOS], "..====."),
        ([], ""),
    ],
)
def test_what_is_shown(ids, shown):
    """Each value depends only on the ids up to there."""
    assert "".join(np.where(TOKENIZER.shown_mask(ids), "=", ".")) == shown
    for n in range(len(ids)):
        assert TOKENIZER.shown_mask(ids[:n]).tolist() == TOKENIZER.shown_mask(ids)[:n].tolist()


def test_what_is_shown_is_not_part_of_the_music():
    """It moves neither clock nor keys, wherever it stands."""
    music = [p.BOS, *MUSIC, 258 + 12, *MUSIC, p.EOS]
    for place in range(len(music) + 1):
        ids = np.array([*music[:place], *SHOWN, *music[place:]])
        assert TOKENIZER.without_shown(ids).tolist() == music
        assert decode_ids(ids) == decode_ids(music)
        assert TOKENIZER.recovered(decode_ids(music), ids) == (2, TOKENIZER.decode(music).duration)
        assert TOKENIZER.seconds(ids) == TOKENIZER.seconds(np.array(music)) == pytest.approx(0.92)
        assert np.array_equal(TOKENIZER.first_seconds(ids, 0.45), music[:5])


# The grammar


def walk(ids) -> tuple[int, str] | None:
    """Walk the tables like a sampler, with the set of sounding keys. Return the first id that it would not allow."""
    grammar, state, sounding, running = performance_grammar(), performance_grammar().start, set(), -1
    for index, i in enumerate(ids):
        if not 0 <= i < p.VOCAB_SIZE:
            return index, "outside"
        press, release, velocity = (int(t[i]) for t in (grammar.press, grammar.release, grammar.velocity))
        if i == p.BOS and index == 0:
            continue
        if not grammar.allowed[state, i] or press in sounding or (release >= 0 and release not in sounding):
            return index, "not allowed"
        if velocity >= 0 and velocity == running:
            return index, "repeated"
        if i == p.EOS and sounding:
            return index, "held"
        sounding = (sounding | {press}) - {-1, release}
        running = velocity if velocity >= 0 else running
        state = int(grammar.next_state[state, i])
    if sounding or (state not in (p.OFF, p.END, p.START)):
        return len(ids), "incomplete"
    return None


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(any_notes, st.lists(st.tuples(st.integers(0, 300), st.integers(-2, 392)), max_size=3), st.integers(0, 300))
def test_violations_equal_those_of_a_walk(notes, changes, cut):
    ids = encode_notes(notes).astype(int).tolist()
    for place, value in changes:
        ids[place % len(ids)] = value
    ids = ids[: max(cut, len(ids) - 2)] + [p.EOS] * (cut % 2)
    expected, found = walk(ids), first_violation(ids)
    assert (expected and expected[0]) == (found and found[0])
    prefix = first_violation(ids, complete=False)
    if expected is not None and expected[1] == "held":  # then the first violation is what follows EOS, if anything
        expected = (expected[0] + 1, "not allowed") if expected[0] + 1 < len(ids) else None
    incomplete = expected is not None and expected[1] == "incomplete"
    assert (prefix and prefix[0]) == (None if expected is None or incomplete else expected[0])


@pytest.mark.parametrize(
    ("names", "index", "reason"),
    [
        ("NOTE_ON_60", 0, "NOTE_ON_60 may not follow START"),
        ("VELOCITY_3 NOTE_ON_60 NOTE_OFF_60", 2, "NOTE_OFF_60 may not follow NOTE_ON"),
        ("VELOCITY_3 NOTE_ON_60 TIME_SHIFT_9 TIME_SHIFT_1", 3, "TIME_SHIFT_1 may not follow TIME_SHIFT"),
        ("VELOCITY_3 NOTE_ON_60 TIME_SHIFT_9 NOTE_OFF_61", 3, "NOTE_OFF_61 releases a silent key"),
        ("VELOCITY_3 NOTE_ON_60 NOTE_ON_60", 2, "NOTE_ON_60 presses a sounding key"),
        ("VELOCITY_3 NOTE_ON_60 VELOCITY_3", 2, "VELOCITY_3 repeats the running velocity"),
        ("VELOCITY_3 NOTE_ON_60 TIME_SHIFT_9", 3, "the stream ends while key 60 sounds"),
        ("VELOCITY_3 NOTE_ON_60 TIME_SHIFT_9 EOS", 3, "EOS may not follow TIME_SHIFT"),
        ("VELOCITY_3 NOTE_ON_60 TIME_SHIFT_9 NOTE_OFF_60 TIME_SHIFT_9", 5, "does not end with a NOTE_OFF"),
        ("VELOCITY_3 PAD", 1, "PAD may not follow VELOCITY"),
    ],
)
def test_reasons_of_violations(names, index, reason):
    found = first_violation([NAMES.index(name) for name in names.split()])
    assert found is not None
    assert found[0] == index
    assert reason in found[1]


def test_the_tables_are_shared_and_read_only():
    grammar = performance_grammar()
    assert grammar is performance_grammar()
    assert grammar.allowed.shape == (len(grammar.states), p.VOCAB_SIZE)
    assert not grammar.allowed[:, [p.PAD, p.BOS, p.FILL, p.PLAY]].any()
    assert np.flatnonzero(grammar.allowed[:, p.EOS]).tolist() == [p.OFF]
    assert all(table.dtype == np.int32 for table in (grammar.next_state, grammar.press, grammar.release))
    with pytest.raises(ValueError, match="read-only"):
        grammar.allowed[0, 0] = True
