"""Layouts and faults of real MIDI files, one small file each: the notes, and what is counted as repaired.

Ticks are milliseconds. A note is (onset, offset, pitch, velocity) in milliseconds.
"""

import gzip

import pytest
from support.midi_files import META_END, midi, note, note_off, note_on, pedal, tempo, track, variable_length

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.midi import read_midi
from dsmr_mlx.music.repairs import Repair, describe_repairs, parse_repairs

TEXT = b"\xff\x01\x00"  # an event that is no channel message


def control(number: int, value: int = 0, channel: int = 0) -> bytes:
    return bytes([0xB0 | channel, number, value])


def port(number: int) -> bytes:
    return bytes([0xFF, 0x21, 1, number])


def chunk(body: bytes, length: int | None = None, name: bytes = b"MTrk") -> bytes:
    return name + (len(body) if length is None else length).to_bytes(4, "big") + body


def raw(*parts: bytes) -> bytes:
    """Return a file of one track with these bytes, and a complete End of Track."""
    return midi(chunk(b"".join(parts) + b"\0" + META_END), kind=0)


def riff(data: bytes, before: bytes = b"", size: int | None = None) -> bytes:
    size = len(data) if size is None else size
    inside = b"RMID" + before + b"data" + size.to_bytes(4, "little") + data
    return b"RIFF" + len(inside).to_bytes(4, "little") + inside


K = note(0, 100, 60)
ONE = [(0, 100, 60, 64)]
HELD = [(0, 1000, 60, 64)]
DOWN, UP = (50, pedal(127)), (1000, pedal(0))
BEFORE = b"\0\x90\x3c\x40\x64\x3c\0"  # a note of 100 ticks, with running status
AFTER = b"\0\x90\x3e\x40\x64\x3e\0"
RUNNING = b"\0\x3e\x40\x64\x3e\0"  # the same as AFTER, with running status
TWO = [(0, 100, 60, 64), (100, 200, 62, 64)]
T = track(K)

# name: (bytes, notes, repairs)
PEDALS = {
    "of another channel": (midi(track(K, (50, pedal(127, 1)), (1000, pedal(0, 1)))), ONE),
    "of another channel, in another track": (midi(T, track((50, pedal(127, 1)), (1000, pedal(0, 1)))), ONE),
    "of another port": (midi(T, track((0, port(1)), DOWN, UP)), ONE),
    "of the same port, named": (midi(track((0, port(1)), K), track((0, port(1)), DOWN, UP)), HELD),
    "port 0 is the default": (midi(T, track((0, port(0)), DOWN, UP)), HELD),
    "a port of no bytes": (midi(track((0, b"\xff\x21\x00"), K), track(DOWN, UP)), HELD),
    "in a track after a track without notes": (midi(track((0, tempo(500_000))), track(DOWN, UP), T), HELD),
    "sostenuto and soft pedal are no sustain": (
        midi(track(K, (50, control(66, 127)), (50, control(67, 127)), (900, control(66)))),
        ONE,
    ),
    "values of 63 in the own track are never down": (midi(track(K, (0, pedal(63))), track(DOWN, UP)), HELD),
    "only notes after it are in the other track": (
        midi(track(note(0, 10, 40), DOWN, UP), track(note(1100, 50, 60))),
        [(0, 10, 40, 64), (1100, 1150, 60, 64)],
    ),
    "two tracks, each with its own": (
        midi(track(K, DOWN, (400, pedal(0))), track(note(0, 100, 40), DOWN, UP)),
        [(0, 1000, 40, 64), (0, 400, 60, 64)],
    ),
    "own, still down at the end when no other lifts it": (
        midi(track(K, DOWN, (400, pedal(0)), note(1100, 50, 62), (1120, pedal(99))), track(note(0, 100, 40), DOWN, UP)),
        [(0, 1000, 40, 64), (0, 400, 60, 64), (1100, 1150, 62, 64)],
    ),
    "down in one track, up in another, three times": (
        midi(
            track(K, DOWN, (300, pedal(127)), (700, pedal(127)), note(310, 50, 64)),
            track((200, pedal(0)), (600, pedal(0)), UP),
        ),
        [(0, 200, 60, 64), (310, 600, 64, 64)],
    ),
    "never up, in another track": (midi(T, track(DOWN, (900, pedal(100)))), [(0, 900, 60, 64)]),
    "lifted by a reset in another track": (midi(track(K, DOWN, UP), track((300, control(121)))), [(0, 300, 60, 64)]),
    "of drums": (midi(track(K), track((50, pedal(127, 9)), (1000, pedal(0, 9)))), ONE),
    "format 2: of its own track only": (midi(T, track(DOWN, UP), kind=2), ONE, {Repair.PATTERNS: 2}),
}

