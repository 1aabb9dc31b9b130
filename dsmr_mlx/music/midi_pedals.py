"""Sustain pedals: which channel they act on, and how long they hold its notes. All times are ticks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.channel_messages import (
    CHANNELS,
    MAX_CHANNELS,
    PEDAL_DOWN,
    RESET_CONTROLLERS,
    SUSTAIN,
    TICK_BITS,
    Messages,
    Timeline,
)


def separate_pedals(messages: Messages) -> Messages:
    """Move tracks that share a channel, but have a complete pedal of their own, to new channels.

    A pedal is complete if it goes down and up again, and is up at the end unless no track lifts it after that. Its
    messages also stay on the old channel, for the tracks there that have no pedal.
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


@dataclass(frozen=True)
class PedalIntervals:
    """I intervals in which a pedal is down, sorted by (channel, down); all `(I,)` int64.

    held: `(I,)` bool, whether it never goes up; `up` is then the end of its notes.
    """

    channel: np.ndarray
    down: np.ndarray
    up: np.ndarray
    held: np.ndarray

    @classmethod
    def of(cls, messages: Messages, channel: np.ndarray, released: np.ndarray) -> PedalIntervals:
        """Return the intervals of all channels.

        A pedal that never goes up is held until the last pedal message or the last release of its channel, whichever is
        later. channel, released: `(N,)`, the channels and ticks of all releases.
        """
        pedal = messages.controls(SUSTAIN, RESET_CONTROLLERS)
        place = (messages.channel[pedal] << TICK_BITS) | messages.tick[pedal]
        if len(messages.origin) > CHANNELS:  # copies come after all tracks
            pedal = pedal[np.lexsort((messages.track[pedal], place))]
        else:
            pedal = pedal[np.argsort(place, kind="stable")]
        down, of, tick = _is_down(messages, pedal), messages.channel[pedal], messages.tick[pedal]
        begins = np.append(True, of[1:] != of[:-1])[: len(of)]
        edge = down != np.append(False, down[:-1])[: len(of)] & ~begins
        last = np.append(begins[1:], True)[: len(of)]
        end = np.zeros(len(messages.origin), np.int64)
        if down[last].any():
            np.maximum.at(end, channel, released)
            np.maximum.at(end, of[last], tick[last])
        down, of, tick = down[edge], of[edge], tick[edge]  # down and up alternate
        held = np.append(of[1:] != of[:-1], True)[: len(of)]
        up = np.where(held, end[of], np.append(tick[1:], 0)[: len(of)])
        return cls(of[down], tick[down], up[down], held[down])

    def sustain(self, channel: np.ndarray, released: np.ndarray) -> np.ndarray:
        """Return the ends of notes by their channels and the ticks of their releases, `(N,)` each: when the pedal goes
        up, if it is down at the release.
        """
        if not len(self.down):
            return released
        i = Timeline(self.channel, self.down).last(channel, released)
        return np.where(i >= 0, np.maximum(released, self.up[i]), released)
