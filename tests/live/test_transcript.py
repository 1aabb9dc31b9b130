"""The transcript: live key events become the same stream of tokens as the whole piece encoded at once."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.live_stand_ins import control, off, on
from support.performance_reference import first_violation
from support.stand_ins import PlainTokenizer

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live.hands import Change, Hands
from dsmr_mlx.live.instrument import Voice
from dsmr_mlx.live.transcript import EventIds, Transcript
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer, decode_ids, encode_notes

EVENTS = EventIds(PerformanceTokenizer())
NOTE = st.tuples(st.integers(0, 400), st.integers(0, 150), st.integers(60, 64), st.integers(1, 127))


FLUSHES = st.lists(st.floats(0, 1), max_size=20)


def transcribed(notes: Notes, flushes: list[float]) -> list[int]:
    """Return the events of a transcript that is flushed at these fractions of the notes' time, and at the end."""
    transcript, ids = Transcript(EVENTS), []
    events = [(notes.onset[0] + flush * (notes.offset.max() - notes.onset[0]), 3, 0, 0) for flush in flushes]
    for onset, offset, pitch, velocity in zip(notes.onset, notes.offset, notes.pitch, notes.velocity, strict=True):
        events += [(onset, 1, int(pitch), int(velocity)), (offset, 2 * (offset == onset), int(pitch), 0)]
    for time, kind, pitch, velocity in sorted(events):
        if kind == 3:
            ids += transcript.flush(time)
        elif kind == 1:
            transcript.press(time, pitch, velocity)
        else:
            transcript.release(time, pitch)
    return ids + transcript.flush_all()


def without_overlaps(notes: list[tuple[int, int, int, int]], scale: float) -> Notes:
    """Return notes in units of `scale` seconds, each ended by the next of its pitch, one per pitch and onset."""
    lines: dict[int, list] = {}
    for onset, length, pitch, velocity in sorted(notes):
        line = lines.setdefault(pitch, [])
        if line and line[-1][0] == onset:
            continue
        if line:
            line[-1][1] = min(line[-1][1], onset)
        line.append([onset, onset + length, pitch, velocity])
    columns = np.array([note for line in lines.values() for note in line]).T
    return Notes.sorted(columns[0] * scale, columns[1] * scale, columns[2], columns[3])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(NOTE, min_size=1, max_size=25), FLUSHES)
def test_the_stream_equals_the_encoded_piece_for_any_flushes(notes, flushes):
    """Notes on the grid of ticks, some of no length, some repeated while they sound."""
    piece = without_overlaps(notes, 0.01)
    assert transcribed(piece, flushes) == encode_notes(piece).tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(NOTE, min_size=1, max_size=25), FLUSHES, st.integers(0, 999))
def test_the_stream_is_valid_off_the_grid(notes, flushes, start):
    """Units of 0.71 ms put several events of a pitch into one tick. The stream is equal if none is merged."""
    piece = without_overlaps(notes, 0.00071)
    piece = Notes(piece.onset + start, piece.offset + start, piece.pitch, piece.velocity)
    ids = transcribed(piece, flushes)
    assert first_violation(ids) is None
    ticks = np.rint((piece.onset - piece.onset.min()) * 100)
    if len(set(zip(piece.pitch, ticks, strict=True))) == len(piece):
        assert ids == encode_notes(piece).tolist()


def test_a_pause_is_flushed_by_the_second_up_to_ten_seconds():
    transcript = Transcript(EVENTS)
    assert transcript.next_time() == float("inf")
    transcript.press(100.0, 60, 64)
    assert transcript.next_time() == pytest.approx(100.01)
    assert len(transcript.flush(100.02)) == 2
    flushed = [transcript.flush(100 + seconds) for seconds in (0.5, 0.99, 1.0, 1.5, 2.5, 60.0, 3600.0)]
    assert [len(ids) for ids in flushed] == [0, 0, 1, 0, 1, 8, 0]
    transcript.release(3600.25, 60)
    transcript.press(3600.25, 62, 64)
    ids = transcript.flush_all()
    piece = decode_ids([*transcript_start(), *(i for ids in flushed for i in ids), *ids])
    assert piece.onset.tolist() == [0.0, pytest.approx(10.25, abs=0.26)]


def transcript_start() -> list[int]:
    """Return the events of a key press at 0 s."""
    transcript = Transcript(EVENTS)
    transcript.press(0.0, 60, 64)
    return transcript.flush_all()


def test_held_keys_stay_down_and_the_model_may_release_and_press_keys():
    """A key belongs to the voice that pressed it last."""
    transcript = Transcript(EVENTS)
    for pitch in (60, 64):
        transcript.press(0.0, pitch, 80)
    ids = transcript.flush_all()
    assert transcript.waits_until(0.55) == EVENTS.waits(55)
    reply = [*EVENTS.waits(55), EVENTS.release[60], EVENTS.press[67]]
    for token in reply:
        transcript.add_model_event(token)
    assert not transcript.holds(Voice.HUMAN, 60)
    assert transcript.holds(Voice.HUMAN, 64)
    assert transcript.holds(Voice.MODEL, 67)
    transcript.release_voice(0.7, Voice.MODEL)
    transcript.press(0.7, 67, 81)
    transcript.release(0.9, 64)
    transcript.release(0.9, 67)
    ids += reply + transcript.flush_all()
    assert first_violation(ids) is None
    assert decode_ids(ids) == Notes.sorted([0, 0, 0.55, 0.7], [0.55, 0.9, 0.7, 0.9], [60, 64, 67, 67], [78, 78, 78, 82])


