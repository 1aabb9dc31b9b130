"""The messages of a MIDI file as one player would send them, for the notes that `midi.read_notes` reads."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.channel_messages import (
    ALL_SOUND_OFF,
    CHANNELS,
    DRUM_CHANNEL,
    RESET_CONTROLLERS,
    SUSTAIN,
    Messages,
)
from dsmr_mlx.music.midi import READ_LIMITS, check_strikes, read_bytes
from dsmr_mlx.music.midi_file import MidiFile, read_midi_file
from dsmr_mlx.music.midi_notes import Keys, keys_of, songs_of
from dsmr_mlx.music.midi_track import CONTROL, NOTE_OFF, NOTE_ON, ONE_DATA_BYTE
from dsmr_mlx.music.notes import without_overlaps
from dsmr_mlx.music.repairs import warn_of_repairs

RELEASE_VELOCITY = 64  # MIDI 1.0: of keyboards that do not sense it
MAX_COPIES = 16  # of a message for all sound off; there are no more channels to play on
PEDALS, OTHERS, RELEASES, STRIKES, SHORT_RELEASES, HELD_PEDALS = range(6)  # the order of messages at one tick


class TimedBytes(NamedTuple):
    """A channel message of two or three bytes and its time in seconds after the first pitched note."""

    time: float
    message: bytes


def read_performance(source: bytes | str | os.PathLike) -> list[TimedBytes]:
    """Read the channel messages of a MIDI file in order of time. A pitch is released before it is struck again.

    source: a path, or the bytes of a file

    Keys go up as in `midi_notes`, so every strike has a release; pedals and other controllers are those of the file. At
    one time controllers come first. Channels that differ only in track or port get different numbers while some are
    free. Before the first pitched note, drums are dropped and other messages are moved to 0 s; messages after the last
    note are dropped.

    Warns and raises `UserError` like `midi.read_notes`.
    """
    path = None if isinstance(source, bytes) else source
    try:
        file = read_midi_file(source if isinstance(source, bytes) else read_bytes(source))
        check_strikes(file, READ_LIMITS)
        timed = _timed_messages(file)
    except UserError as error:
        raise error if path is None else UserError(f"{path}: {error}") from error
    warn_of_repairs(path, +file.repairs)
    return timed


def _timed_messages(file: MidiFile) -> list[TimedBytes]:
    """Return the messages of all songs of a file."""
    timed: list[tuple[float, int, bytes]] = []
    start, end, drums_end = np.inf, -np.inf, -np.inf
    songs = [(song, keys_of(song.messages, file.repairs)) for song in songs_of(file)]
    for song, keys in songs:
        struck, ended, pitched = song.clock.seconds(keys.struck), song.clock.seconds(keys.ended), ~keys.is_drum
        notes = without_overlaps(struck[pitched], ended[pitched], keys.pitch[pitched], keys.velocity[pitched])
        start, end = notes.onset.min(initial=start), notes.offset.max(initial=end)
        drums_end = ended[keys.is_drum].max(initial=drums_end)
    if start == np.inf:
        raise UserError("no pitched note, expected at least one")
    if end - start > READ_LIMITS.seconds:
        raise UserError(f"{end - start:.0f} s long, expected at most {READ_LIMITS.seconds:.0f} s")
    for song, keys in songs:
        tick, order, data = _rows(song.messages, keys.take(song.clock.seconds(keys.struck) >= start))
        timed += zip(song.clock.seconds(tick).tolist(), order.tolist(), data, strict=True)
    timed.sort(key=lambda row: row[:2])
    last = max(end, drums_end)
    return [TimedBytes(max(time - float(start), 0.0), message) for time, _, message in timed if time <= last]


def _rows(messages: Messages, keys: Keys) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """Return tick, order and bytes of all messages."""
    others, to = _other_messages(messages)
    struck, released = _one_at_a_time(keys)
    held, n, start = keys.pedals.held, len(struck), keys.struck[struck]
    pedal = np.full(np.count_nonzero(held), SUSTAIN)
    is_pedal = (messages.kind[others] == CONTROL) & np.isin(messages.first[others], (SUSTAIN, RESET_CONTROLLERS))
    order = [
        np.where(is_pedal, PEDALS, OTHERS),
        np.full(n, STRIKES),
        np.where(released > start, RELEASES, SHORT_RELEASES),
    ]
    columns = (
        [messages.tick[others], start, released, keys.pedals.up[held]],
        [*order, np.full(len(pedal), HELD_PEDALS)],
        [messages.kind[others], np.full(n, NOTE_ON), np.full(n, NOTE_OFF), np.full(len(pedal), CONTROL)],
        [to, keys.channel[struck], keys.channel[struck], keys.pedals.channel[held]],
        [messages.first[others], keys.pitch[struck], keys.pitch[struck], pedal],
        [messages.second[others], keys.velocity[struck], np.full(n, RELEASE_VELOCITY), np.zeros_like(pedal)],
    )
    tick, order, kind, channel, first, second = (np.concatenate(column) for column in columns)
    rows = zip(kind.tolist(), _numbers(messages)[channel].tolist(), first.tolist(), second.tolist(), strict=True)
    data = [bytes((k << 4 | c, a) if k in ONE_DATA_BYTE else (k << 4 | c, a, b)) for k, c, a, b in rows]
    by_time = np.lexsort((order, tick))  # stable
    return tick[by_time], order[by_time], [data[i] for i in by_time.tolist()]


def _other_messages(messages: Messages) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of all messages but notes, in order of tracks, and their channels.

    "All sound off" goes to a channel and to all channels of single tracks that were made from it.
    """
    others = np.flatnonzero((messages.kind != NOTE_OFF) & (messages.kind != NOTE_ON))
    others = others[np.argsort(messages.track[others], kind="stable")]
    to, silences, channels = messages.channel[others], messages.controls(ALL_SOUND_OFF), np.unique(messages.channel)
    origin = messages.origin[channels]
    for channel in channels[np.isin(origin, origin[channels >= CHANNELS])][:MAX_COPIES]:
        of = messages.channel[silences]
        more = silences[(messages.origin[of] == messages.origin[channel]) & (of != channel)]
        others, to = np.append(others, more), np.append(to, np.full(len(more), channel))
    return others, to


def _one_at_a_time(keys: Keys) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices `(S,)` of the keys to strike and the ticks of their releases.

    Of several strikes of a pitch at one tick, the longest is kept, as in the notes. A pitch that is struck again, on
    any channel, is released before that; drums are separate.
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
