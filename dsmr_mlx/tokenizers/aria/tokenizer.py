"""Aria's tokenizer: MIDI files, notes ⇄ ids of one of its three vocabularies."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.midi import READ_LIMITS, FileLimits, Reading, read_bytes, read_midi
from dsmr_mlx.music.midi_file import read_midi_file
from dsmr_mlx.music.notes import DRUMS, Notes
from dsmr_mlx.tokenizers.aria.encoding import TimedMusic, decode_events, encode_events, parse_events
from dsmr_mlx.tokenizers.aria.grammar import aria_grammar
from dsmr_mlx.tokenizers.aria.reading import FileMusic, of_notes, read_music
from dsmr_mlx.tokenizers.aria.vocabulary import (
    BOS,
    ENDING,
    EOS,
    INSTRUMENT_OF_GROUP,
    PAD,
    PROGRAM_OF_INSTRUMENT,
    SIZES,
    vocabulary_of,
)
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import EventGrammar, states_after

PIANO, DRUM = 6, 16  # prefixes
MIN_ANNOUNCED = 150  # ids of events; the end of a shorter piece is not announced


class AriaTokenizer(Tokenizer):
    """The vocabulary with `size` ids: 17,727; 17,729 with the pedal; or 2,675 for piano only, with the pedal.

    A piece is a prefix, BOS (<S>), its events and EOS (<E>). The prefix names the instruments; `with_prefixes` adds a
    composer, a form or a genre for generation. Silence before the first event is left out. The pedal may go down long
    before the first note, from which `decode_piece`, `seconds` and `first_seconds` count. Generation is for the piano;
    ids of other instruments can be trained on and decoded.

    programs: encode instruments and drums, only with 17,727 ids; if not, all notes but drums are of one piano. Raises
    `UserError` for another size or programs with a pedal.
    """

    kind = "aria"
    version = 1
    files_per_second: ClassVar = 350.0
    pad_id = PAD
    bos_id = BOS
    eos_id = EOS

    def __init__(self, size: int = SIZES[0], programs: bool = False) -> None:
        if size not in SIZES:
            raise UserError(f"`size` {size}: expected one of Aria's vocabularies, {', '.join(map(str, SIZES))} ids")
        self.vocabulary = vocabulary_of(size)
        if programs and self.vocabulary.pedal is not None:
            raise UserError(f"`programs`: Aria's vocabulary of {size} ids is for the piano alone, expected {SIZES[0]}")
        self._programs = bool(programs)
        self.labels: tuple[int, ...] = ()  # prefixes of a composer, a form, a genre

    @classmethod
    def parse(cls, size: str, programs: bool) -> Self:
        """Return the tokenizer for a size given as text; empty for the default."""
        known = {"": SIZES[0], **{str(number): number for number in SIZES}}
        if size not in known:
            raise UserError(f"`tokenizer` aria:{size}: expected aria:N with N one of {', '.join(map(str, SIZES))}")
        return cls(known[size], programs)

    def with_prefixes(self, **prefixes: str | None) -> Self:
        """See `Tokenizer.with_prefixes`. composer, form, genre: in any letter case."""
        tokenizer = type(self)(**self.parameters)
        known = {"composer", "form", "genre"}
        if unknown := prefixes.keys() - known:
            raise UserError(f"`{min(unknown)}`: unknown, expected one of {', '.join(sorted(known))}")
        given = ((kind, name) for kind, name in prefixes.items() if name is not None)
        tokenizer.labels = tuple(self.vocabulary.prefix(kind, name) for kind, name in given)
        return tokenizer

    @property
    def tokens(self) -> tuple[str, ...]:
        """See `Tokenizer.tokens`."""
        return self.vocabulary.tokens

    @property
    def label(self) -> str:
        """See `Tokenizer.label`."""
        return f"aria:{self.vocab_size}"

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer.vocab_size`."""
        return self.vocabulary.size

    @property
    def programs(self) -> bool:
        """See `Tokenizer.programs`."""
        return self._programs

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Tokenizer.parameters`."""
        return {"size": self.vocab_size, "programs": self._programs}

    @cached_property
    def fingerprint(self) -> str:
        """See `Tokenizer.fingerprint`. Ids mean the same with and without programs."""
        meaning = [self.kind, self.version, self.vocab_size, self.tokens]
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()

    @cached_property
    def token_events(self) -> tuple[tuple[int, ...], ...]:
        """See `Tokenizer.token_events`: prefixes and special ids are not events, except the announced end and EOS."""
        v = self.vocabulary
        no_events = {BOS, PAD, *np.flatnonzero(v.is_prefix).tolist(), v.prompt_end}
        no_events |= {ENDING} if v.prompt_end is not None else set()
        return tuple(() if i in no_events else (i,) for i in range(self.vocab_size))

    def event_grammar(self) -> EventGrammar:
        """See `aria_grammar`."""
        grammar = aria_grammar(self.vocab_size)
        return replace(grammar, plays_keys=False) if self._programs else grammar

    def read(self, midi: bytes | str | os.PathLike, limits: FileLimits = READ_LIMITS) -> tuple[Reading, np.ndarray]:
        """See `Tokenizer.read`. The ids come from key releases and pedals, not from the notes."""
        reading = read_midi(midi, programs=self.programs, limits=limits)
        return reading, self._piece(self._music(midi, limits))

    def encode_excerpt(self, midi: bytes | str | os.PathLike, notes: Notes) -> np.ndarray:
        """See `Tokenizer.encode_excerpt`. The pedal is that of the file from the first of the notes on."""
        if self.vocabulary.pedal is None or not len(notes):
            return self.encode_notes(notes)
        return self._piece(self._music(midi, READ_LIMITS, float(notes.onset[0])))

    def _music(self, midi: bytes | str | os.PathLike, limits: FileLimits, begin: float | None = None) -> FileMusic:
        """Return the music of a file, see `read_music`."""
        given = isinstance(midi, bytes | bytearray | memoryview)
        file = read_midi_file(bytes(midi) if given else read_bytes(midi, limits))
        try:
            pedal = self.vocabulary.pedal is not None
            return read_music(file, programs=self.programs, pedal=pedal, seconds=limits.seconds, begin=begin)
        except UserError as error:
            raise error if given else UserError(f"{midi}: {error}") from error

    def encode_notes(self, notes: Notes) -> np.ndarray:
        """See `Tokenizer.encode_notes`. Notes have no pedal, so no ids encode one."""
        return self._piece(of_notes(notes, self._programs))

    def _piece(self, music: FileMusic) -> np.ndarray:
        """Return prefix, BOS, events and EOS: uint16 `(T,)`."""
        prefix = [PIANO + i for i in music.instruments] + [DRUM] * bool((music.music.instrument < 0).any())
        events = encode_events(music.music, self.vocabulary)
        return np.concatenate([prefix or [PIANO], [BOS], events, [EOS]]).astype(np.uint16)

    def decode(self, ids) -> Notes:
        """See `decode_events`."""
        return decode_events(ids, self.vocabulary, self._programs)

    def decode_piece(self, ids: np.ndarray) -> Notes:
        """See `Tokenizer.decode_piece`."""
        return self.decode(ids).from_first_onset()

    def changed(self, ids: np.ndarray, change: Callable[[Notes], Notes]) -> np.ndarray:
        """See `Tokenizer.changed`. Pedal events move with the notes; note lengths are not extended by the pedal.

        `change` receives the pedal events as drums, whose pitches do not change.
        """
        music, _ = parse_events(ids, self.vocabulary)
        n_pedals, is_drum = len(music.pedal_time), music.instrument < 0
        start = np.append(music.pedal_time, music.onset)
        program = np.append(np.full(n_pedals, DRUMS), np.where(is_drum, DRUMS, 0))
        columns = (
            np.append(np.full(n_pedals, values), own) for values, own in ((0, music.pitch), (64, music.velocity))
        )
        order = np.argsort(start, kind="stable")
        end = start + np.append(np.zeros(n_pedals, np.int64), music.duration)
        given = Notes(*(column[order] for column in (start / 1000, end / 1000, *columns, program)))
        new, is_pedal = change(given), order < n_pedals
        onset, ends = (np.rint(1000 * times).astype(np.int64) for times in (new.onset, new.offset))
        rank = np.where(is_pedal, 0, order - n_pedals)[~is_pedal]
        changed = TimedMusic(
            *(onset[~is_pedal], (ends - onset)[~is_pedal]),
            *(column[~is_pedal].astype(np.int64) for column in (new.pitch, new.velocity)),
            *(music.instrument[rank], onset[is_pedal], music.pedal_down[order[is_pedal]]),
        )
        prefix = np.asarray(ids)[self.vocabulary.is_prefix[np.asarray(ids)]]
        events = encode_events(changed, self.vocabulary)
        return np.concatenate([prefix, [BOS], events, [EOS]]).astype(np.uint16)

    def with_announced_end(self, ids: np.ndarray, distance: int) -> np.ndarray:
        """See `Tokenizer.with_announced_end`: before a complete event, in pieces of more than `MIN_ANNOUNCED` ids of
        events, as in Aria's training.
        """
        begin, end = int(np.flatnonzero(ids == BOS)[0]) + 1, len(ids) - int(ids[-1] == EOS)
        if self.vocabulary.prompt_end is not None or end - begin <= MIN_ANNOUNCED:
            return ids
        place = begin + len(self._complete(ids[begin : end - distance]))
        return np.insert(ids, place, ENDING)

    def with_decoded_programs(self, notes: Notes) -> Notes:
        """See `Tokenizer.with_decoded_programs`: one for each of the groups of eight that the vocabulary has."""
        if notes.program is None:
            return notes
        instrument = INSTRUMENT_OF_GROUP[np.minimum(notes.program, 127) // 8]
        kept = (notes.program == DRUMS) | (instrument < 0)
        return replace(notes, program=np.where(kept, notes.program, np.array(PROGRAM_OF_INSTRUMENT)[instrument]))

    def from_events(self, events: np.ndarray) -> np.ndarray:
        """See `Tokenizer.from_events`."""
        return np.asarray(events).astype(np.uint16)

    def prompt(self, ids: np.ndarray) -> np.ndarray:
        """See `Tokenizer.prompt`: prefixes, BOS, the events without an announced end, and <X> if there is one.

        A pedal-down event at the end and an incomplete event before <X> are left out. A prompt stays as it is.
        """
        v, ids = self.vocabulary, np.asarray(ids).astype(np.int64)
        is_prefix = v.is_prefix[ids]
        given = ids[is_prefix].tolist() or [PIANO]
        prefix = given + [label for label in self.labels if label not in given]
        special = [i for i in (PAD, BOS, EOS, ENDING, v.prompt_end) if i is not None]
        events = ids[~is_prefix & ~np.isin(ids, special)]
        pedal = len(events) > 1 and v.pedal is not None and events[-2] == v.pedal and v.index("onsets", events)[-1] >= 0
        events = events[:-2] if pedal else events
        events = events if v.prompt_end is None else self._complete(events)
        end = [v.prompt_end] if v.prompt_end is not None and len(events) else []
        return np.concatenate([prefix, [BOS], events, end]).astype(np.int64)

    def shown_mask(self, ids) -> np.ndarray:
        """See `Tokenizer.shown_mask`: the model reads <X>, which is not part of the music."""
        ids = np.asarray(ids).ravel()
        return ids == (self.vocab_size if self.vocabulary.prompt_end is None else self.vocabulary.prompt_end)

    def seconds(self, ids: np.ndarray) -> float:
        """See `Tokenizer.seconds`. With the pedal, they count from the first note."""
        return max(super().seconds(ids) - self._seconds_before_notes(ids), 0.0)

    def first_seconds(self, ids: np.ndarray, seconds: float) -> np.ndarray:
        """See `Tokenizer.first_seconds`: whole notes that begin by then, counted as in `seconds`.

        Raises `UserError` if there are none.
        """
        cut = self._complete(super().first_seconds(ids, seconds + self._seconds_before_notes(ids)))
        if not len(parse_events(cut, self.vocabulary)[0].onset):
            raise UserError(f"`seconds` {seconds:g}: no note begins by then, expected a later time")
        prefix = np.asarray(ids)[self.vocabulary.is_prefix[np.asarray(ids)]]
        return np.concatenate([prefix, cut]).astype(self.dtype)

    def _seconds_before_notes(self, ids: np.ndarray) -> float:
        """Return the seconds before the first note; 0 without a note, or without the pedal: then music begins at 0."""
        onset = parse_events(ids, self.vocabulary)[0].onset if self.vocabulary.pedal is not None else ()
        return float(min(onset, default=0)) / 1000

    def _complete(self, events: np.ndarray) -> np.ndarray:
        """Return events `(T,)` without an incomplete one at the end."""
        grammar = aria_grammar(self.vocab_size)
        states = states_after(grammar.next_state, grammar.start, events)
        may_begin = grammar.allowed[:, grammar.press >= 0].any(axis=1)[states]
        return events[: np.flatnonzero(may_begin)[-1]]
