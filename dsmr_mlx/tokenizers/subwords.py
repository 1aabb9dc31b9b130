"""Subwords: a SentencePiece model over the events of a base tokenizer, learned from a corpus, without loss.

Every event becomes one character (private use, so that no normalization changes it), and a piece of music a text
without spaces. SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226) learns which characters to join, by byte-pair
encoding (Sennrich et al. 2016, arXiv 1508.07909) or as a unigram model (Kudo 2018, arXiv 1804.10959). Every single
event stays a token, so all music can be encoded. The events of each token are stored beside the model: only encoding
needs SentencePiece.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import TOKENIZER_FILE, read_json, read_regular, write_atomically
from dsmr_mlx.common.parsing import is_whole_number
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import BadFile, Tokenizer
from dsmr_mlx.tokenizers.event_grammar import EventGrammar

MODEL_FILE, EVENTS_FILE = "subwords.model", "subwords.json"
MODEL_TYPES = ("bpe", "unigram")
PAD, BOS, EOS, UNKNOWN = range(4)
SPECIAL = ("PAD", "BOS", "EOS", "UNKNOWN")
FIRST_CHARACTER = 0xF0000  # of a private use plane with room for 65,534
MAX_EVENTS = 65_534
MAX_IDS = 1 << 20
LINE_EVENTS = 256  # per line of the training text: in longer lines the unigram model finds far fewer candidates
MAX_LINES = 16_384  # 4 million events: three times as many compress by less than one percent more
BASE_KEYS = {"kind", "parameters", "fingerprint"}


class SubwordTokenizer(Tokenizer):
    """Tokens of one or several events of the tokenizer `base`, as learned by a SentencePiece model.

    model: the bytes of the model; model_type: "bpe" or "unigram"; token_events: the events of each id, read from the
    model if None. The ids are PAD, BOS, EOS, UNKNOWN, which never occurs, and then those of the model. FILL and PLAY of
    the base are tokens by themselves; the events before, between and after them are divided separately.
    """

    kind = "subwords"
    version = 3

    def __init__(
        self, base: Tokenizer, model: bytes, model_type: str, token_events: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.base = base
        self.model_type = model_type
        self._model = model
        self._token_events = tuple(map(tuple, _token_events(model, base) if token_events is None else token_events))

    @property
    def files_per_second(self) -> float:
        """See `Tokenizer.files_per_second`."""
        return self.base.files_per_second

    @property
    def label(self) -> str:
        """See `Tokenizer.label`."""
        return f"{self.base.label} {self.model_type}:{self.vocab_size}"

    @property
    def event_names(self) -> tuple[str, ...]:
        """See `Tokenizer.event_names`: those of the base."""
        return self.base.tokens

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """PAD, BOS, EOS, UNKNOWN, then for each token the names of its events joined by +."""
        names = self.base.tokens
        return (*SPECIAL, *("+".join(names[event] for event in row) for row in self._token_events[len(SPECIAL) :]))

    @property
    def pad_id(self) -> int:
        """See `Tokenizer.pad_id`."""
        return PAD

    @property
    def bos_id(self) -> int:
        """See `Tokenizer.bos_id`."""
        return BOS

    @property
    def eos_id(self) -> int:
        """See `Tokenizer.eos_id`."""
        return EOS

    @cached_property
    def fill_id(self) -> int | None:
        """See `Tokenizer.fill_id`."""
        return self._single(self.base.fill_id)

    @cached_property
    def play_id(self) -> int | None:
        """See `Tokenizer.play_id`."""
        return self._single(self.base.play_id)

    def _single(self, event: int | None) -> int | None:
        """Return the token that stands for one event alone."""
        return None if event is None else self._token_events.index((event,))

    @property
    def programs(self) -> bool:
        """See `Tokenizer.programs`."""
        return self.base.programs

    @property
    def token_events(self) -> tuple[tuple[int, ...], ...]:
        """The events of each id; PAD, BOS and EOS stand for those of the base, UNKNOWN for none."""
        return self._token_events

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Tokenizer.parameters`: the base and the identity of the model."""
        base = {"kind": self.base.kind, "parameters": self.base.parameters, "fingerprint": self.base.fingerprint}
        return {"base": base, "model_type": self.model_type, "sha256": hashlib.sha256(self._model).hexdigest()}

    def event_grammar(self) -> EventGrammar | None:
        """See `Tokenizer.event_grammar`: that of the base."""
        return self.base.event_grammar()

    def encode_notes(self, notes: Notes) -> np.ndarray:
        """See `Tokenizer.encode_notes`."""
        return self.from_events(self.base.encode_notes(notes))

    def from_events(self, events: np.ndarray) -> np.ndarray:
        """Return BOS, the tokens of events `(T,)` of the base, EOS: `(T′,)`. Special ids of the base are skipped."""
        events = self.base.without_special(events)
        marks = np.flatnonzero(np.isin(events, [self.base.fill_id, self.base.play_id]))
        parts = np.split(events, np.union1d(marks, marks + 1))
        ids = self._processor.encode([_text(part) for part in parts if len(part)], num_threads=1)
        return np.concatenate([[BOS], *ids, [EOS]]).astype(self.dtype)

    def decode(self, ids) -> Notes:
        """See `Tokenizer.decode`."""
        return self.base.decode(self.to_events(ids))

    def recovered(self, notes: Notes, ids: np.ndarray) -> tuple[int, float]:
        """See `Tokenizer.recovered`."""
        return self.base.recovered(notes, self.to_events(ids))

    def save(self, folder: str | os.PathLike) -> None:
        """See `Tokenizer.save`; the model, the events of its tokens and the files of the base are stored next to it."""
        self.base.save(folder)
        super().save(folder)
        write_atomically(Path(folder) / MODEL_FILE, self._model)
        write_atomically(Path(folder) / EVENTS_FILE, json.dumps({"token_events": self._token_events}) + "\n")

    @classmethod
    def restore(
        cls, folder: Path, parameters: dict[str, Any], restore_base: Callable[[Path, dict[str, Any]], Tokenizer]
    ) -> SubwordTokenizer:
        """See `Tokenizer.restore`. Raises `UserError` if the model is missing or has another SHA-256."""
        if parameters.keys() != {"base", "model_type", "sha256"}:
            raise TypeError("expected base, model_type and sha256")
        if not isinstance(parameters["base"], dict) or parameters["base"].keys() != BASE_KEYS:
            raise TypeError(f"base: expected {', '.join(sorted(BASE_KEYS))}")
        try:
            model = read_regular(folder / MODEL_FILE)
        except OSError as error:
            raise BadFile(
                f"{folder / MODEL_FILE}: cannot be read ({error.strerror}), expected a subword model"
            ) from error
        found = hashlib.sha256(model).hexdigest()
        if found != parameters["sha256"]:
            expected = parameters["sha256"]
            raise BadFile(f"{folder / MODEL_FILE}: sha256 {found}, expected {expected}: damaged, or another model")
        base = restore_base(folder / TOKENIZER_FILE, parameters["base"])
        return cls(base, model, parameters["model_type"], _read_token_events(folder / EVENTS_FILE, base))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without SentencePiece's object, which is built again when needed."""
        return {name: value for name, value in vars(self).items() if name != "_processor"}

    @cached_property
    def _processor(self) -> Any:
        try:
            processor = _processor(self._model)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{MODEL_FILE}: not a SentencePiece model ({' '.join(str(error).split())})") from error
        if processor.get_piece_size() != self.vocab_size:
            found = processor.get_piece_size()
            raise UserError(f"{MODEL_FILE}: {found} tokens, {EVENTS_FILE} has {self.vocab_size}: not the same model")
        return processor


