"""Record generated tokens in MIDI files that grow while the music is made.

After every write a file is a complete MIDI file, see `music.growing_midi`.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from dsmr_mlx.common.files import write_atomically
from dsmr_mlx.music.growing_midi import GrowingMidi
from dsmr_mlx.music.midi import midi_bytes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import Moment
from dsmr_mlx.tokenizers.keyboard import Keyboard, KeyEvent

SECONDS_BETWEEN_WRITES = 10  # of music, not of wall time: the same music gives the same bytes
TOKENS_BETWEEN_WRITES, GROWTH = 1000, 1.2  # if the whole file is rewritten: at growing intervals


class Recording(Protocol):
    """Writes one lane of music into a MIDI file. Its figures are those of the music after the prompt.

    Methods raise `OSError` if the file cannot be written.
    """

    path: Path

    def prompt(self, tokens: list[int]) -> None:
        """Begin the file with these tokens, which are not counted; what is shown is left out."""
        ...

    def play(self, token: int) -> None:
        """Add one token; the file is written at intervals."""
        ...

    def close(self) -> None:
        """Release the keys that are down and complete the file."""
        ...

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        ...

    @property
    def notes(self) -> int:
        """The number of notes."""
        ...

    @property
    def seconds(self) -> float:
        """The end of the last note."""
        ...

    @property
    def lowest(self) -> int:
        """The lowest pitch."""
        ...

    @property
    def highest(self) -> int:
        """The highest pitch."""
        ...


class KeyRecording:
    """A `Recording` in constant memory, for vocabularies with `EventGrammar.plays_keys`."""

    def __init__(self, path: str | os.PathLike, tokenizer: Tokenizer, text: str, before: Moment | None = None):
        grammar = tokenizer.event_grammar()
        self.path = Path(path)
        self.keyboard = Keyboard(grammar, before)
        self.tokenizer = tokenizer
        self.token_events = tokenizer.token_events
        self.file = GrowingMidi(path, text)
        self.seconds_per_tick = grammar.seconds_per_tick
        self.write_at = self._later()
        self._count_from_here()

    def prompt(self, tokens: list[int]) -> None:
        """See `Recording.prompt`."""
        for token in self.tokenizer.without_shown(tokens).tolist():
            self._play(token)
        self._count_from_here()

    def _count_from_here(self) -> None:
        self.start = self.finished = self.keyboard.tick
        self.tokens = self.notes = 0
        self.lowest, self.highest = 127, 0
        self.uncounted = set(self.keyboard.down)  # keys that were pressed before
        self.pressed_at: dict[int, int] = {}  # tick by pitch

    @property
    def seconds(self) -> float:
        """See `Recording.seconds`."""
        return (self.finished - self.start) * self.seconds_per_tick

    def play(self, token: int) -> None:
        """See `Recording.play`."""
        self.tokens += 1
        self._play(token)
        if self.keyboard.tick >= self.write_at:
            self.file.write()
            self.write_at = self._later()

    def close(self) -> None:
        """See `Recording.close`."""
        self._add(self.keyboard.release_all())
        self.file.close()

    def _play(self, token: int) -> None:
        for event in (token,) if self.token_events is None else self.token_events[token]:
            self._add(self.keyboard.play(event))

    def _later(self) -> float:
        return self.keyboard.tick + SECONDS_BETWEEN_WRITES / self.seconds_per_tick

    def _add(self, events: Iterable[KeyEvent]) -> None:
        for tick, pitch, velocity in events:
            self.file.add(round(1000 * tick * self.seconds_per_tick), pitch, velocity)
            if velocity:
                self.pressed_at[pitch] = tick
                self.lowest, self.highest = min(self.lowest, pitch), max(self.highest, pitch)
            elif pitch in self.uncounted:
                self.uncounted.remove(pitch)
            elif tick > self.pressed_at[pitch]:  # otherwise another note has replaced it at once
                self.notes, self.finished = self.notes + 1, tick


class DecodedRecording:
    """A `Recording` of ids that are only decodable together: all are kept, and the whole file is rewritten.

    context: ids before them that are needed to decode them.
    """

    def __init__(self, path: str | os.PathLike, tokenizer: Tokenizer, text: str, context: Sequence[int] = ()):
        self.path, self.tokenizer, self.text = Path(path), tokenizer, text
        self.context = list(context)
        self.ids: list[int] = []
        self.prompt_length, self.write_at = 0, TOKENS_BETWEEN_WRITES

    def prompt(self, tokens: list[int]) -> None:
        """See `Recording.prompt`."""
        self.ids += tokens
        self.prompt_length = len(self.ids)

    @property
    def tokens(self) -> int:
        """See `Recording.tokens`."""
        return len(self.ids) - self.prompt_length

    @property
    def notes(self) -> int:
        """See `Recording.notes`."""
        return len(self._new())

    @property
    def seconds(self) -> float:
        """See `Recording.seconds`."""
        return self._new().duration

    @property
    def lowest(self) -> int:
        """See `Recording.lowest`."""
        return int(self._new().pitch.min())

    @property
    def highest(self) -> int:
        """See `Recording.highest`."""
        return int(self._new().pitch.max())

    def play(self, token: int) -> None:
        """See `Recording.play`."""
        self.ids.append(token)
        if len(self.ids) >= self.write_at:
            self.write_at = int(GROWTH * len(self.ids)) + TOKENS_BETWEEN_WRITES
            self.close()

    def close(self) -> None:
        """See `Recording.close`; more tokens may follow."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, midi_bytes(notes_after(self.tokenizer, self.context, self.ids), self.text))

    def _new(self) -> Notes:
        return notes_after(
            self.tokenizer, self.context + self.ids[: self.prompt_length], self.ids[self.prompt_length :]
        )