CHUNKS = {
    "an empty track": (midi(chunk(b""), T), ONE, {Repair.NO_END: 1}),
    "chunks of other types": (midi(chunk(b"abc", name=b"XFIH"), T, chunk(b"", name=b"XFKM"))[:11] + b"\1"
                              + midi(chunk(b"abc", name=b"XFIH"), T, chunk(b"", name=b"XFKM"))[12:], ONE),
    "junk between tracks": (midi(T, b"\1\2\3" + track(note(0, 50, 62))), [*ONE, (0, 50, 62, 64)], {Repair.OUTSIDE: 3}),
    "junk after the last track": (midi(T) + b"\0" * 100, ONE, {Repair.OUTSIDE: 100}),
    "fewer tracks than the header says": (midi(T)[:10] + b"\0\5" + midi(T)[12:], ONE, {Repair.TRACK_COUNT: 4}),
    "more tracks than the header says": (
        midi(T, track(note(0, 50, 62)))[:10] + b"\0\1" + midi(T, track(note(0, 50, 62)))[12:],
        [*ONE, (0, 50, 62, 64)],
        {Repair.TRACK_COUNT: 1},
    ),
    "an unknown format": (midi(T, kind=7), ONE, {Repair.FORMAT: 1}),
    "format 0 with two tracks": (midi(T, track(note(0, 50, 62)), kind=0), [*ONE, (0, 50, 62, 64)]),
    "no End of Track": (midi(chunk(BEFORE)), ONE, {Repair.NO_END: 1}),
    "a length beyond the file, but complete": (
        midi(chunk(BEFORE + b"\0" + META_END, 9999)), ONE, {Repair.TRACK_LENGTH: 1},
    ),
    "a length beyond the file, before another track": (
        midi(chunk(BEFORE + b"\0" + META_END, 9999), track(note(0, 50, 62))),
        [*ONE, (0, 50, 62, 64)],
        {Repair.TRACK_LENGTH: 1},
    ),
    "a length of 0 and events": (midi(chunk(BEFORE + b"\0" + META_END, 0)), ONE, {Repair.TRACK_LENGTH: 1}),
    "a length of 0 and a long delta time": (
        midi(chunk(b"\x83\xff\x7f" + BEFORE[1:] + b"\0" + META_END, 0)), ONE, {Repair.TRACK_LENGTH: 1},
    ),
    "a length of 0 and events, before another track": (
        midi(chunk(BEFORE + b"\0" + META_END, 0), track(note(0, 50, 62))),
        [*ONE, (0, 50, 62, 64)],
        {Repair.TRACK_LENGTH: 1},
    ),
    "an empty track at the end": (midi(T, chunk(b"")), ONE, {Repair.NO_END: 1}),
    "an empty track before zeros": (midi(T, chunk(b"") + bytes(9)), ONE, {Repair.NO_END: 1, Repair.OUTSIDE: 9}),
    "an empty track before 255s": (midi(T, chunk(b"") + b"\xff" * 9), ONE, {Repair.NO_END: 1, Repair.OUTSIDE: 9}),
    "an empty track before a chunk of another type": (
        midi(T, chunk(b"") + chunk(b"abc", name=b"XFIH")), ONE, {Repair.NO_END: 1},
    ),
    "cut in an End of Track": (
        midi(chunk(BEFORE + b"\0\xff\x2f"), track(note(0, 50, 62))),
        [*ONE, (0, 50, 62, 64)],
        {Repair.CUT_MESSAGE: 1, Repair.NO_END: 1},
    ),
    "cut in a delta time": (midi(chunk(BEFORE + b"\x81")), ONE, {Repair.CUT_MESSAGE: 1, Repair.NO_END: 1}),
    "cut in a message": (midi(chunk(BEFORE + b"\0\x90\x40")), ONE, {Repair.CUT_MESSAGE: 1, Repair.NO_END: 1}),
    "two Ends of Track": (raw(BEFORE, b"\0", META_END), ONE, {Repair.EARLY_END: 1}),
    "notes after an End of Track": (raw(BEFORE, b"\0", META_END, AFTER), TWO, {Repair.EARLY_END: 3}),
    "running status after an End of Track": (
        raw(BEFORE, b"\0", META_END, RUNNING), TWO, {Repair.EARLY_END: 3, Repair.RUNNING_STATUS: 1},
    ),
    "garbage after an End of Track": (
        raw(BEFORE, b"\0", META_END, b"\0\xf4\xf5garbage"), ONE, {Repair.UNREADABLE_END: 14},
    ),
}  # fmt: skip

