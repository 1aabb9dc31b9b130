"""Read MIDI files as Aria's tokenizer does: raw key releases, the pedal as intervals, whole milliseconds.

Unlike Aria's code, it applies tempo changes within durations, and repairs files as `music.midi` does. For files with
one tempo and no faults, the ids are the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.channel_messages import DRUM_CHANNEL, Messages, Timeline
from dsmr_mlx.music.midi_clock import Clock
from dsmr_mlx.music.midi_file import MidiFile
from dsmr_mlx.music.midi_notes import Keys, keys_of, songs_of
from dsmr_mlx.music.midi_track import PROGRAM
from dsmr_mlx.music.notes import DRUMS, Notes
from dsmr_mlx.tokenizers.aria.encoding import TimedMusic
from dsmr_mlx.tokenizers.aria.vocabulary import DURATIONS, INSTRUMENT_OF_GROUP, STEP_MS

DRUM = -1  # as the instrument of a note


class FileMusic(NamedTuple):
    """The music of a file, and its instruments in ascending order, even those without notes."""

    music: TimedMusic
    instruments: list[int]


class _Part(NamedTuple):
    """The N notes of one song, in the order of Aria, and I pedal intervals; times in `Clock.units`.

    up: infinite if the pedal never goes up; named: the instruments of its channels
    """

    struck: np.ndarray
    ended: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray
    instrument: np.ndarray
    down: np.ndarray
    up: np.ndarray
    named: list[int]


def read_music(file: MidiFile, *, programs: bool, pedal: bool, seconds: float, begin: float | None = None) -> FileMusic:
    """Return the music of a file; times count from its first event, a note or, with `pedal`, the pedal.

    programs: keep instruments and drums, and drop channels with programs that the vocabulary lacks; if not, all
    channels but drums are one piano. pedal: keep the intervals in which a key is released. seconds: the length allowed.
    begin: only the notes that begin so many seconds after the first one or later, and the pedal from the first of these
    on. Raises `UserError` if there is no note, or more than `seconds`.
    """
    songs = songs_of(file)
    parts = [_part(song.messages, song.clock, file, programs) for song in songs]
    *columns, down, up = (np.concatenate(column) for column in zip(*(part[:-1] for part in parts), strict=True))
    if begin is not None and len(columns[0]):
        late = columns[0] >= columns[0].min() + (1e6 * begin - 1) * songs[0].clock.tpq  # to the microsecond
        columns = [column[late] for column in columns]
        down, up = _pedals_of(down, up, *columns[:2])
    struck, ended, *others = columns
    if not len(struck):
        raise UserError(f"no {'note of an instrument that Aria has' if programs else 'pitched note'}, expected one")
    time, is_down = _pedal_events(down, up) if pedal else (np.zeros(0), np.zeros(0, bool))
    start, unit = min(struck.min(), time.min(initial=np.inf)), 1000 * songs[0].clock.tpq
    length = (max(ended.max(), time.max(initial=-np.inf)) - start) / (1000 * unit)
    if not length <= seconds:
        raise UserError(f"{length:.0f} s long with its pedal, expected at most {seconds:.0f} s")
    order = np.argsort(struck, kind="stable")
    onset, duration, time = (np.rint(t / unit).astype(np.int64) for t in (struck - start, ended - struck, time - start))
    notes = (column[order] for column in (onset, duration, *others))
    return FileMusic(TimedMusic(*notes, time, is_down), sorted({i for part in parts for i in part.named}))


def of_notes(notes: Notes, programs: bool) -> FileMusic:
    """Return notes as music without a pedal; times count from the first onset. Simultaneous notes are sorted by end."""
    if not programs:
        notes = notes.as_piano()
    program = np.zeros(len(notes), np.int64) if notes.program is None else notes.program.astype(np.int64)
    instrument = np.where(program == DRUMS, DRUM, INSTRUMENT_OF_GROUP[np.minimum(program, 127) // 8])
    known = (program == DRUMS) | (instrument >= 0)
    notes, instrument = notes.take(known), instrument[known]
    start = notes.onset.min(initial=np.inf)
    onset = np.rint(1000 * (notes.onset - start)).astype(np.int64)
    duration = np.rint(1000 * (notes.offset - notes.onset)).astype(np.int64)
    order = np.lexsort((notes.pitch, np.minimum(duration, STEP_MS * (DURATIONS - 1)), onset))
    columns = (onset, duration, notes.pitch.astype(np.int64), notes.velocity.astype(np.int64), instrument)
    music = TimedMusic(*(column[order] for column in columns), np.zeros(0, np.int64), np.zeros(0, bool))
    return FileMusic(music, sorted(set(instrument[instrument >= 0].tolist())))


def _part(messages: Messages, clock: Clock, file: MidiFile, programs: bool) -> _Part:
    """Return a song. Its notes are ordered by onset, then track by track as their keys are released."""
    keys = keys_of(messages, file.repairs)
    instrument, kept, named = np.zeros(len(keys.struck), np.int64), ~keys.is_drum, [0]
    if programs:
        of_channel, named = _instruments(messages, keys)
        instrument = np.where(keys.is_drum, DRUM, of_channel[messages.origin[keys.channel]])
        kept = keys.is_drum | (instrument >= 0)
    order = np.lexsort((keys.release, keys.struck))
    order = order[kept[order]]
    up = _pedal_ends(keys)
    ended = _sustained(keys, up)
    columns = (keys.pitch.astype(np.int64), keys.velocity.astype(np.int64), instrument)
    used = _holds_a_note(keys, up) & (messages.origin[keys.pedals.channel] % 16 != DRUM_CHANNEL)
    rises = np.where(keys.pedals.held, np.inf, clock.units(up))
    return _Part(
        *(clock.units(ticks[order]) for ticks in (keys.struck, ended)),
        *(column[order] for column in columns),
        clock.units(keys.pedals.down[used]),
        rises[used],
        named,
    )


def _instruments(messages: Messages, keys: Keys) -> tuple[np.ndarray, list[int]]:
    """Return the instrument of each channel of the file, −2 for channels to drop, and those of the pitched channels.

    A channel has the instrument of its last program. It is dropped if any of its programs has no instrument.
    """
    of_channel = np.zeros(int(messages.origin.max()) + 1, np.int64)
    changes = np.flatnonzero(messages.kind == PROGRAM)
    changes = changes[np.argsort(messages.tick[changes], kind="stable")]
    channel, group = messages.origin[messages.channel[changes]], messages.first[changes] // 8
    of_channel[channel] = INSTRUMENT_OF_GROUP[group]  # of several values the last is kept
    of_channel[channel[INSTRUMENT_OF_GROUP[group] < 0]] = -2
    pitched = np.union1d(channel[channel % 16 != DRUM_CHANNEL], messages.origin[keys.channel[~keys.is_drum]])
    named = np.unique(of_channel[pitched])
    return of_channel, named[named >= 0].tolist()


def _pedal_ends(keys: Keys) -> np.ndarray:
    """Return the ticks `(I,)` at which the pedals go up; if never, the release of the last note struck."""
    pedals = keys.pedals
    up = pedals.up.copy()
    for i in np.flatnonzero(pedals.held):
        notes = np.flatnonzero(keys.channel == pedals.channel[i])
        last = notes[np.lexsort((keys.release[notes], keys.struck[notes]))][-1:]
        up[i] = keys.released[last[0]] if len(last) else pedals.down[i]
    return up


def _sustained(keys: Keys, up: np.ndarray) -> np.ndarray:
    """Return the ends `(N,)` of notes: their releases or, if a pedal was down before, when that goes up."""
    if not len(up):
        return keys.released
    i = Timeline(keys.pedals.channel, keys.pedals.down).last(keys.channel, keys.released - 1)
    return np.where((i >= 0) & ~keys.is_drum, np.maximum(keys.released, up[i]), keys.released)


def _holds_a_note(keys: Keys, up: np.ndarray) -> np.ndarray:
    """Return whether a key of the channel is released in each interval: bool `(I,)`."""
    if not len(keys.released):
        return np.zeros(len(up), bool)
    first = Timeline(keys.channel, keys.released).next_tick(keys.pedals.channel, keys.pedals.down)
    return first <= up


def _pedals_of(
    down: np.ndarray, up: np.ndarray, struck: np.ndarray, ended: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pedals `(I,)` from the first of some notes `(N,)` on, without those in which none of them ends."""
    down, ended = np.maximum(down, struck.min(initial=np.inf)), np.sort(ended)
    used = np.searchsorted(ended, up, side="right") > np.searchsorted(ended, down, side="right")
    return down[used], up[used]


def _pedal_events(down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge pedals into one that is down whenever any is. Return its times, and whether it goes down: `(P,)` each."""
    order = np.argsort(down, kind="stable")
    down, up = down[order], np.maximum.accumulate(up[order]) if len(up) else up
    begins = np.append(True, down[1:] > up[:-1])[: len(down)]
    ends = np.append(begins[1:], True)[: len(down)]
    time = np.stack([down[begins], up[ends]], axis=1).ravel()
    is_down = np.tile([True, False], int(begins.sum()))
    return time[np.isfinite(time)], is_down[np.isfinite(time)]