def record(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    text: str,
    before: Moment | None = None,
    recent: Sequence[int] = (),
) -> Recording:
    """Return a recording for a vocabulary.

    text: stored as a marker at the start, see `midi.read_text`
    before: the moment from which the music continues; None: the beginning of a piece. Keys that are down then are not
        recorded
    recent: the last ids before, for vocabularies whose ids cannot be decoded one by one
    """
    grammar = tokenizer.event_grammar()
    if grammar is not None and grammar.plays_keys:
        return KeyRecording(path, tokenizer, text, before)
    return DecodedRecording(path, tokenizer, text, [] if before is None else context(tokenizer, before, recent))


def context(tokenizer: Tokenizer, moment: Moment, recent: Sequence[int]) -> list[int]:
    """The ids that are needed to decode what follows: the `recent` ones from the first place where a piece could begin,
    such as a bar. Without such a place, ids that lead into the middle of the current bar.
    """
    grammar = tokenizer.event_grammar()
    if grammar is None:
        return list(recent)
    events = tokenizer.to_events(recent)
    begins = grammar.allowed[grammar.start] & (grammar.bar if grammar.bar.any() else True)
    places = np.flatnonzero(begins[events])
    if len(places):
        events = events[places[0] :]
    elif not grammar.bar.any() or moment.phase in (0, grammar.first_phase):
        return []
    else:
        earlier = np.flatnonzero((grammar.position >= 0) & (grammar.position <= moment.phase))
        last = earlier[np.argsort(grammar.position[earlier])][-1:]
        events = np.append(np.flatnonzero(grammar.bar)[:1], last)
    ids = tokenizer.from_events(events)
    return ids[~np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id])].tolist()


def notes_after(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> Notes:
    """The notes that `ids` add to the music of the ids `before`.

    Time 0 is the end of that music, or the first new onset if that is earlier.
    """
    before, ids = np.asarray(before, np.int64), np.asarray(ids, np.int64)
    if not len(before) or tokenizer.event_grammar() is None:
        return tokenizer.decode(ids)
    known, notes = tokenizer.decode(before), tokenizer.decode(np.concatenate([before, ids]))
    seconds = tokenizer.seconds(before)
    left = Counter(zip(*_keys(known), strict=True))
    is_new = np.ones(len(notes), bool)
    for i, key in enumerate(zip(*_keys(notes), strict=True)):
        if left[key]:
            left[key] -= 1
            is_new[i] = False
    new = notes.take(is_new)
    return new.shifted(-min(known.duration if seconds is None else seconds, new.onset.min(initial=np.inf)))


def _keys(notes: Notes) -> list[list]:
    """The columns that identify a note: not its length, which later ids may change."""
    columns = (notes.onset, notes.pitch) if notes.program is None else (notes.onset, notes.pitch, notes.program)
    return [column.tolist() for column in columns]
