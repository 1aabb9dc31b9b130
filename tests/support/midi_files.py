"""Small MIDI files for tests, built byte by byte without the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np

Event = tuple[int, bytes]  # absolute tick, message

META_END = b"\xff\x2f\x00"


def variable_length(value: int) -> bytes:
    """Encode a MIDI variable-length quantity."""
    out = [value & 127]
    while value := value >> 7:
        out.append(value & 127 | 128)
    return bytes(reversed(out))


def note_on(pitch: int, velocity: int = 64, channel: int = 0) -> bytes:
    """Return a note-on message."""
    return bytes([0x90 | channel, pitch, velocity])


def note_off(pitch: int, channel: int = 0) -> bytes:
    """Return a note-off message."""
    return bytes([0x80 | channel, pitch, 0])


def pedal(value: int, channel: int = 0) -> bytes:
    """Return a sustain pedal message."""
    return bytes([0xB0 | channel, 64, value])


def tempo(microseconds: int) -> bytes:
    """Return a tempo event, in microseconds per quarter."""
    return b"\xff\x51\x03" + microseconds.to_bytes(3, "big")


def note(tick: int, length: int, pitch: int, velocity: int = 64, channel: int = 0) -> list[Event]:
    """Return the note-on and note-off of a note; tick and length in ticks."""
    return [(tick, note_on(pitch, velocity, channel)), (tick + length, note_off(pitch, channel))]


def track(*events: Event | list[Event]) -> bytes:
    """Return a track chunk. Events may be in any order; those of one tick keep their order."""
    flat: list[Event] = []
    for event in events:
        flat += event if isinstance(event, list) else [event]
    body, now = b"", 0
    for tick, message in sorted(flat, key=lambda event: event[0]):
        body += variable_length(tick - now) + message
        now = tick
    body += b"\x00" + META_END
    return b"MTrk" + len(body).to_bytes(4, "big") + body


def midi(*tracks: bytes, tpq: int = 500, kind: int = 1) -> bytes:
    """Return a file of tracks. With the default tpq and no tempo event, one tick is 1 ms."""
    header = kind.to_bytes(2, "big") + len(tracks).to_bytes(2, "big") + tpq.to_bytes(2, "big")
    return b"MThd" + (6).to_bytes(4, "big") + header + b"".join(tracks)


def tune(seed: int = 0, notes: int = 20) -> bytes:
    """Return a file with a small piece that depends on the seed."""
    rng = np.random.default_rng(seed)
    events: list[Event] = []
    tick = 0
    for _ in range(notes):
        events += note(tick, int(rng.integers(30, 400)), int(rng.integers(21, 109)), int(rng.integers(1, 128)))
        tick += int(rng.integers(1, 500))
    return midi(track(events))


def write_midi_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files under a folder, by relative path."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder
