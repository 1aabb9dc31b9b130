"""Passages of the pieces of a corpus whose ids can be concatenated, in any vocabulary.

A passage is the notes with onsets between two times, encoded alone: its time starts at its first onset, and its notes
are cut at its end. If tokens advance the time, concatenated passages decode to the same notes as each one alone. This
fails in PerTok of MidiTok, which has no token for the first bar.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from dsmr_mlx.data.corpus import Corpus, Piece
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import EventGrammar

MAX_TRIES = 6  # ends tried for a passage of a given length


def without_specials(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Return ids `(T,)` as int64 without BOS, what is before it, and a trailing EOS."""
    ids = ids.astype(np.int64)
    begin = int(np.append(np.flatnonzero(ids == tokenizer.bos_id), -1)[0]) + 1
    end = len(ids) - int(len(ids) > begin and ids[-1] == tokenizer.eos_id)
    return ids[begin:end]


def encode_passage(tokenizer: Tokenizer, grammar: EventGrammar | None, notes: Notes) -> np.ndarray:
    """Encode notes, the first onset at 0 s, as ids `(T,)` int64 without BOS and EOS, after which no note sounds.

    grammar: of the tokenizer's events; None if unknown, the notes are then not cut. If the ids do not encode the length
    of the passage, the next one begins earlier, at a bar line or with the last onset: notes are cut there, except those
    with that onset.
    """
    ids = without_specials(tokenizer, tokenizer.encode_notes(notes))
    end = next_onset(tokenizer, grammar, ids)
    late = np.zeros(len(notes), bool) if end is None else (notes.offset > end + 1e-9) & (notes.onset < end - 1e-9)
    if not late.any():
        return ids
    offset = np.where(late, end, notes.offset)
    cut = Notes(notes.onset, offset, notes.pitch, notes.velocity, notes.program)
    return without_specials(tokenizer, tokenizer.encode_notes(cut))


def next_onset(tokenizer: Tokenizer, grammar: EventGrammar | None, ids: np.ndarray) -> float | None:
    """Return the seconds from the first onset of a passage to that of an identical passage appended to it.

    None if the grammar is unknown or has no clock, or the passage has no note.
    """
    if grammar is None or not grammar.has_clock:
        return None
    events = tokenizer.to_events(ids)
    presses = np.flatnonzero(grammar.press[events] >= 0)
    if not len(presses):
        return None
    elapsed = grammar.elapsed(np.concatenate([events, events[: presses[0] + 1]]))
    return float(elapsed[-1] - elapsed[presses[0]]) * grammar.seconds_per_tick


class DecodedPiece:
    """The notes of a piece, from which passages are cut. A passage begins at one of `n_starts` distinct onsets."""

    def __init__(self, tokenizer: Tokenizer, grammar: EventGrammar | None, ids: np.ndarray):
        self.tokenizer = tokenizer
        self.grammar = grammar
        self.notes = tokenizer.decode(ids)
        self.tokens_per_note = len(ids) / max(len(self.notes), 1)
        starts = np.flatnonzero(np.diff(self.notes.onset, prepend=-1.0))  # the first note of each chord
        self.cuts = np.append(starts, len(self.notes))
        self.n_starts = len(starts)

    def between(self, first: int, end: int) -> np.ndarray:
        """Return the ids of the passage from start number `first` to start number `end`, 0 ≤ first < end ≤ n_starts."""
        low, high = self.cuts[[first, end]]
        notes = self.notes.take(slice(low, high))
        limit = self.notes.onset[high] if high < len(self.notes) else np.inf
        onset, offset = notes.onset - notes.onset[0], np.minimum(notes.offset, limit) - notes.onset[0]
        notes = Notes(onset, offset, notes.pitch, notes.velocity, notes.program)
        return encode_passage(self.tokenizer, self.grammar, notes)

    def passage(self, first: int, tokens: int) -> tuple[np.ndarray, int]:
        """Return the passage from start `first` with about `tokens` ids, and the start where it ends."""
        low, high = first + 1, self.n_starts
        end = int(np.searchsorted(self.cuts, self.cuts[first] + tokens / self.tokens_per_note))
        best, best_end, tried = None, first, set()
        while len(tried) < MAX_TRIES:
            end = min(max(end, low), high)
            if end in tried:
                break
            tried.add(end)
            ids = self.between(first, end)
            if best is None or abs(len(ids) - tokens) < abs(len(best) - tokens):
                best, best_end = ids, end
            per_start = max(len(ids), 1) / (end - first)
            move = round((tokens - len(ids)) / per_start)
            end += move or (1 if len(ids) < tokens else -1)
        return best, best_end


class Passages:
    """The pieces of a corpus that have notes, decoded when first used."""

    def __init__(self, corpus: Corpus, pieces: Sequence[Piece]):
        self.corpus = corpus
        self.pieces = [piece for piece in pieces if piece.notes]
        self.grammar = corpus.tokenizer.event_grammar()
        self.music: dict[str, DecodedPiece] = {}

    def decoded(self, piece: Piece) -> DecodedPiece:
        """Return a decoded piece."""
        if piece.source not in self.music:
            self.music[piece.source] = DecodedPiece(self.corpus.tokenizer, self.grammar, self.corpus.tokens(piece))
        return self.music[piece.source]

    def filler(self, pieces: Sequence[Piece], tokens: int, rng: np.random.Generator) -> np.ndarray:
        """Return about `tokens` ids `(T,)` of these pieces in random order, from a random start in the first one."""
        parts, left = [np.empty(0, np.int64)], tokens
        for music, first in self._starts(pieces, rng):
            part, end = music.passage(first, left) if left > 0 else (parts[0], 0)
            if abs(left - len(part)) >= left:  # no closer with this part than without it
                break
            parts.append(part)
            left -= len(part)
            if end < music.n_starts:
                break
        return np.concatenate(parts)

    def _starts(self, pieces: Sequence[Piece], rng: np.random.Generator) -> Iterator[tuple[DecodedPiece, int]]:
        """Yield a random start in one piece, then the beginnings of the others, in an endless cycle."""
        order = rng.permutation(len(pieces))
        begun = False
        while True:
            for i in order:
                music = self.decoded(pieces[i])
                if music.n_starts:
                    yield music, 0 if begun else int(rng.integers(music.n_starts))
                    begun = True
            if not begun:
                return
