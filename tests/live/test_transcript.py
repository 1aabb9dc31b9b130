"""What a human plays becomes, piece by piece, the stream that the codec gives for the whole."""

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


LOOKS = st.lists(st.floats(0, 1), max_size=20)


def played(notes: Notes, looks: list[float]) -> list[int]:
    """The ids that a transcript tells of some notes; it is asked at parts of their time, and in the end."""
    transcript, ids = Transcript(EVENTS), []
    events = [(notes.onset[0] + look * (notes.offset.max() - notes.onset[0]), 3, 0, 0) for look in looks]
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
    """Notes in units of `scale` seconds, each ended where its pitch comes again; one of each pitch at a time."""
    kept: dict[int, list] = {}
    for onset, length, pitch, velocity in sorted(notes):
        line = kept.setdefault(pitch, [])
        if line and line[-1][0] == onset:
            continue
        if line:
            line[-1][1] = min(line[-1][1], onset)
        line.append([onset, onset + length, pitch, velocity])
    columns = np.array([note for line in kept.values() for note in line]).T
    return Notes.sorted(columns[0] * scale, columns[1] * scale, columns[2], columns[3])


@settings(max_examples=150, deadline=None)
@given(st.lists(NOTE, min_size=1, max_size=25), LOOKS)
def test_the_stream_is_that_of_the_codec_however_often_it_is_asked_for(notes, looks):
    """Notes on a grid of ticks, some of no length, some struck again while they sound; looks at any time."""
    piece = without_overlaps(notes, 0.01)
    assert played(piece, looks) == encode_notes(piece).tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(NOTE, min_size=1, max_size=25), LOOKS, st.integers(0, 999))
def test_off_the_grid_too(notes, looks, start):
    """Units of 0.71 ms, so that several events of one pitch fall into one tick: valid, and equal if none is merged."""
    piece = without_overlaps(notes, 0.00071)
    piece = Notes(piece.onset + start, piece.offset + start, piece.pitch, piece.velocity)
    ids = played(piece, looks)
    assert first_violation(ids) is None
    ticks = np.rint((piece.onset - piece.onset.min()) * 100)
    if len(set(zip(piece.pitch, ticks, strict=True))) == len(piece):
        assert ids == encode_notes(piece).tolist()


def test_a_pause_is_told_second_by_second_and_no_longer_than_ten_seconds():
    transcript = Transcript(EVENTS)
    assert transcript.next_time() == float("inf")
    transcript.press(100.0, 60, 64)
    assert transcript.next_time() == pytest.approx(100.01)
    assert len(transcript.flush(100.02)) == 2
    told = [transcript.flush(100 + seconds) for seconds in (0.5, 0.99, 1.0, 1.5, 2.5, 60.0, 3600.0)]
    assert [len(ids) for ids in told] == [0, 0, 1, 0, 1, 8, 0]
    transcript.release(3600.25, 60)
    transcript.press(3600.25, 62, 64)
    ids = transcript.flush_all()
    piece = decode_ids([*transcript_start(), *(i for ids in told for i in ids), *ids])
    assert piece.onset.tolist() == [0.0, pytest.approx(10.25, abs=0.26)]


def transcript_start() -> list[int]:
    transcript = Transcript(EVENTS)
    transcript.press(0.0, 60, 64)
    return transcript.flush_all()


def test_what_is_held_stays_held_and_what_the_model_plays_counts():
    """Held keys are not told to be up; the model may release them, and strikes keys that are then its own."""
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


def test_events_that_come_too_late_move_to_the_next_possible_tick():
    """After a strike no key goes up in the same tick, and no time goes back."""
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


def test_a_stream_that_goes_on_keeps_its_velocity_and_begins_with_the_time_until_the_first_key():
    grammar = EVENTS.grammar
    state = int(grammar.next_state[EVENTS.release[60]])
    transcript = Transcript(EVENTS, state, 15, held=[72], start=50.0)
    transcript.release_voice(50.0, Voice.MODEL)
    transcript.press(50.4, 60, 64)
    assert transcript.flush_all() == [EVENTS.release[72], *EVENTS.waits(40), EVENTS.press[60]]
    ended = Transcript(EVENTS, int(grammar.next_state[2]), 15, start=50.0)
    ended.press(51.0, 60, 64)
    assert ended.flush_all() == [EVENTS.velocity[15], EVENTS.press[60]]


def test_the_pedal_is_folded_as_in_files_and_keys_may_be_held_on_several_channels():
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


def test_what_hands_do_to_let_go():
    hands = Hands()
    for message in (on(60), on(62), off(60), control(64, 127, channel=2), on(64, channel=2)):
        hands.update(message)
    messages = hands.release_messages()
    assert messages == [off(62).copy(velocity=0), off(64, channel=2).copy(velocity=0), control(64, 0, channel=2)]
    assert [change.pitch for message in messages for change in hands.update(message)] == [62, 64]
    assert not hands.release_messages()


def test_a_controller_that_passes_the_turn_is_no_pedal():
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


def test_a_vocabulary_that_cannot_be_played_live_is_refused():
    with pytest.raises(
        UserError,
        match="tokenizer plain: its tokens are not key events; a live session needs 'performance'",
    ):
        EventIds(PlainTokenizer())


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (
            ["REMI", "TSD", "Structured", "CPWord", "REMI bpe"],
            "a note has a length, unknown while its key is down",
        ),
        (
            ["PerTok", "MuMIDI", "Octuple", "MMM", "BEAT", "REMI programs"],
            "its tokens are not key events",
        ),
        (["MIDILike", "MIDILike unigram"], "some keys, velocities or pauses have no separate token"),
    ],
)
def test_vocabularies_of_miditok_are_refused_and_the_reason_is_named(names, reason):
    pytest.importorskip("miditok")
    from support.vocabularies import vocabulary

    for name in names:
        tokenizer = vocabulary(name)
        message = f"tokenizer {tokenizer.label}: {reason}; a live session needs 'performance'"
        with pytest.raises(UserError, match=re.escape(message)):
            EventIds(tokenizer)