HEADERS = {
    "RMID": (riff(midi(T)), ONE),
    "RMID with an odd chunk and its padding": (riff(midi(T), b"DISP\5\0\0\0hello\0"), ONE),
    "RMID with trailing chunks": (riff(midi(T)) + b"LIST\4\0\0\0INFO", ONE),
    "RMID with wrong sizes": (riff(midi(T), size=0), ONE),
    "MacBinary with a resource fork": (
        (b"\0\4tune" + b"\0" * 59 + b"Midi").ljust(128, b"\0") + midi(T) + b"\0\0\1\0",
        ONE,
        {Repair.OUTSIDE: 132},
    ),
    "a header of 20 bytes": (b"MThd\0\0\0\x14" + midi(T)[8:14] + b"\0" * 14 + midi(T)[14:], ONE),
    "SMPTE, 24 frames of 100 ticks": (midi(track(note(0, 2400, 60)), tpq=0xE864), HELD),
    "SMPTE, 30 frames of 80 ticks, tempo does not count": (
        midi(track((0, tempo(1)), note(0, 2400, 60)), tpq=0xE250),
        HELD,
    ),
}

MESSAGES = {
    "running status after a meta event": (raw(BEFORE, b"\0\xff\1\2hi", RUNNING), TWO, {Repair.RUNNING_STATUS: 1}),
    "running status behind SysEx": (raw(BEFORE, b"\0\xf0\3\x7e\x7f\xf7", RUNNING), TWO, {Repair.RUNNING_STATUS: 1}),
    "running status after an escape": (raw(BEFORE, b"\0\xf7\1\xfa", RUNNING), TWO, {Repair.RUNNING_STATUS: 1}),
    "a reserved real-time byte": (raw(BEFORE, b"\0\xfd", AFTER), TWO, {Repair.SYSTEM_MESSAGE: 1}),
    "song position, song select, quarter frame": (
        raw(BEFORE, b"\0\xf2\1\2\0\xf3\1\0\xf1\1", AFTER),
        TWO,
        {Repair.SYSTEM_MESSAGE: 3},
    ),
    "a SysEx that looks like notes": (raw(BEFORE, b"\0\xf0\4\x90\x3c\x40\xf7", AFTER), TWO),
    "a SysEx in packets with time between them": (
        raw(BEFORE, b"\0\xf0\2\x43\x12\x0a\xf7\2\0\x43\x0a\xf7\2\x12\xf7", AFTER),
        [(0, 100, 60, 64), (120, 220, 62, 64)],
    ),
    "a note in an escape": (raw(BEFORE, b"\0\xf7\3\x90\x40\x40", AFTER), TWO, {Repair.ESCAPED: 1}),
    "a delta time of five bytes": (raw(BEFORE, b"\x80\x80\x80\x80" + AFTER), TWO, {Repair.LONG_WAIT: 1}),
    "data bytes above 127": (
        raw(b"\0\x90\x3c\x90\x64\x3c\0\0\xc0\x80\0\xb0\x07\xff", AFTER),
        [(0, 100, 60, 127), (100, 200, 62, 64)],
        {Repair.DATA_BYTE: 3},
    ),
    "a pitch above 127": (raw(b"\0\x90\xff\x40\x64\x80\xff\0"), [(0, 100, 127, 64)], {Repair.DATA_BYTE: 2}),
    "aftertouch, bends and programs between notes": (
        raw(b"\0\xc0\5", BEFORE, b"\0\xd0\x40\0\x41\0\xa0\x3c\1\0\xe0\0\x40\0\xc0\1", AFTER),
        TWO,
    ),
    "tempo of 0": (midi(track(K, (50, tempo(0)))), ONE, {Repair.TEMPO: 1}),
    "tempo of two bytes": (midi(track(K, (50, b"\xff\x51\2\7\xa1"))), ONE, {Repair.TEMPO: 1}),
    "tempo of four bytes": (midi(track(K, (0, b"\xff\x51\4\x0f\x42\x40\0"))), [(0, 200, 60, 64)]),
    "tempo in the third track": (midi(T, track(), track((50, tempo(1_000_000)))), [(0, 150, 60, 64)]),
    "format 2: each track has its tempo": (
        midi(track((0, tempo(1_000_000)), K), track((0, tempo(250_000)), note(0, 100, 62)), kind=2),
        [(0, 200, 60, 64), (0, 50, 62, 64)],
        {Repair.PATTERNS: 2},
    ),
    "format 2: one tempo for all": (
        midi(track((0, tempo(1_000_000)), K), track(note(0, 100, 62)), kind=2),
        [(0, 200, 60, 64), (0, 200, 62, 64)],
        {Repair.PATTERNS: 2},
    ),
    "format 2 with one track": (midi(T, kind=2), ONE),
    "drums in several tracks": (midi(track(note(0, 9, 36, channel=9)), track(K, note(0, 9, 38, channel=9))), ONE),
    "drums of another port": (midi(T, track((0, port(1)), note(0, 9, 36, channel=9))), ONE),
}

