"""Derive notes from the messages of a MIDI file: keys, pedals, programs (MIDI 1.0 and its RP-015).

A channel message acts on its channel, whichever track it is in. At one tick, controllers act before keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dsmr_mlx.music.channel_messages import (
    ALL_SOUND_OFF,
    DRUM_CHANNEL,
    NEVER,
    RELEASES_KEYS,
    TICK_BITS,
    Messages,
    Timeline,
)
from dsmr_mlx.music.key_matching import match_keys
from dsmr_mlx.music.midi_clock import Clock
from dsmr_mlx.music.midi_file import MidiFile
from dsmr_mlx.music.midi_pedals import PedalIntervals, separate_pedals
from dsmr_mlx.music.midi_track import NOTE_OFF, NOTE_ON, PROGRAM
from dsmr_mlx.music.repairs import Repair, Repairs


@dataclass(frozen=True)
class Keys:
    """N struck keys; times in ticks, `released` without the pedal, `ended` with it.

    struck, released, ended, channel, program: `(N,)` int64; pitch, velocity: `(N,)` uint8; is_drum: `(N,)` bool
    pedals: the pedal intervals of all channels
    release: `(N,)` int64, the index of the message that released each key, `NEVER` if none did
    """

    struck: np.ndarray
    released: np.ndarray
    ended: np.ndarray
    channel: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray
    program: np.ndarray
    is_drum: np.ndarray
    pedals: PedalIntervals
    release: np.ndarray

    def take(self, index: np.ndarray) -> Keys:
        """Return some of the keys, by a mask `(N,)` or by indices, and all pedals."""
        columns = {name: column[index] for name, column in vars(self).items() if name != "pedals"}
        return replace(self, **columns)


@dataclass(frozen=True)
class Song:
    """Tracks that sound together, with their clock."""

    messages: Messages
    clock: Clock


def songs_of(file: MidiFile) -> list[Song]:
    """Return the songs of a file: one, or in format 2 one for each track with messages, each with its own tempo.

    A track of format 2 without a tempo uses those of the others. Raises `UserError` for an invalid division.
    """
    all_tempos = [tempo for track in file.tracks for tempo in track.tempos]
    clock = Clock.of(file.division, all_tempos)
    tracks = [track for track in file.tracks if len(track.tick)]
    if file.format == 2 and len(tracks) > 1:
        file.repairs[Repair.PATTERNS] += len(tracks)
        clocks = [Clock.of(file.division, track.tempos or all_tempos) for track in tracks]
        return [Song(separate_pedals(Messages.of([t])), c) for t, c in zip(tracks, clocks, strict=True)]
    if not tracks:
        return []
    messages = separate_pedals(Messages.of(tracks))
    return [Song(replace(messages, end=max(track.end for track in file.tracks)), clock)]


def keys_of(messages: Messages, repairs: Repairs, programs: bool = False) -> Keys:
    """Return the keys struck, with their ends.

    A key is released by its own track, by a controller that releases all keys of its channel, or else when it is struck
    again, when another track of its channel releases it, or at the end of the music. A note released while the pedal of
    its channel is down lasts until the pedal goes up. programs: False leaves the programs at 0.
    """
    is_note = np.flatnonzero((messages.kind == NOTE_OFF) | (messages.kind == NOTE_ON))
    struck, released, open_end = _matched(messages, is_note, repairs)
    start, channel = messages.tick[struck], messages.channel[struck]
    release = np.where(released >= 0, released, NEVER)
    released = np.where(released >= 0, messages.tick[released], open_end)
    pedals = PedalIntervals.of(messages, channel, released)
    ended = pedals.sustain(channel, released)
    silences = messages.controls(ALL_SOUND_OFF)
    if len(silences):
        of = messages.origin[messages.channel[silences]]
        ended = np.minimum(ended, Timeline(of, messages.tick[silences]).next_tick(messages.origin[channel], start))
    return Keys(
        struck=start,
        released=released,
        ended=ended,
        channel=channel,
        pitch=messages.first[struck],
        velocity=messages.second[struck],
        program=_programs(messages, struck) if programs else np.zeros(len(struck), np.int64),
        is_drum=messages.origin[channel] % 16 == DRUM_CHANNEL,
        pedals=pedals,
        release=release,
    )


def _lines(messages: Messages, index: np.ndarray) -> np.ndarray:
    """Return a number `(I,)` for each combination of track and channel of some messages."""
    track, channel = messages.track[index], messages.channel[index]
    if not len(track) or (track == track[0]).all():
        return channel
    return np.unique((track << TICK_BITS) | channel, return_inverse=True)[1]


def _matched(messages: Messages, is_note: np.ndarray, repairs: Repairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the indices of strikes and of their releases, −1 if none, and the end ticks of strikes without one, else
    `NEVER`: `(N,)` each.
    """
    strike = (messages.kind[is_note] == NOTE_ON) & (messages.second[is_note] > 0)
    key = _lines(messages, is_note) * 128 + messages.first[is_note]
    period, period_end = _periods(messages, is_note)
    if period is None:
        found = match_keys(key.astype(np.uint16) if len(key) and key.max() < 1 << 16 else key, strike)
    else:  # a release does not reach back beyond a controller that releases all keys
        found = match_keys(np.unique((key << TICK_BITS) | period, return_inverse=True)[1], strike)
    matched, opened = is_note[found.strikes], is_note[found.open_strikes]
    ends = np.full(len(matched) + len(opened), NEVER)
    if len(opened):
        strays = is_note[found.stray_releases]
        end = _open_ends(messages, is_note[strike], key[strike], opened, key[found.open_strikes], strays)
        by_controller = np.full(len(opened), NEVER) if period_end is None else period_end[found.open_strikes]
        repairs[Repair.NO_NOTE_OFF] += int((by_controller == NEVER).sum())
        ends[len(matched) :] = np.minimum(end, by_controller)
    releases = np.append(is_note[found.releases], np.full(len(opened), -1))
    return np.append(matched, opened), releases, ends


