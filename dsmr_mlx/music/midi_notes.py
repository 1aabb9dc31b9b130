"""Which notes the messages of a MIDI file play: keys, pedals, programs (MIDI 1.0 and its RP-015).

A channel message acts on its channel, whichever track it is in. At one tick, controllers act before keys. All times
are ticks; a channel or key and a tick of `TICK_BITS` bits are packed into one sortable int64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.key_matching import match_keys
from dsmr_mlx.music.midi_clock import Clock
from dsmr_mlx.music.midi_file import MidiFile
from dsmr_mlx.music.midi_track import CONTROL, MAX_TICK, NOTE_OFF, NOTE_ON, PROGRAM, Track
from dsmr_mlx.music.repairs import Repair, Repairs

SUSTAIN, ALL_SOUND_OFF, RESET_CONTROLLERS, ALL_NOTES_OFF = 64, 120, 121, 123  # controllers
PEDAL_DOWN = 64  # from this value on
RELEASES_KEYS = (ALL_SOUND_OFF, ALL_NOTES_OFF, 124, 125, 126, 127)  # the modes 124 to 127 imply "all notes off"
DRUM_CHANNEL = 9
CHANNELS = 16 * 256  # of all ports; channels from here on belong to one track
TICK_BITS = MAX_TICK.bit_length()
MAX_CHANNELS = 1 << (63 - TICK_BITS - 7)
NEVER = 2 * MAX_TICK - 1


@dataclass(frozen=True)
class Messages:
    """Channel messages of simultaneous tracks, E of them: in time within each track, track after track.

    tick, track, channel: `(E,)` int64; kind, first, second: `(E,)` uint8, see `Track`
    origin: `(C,)` int64, the channel in the file of each channel
    end: tick of the last event, also of those that are no channel messages
    """

    tick: np.ndarray
    track: np.ndarray
    channel: np.ndarray
    kind: np.ndarray
    first: np.ndarray
    second: np.ndarray
    origin: np.ndarray
    end: int

    @classmethod
    def of(cls, tracks: list[Track]) -> Messages:
        """Return the messages of simultaneous tracks."""
        number = np.repeat(np.arange(len(tracks)), [len(track.tick) for track in tracks])
        names = ("tick", "channel", "kind", "first", "second")
        columns = {name: np.concatenate([getattr(track, name) for track in tracks]) for name in names}
        end = max(track.end for track in tracks)
        return cls(**columns, track=number, origin=np.arange(CHANNELS), end=end)

    def controls(self, *numbers: int) -> np.ndarray:
        """Return the indices of the messages of some controllers."""
        chosen = np.zeros(256, bool)
        chosen[list(numbers)] = True
        return np.flatnonzero(chosen[self.first] & (self.kind == CONTROL))


@dataclass(frozen=True)
class Keys:
    """Keys struck, N of them, in ticks; `released` is the time without the pedal, `ended` with it.

    struck, released, ended, channel: `(N,)` int64; pitch, velocity: `(N,)` uint8; program: `(N,)` int64.
    """

    struck: np.ndarray
    released: np.ndarray
    ended: np.ndarray
    channel: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray
    program: np.ndarray
    is_drum: np.ndarray


@dataclass(frozen=True)
class Song:
    """Tracks that sound together, with their clock."""

    messages: Messages
    clock: Clock


def songs_of(file: MidiFile) -> list[Song]:
    """Return the songs of a file: one, or in format 2 one for each track with messages, each with its own tempo.

    A track of format 2 without a tempo has that of the others. Raises `UserError` for an invalid division.
    """
    everything = [tempo for track in file.tracks for tempo in track.tempos]
    clock = Clock.of(file.division, everything)
    tracks = [track for track in file.tracks if len(track.tick)]
    if file.format == 2 and len(tracks) > 1:
        file.repairs[Repair.PATTERNS] += len(tracks)
        clocks = [Clock.of(file.division, track.tempos or everything) for track in tracks]
        return [Song(separate_pedals(Messages.of([t])), c) for t, c in zip(tracks, clocks, strict=True)]
    if not tracks:
        return []
    messages = separate_pedals(Messages.of(tracks))
    return [Song(replace(messages, end=max(track.end for track in file.tracks)), clock)]


class Timeline:
    """Events (key, tick) in order, to look up what comes before or after others."""

    def __init__(self, key: np.ndarray, tick: np.ndarray) -> None:
        place = (key << TICK_BITS) | tick
        self._order = np.argsort(place, kind="stable")
        self._place = place[self._order]

    def last(self, key: np.ndarray, tick: np.ndarray) -> np.ndarray:
        """Return the index of the last event of each key at or before a tick, −1 if there is none."""
        i = np.searchsorted(self._place, (key << TICK_BITS) | tick, side="right") - 1
        same = np.append(self._place, -1)[i] >> TICK_BITS == key  # place −1 is of no key
        return np.where(same, np.append(self._order, -1)[i], -1)

    def next_tick(self, key: np.ndarray, tick: np.ndarray) -> np.ndarray:
        """Return the tick of the first event of each key after a tick, `NEVER` if there is none."""
        i = np.searchsorted(self._place, (key << TICK_BITS) | tick, side="right")
        place = np.append(self._place, -1)[i]
        return np.where(place >> TICK_BITS == key, place & ((1 << TICK_BITS) - 1), NEVER)


def separate_pedals(messages: Messages) -> Messages:
    """Give tracks that share a channel, but have a complete pedal of their own, channels of their own.

    A pedal is complete if it goes down and up again, and is up at the end unless no track lifts it after that. Such a
    pedal also stays on its channel, for the tracks there that have none.
    """
    if not len(messages.track) or messages.track[0] == messages.track[-1]:
        return messages
    pedal = messages.controls(SUSTAIN, RESET_CONTROLLERS)
    pedal = pedal[np.lexsort((messages.track[pedal], messages.channel[pedal]))]
    track, channel, tick = messages.track[pedal], messages.channel[pedal], messages.tick[pedal]
    begins = np.append(True, (track[1:] != track[:-1]) | (channel[1:] != channel[:-1]))[: len(pedal)]
    first = np.flatnonzero(begins)
    if len(first) < 2:
        return messages
    last = np.append(first[1:], len(pedal)) - 1
    down = _is_down(messages, pedal)
    lifted = np.append(down[:-1] & ~down[1:] & ~begins[1:], False)
    goes_up, goes_down = np.logical_or.reduceat(lifted, first), np.logical_or.reduceat(down, first)
    last_up = np.full(CHANNELS, -1)
    np.maximum.at(last_up, channel[~down], tick[~down])
    complete = goes_up & (~down[last] | (last_up[channel[first]] <= tick[last]))
    complete &= np.bincount(channel[first][goes_down], minlength=CHANNELS)[channel[first]] > 1
    return _with_own_channels(messages, track[first][complete], channel[first][complete], pedal)


def _with_own_channels(messages: Messages, track: np.ndarray, channel: np.ndarray, pedal: np.ndarray) -> Messages:
    """Move tracks `(K,)` on channels `(K,)` to new channels. pedal: indices of messages to keep on the old ones too."""
    own = np.unique((track << TICK_BITS) | channel)
    line = (messages.track << TICK_BITS) | messages.channel
    place = np.minimum(np.searchsorted(own, line), max(len(own) - 1, 0))
    if not len(own):
        return messages
    moved = own[place] == line
    origin = np.append(messages.origin, own & ((1 << TICK_BITS) - 1))
    if len(origin) > MAX_CHANNELS:
        raise UserError(f"{len(origin):,} channels, expected at most {MAX_CHANNELS:,}")
    order = np.append(np.arange(len(line)), pedal[moved[pedal]])
    channels = np.append(np.where(moved, CHANNELS + place, messages.channel), messages.channel[order[len(line) :]])
    names = ("tick", "track", "kind", "first", "second")
    columns = {name: getattr(messages, name)[order] for name in names}
    return replace(messages, **columns, channel=channels, origin=origin)


def _is_down(messages: Messages, pedal: np.ndarray) -> np.ndarray:
    """Return whether the pedal is down after messages `(P,)` of `SUSTAIN` and `RESET_CONTROLLERS`."""
    return (messages.first[pedal] == SUSTAIN) & (messages.second[pedal] >= PEDAL_DOWN)


def keys_of(messages: Messages, repairs: Repairs, programs: bool = False) -> Keys:
    """Return the keys struck, with their ends.

    A key is released by its own track, by a controller that releases all keys of its channel, or else when it is struck
    again, when another track of its channel releases it, or at the end of the music. A note released while the pedal of
    its channel is down lasts until the pedal goes up. programs: False leaves the programs at 0.
    """
    is_note = np.flatnonzero((messages.kind == NOTE_OFF) | (messages.kind == NOTE_ON))
    struck, released, open_end = _matched(messages, is_note, repairs)
    start, channel = messages.tick[struck], messages.channel[struck]
    released = np.where(released >= 0, messages.tick[released], open_end)
    ended = _sustained(messages, channel, released)
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
    )


def _lines(messages: Messages, index: np.ndarray) -> np.ndarray:
    """Return a number `(I,)` for each combination of track and channel of some messages."""
    track, channel = messages.track[index], messages.channel[index]
    if not len(track) or (track == track[0]).all():
        return channel
    return np.unique((track << TICK_BITS) | channel, return_inverse=True)[1]


def _matched(messages: Messages, is_note: np.ndarray, repairs: Repairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the indices of strikes `(N,)` and of their releases, −1 without one, and then their ends in ticks."""
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


