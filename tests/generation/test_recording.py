"""Growing files: valid at every moment, equal to `decode` in the end, in constant memory."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.music import random_notes
from support.stand_ins import PlainTokenizer

from dsmr_mlx.generation.recording import KeyRecording, record
from dsmr_mlx.music import growing_midi
from dsmr_mlx.music.growing_midi import variable_length
from dsmr_mlx.music.midi import read_notes, read_text
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.event_grammar import Moment, beginning
from dsmr_mlx.tokenizers.keyboard import Keyboard
from dsmr_mlx.tokenizers.performance import (
    BOS,
    EOS,
    NOTE_OFF,
    NOTE_ON,
    PAD,
    VELOCITY,
    VOCAB_SIZE,
    PerformanceTokenizer,
    decode_ids,
    encode_notes,
    performance_grammar,
)

G = performance_grammar()
SECOND = VELOCITY - 1
COLUMNS = ("onset", "offset", "pitch", "velocity")


def recorded(path, ids, before: Moment | None = None) -> KeyRecording:
    made = record(path, PerformanceTokenizer(), "made by a test", before)
    for token in ids:
        made.play(int(token))
    return made


def track_of(path) -> list[tuple[int, int]]:
    """(ticks to wait, status) of all events in the only track, read by the lengths that the file states."""
    data = path.read_bytes()
    assert data[:14] == bytes.fromhex("4d546864 00000006 0000 0001 01f4")
    assert data[14:18] == b"MTrk"
    place, end, events = 22, 22 + int.from_bytes(data[18:22], "big"), []

    def number() -> int:
        nonlocal place
        value = 0
        while True:
            place += 1
            value = value << 7 | data[place - 1] & 127
            if data[place - 1] < 128:
                return value

    while place < end:
        wait, status, kind = number(), data[place], data[place + 1]
        place += 2
        if status == 0xFF:
            length = number()
            place += length
        elif status != 0xC0:
            place += 1
        events.append((wait, kind if status == 0xFF else status))
    assert place == end <= len(data)
    assert events[-1][1] == 0x2F, "the track ends with end-of-track"
    return events


def from_zero(notes: Notes) -> Notes:
    start = notes.onset.min() if len(notes) else 0
    return Notes(notes.onset - start, notes.offset - start, notes.pitch, notes.velocity)


def assert_same(actual: Notes, expected: Notes) -> None:
    expected = from_zero(expected)
    assert np.array_equal(actual.pitch, expected.pitch)
    assert np.array_equal(actual.velocity, expected.velocity)
    np.testing.assert_allclose(actual.onset, expected.onset, atol=1e-6)
    np.testing.assert_allclose(actual.offset, expected.offset, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 120), seed=st.integers(0, 99), cut=st.floats(0, 1))
def test_a_recording_equals_the_decoded_ids(tmp_path_factory, n, seed, cut):
    """For music that obeys the grammar, cut anywhere: keys that are down then are released there."""
    piece = random_notes(seed, n, waits=(0, 40), lengths=(1, 300), pitches=(21, 109), velocities=(1, 128))
    ids = encode_notes(piece)
    ids = ids[: max(round(cut * len(ids)), 4)]
    path = tmp_path_factory.mktemp("recorded") / "a.mid"
    made = recorded(path, [BOS, *ids, EOS, PAD])
    made.close()
    expected = decode_ids(ids)
    if len(expected):
        assert_same(read_notes(path), expected)
    assert read_text(path) == "made by a test"
    assert made.notes == len(expected)
    assert made.tokens == len(ids) + 3
    if made.notes:
        assert (made.lowest, made.highest) == (expected.pitch.min(), expected.pitch.max())
        assert made.seconds == pytest.approx(expected.duration)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, VOCAB_SIZE - 1).filter(lambda i: i >= 0), max_size=60))
def test_a_keyboard_is_consistent_for_any_events(ids):
    """For any ids: released keys were down, time never runs back, and all keys can be released."""
    keyboard, down, last = Keyboard(PerformanceTokenizer().event_grammar()), set(), 0
    for event in [e for i in ids for e in keyboard.play(i)] + list(keyboard.release_all()):
        assert event.tick >= last
        assert (event.pitch in down) == (event.velocity == 0)
        down ^= {event.pitch}
        last = event.tick
    assert not down
    assert last <= keyboard.tick + 1 == G.ticks[ids].sum() + 1


def test_keys_held_before_are_not_recorded(tmp_path):
    ids = [NOTE_OFF + 60, NOTE_ON + 62, SECOND, NOTE_OFF + 62, NOTE_OFF + 64]
    before = beginning(PerformanceTokenizer().event_grammar())._replace(velocity=20)
    made = recorded(tmp_path / "a.mid", ids, before)
    made.close()
    notes = read_notes(tmp_path / "a.mid")
    assert (notes.pitch.tolist(), notes.velocity.tolist()) == ([62], [4 * 20 + 2])
    assert (made.notes, made.seconds) == (1, 1.0)


def test_a_prompt_is_recorded_and_not_counted(tmp_path):
    made = recorded(tmp_path / "a.mid", [])
    made.prompt([VELOCITY + 9, NOTE_ON + 60, NOTE_ON + 64, SECOND, NOTE_OFF + 64])
    for token in [NOTE_ON + 67, SECOND, NOTE_OFF + 67, SECOND, NOTE_OFF + 60]:
        made.play(token)
    made.close()
    notes = read_notes(tmp_path / "a.mid")
    assert (notes.pitch.tolist(), notes.offset.tolist()) == ([60, 64, 67], [3.0, 1.0, 2.0])
    assert (made.notes, made.tokens, made.seconds, made.lowest, made.highest) == (1, 5, 1.0, 67, 67)


def chord(pitch: int) -> list[int]:
    return [NOTE_ON + pitch, NOTE_ON + pitch + 4, *[SECOND] * 3, NOTE_OFF + pitch, NOTE_OFF + pitch + 4]


class Killed(BaseException):
    pass


def test_the_file_is_valid_after_every_write(tmp_path, monkeypatch):
    """If the program dies before any of its writes, the file holds the music of some earlier moment."""
    music = [VELOCITY + 5, *(i for pitch in range(40, 60) for i in chord(pitch))]
    recorded(tmp_path / "whole.mid", music).close()
    whole = read_notes(tmp_path / "whole.mid")
    original, lengths = growing_midi.overwrite, []
    for survived in range(100):
        path, left = tmp_path / f"{survived}.mid", iter(range(survived))

        def overwrite(file, offset, data, left=left):
            if next(left, None) is None:
                raise Killed
            original(file, offset, data)

        monkeypatch.setattr(growing_midi, "overwrite", overwrite)
        try:
            recorded(path, music).close()
            break
        except Killed:
            notes = read_notes(path)
            lengths.append(len(notes))
            earlier = Notes(*(getattr(whole, name)[: len(notes)] for name in COLUMNS))
            cut = np.minimum(earlier.offset, notes.duration)  # keys that were down then
            assert_same(notes, Notes(earlier.onset, cut, earlier.pitch, earlier.velocity))
            assert sum(status == 0x90 for _, status in track_of(path)) >= len(notes)
            assert read_text(path) == "made by a test"
    assert len(lengths) == 3 * 6
    assert lengths == sorted(lengths)
    assert lengths[0] == 8, "6 notes with their ends, 2 keys that were down"
    assert path.read_bytes() == (tmp_path / "whole.mid").read_bytes(), "same music, same bytes"


def test_memory_does_not_grow_with_the_music(tmp_path):
    made, pending = recorded(tmp_path / "a.mid", []), []
    for i in range(3600 // 3):
        for token in chord(30 + i % 60):
            made.play(token)
        pending.append(len(made.file.pending))
        assert len(made.keyboard.down) == 0
    assert max(pending[600:]) <= max(pending[:20]) < 200
    made.close()
    assert len(read_notes(tmp_path / "a.mid")) == 2 * 1200


def test_silence_longer_than_the_largest_delta_time(tmp_path):
    made = recorded(tmp_path / "a.mid", [])
    for i in [NOTE_ON + 50, SECOND, NOTE_OFF + 50]:
        made.play(i)
    made.file.add(made.file.clock + 2**29, 60, 70)
    made.close()
    assert sum(wait for wait, _ in track_of(tmp_path / "a.mid")) == 1000 + 2**29


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, "00"), (127, "7f"), (128, "8100"), (16383, "ff7f"), (16384, "818000"), (2**28 - 1, "ffffff7f")],
)
def test_numbers_of_variable_length(number, expected):
    assert variable_length(number).hex() == expected


def test_no_file_before_the_first_music(tmp_path):
    made = recorded(tmp_path / "a.mid", [])
    made.play(NOTE_ON + 60)
    assert list(tmp_path.iterdir()) == []
    made.close()
    assert os.listdir(tmp_path) == ["a.mid"]  # noqa: PTH208
    empty = recorded(tmp_path / "b.mid", [])
    empty.close()
    assert [status for _, status in track_of(tmp_path / "b.mid")] == [0x51, 6, 0xC0, 0x2F]
    deeper = recorded(tmp_path / "new" / "folder" / "c.mid", [NOTE_ON + 60])
    assert not (tmp_path / "new").exists()
    deeper.close()
    assert read_text(tmp_path / "new" / "folder" / "c.mid")


def test_ids_without_known_keys_are_decoded_together(tmp_path):
    path, tokenizer = tmp_path / "new" / "a.mid", PlainTokenizer()
    made = record(path, tokenizer, "made by a test")
    made.prompt([8, 3, 4, 5])
    counts = []
    for _ in range(1300):
        made.play(2)
        if path.exists():
            counts.append(len(read_notes(path)))
    assert counts[0] == counts[-1] == 999
    made.close()
    assert read_notes(path) == tokenizer.decode(made.ids)
    assert len(read_notes(path)) == 1303
    assert (made.notes, made.tokens, made.seconds, made.lowest, made.highest) == (1300, 1300, 1299.5, 60, 60)
    assert read_text(path) == "made by a test"
