"""A MidiTok tokenizer as one vocabulary of ids, and notes as the scores that MidiTok reads and writes.

Most tokenizers have one vocabulary, and its ids are taken as they are. Some (CPWord, Octuple, MuMIDI) have several and
give a row of fields for each event; here the fields come one after the other, and each field has ids of its own. A
tokenizer that MidiTok has trained has ids for events and ids that it has learned, which stand for several events.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dsmr_mlx.music.notes import DRUMS, Notes, without_overlaps
from dsmr_mlx.tokenizers.miditok.config import SPECIAL_TOKENS

if TYPE_CHECKING:
    from miditok import MusicTokenizer
    from symusic import Score, Track

QUARTERS_PER_SECOND = 2  # every piece is brought to 120 quarters a minute
QUARTERS_PER_BAR = 4
MOST_REPAIRS = 64  # tokens that MidiTok cannot decode, before the rest is given up
EDGE = -1  # the beginning and the end of a piece, among the fields


class Place(NamedTuple):
    """A field of a row by its number, and the kinds of rows in which what is said there can stand."""

    field: int
    kinds: frozenset[str]

    def __str__(self) -> str:
        return f"{self.field} {'|'.join(sorted(self.kinds))}"


class MidiTokVocabulary:
    """What MidiTok's ids are here.

    miditok: MidiTok's object; tokens: a name for each id; names: MidiTok's own name, None for ids that were learned;
    token_events: see `Tokenizer.token_events`; fields: for rows of fields the field of each id, `EDGE` for special ids, None
    without.
    """

    def __init__(self, miditok: MusicTokenizer) -> None:
        self.miditok = miditok
        self.token_events: tuple[tuple[int, ...], ...] | None = None
        self.fields: list[int] | None = None
        if miditok.is_multi_voc:
            self._number_fields()
        elif miditok.is_trained:
            self._number_learned()
        else:
            self.names: list[str | None] = sorted(miditok.vocab, key=miditok.vocab.get)
            self.tokens = tuple(self.names)
        unsaid = {f"{name}_None" for name in (*SPECIAL_TOKENS, "MASK")}
        self._unsaid = np.array([i for i, name in enumerate(self.names) if name in unsaid])

    @property
    def resolution(self) -> int:
        """Ticks per quarter of the scores that MidiTok reads without rounding."""
        return getattr(self.miditok, "tpq", None) or self.miditok.config.max_num_pos_per_beat

    def encode(self, notes: Notes) -> list[int]:
        """Notes, one at least → ids, specials aside."""
        sequence = _sequence(self.miditok.encode(score_of(notes, self.resolution)))
        if self.fields is None:
            return sequence.ids
        return [number + self._shift[field] for row in sequence.ids for field, number in enumerate(row)]

    def decode(self, events: np.ndarray) -> Notes:
        """Events (T,), specials or not → notes. Where MidiTok fails at one, it is left out."""
        rows = self._rows(events[~np.isin(events, self._unsaid)].tolist())
        for _ in range(MOST_REPAIRS):
            try:
                return self._decode(rows)
            except Exception:  # what MidiTok raises for tokens that make no sense is not documented
                del rows[self._first_bad(rows)]
        return Notes.empty()

    def whole(self, events: np.ndarray) -> np.ndarray:
        """Events (T,) without a last row of fields that is not complete."""
        if self.fields is None:
            return events
        begins = np.flatnonzero(np.array(self.fields)[events] == 0)
        last = begins[-1] if len(begins) else len(events)
        return events if len(events) - last in self._lengths_of(events[last:]) else events[:last]

    def _first_bad(self, rows: list) -> int:
        """The index of a row at which decoding fails."""
        good, bad = 0, len(rows)  # how many rows decode, how many do not
        while bad - good > 1:
            middle = (good + bad) // 2
            try:
                self._decode(rows[:middle])
                good = middle
            except Exception:  # as above
                bad = middle
        return bad - 1

    def _decode(self, rows: list) -> Notes:
        from miditok import TokSequence

        if not rows:
            return Notes.empty()
        sequence = TokSequence(ids=rows + self._releases(rows))
        one = self.miditok.one_token_stream
        return notes_of(self.miditok.decode(sequence if one else [sequence]), self.miditok.config.use_programs)

    def _rows(self, events: list[int]) -> list:
        """Events as MidiTok wants them: ids, or rows of ids, of which those that are not whole are left out."""
        if self.fields is None:
            return events
        rows, whole = [], []
        for event in events:
            field = self.fields[event]
            if field == 0:
                rows.append([])
                whole.append(True)
            if rows:
                whole[-1] &= field == len(rows[-1])
                rows[-1].append(event - self._shift[max(field, 0)])
        return [row for row, fits in zip(rows, whole, strict=True) if fits and len(row) in self._lengths_of(row)]

    def _lengths_of(self, row: Sequence[int]) -> set[int]:
        """How many fields a row that begins like this one may have."""
        if not len(row):
            return {0}
        return self._lengths.get(kind_of_row(self.names[row[0]])) or set().union(*self._lengths.values())

    def _releases(self, ids: list) -> list[int]:
        """What ends the notes that some ids leave sounding: MidiTok would drop them."""
        vocabulary = self.miditok.vocab
        if self.fields is not None or not any(name.startswith("NoteOff_") for name in vocabulary):
            return []
        sounding, program = Counter(), None
        for number in ids:
            kind, _, value = self.names[number].partition("_")
            if kind == "Program":
                program = number
            elif kind in ("NoteOn", "DrumOn"):
                sounding[program, f"{kind.removesuffix('On')}Off_{value}"] += 1
            elif kind in ("NoteOff", "DrumOff"):
                sounding[program, self.names[number]] -= 1
        ends = [(p, vocabulary[name]) for (p, name), count in sounding.items() for _ in range(count)]
        return [number for end in ends for number in end if number is not None]

    def _number_fields(self) -> None:
        """Ids of special tokens, which all fields have, then those of the other tokens of each field."""
        special = list(self.miditok.special_tokens)
        self.names, self.fields, self._shift = list(special), [EDGE] * len(special), []
        for field, vocabulary in enumerate(self.miditok.vocab):
            self._shift.append(len(self.names) - len(special))
            own = sorted(vocabulary, key=vocabulary.get)[len(special) :]
            self.names += own
            self.fields += [field] * len(own)
        named = zip(self.fields, self.names, strict=True)
        self.tokens = tuple(name if field == EDGE else f"{field}:{name}" for field, name in named)
        self._learn_rows()

    def _learn_rows(self) -> None:
        """Which kinds of rows there are, how long, and what is in them; MidiTok does not say, so it is tried out."""
        rows = _sequence(self.miditok.encode(score_of(probe_notes(self.miditok), self.resolution))).tokens
        self._lengths: dict[str, set[int]] = {}
        self._seen: dict[tuple[int, str], set[str]] = {}
        for row in rows:
            self._last_kind = kind_of_row(row[0])
            self._lengths.setdefault(self._last_kind, set()).add(len(row))
            for field, token in enumerate(row):
                self._seen.setdefault((field, token.partition("_")[0]), set()).add(self._last_kind)

    def places(self) -> list[Place | None]:
        """For each id the place of its field, None for special ids."""
        every = frozenset(self._lengths)

        def place_of(field: int, name: str) -> Place | None:
            if field == EDGE:
                return None
            kinds = {kind_of_row(name)} & every if field == 0 else self._seen.get((field, name.partition("_")[0]))
            return Place(field, frozenset(kinds or every))

        return list(map(place_of, self.fields, self.names))

    def may_be_next(self, place: Place, following: Place | None) -> bool:
        """Whether a field may follow another; None: the end of a piece, which comes after a row that tells a note."""
        ends = any(place.field + 1 in self._lengths[kind] for kind in place.kinds)
        if following is None:
            return ends and self._last_kind in place.kinds
        if following.field == 0:
            return ends
        goes_on = any(place.field + 1 < max(self._lengths[kind]) for kind in place.kinds & following.kinds)
        return following.field == place.field + 1 and goes_on

    def _number_learned(self) -> None:
        """Ids of events, and ids that stand for several."""
        from miditok import TokSequence

        events = {number: name for name, number in self.miditok.vocab.items()}
        self.names, pieces = [], []
        for number in range(len(self.miditok)):
            sequence = TokSequence(ids=[number], are_ids_encoded=number not in events)
            if sequence.are_ids_encoded:
                self.miditok.decode_token_ids(sequence)
            pieces.append(tuple(sequence.ids))
            self.names.append(events.get(number))
        self.token_events = tuple(pieces)
        self.tokens = tuple("+".join(events[event] for event in piece) for piece in pieces)


def kind_of_row(first: str) -> str:
    """The kind of a row of fields, by the name of its first: its type, or which family of rows it names."""
    kind, _, value = first.partition("_")
    return value if kind == "Family" else kind


def _sequence(encoded):
    """MidiTok gives one sequence, or a list of one for each track."""
    return encoded[0] if isinstance(encoded, list) else encoded


def score_of(notes: Notes, resolution: int) -> Score:
    """Notes as a score of 120 quarters a minute in 4/4, rounded to its ticks: a track for each program."""
    from symusic import Score, Tempo, TimeSignature

    score = Score(resolution)
    score.tempos.append(Tempo(0, 60 * QUARTERS_PER_SECOND))
    score.time_signatures.append(TimeSignature(0, QUARTERS_PER_BAR, 4))
    for program in notes.programs:
        played = notes if notes.program is None else notes.take(notes.program == program)
        score.tracks.append(_track(played, program, QUARTERS_PER_SECOND * resolution))
    return score


def _track(notes: Notes, program: int, second: int) -> Track:
    """Notes of one program, in ticks of which there are so many in a `second`, sorted as MidiTok expects them."""
    from symusic import Note, Track

    onset = np.rint(notes.onset * second).astype(np.int32)
    offset = np.maximum(np.rint(notes.offset * second).astype(np.int32), onset + 1)
    order = np.lexsort((notes.velocity, offset, notes.pitch, onset))
    track = Track("drums" if program == DRUMS else "", 0 if program == DRUMS else program, program == DRUMS)
    track.notes = Note.from_numpy(
        time=onset[order],
        duration=(offset - onset)[order],
        pitch=notes.pitch[order].astype(np.int8),
        velocity=np.clip(notes.velocity[order], 1, 127).astype(np.int8),
    )
    return track


def notes_of(score: Score, programs: bool) -> Notes:
    """The notes of a score that MidiTok wrote, whatever it says of its tempo; with `programs` the instruments too."""
    second = QUARTERS_PER_SECOND * score.ticks_per_quarter
    columns = []
    for track in score.tracks:
        notes = track.notes.numpy()
        onset = notes["time"].astype(np.int64)
        offset = onset + np.maximum(notes["duration"].astype(np.int64), 1)
        velocity = np.clip(notes["velocity"].astype(np.int64), 1, 127)
        program = np.full(len(onset), DRUMS if track.is_drum else track.program)
        columns.append((onset, offset, notes["pitch"].astype(np.int64), velocity, program))
    if not columns:
        return Notes.empty()
    onset, offset, pitch, velocity, program = (np.concatenate(column) for column in zip(*columns, strict=True))
    good = (onset >= 0) & (pitch >= 0)
    onset, offset, pitch, velocity, program = (c[good] for c in (onset, offset, pitch, velocity, program))
    return without_overlaps(onset / second, offset / second, pitch, velocity, program if programs else None)


def probe_notes(miditok: MusicTokenizer) -> Notes:
    """A little music for trying a tokenizer out, of pitches and programs that its settings allow."""
    config = miditok.config
    onset = np.repeat(np.arange(18) / 2, 2)
    onset[1::4] += 0.01  # chords and notes that almost are
    low, high = config.pitch_range
    pitch, program = low + np.arange(36) * 7 % (high - low), None
    if config.use_programs:
        pitched = [program for program in sorted(config.programs) if program >= 0]
        program = np.full(36, pitched[0] if pitched else DRUMS)
        if -1 in config.programs:
            program[19], pitch[19] = DRUMS, config.drums_pitch_range[0]
    return Notes.sorted(onset, onset + 0.25, pitch, np.full(36, 64), program)