def _sustained(messages: Messages, channel: np.ndarray, released: np.ndarray) -> np.ndarray:
    """Return when keys `(N,)` of channels `(N,)` released at ticks `(N,)` end: when the pedal goes up, if it is down.

    A pedal that never goes up is held until the last release or pedal message of its channel.
    """
    pedal = messages.controls(SUSTAIN, RESET_CONTROLLERS)
    if not len(pedal):
        return released
    pedal = pedal[np.argsort((messages.channel[pedal] << TICK_BITS) | messages.tick[pedal], kind="stable")]
    down, of, tick = _is_down(messages, pedal), messages.channel[pedal], messages.tick[pedal]
    begins = np.append(True, of[1:] != of[:-1])
    edge = down != np.append(False, down[:-1]) & ~begins
    last = np.append(begins[1:], True)
    if down[last].any():
        ends = np.zeros(len(messages.origin), np.int64)
        np.maximum.at(ends, channel, released)
        np.maximum.at(ends, of[last], tick[last])
    else:
        ends = None
    down, of, tick = down[edge], of[edge], tick[edge]
    up = np.append(tick[1:], 0)
    if ends is not None and len(of):
        never = np.append(of[1:] != of[:-1], True)
        up = np.where(never, ends[of], up)
    down, of, tick, up = (column[down] for column in (down, of, tick, up))
    i = Timeline(of, tick).last(channel, released)
    return np.where(i >= 0, np.maximum(released, np.append(up, 0)[i]), released)


def _programs(messages: Messages, index: np.ndarray) -> np.ndarray:
    """Return the programs of messages `(I,)`: of their own track, or else of another track on their channel."""
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