OPEN_NOTES = {
    "never released: until End of Track": (midi(track((0, note_on(60)), (700, TEXT))), [(0, 700, 60, 64)], 1),
    "never released: until the end of another track": (
        midi(track((0, note_on(60))), track((0, tempo(500_000)), (900, TEXT))),
        [(0, 900, 60, 64)],
        1,
    ),
    "at the very end": (midi(track(K, (100, note_on(62)))), [(0, 100, 60, 64), (100, 101, 62, 64)], 1),
    "one missing release does not shift those that follow": (
        midi(track((0, note_on(60)), note(200, 50, 60), note(400, 50, 60), note(900, 50, 60))),
        [(0, 200, 60, 64), (200, 250, 60, 64), (400, 450, 60, 64), (900, 950, 60, 64)],
        1,
    ),
    "struck twice, released twice: first in, first out": (
        midi(track((0, note_on(60)), (200, note_on(60)), (300, note_off(60)), (600, note_off(60)))),
        [(0, 200, 60, 64), (200, 600, 60, 64)],
        0,
    ),
    "released in another track": (midi(track((0, note_on(60))), track((300, note_off(60)), UP)), [(0, 300, 60, 64)], 1),
    "struck again by another track": (
        midi(track((0, note_on(60)), (2000, TEXT)), track(note(500, 100, 60))),
        [(0, 500, 60, 64), (500, 600, 60, 64)],
        1,
    ),
    "released on another channel only": (
        midi(track((0, note_on(60)), (100, note_off(60, 1)), (400, TEXT))),
        [(0, 400, 60, 64)],
        1,
    ),
    "under the pedal": (midi(track((0, note_on(60)), (50, pedal(127)), (900, pedal(0)))), [(0, 900, 60, 64)], 1),
    "ended by all notes off, held by the pedal": (
        midi(track((0, note_on(60)), DOWN, (300, control(123)), UP)),
        [(0, 1000, 60, 64)],
        0,
    ),
    "ended by all sound off in spite of the pedal, which stays down": (
        midi(track((0, note_on(60)), DOWN, (300, control(120)), note(400, 50, 62), UP)),
        [(0, 300, 60, 64), (400, 1000, 62, 64)],
        0,
    ),
    "ended by all notes off in another track": (
        midi(track((0, note_on(60))), track((300, control(123)), (900, TEXT))),
        [(0, 300, 60, 64)],
        0,
    ),
    "not ended by all notes off on another channel": (
        midi(track(note(0, 500, 60), (300, control(123, channel=1)))),
        [(0, 500, 60, 64)],
        0,
    ),
    "ended by mono mode": (midi(track((0, note_on(60)), (300, control(126, 1)))), [(0, 300, 60, 64)], 0),
    "all notes off at the time of a strike comes first": (midi(track(K, (0, control(123)))), ONE, 0),
    "a release after all notes off is not that of a later strike": (
        midi(track((0, note_on(60)), (100, control(123)), (200, note_off(60)), note(300, 50, 60))),
        [(0, 100, 60, 64), (300, 350, 60, 64)],
        0,
    ),
}