def test_late_events_move_to_the_next_possible_tick():
    """No release follows a press in the same tick, and time never goes back."""
    transcript = Transcript(EVENTS)
    transcript.press(0.0, 60, 64)
    ids = transcript.flush_all()
    for token in [*EVENTS.waits(30), EVENTS.press[62]]:
        transcript.add_model_event(token)
        ids.append(token)
    transcript.release(0.21, 60)
    transcript.press(0.25, 62, 64)
    transcript.release(0.30, 62)
    ids += transcript.flush_all()
    assert first_violation(ids) is None
    assert decode_ids(ids) == Notes.sorted([0, 0.3, 0.31], [0.31, 0.31, 0.32], [60, 62, 62], [62, 62, 62])


def test_a_continued_stream_keeps_its_velocity_and_counts_the_time_before_the_first_key():
    grammar = EVENTS.grammar
    state = int(grammar.next_state[0, EVENTS.release[60]])
    transcript = Transcript(EVENTS, state, 15, held=[72], start=50.0)
    transcript.release_voice(50.0, Voice.MODEL)
    transcript.press(50.4, 60, 64)
    assert transcript.flush_all() == [EVENTS.release[72], *EVENTS.waits(40), EVENTS.press[60]]
    ended = Transcript(EVENTS, int(grammar.next_state[0, 2]), 15, start=50.0)
    ended.press(51.0, 60, 64)
    assert ended.flush_all() == [EVENTS.velocity[15], EVENTS.press[60]]


def test_hands_fold_the_pedal_as_in_files_and_track_keys_by_channel():
    hands = Hands()
    script = [
        (on(60), [Change(60, 64)]),
        (control(64, 127), []),
        (off(60), []),
        (on(60, 30), [Change(60, 30)]),
        (off(60), []),
        (on(62), [Change(62, 64)]),
        (control(64, 63), [Change(60, 0)]),
        (on(62, 70, channel=3), [Change(62, 70)]),
        (off(62), []),
        (on(62, 0, channel=3), [Change(62, 0)]),
        (off(62, channel=3), []),
        (on(36, channel=9), []),
        (on(65), [Change(65, 64)]),
        (on(66), [Change(66, 64)]),
        (control(123, 0), [Change(65, 0), Change(66, 0)]),
        (control(64, 127), []),
        (on(67), [Change(67, 64)]),
        (control(123, 0), []),
        (control(121, 0), [Change(67, 0)]),
        (on(68), [Change(68, 64)]),
        (off(68), [Change(68, 0)]),
        (control(64, 127), []),
        (on(69), [Change(69, 64)]),
        (off(69), []),
        (on(70), [Change(70, 64)]),
        (control(120, 0), [Change(69, 0), Change(70, 0)]),
    ]
    for message, changes in script:
        assert hands.update(message) == changes, message
    assert not hands.down


def test_release_messages_release_everything():
    hands = Hands()
    pedals = (control(64, 127, channel=2), control(64, 127, channel=4), control(64, 40, channel=4), control(64, 0))
    for message in (on(60), on(62), off(60), *pedals, on(64, channel=2)):
        hands.update(message)
    messages = hands.release_messages()
    ups = [control(64, 0, channel=2), control(64, 0, channel=4)]  # of a half pedal, too
    assert messages == [off(62).copy(velocity=0), off(64, channel=2).copy(velocity=0), *ups]
    assert [change.pitch for message in messages for change in hands.update(message)] == [62, 64]
    assert not hands.release_messages()


def test_a_controller_that_passes_the_turn_is_not_a_pedal():
    hands = Hands(turn_controller=64)
    assert [hands.passes_turn(control(64, value)) for value in (10, 64, 100, 63, 127)] == [
        False,
        True,
        False,
        False,
        True,
    ]
    assert not hands.passes_turn(control(67, 127))
    hands.update(on(60))
    assert hands.update(off(60)) == [Change(60, 0)]


def test_a_tokenizer_without_key_events_is_refused():
    with pytest.raises(
        UserError,
        match="tokenizer plain: its tokens are not key events; a live session needs 'performance'",
    ):
        EventIds(PlainTokenizer())


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (
            ["REMI", "TSD", "Structured", "REMI bpe"],
            "a note has a length, unknown while its key is down",
        ),
        (
            ["PerTok", "TSD rests", "BEAT", "REMI programs"],
            "its tokens are not key events",
        ),
        (["MIDILike", "MIDILike unigram"], "some keys, velocities or pauses have no separate token"),
    ],
)
def test_miditok_vocabularies_are_refused_with_a_reason(names, reason):
    pytest.importorskip("miditok")
    from support.vocabularies import vocabulary

    for name in names:
        tokenizer = vocabulary(name)
        message = f"tokenizer {tokenizer.label}: {reason}; a live session needs 'performance'"
        with pytest.raises(UserError, match=re.escape(message)):
            EventIds(tokenizer)
