"""The vocabulary of a MidiTok tokenizer, and the conversion of notes to and from MidiTok's scores.

A tokenizer that MidiTok has trained has ids of single events and learned ids of several events.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from dsmr_mlx.music.notes import DRUMS, Notes, without_overlaps
from dsmr_mlx.tokenizers.miditok.config import SPECIAL_TOKENS

if TYPE_CHECKING:
    from miditok import MusicTokenizer
    from symusic import Score, Track

QUARTERS_PER_SECOND = 2  # every piece is converted to 120 quarters per minute
QUARTERS_PER_BAR = 4
MAX_REPAIRS = 64  # undecodable tokens that are removed; the music ends at the next one


class MidiTokVocabulary:
    """The ids of a MidiTok tokenizer.

    miditok: MidiTok's object
    tokens: the name of each id
    names: the same, but None for learned ids
    token_events: see `Tokenizer.token_events`
    """

    def __init__(self, miditok: MusicTokenizer) -> None:
        self.miditok = miditok
        self.token_events: tuple[tuple[int, ...], ...] | None = None
        if miditok.is_trained:
            self._add_learned()
        else:
            self.names: list[str | None] = sorted(miditok.vocab, key=miditok.vocab.get)
            self.tokens = tuple(self.names)
        silent = {f"{name}_None" for name in (*SPECIAL_TOKENS, "MASK")}
        self._silent = np.array([i for i, name in enumerate(self.names) if name in silent])

    @property
    def resolution(self) -> int:
        """Ticks per quarter of scores that MidiTok encodes without rounding."""
        return getattr(self.miditok, "tpq", None) or self.miditok.config.max_num_pos_per_beat

    def encode(self, notes: Notes) -> list[int]:
        """Encode one or more notes as ids without BOS and EOS."""
        encoded = self.miditok.encode(score_of(notes, self.resolution))
        return (encoded[0] if isinstance(encoded, list) else encoded).ids

    def decode(self, events: np.ndarray) -> Notes:
        """Decode events `(T,)`, special or not, to notes. Events at which MidiTok fails are left out."""
        ids = events[~np.isin(events, self._silent)].tolist()
        for _ in range(MAX_REPAIRS + 1):
            try:
                return self._decode(ids)
            except Exception:  # MidiTok does not document what it raises for invalid tokens
                bad = self._first_bad(ids)
                del ids[bad]
        return self._decode(ids[:bad])

    def _first_bad(self, ids: list[int]) -> int:
        """Return the index of an id at which decoding fails, found by bisection."""
        good, bad = 0, len(ids)  # lengths of a prefix that decodes and of one that does not
        while bad - good > 1:
            middle = (good + bad) // 2
            try:
                self._decode(ids[:middle])
                good = middle
            except Exception:  # as above
                bad = middle
        return bad - 1

    def _decode(self, ids: list[int]) -> Notes:
        from miditok import TokSequence

        if not ids:
            return Notes.empty()
        sequence = TokSequence(ids=ids + self._releases(ids))
        one = self.miditok.one_token_stream
        return notes_of(self.miditok.decode(sequence if one else [sequence]), self.miditok.config.use_programs)

    def _releases(self, ids: list[int]) -> list[int]:
        """Return ids that release the keys that `ids` leave down: MidiTok would drop their notes."""
        vocabulary = self.miditok.vocab
        if not any(name.startswith("NoteOff_") for name in vocabulary):
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

    def _add_learned(self) -> None:
        """Set the names and events of the ids of a trained tokenizer."""
        from miditok import TokSequence

        events = {number: name for name, number in self.miditok.vocab.items()}
        self.names, rows = [], []
        for number in range(len(self.miditok)):
            sequence = TokSequence(ids=[number], are_ids_encoded=number not in events)
            if sequence.are_ids_encoded:
                self.miditok.decode_token_ids(sequence)
            rows.append(tuple(sequence.ids))
            self.names.append(events.get(number))
        self.token_events = tuple(rows)
        self.tokens = tuple("+".join(events[event] for event in row) for row in rows)


def score_of(notes: Notes, resolution: int) -> Score:
    """Return notes as a score in 4/4 at 120 quarters per minute with a track per program, rounded to its ticks."""
    from symusic import Score, Tempo, TimeSignature

    score = Score(resolution)
    score.tempos.append(Tempo(0, 60 * QUARTERS_PER_SECOND))
    score.time_signatures.append(TimeSignature(0, QUARTERS_PER_BAR, 4))
    for program in notes.programs:
        of_program = notes if notes.program is None else notes.take(notes.program == program)
        score.tracks.append(_track(of_program, program, QUARTERS_PER_SECOND * resolution))
    return score


def _track(notes: Notes, program: int, per_second: int) -> Track:
    """Return the notes of one program in ticks, `per_second` in a second, in MidiTok's order."""
    from symusic import Note, Track

    onset = np.rint(notes.onset * per_second).astype(np.int32)
    offset = np.maximum(np.rint(notes.offset * per_second).astype(np.int32), onset + 1)
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
    """Return the notes of a score written by MidiTok; its tempo is ignored. programs: keep the instruments."""
    per_second = QUARTERS_PER_SECOND * score.ticks_per_quarter
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
    return without_overlaps(onset / per_second, offset / per_second, pitch, velocity, program if programs else None)


def probe_notes(miditok: MusicTokenizer) -> Notes:
    """Return short music to test a tokenizer, with pitches and programs that its settings allow."""
    config = miditok.config
    onset = np.repeat(np.arange(18) / 2, 2)
    onset[1::4] += 0.01  # chords and near-chords
    low, high = config.pitch_range
    pitch, program = low + np.arange(36) * 7 % (high - low), None
    if config.use_programs:
        pitched = [program for program in sorted(config.programs) if program >= 0]
        program = np.full(36, pitched[0] if pitched else DRUMS)
        if -1 in config.programs:
            program[19], pitch[19] = DRUMS, config.drums_pitch_range[0]
    return Notes.sorted(onset, onset + 0.25, pitch, np.full(36, 64), program)