CASES = {
    f"{kind}: {name}": case
    for kind, cases in {"pedal": PEDALS, "chunks": CHUNKS, "header": HEADERS, "messages": MESSAGES}.items()
    for name, case in cases.items()
}
CASES |= {
    f"open note: {name}": (data, notes, {Repair.NO_NOTE_OFF: n} if n else {})
    for name, (data, notes, n) in OPEN_NOTES.items()
}


@pytest.mark.parametrize("name", CASES)
def test_layout(name):
    data, notes, *repairs = CASES[name]
    found = read_midi(data)
    assert [(round(1000 * a), round(1000 * b), p, v) for a, b, p, v in found.notes.rows] == notes
    assert dict(found.repairs) == (repairs[0] if repairs else {})


REFUSED = {
    "empty": (b"", r"it is empty\)$"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer.*`git lfs pull`"),
    "git-annex": (b"/annex/objects/MD5E-s1--1.mid\n", "git-annex pointer.*`git annex get`"),
    "ZIP": (b"PK\3\4\x14\0" + b"\0" * 24 + b"a.mid" + midi(T), "it is a ZIP archive; unpack it first"),
    "gzip": (gzip.compress(midi(T)), "compressed with gzip; unpack it first"),
    "WAV": (b"RIFF\x24\0\0\0WAVEfmt ", "WAV audio; audio is not MIDI"),
    "WAV with a MIDI file in it": (b"RIFF\x24\0\0\0WAVEdata" + midi(T), "WAV audio"),
    "FLAC": (b"fLaC\0\0\0\x22", "FLAC audio"),
    "MP3": (b"ID3\4\0", "MP3 audio"),
    "web page": (b"\n<!DOCTYPE HTML><html>", "a web page; perhaps a download failed"),
    "MusicXML": (b'\xef\xbb\xbf<?xml version="1.0"?><score-partwise/>', "perhaps MusicXML"),
    "zeros": (bytes(5000), "zeros only"),
    "text": (b"hello", "does not begin with MThd; audio is not MIDI"),
    "a header too short": (b"MThd\0\0\0\2\0\1", "a header of 2 bytes"),
    "a header beyond the file": (b"MThd\0\0\0\xff" + midi(T)[8:], "a header of 255 bytes in a file of"),
    "cut in a track": (midi(track(K, note(500, 100, 62)))[:-9], "cut off: a track has 21 bytes, 12 are left"),
    "cut in a chunk's length": (midi(T) + b"MTrk\0", "cut off: a track has"),
    "a length of 0 without an End of Track": (midi(chunk(BEFORE, 0)), "a track of length 0 has no End of Track"),
    "data without a status": (raw(b"\0\x3c\x40"), "track 1, byte 1: data byte 3C without a status byte"),
    "data without a status after a meta event": (raw(b"\0\xff\1\0\0\x3c\x40"), "byte 5: data byte 3C without"),
    "an undefined status": (raw(BEFORE, b"\0\xf4"), "track 1, byte 8: undefined status byte F4"),
    "a meta event longer than its track": (raw(BEFORE, b"\0\xff\1\x84\0"), "event FF of 512 bytes, 4 are left"),
    "a SysEx longer than its track": (raw(b"\0\xf0\xff\xff\xff\x7f"), "event F0 of 268,435,455 bytes"),
    "a delta time of twenty bytes": (raw(b"\xff" * 20 + b"\0\x90\x3c\x40"), "byte 0: a number of too many bytes"),
    "delta times beyond reason": (raw(*[b"\xff\xff\xff\x7f\x90\x3c\x40"] * 300), r" stamp of .* ticks, expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name, tmp_path):
    data, reason = REFUSED[name]
    (tmp_path / "x.mid").write_bytes(data)
    with pytest.raises(UserError, match=f"x.mid: (not a readable MIDI file|time).*{reason}"):
        read_midi(tmp_path / "x.mid")


def test_programs_of_channels_and_tracks():
    """A track has the programs of its own messages, or else those of its channel."""
    tracks = [
        track((0, b"\xc0\x05"), note(0, 100, 60), (500, b"\xc0\x06"), note(600, 50, 61)),
        track(note(0, 100, 62), note(600, 50, 63)),
        track((0, b"\xc0\x09"), note(0, 100, 64), (0, b"\xc1\x0a"), note(0, 50, 65, channel=1)),
        track(note(0, 50, 66, channel=2), note(0, 50, 36, channel=9)),
    ]
    notes = read_midi(midi(*tracks), programs=True).notes
    found = dict(zip(notes.pitch.tolist(), notes.program.tolist(), strict=True))
    assert found == {60: 5, 61: 6, 62: 9, 63: 6, 64: 9, 65: 10, 66: 0, 36: 128}


def test_many_tracks_are_read_in_time():
    """Each of 3,000 tracks of one channel has a complete pedal: no step is quadratic."""
    tracks = [track(note(0, 10, i % 128), (5, pedal(127)), (20, pedal(0))) for i in range(3000)]
    assert len(read_midi(midi(*tracks)).notes) == 128


def test_repairs_round_trip():
    repairs = {Repair.NO_NOTE_OFF: 3, Repair.DATA_BYTE: 12_345}
    assert describe_repairs(repairs) == "notes without an end: 3; data bytes above 127: 12345"
    assert parse_repairs(describe_repairs(repairs)) == repairs
    assert parse_repairs("") == parse_repairs("something: 3; notes without an end: x") == {}


def test_all_bytes_of_long_tracks_count():
    """Blocks of messages end anywhere: a note for each delta length and place of a status byte."""
    waits = [variable_length(n) for n in (0, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152)]
    body = b"".join(
        wait + bytes([0x90, 60 + i % 2, 0x40]) + b"\1" + bytes([60 + i % 2, 0]) for i in range(40) for wait in waits
    )
    assert len(read_midi(midi(chunk(body + b"\0" + META_END))).notes) == 280
