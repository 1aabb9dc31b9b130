"""The messages of a MIDI file, as one player would send them who plays the notes that `midi.read_notes` reads."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.midi import READ_LIMITS, check_strikes, read_bytes
from dsmr_mlx.music.midi_file import read_midi_file
from dsmr_mlx.music.midi_notes import ALL_SOUND_OFF, CHANNELS, DRUM_CHANNEL, Keys, Messages, keys_of, songs_of
from dsmr_mlx.music.midi_track import NOTE_OFF, NOTE_ON, ONE_DATA_BYTE
from dsmr_mlx.music.repairs import warn_of_repairs

RELEASE_VELOCITY = 64  # MIDI 1.0: of keyboards that do not sense it
CONTROLS, RELEASES, STRIKES, SHORT_RELEASES = range(4)  # the order of messages at one tick


class TimedBytes(NamedTuple):
    """A channel message of two or three bytes and its time in seconds from the start of the file."""

    time: float
    message: bytes


def read_performance(path: str | os.PathLike) -> list[TimedBytes]:
    """Read the channel messages of a MIDI file in order of time. A pitch is released before it is struck again.

    Keys go up where `midi_notes` says, so every strike has a release; pedals and other controllers are those of the
    file. At one time controllers come first. Channels that only tracks or ports keep apart get different numbers as far
    as there are free ones.

    Warns and raises `UserError` like `midi.read_notes`, but a file without notes is accepted.
    """
    try:
        file = read_midi_file(read_bytes(path))
        check_strikes(file, READ_LIMITS)
        timed: list[tuple[float, int, bytes]] = []
        for song in songs_of(file):
            keys = keys_of(song.messages, file.repairs)
            tick, order, data = _rows(song.messages, keys)
            seconds = song.clock.seconds(tick)
            timed += zip(seconds.tolist(), order.tolist(), data, strict=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    warn_of_repairs(path, +file.repairs)
    timed.sort(key=lambda row: row[:2])
    if timed and timed[-1][0] > READ_LIMITS.seconds:
        raise UserError(f"{path}: {timed[-1][0]:.0f} s long, expected at most {READ_LIMITS.seconds:.0f} s")
    return [TimedBytes(time, message) for time, _, message in timed]


def _rows(messages: Messages, keys: Keys) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """Return tick, order and bytes of all messages."""
    number = _numbers(messages)
    others = np.flatnonzero((messages.kind != NOTE_OFF) & (messages.kind != NOTE_ON))
    to = messages.channel[others]
    # A channel of one track is silenced with the channel that it was made from.
    for extra in np.unique(messages.channel[messages.channel >= CHANNELS])[:16]:
        silences = messages.controls(ALL_SOUND_OFF)
        silences = silences[messages.origin[messages.channel[silences]] == messages.origin[extra]]
        others, to = np.append(others, silences), np.append(to, np.full(len(silences), extra))
    struck, released = _one_at_a_time(keys)
    n, start = len(struck), keys.struck[struck]
    tick = np.concatenate([messages.tick[others], start, released])
    order = np.repeat([CONTROLS, STRIKES, RELEASES], [len(others), n, n])
    order[len(others) + n :][released == start] = SHORT_RELEASES
    kind = np.concatenate([messages.kind[others], np.repeat([NOTE_ON, NOTE_OFF], n)])
    channel = number[np.concatenate([to, *[keys.channel[struck]] * 2])]
    first = np.concatenate([messages.first[others], *[keys.pitch[struck]] * 2])
    second = np.concatenate([messages.second[others], keys.velocity[struck], np.full(n, RELEASE_VELOCITY)])
    rows = zip(kind.tolist(), channel.tolist(), first.tolist(), second.tolist(), strict=True)
    data = [bytes((k << 4 | c, a) if k in ONE_DATA_BYTE else (k << 4 | c, a, b)) for k, c, a, b in rows]
    by_time = np.argsort(tick, kind="stable")  # controllers of one tick keep their order
    return tick[by_time], order[by_time], [data[i] for i in by_time.tolist()]


def _one_at_a_time(keys: Keys) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices `(S,)` of the keys to strike and the ticks of their releases.

    Of several strikes of a pitch at one tick the longest counts, as in the notes. A pitch that is struck again, on
    whichever channel, is released before that; drums are apart.
    """
    key = keys.pitch.astype(np.int64) + np.where(keys.is_drum, 128 * (keys.channel + 1), 0)
    order = np.lexsort((keys.velocity, keys.ended, keys.struck, key))
    same_key = key[order][1:] == key[order][:-1]
    kept = order[np.append(~same_key | (keys.struck[order][1:] != keys.struck[order][:-1]), True)[: len(order)]]
    again = key[kept][1:] == key[kept][:-1]
    released = keys.released[kept]
    released[:-1] = np.where(again, np.minimum(released[:-1], keys.struck[kept][1:]), released[:-1])
    return kept, released


def _numbers(messages: Messages) -> np.ndarray:
    """Return a channel 0..15 for each channel: its own number, unless another channel has it and one is free."""
    number = messages.origin % 16
    used = np.unique(messages.channel)
    taken = set(number[used[used < 16]].tolist())
    for channel in used[used >= 16].tolist():
        wanted = int(number[channel])
        free = [c for c in range(16) if c not in taken and c != DRUM_CHANNEL]
        if wanted in taken and wanted != DRUM_CHANNEL and free:
            number[channel] = free[0]
        taken.add(int(number[channel]))
    return number
