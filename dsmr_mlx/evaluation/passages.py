"""Passages of the pieces of a corpus as ids that can be put one after the other, whatever the vocabulary.

A passage is the music that is struck between two moments, encoded by itself: its time counts from its first onset, and
its notes end where it ends. Where time goes on from token to token, passages in a row sound as each of them does alone.
In a few of MidiTok's vocabularies it does not: Octuple numbers the bars, PerTok does not announce the first one.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from dsmr_mlx.data.corpus import Corpus, Piece
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import EventGrammar

MOST_TRIES = 6  # cuts that are tried for the length that is wanted


def stripped(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Ids (T,) without the BOS that they begin with and the EOS that they end with; int64."""
    ids = ids.astype(np.int64)
    begin = int(len(ids) > 0 and ids[0] == tokenizer.bos_id)
    end = len(ids) - int(len(ids) > begin and ids[-1] == tokenizer.eos_id)
    return ids[begin:end]


def encode_passage(tokenizer: Tokenizer, grammar: EventGrammar | None, notes: Notes) -> np.ndarray:
    """Notes, the first onset at 0 s → ids (T,) int64 without BOS and EOS, after which nothing sounds.

    grammar: what the tokenizer's events mean; None if it is not known, the notes are then encoded as they are.

    Where the ids do not say how long the passage lasts, the next one begins sooner: at a bar line, or with the last
    onset. Notes are cut there, but for those that are struck at that very moment.
    """
    ids = stripped(tokenizer, tokenizer.encode_notes(notes))
    end = next_beginning(tokenizer, grammar, ids)
    late = np.zeros(len(notes), bool) if end is None else (notes.offset > end + 1e-9) & (notes.onset < end - 1e-9)
    if not late.any():
        return ids
    offset = np.where(late, end, notes.offset)
    cut = Notes(notes.onset, offset, notes.pitch, notes.velocity, notes.program)
    return stripped(tokenizer, tokenizer.encode_notes(cut))


def next_beginning(tokenizer: Tokenizer, grammar: EventGrammar | None, ids: np.ndarray) -> float | None:
    """When the first note of a passage is struck that follows a passage like it, in seconds after that one's; None
    where the vocabulary does not tell.
    """
    if grammar is None or not grammar.has_clock:
        return None
    events = tokenizer.to_events(ids)
    struck = np.flatnonzero(grammar.press[events] >= 0)
    if not len(struck):
        return None
    elapsed = grammar.elapsed(np.concatenate([events, events[: struck[0] + 1]]))
    return float(elapsed[-1] - elapsed[struck[0]]) * grammar.seconds_per_tick


class Music:
    """The notes of a piece, and the passages that can be cut from it."""

    def __init__(self, tokenizer: Tokenizer, grammar: EventGrammar | None, ids: np.ndarray):
        self.tokenizer = tokenizer
        self.grammar = grammar
        self.notes = tokenizer.decode(ids)
        self.tokens_per_note = len(ids) / max(len(self.notes), 1)
        moments = np.flatnonzero(np.diff(self.notes.onset, prepend=-1.0))
        self.cuts = np.append(moments, len(self.notes))  # the notes that a passage can begin with or end before

    @property
    def moments(self) -> int:
        """Where a passage can begin: at how many onsets."""
        return len(self.cuts) - 1

    def between(self, first: int, end: int) -> np.ndarray:
        """The ids of the passage from one moment to another, `end`, 0 ≤ first < end ≤ `moments`."""
        low, high = self.cuts[[first, end]]
        notes = self.notes.take(slice(low, high))
        limit = self.notes.onset[high] if high < len(self.notes) else np.inf
        onset, offset = notes.onset - notes.onset[0], np.minimum(notes.offset, limit) - notes.onset[0]
        notes = Notes(onset, offset, notes.pitch, notes.velocity, notes.program)
        return encode_passage(self.tokenizer, self.grammar, notes)

    def passage(self, first: int, wanted: int) -> tuple[np.ndarray, int]:
        """The passage from a moment on whose ids are nearest to `wanted` in number, and the moment where it ends."""
        low, high = first + 1, self.moments
        end = int(np.searchsorted(self.cuts, self.cuts[first] + wanted / self.tokens_per_note))
        best, best_end, tried = None, first, set()
        while len(tried) < MOST_TRIES:
            end = min(max(end, low), high)
            if end in tried:
                break
            tried.add(end)
            ids = self.between(first, end)
            if best is None or abs(len(ids) - wanted) < abs(len(best) - wanted):
                best, best_end = ids, end
            per_moment = max(len(ids), 1) / (end - first)
            move = round((wanted - len(ids)) / per_moment)
            end += move or (1 if len(ids) < wanted else -1)
        return best, best_end


class Passages:
    """The music of some pieces of a corpus, decoded when it is needed."""

    def __init__(self, corpus: Corpus, pieces: Sequence[Piece]):
        self.corpus = corpus
        self.pieces = [piece for piece in pieces if piece.notes]
        self.grammar = corpus.tokenizer.event_grammar()
        self.music: dict[str, Music] = {}

    def of(self, piece: Piece) -> Music:
        """The music of a piece."""
        if piece.source not in self.music:
            self.music[piece.source] = Music(self.corpus.tokenizer, self.grammar, self.corpus.tokens(piece))
        return self.music[piece.source]

    def filler(self, pieces: Sequence[Piece], wanted: int, rng: np.random.Generator) -> np.ndarray:
        """About `wanted` ids (T,) of music of these pieces, in any order, from anywhere in the first of them on."""
        parts, left = [np.empty(0, np.int64)], wanted
        for music, first in self._places(pieces, rng):
            part, end = music.passage(first, left) if left > 0 else (parts[0], 0)
            if abs(left - len(part)) >= left:  # nothing is nearer
                break
            parts.append(part)
            left -= len(part)
            if end < music.moments:
                break
        return np.concatenate(parts)

    def _places(self, pieces: Sequence[Piece], rng: np.random.Generator) -> Iterator[tuple[Music, int]]:
        """A moment in one piece, then the beginnings of the others, again and again."""
        order = rng.permutation(len(pieces))
        begun = False
        while True:
            for i in order:
                music = self.of(pieces[i])
                if music.moments:
                    yield music, 0 if begun else int(rng.integers(music.moments))
                    begun = True
            if not begun:
                return