def parse_subwords(text: str) -> tuple[str, int]:
    """Parse `bpe:2000` as the type of a model and the size of its vocabulary. Raises `UserError` for invalid text."""
    model_type, _, size = text.partition(":")
    if model_type in MODEL_TYPES and is_whole_number(size):
        return model_type, int(size)
    raise UserError(f"`subwords` {text}: expected bpe:SIZE or unigram:SIZE, such as bpe:2000")


def learn_subwords(base: Tokenizer, sequences: Sequence[np.ndarray], model_type: str, size: int) -> SubwordTokenizer:
    """Learn a tokenizer of `size` ids from pieces of music, each given as ids `(T,)` of `base`. Deterministic.

    All events of the base become tokens, even those that do not occur. Of long music, only every n-th line is used.
    Raises `UserError` for a base that cannot have subwords, or a size too small or too large for the music.
    """
    check_subwords(base, model_type, size)
    events = _events(base)
    lines = (line for sequence in sequences for line in _lines(base.without_shown(sequence)))
    step = -(-sum(-(-len(sequence) // LINE_EVENTS) for sequence in sequences) // MAX_LINES)  # rounded up
    texts = (_text(line[np.isin(line, events)]) for line in islice(lines, 0, None, max(step, 1)))
    model = _learn(chain((_text([event]) for event in events), filter(None, texts)), model_type, size)
    return SubwordTokenizer(base, model, model_type)


def check_subwords(base: Tokenizer, model_type: str, size: int) -> None:
    """Raise `UserError` for a base that cannot have subwords, or a size that is invalid for any music."""
    if not base.decodes or base.token_events is not None:
        raise UserError(f"`subwords`: tokenizer {base.kind!r} has no events to join, or has joined them already")
    if base.vocab_size > MAX_EVENTS:
        raise UserError(f"`subwords`: {base.vocab_size:,} events, expected at most {MAX_EVENTS:,}")
    events = len(_events(base))
    least = events + len(SPECIAL) + 1
    if not least <= size <= MAX_IDS:
        raise UserError(
            f"`subwords` {model_type}:{size}: expected {least:,} to {MAX_IDS:,}, because there are {events} events"
        )


def _events(base: Tokenizer) -> list[int]:
    """Return the ids of a base that can be joined."""
    return [i for i in range(base.vocab_size) if i not in (base.pad_id, base.bos_id, base.eos_id)]


def _lines(ids: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(ids), LINE_EVENTS):
        yield ids[start : start + LINE_EVENTS]


def _learn(texts: Iterator[str], model_type: str, size: int) -> bytes:
    """Return the bytes of a SentencePiece model."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=model,
            model_type=model_type,
            vocab_size=size,
            character_coverage=1.0,  # otherwise rare events would be lost
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_whitespace=False,
            split_by_unicode_script=False,
            split_by_number=False,
            byte_fallback=False,
            hard_vocab_limit=True,
            max_sentence_length=1 << 20,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNKNOWN,
            num_threads=1,  # the unigram model depends on the number of threads
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        most = re.search(r"value <= (\d+)", str(error))
        expected = f"at most {most[1]}, because the music has no more subwords" if most else str(error)
        raise UserError(f"`subwords` {model_type}:{size}: expected {expected}") from error
    return model.getvalue()


def _text(events: Sequence[int] | np.ndarray) -> str:
    """Return events as a text of one character each."""
    return (np.asarray(events).astype(np.int64) + FIRST_CHARACTER).astype("<u4").tobytes().decode("utf-32-le")


def _processor(model: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=model)


def _token_events(model: bytes, base: Tokenizer) -> list[tuple[int, ...]]:
    """Return the events of each id of a model."""
    processor = _processor(model)
    special = _special_rows(base)
    texts = (processor.id_to_piece(i) for i in range(len(special), processor.get_piece_size()))
    return special + [tuple(ord(character) - FIRST_CHARACTER for character in text) for text in texts]


def _special_rows(base: Tokenizer) -> list[tuple[int, ...]]:
    """Return the events of PAD, BOS, EOS and UNKNOWN."""
    return [(base.pad_id,), (base.bos_id,), (base.eos_id,), ()]


def _read_token_events(path: Path, base: Tokenizer) -> list[list[int]]:
    """Read the events of each id and check that they are events of the base."""
    try:
        content = read_json(path, "the events of subwords")
    except UserError as error:
        raise BadFile(str(error)) from error
    rows = content.get("token_events") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise BadFile(f"{path}: expected an object with token_events, a list of lists")
    if not all(type(event) is int and 0 <= event < base.vocab_size for row in rows for event in row):
        raise BadFile(f"{path}: expected events from 0 to {base.vocab_size - 1}")
    special = _special_rows(base)
    learned = rows[len(special) :]
    singles = {row[0] for row in learned if len(row) == 1}
    if list(map(tuple, rows[: len(special)])) != special or not all(learned) or not singles >= set(_events(base)):
        raise BadFile(f"{path}: expected PAD, BOS, EOS, UNKNOWN, and then tokens with events, one for each event alone")
    if len(rows) > MAX_IDS:
        raise BadFile(f"{path}: {len(rows):,} tokens, expected at most {MAX_IDS:,}")
    return rows