def _periods(messages: Messages, index: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the periods `(I,)` of messages between controllers that release all keys, and their ends in ticks.

    None without such controllers.
    """
    modes = messages.controls(*RELEASES_KEYS)
    if not len(modes):
        return None, None
    timeline = Timeline(messages.origin[messages.channel[modes]], messages.tick[modes])
    channel, tick = messages.origin[messages.channel[index]], messages.tick[index]
    ends = timeline.next_tick(channel, tick)
    return np.unique(ends, return_inverse=True)[1], ends


def _open_ends(
    messages: Messages,
    strikes: np.ndarray,
    key: np.ndarray,
    opened: np.ndarray,
    opened_key: np.ndarray,
    strays: np.ndarray,
) -> np.ndarray:
    """Return the ends of strikes without a release.

    strikes: indices of all strikes `(S,)`, key: their keys by track and channel; opened, opened_key: those without a
    release; strays: releases without a strike.
    """
    order = np.lexsort((strikes, key))
    again = np.append(key[order][1:] == key[order][:-1], False)
    following = np.where(again, messages.tick[np.append(strikes[order][1:], 0)], NEVER)
    by_index = np.empty(len(messages.tick), np.int64)
    by_index[strikes[order]] = following
    ends = np.minimum(by_index[opened], messages.end)
    shared, tick = messages.channel[opened] * 128 + messages.first[opened], messages.tick[opened]
    for others in (strikes, strays):  # of all tracks of the channel
        timeline = Timeline(messages.channel[others] * 128 + messages.first[others], messages.tick[others])
        ends = np.minimum(ends, timeline.next_tick(shared, tick))
    return ends


def _programs(messages: Messages, index: np.ndarray) -> np.ndarray:
    """Return the programs of messages `(I,)`: of their own track, else of another track on their channel."""
    changes = np.flatnonzero(messages.kind == PROGRAM)
    program = np.zeros(len(index), np.int64)
    if not len(changes):
        return program
    channel, tick = messages.origin[messages.channel[index]], messages.tick[index]
    shared = Timeline(messages.origin[messages.channel[changes]], messages.tick[changes]).last(channel, tick)
    program = np.where(shared >= 0, messages.first[changes[shared]], program)
    lines = _lines(messages, np.append(changes, index))
    own_lines, of = lines[: len(changes)], lines[len(changes) :]
    own = Timeline(own_lines, messages.tick[changes]).last(of, tick)
    program = np.where(np.isin(of, own_lines), np.where(own >= 0, messages.first[changes[own]], 0), program)
    return program.astype(np.int64)
