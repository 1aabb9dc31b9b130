"""An independent reader of MIDI files: one event at a time, one note at a time, in exact arithmetic.

It follows the same rules as `dsmr_mlx.music.midi_notes` in the plainest way: lists, stacks and walks over all events.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

MIN_LENGTH = Fraction(1, 1000)
ENDS_KEYS = (120, 123, 124, 125, 126, 127)


@dataclass(frozen=True)
class Event:
    """A channel message."""

    tick: int
    track: int
    channel: int  # 16 · port + channel
    kind: int
    first: int
    second: int


@dataclass
class Note:
    """A key strike and its end."""

    tick: int
    track: int
    channel: int
    pitch: int
    velocity: int
    end: int | None = None
    of: int = 0  # 1 if its track keeps its pedal to itself


def parse(data: bytes) -> tuple[int, int, list[list[Event]], list[list[tuple[int, int]]], list[int]]:
    """Return format, division, and for each track the channel messages, tempo events and last tick."""
    data = data[data.index(b"MThd") :]
    header = int.from_bytes(data[4:8], "big")
    kind, division = int.from_bytes(data[8:10], "big"), int.from_bytes(data[12:14], "big")
    place, tracks, tempos, ends = 8 + header, [], [], []
    while place + 8 <= len(data):
        name, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "big")
        if name == b"MTrk":
            events, changes, end = parse_track(data[place + 8 : place + 8 + length], len(tracks))
            tracks.append(events)
            tempos.append(changes)
            ends.append(end)
        place += 8 + length
    return kind, division, tracks, tempos, ends


def parse_track(body: bytes, number: int) -> tuple[list[Event], list[tuple[int, int]], int]:
    """Return the channel messages, tempo events and last tick of a track chunk."""
    place, tick, status, port = 0, 0, 0, 0
    events: list[Event] = []
    tempos: list[tuple[int, int]] = []

    def number_at() -> int:
        nonlocal place
        value = 0
        while True:
            byte = body[place]
            place += 1
            value = value * 128 + byte % 128
            if byte < 128:
                return value

    while place < len(body):
        tick += number_at()
        byte = body[place]
        if byte >= 0xF0:
            place += 1
            if byte == 0xFF:
                kind = body[place]
                place += 1
            if byte in (0xFF, 0xF0, 0xF7):
                length = number_at()
                content = body[place : place + length]
                place += length
                if byte == 0xFF and kind == 0x51 and len(content) >= 3 and any(content[:3]):
                    tempos.append((tick, int.from_bytes(content[:3], "big")))
                if byte == 0xFF and kind == 0x21 and content:
                    port = content[0]
            else:
                place += {0xF1: 1, 0xF2: 2, 0xF3: 1}.get(byte, 0)
            continue
        if byte >= 0x80:
            status = byte
            place += 1
        size = 1 if status >> 4 in (0xC, 0xD) else 2
        values = [min(value, 127) for value in body[place : place + size]] + [0]
        place += size
        events.append(Event(tick, number, 16 * port + status % 16, status >> 4, values[0], values[1]))
    return events, tempos, tick


def read(data: bytes) -> list[tuple[float, float, int, int]]:
    """Return the pitched notes of a file: onset, offset (seconds), pitch, velocity, by onset and pitch."""
    kind, division, tracks, tempos, ends = parse(data)
    every = [change for changes in tempos for change in changes]
    used = [i for i, events in enumerate(tracks) if events]
    songs = [[i] for i in used] if kind == 2 and len(used) > 1 else [used]
    notes = []
    for song in songs:
        changes = tempos[song[0]] if len(songs) > 1 and tempos[song[0]] else every
        end = max(ends[i] for i in (song if len(songs) > 1 else range(len(tracks)))) if tracks else 0
        for note in play([event for i in song for event in tracks[i]], end):
            if note.channel % 16 != 9:
                at, to = (seconds(tick, changes, division) for tick in (note.tick, note.end))
                notes.append((at, to, note.pitch, note.velocity))
    return on_one_piano(notes)


def seconds(tick: int, changes: list[tuple[int, int]], division: int) -> Fraction:
    """Return the time of a tick."""
    if division & 0x8000:
        frames = 256 - (division >> 8)
        rate = Fraction(30_000, 1001) if frames == 29 else Fraction(frames)
        return Fraction(tick) / (rate * (division & 255))
    now, tempo, time = 0, 500_000, Fraction(0)
    for at, change in sorted(changes, key=lambda change: change[0]):
        if at > tick:
            break
        time += Fraction((at - now) * tempo, 1_000_000 * division)
        now, tempo = at, change
    return time + Fraction((tick - now) * tempo, 1_000_000 * division)


def play(events: list[Event], end: int) -> list[Note]:
    """Return the notes of simultaneous tracks."""
    notes = [note for line in by(events, "track", "channel").values() for note in keys(line, events)]
    stray = strays(events)
    for note in notes:
        note.of = 1 if note.track in private_tracks(events, note.channel) else 0
    for note in notes:
        if note.end is None:
            note.end = next_end(note, notes, stray, events, end)
    result = []
    for note in notes:
        group = [other for other in notes if (other.channel, other.of) == (note.channel, note.of)]
        if note.of:
            group = [other for other in group if other.track == note.track]
        result.append((note, sustained(note, events, max(other.end for other in group))))
    for note, until in result:
        silences = [e.tick for e in events if is_control(e, note, 120) and e.tick > note.tick]
        note.end = min([until, *silences])
    return notes


def by(events: list[Event], *names: str) -> dict[tuple, list[Event]]:
    """Group events."""
    groups = defaultdict(list)
    for event in events:
        groups[tuple(getattr(event, name) for name in names)].append(event)
    return groups


def is_control(event: Event, note: Note, *numbers: int) -> bool:
    """Whether an event is one of these controllers on the channel of a note."""
    return event.kind == 0xB and event.channel == note.channel and event.first in numbers


def period(tick: int, channel: int, events: list[Event]) -> int:
    """Return how many controllers that end keys a channel has had at a tick, that tick included."""
    return sum(e.kind == 0xB and e.channel == channel and e.first in ENDS_KEYS and e.tick <= tick for e in events)


def matched(line: list[Event], events: list[Event]) -> tuple[list[tuple[Event, Event]], list[Event], list[Event]]:
    """Return pairs of strikes and releases of a track on a channel, strikes without and releases without."""
    groups = defaultdict(list)
    for event in line:
        if event.kind in (8, 9):
            groups[event.first, period(event.tick, event.channel, events)].append(event)
    pairs, left, without = [], [], []
    for group in groups.values():
        stack, closed = [], []
        for event in group:
            if event.kind == 9 and event.second:
                stack.append(event)
            elif stack:
                closed += [stack.pop(), event]
            else:
                without.append(event)
        left += stack
        queue = []
        for event in group:
            if event.kind == 9 and event.second and any(event is other for other in closed):
                queue.append(event)
            elif any(event is other for other in closed):
                pairs.append((queue.pop(0), event))
    return pairs, left, without


def keys(line: list[Event], events: list[Event]) -> list[Note]:
    """Return the strikes of one track on one channel; those without a release have no end yet."""
    pairs, left, _ = matched(line, events)
    ends = [(on, off.tick) for on, off in pairs] + [(on, None) for on in left]
    order = {id(event): i for i, event in enumerate(line)}
    ends.sort(key=lambda pair: order[id(pair[0])])
    return [Note(on.tick, on.track, on.channel, on.first, on.second, end) for on, end in ends]


def strays(events: list[Event]) -> list[Event]:
    """Return the releases that release nothing in their own track."""
    return [event for line in by(events, "track", "channel").values() for event in matched(line, events)[2]]


def next_end(note: Note, notes: list[Note], stray: list[Event], events: list[Event], end: int) -> int:
    """Return where a strike without a release ends."""
    same = [n for n in notes if (n.channel, n.pitch, n.of) == (note.channel, note.pitch, note.of)]
    mine = private_tracks(events, note.channel)
    if note.of:
        same = [n for n in same if n.track == note.track]
    place = next(i for i, other in enumerate(same) if other is note)
    candidates = [n.tick for n in same[place + 1 :] if n.track == note.track][:1]
    candidates += [n.tick for n in same if n.tick > note.tick]
    for event in stray:
        shares = event.track == note.track if note.of else event.track not in mine
        if shares and (event.channel, event.first) == (note.channel, note.pitch) and event.tick > note.tick:
            candidates.append(event.tick)
    candidates += [e.tick for e in events if is_control(e, note, *ENDS_KEYS) and e.tick > note.tick]
    return min([*candidates, end])


def private_tracks(events: list[Event], channel: int) -> set[int]:
    """Return the tracks that keep their pedal to themselves."""
    pedals = defaultdict(list)
    for event in events:
        if event.kind == 0xB and event.channel == channel and event.first in (64, 121):
            pedals[event.track].append((event.tick, event.first == 64 and event.second >= 64))
    pressed = [track for track, pedal in pedals.items() if any(down for _, down in pedal)]
    result = set()
    for track in pressed if len(pressed) > 1 else ():
        pedal = pedals[track]
        lifted = any(a and not b for (_, a), (_, b) in pairwise(pedal))
        later = [t for other in pedals.values() for t, down in other if not down and t > pedal[-1][0]]
        if lifted and (not pedal[-1][1] or not later):
            result.add(track)
    return result


def sustained(note: Note, events: list[Event], last_release: int) -> int:
    """Return where a note ends with the pedal."""
    pedal = [e for e in events if is_control(e, note, 64, 121) and (not note.of or e.track == note.track)]
    pedal.sort(key=lambda event: event.tick)
    down = False
    for event in pedal:
        is_down = event.first == 64 and event.second >= 64
        if event.tick > note.end and down and not is_down:
            return event.tick
        if event.tick > note.end and not down:
            return note.end
        down = is_down
    return max(note.end, last_release, pedal[-1].tick) if down else note.end


def on_one_piano(notes: list[tuple[Fraction, Fraction, int, int]]) -> list[tuple[float, float, int, int]]:
    """Keep the longest, then loudest of each onset and pitch, end notes where their pitch begins again."""
    best = {}
    for note in notes:
        key = note[0], note[2]
        best[key] = max(best.get(key, note), note, key=lambda n: (n[1], n[3]))
    first = min((onset for onset, _ in best), default=0)
    result = []
    for (onset, pitch), (_, end, _, velocity) in best.items():
        again = [at for at, other in best if other == pitch and at > onset]
        end = min([max(end, onset + MIN_LENGTH), *again])
        result.append((float(onset - first), float(end - first), pitch, velocity))
    return sorted(result, key=lambda note: (note[0], note[2]))
