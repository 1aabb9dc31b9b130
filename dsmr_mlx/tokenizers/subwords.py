"""Subwords: a SentencePiece model over the events of a base tokenizer, learned from a corpus, without loss.

Every event is a character of its own (private use, so that no normalization touches it), a piece of music a text
without spaces. SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226) learns which characters to put together, by
byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) or as a unigram model (Kudo 2018, arXiv 1804.10959). Single
events stay pieces, so every music has a segmentation, and which events a piece stands for is stored beside the model:
only encoding needs SentencePiece.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import TOKENIZER_FILE, read_json, write_atomically
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import BadFile, Tokenizer
from dsmr_mlx.tokenizers.event_grammar import EventGrammar
from dsmr_mlx.tokenizers.registry import restore_tokenizer

MODEL, PIECES = "subwords.model", "subwords.json"
KINDS_OF_MODEL = ("bpe", "unigram")
PAD, BOS, EOS, UNKNOWN = range(4)
SPECIAL = ("PAD", "BOS", "EOS", "UNKNOWN")
FIRST_CHARACTER = 0xF0000  # of a plane of private use, with room for 65,534
MOST_EVENTS = 65_534
MOST_PIECES = 1 << 20
LINE = 256  # events in a line to learn from: SentencePiece's unigram model finds far fewer candidates in long ones
MOST_LINES = 16_384  # 4 million events: three times as many compress by less than one per cent more
PARTS_OF_BASE = {"kind", "parameters", "fingerprint"}


class SubwordTokenizer(Tokenizer):
    """Pieces of one event or several of the tokenizer `base`, as a SentencePiece model has learned them.

    model: the model as SentencePiece stores it; learned: "bpe" or "unigram"; pieces: the events of each id, if they are
    known, else SentencePiece is asked. The ids are PAD, BOS, EOS, UNKNOWN, which never occurs, and then the model's.
    """

    kind = "subwords"
    version = 1

    def __init__(
        self, base: Tokenizer, model: bytes, learned: str, pieces: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.base = base
        self.learned = learned
        self._model = model
        self._pieces = tuple(map(tuple, _pieces_of(model, base) if pieces is None else pieces))

    @property
    def files_per_second(self) -> float:
        """See `Tokenizer.files_per_second`."""
        return self.base.files_per_second

    @property
    def label(self) -> str:
        """See `Tokenizer.label`."""
        return f"{self.base.label} {self.learned}:{self.vocab_size}"

    @property
    def event_names(self) -> tuple[str, ...]:
        """Those of the base."""
        return self.base.tokens

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """PAD, BOS, EOS, UNKNOWN, then for each piece the names of its events with + between them."""
        names = self.base.tokens
        return (*SPECIAL, *("+".join(names[event] for event in piece) for piece in self._pieces[len(SPECIAL) :]))

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

    @property
    def programs(self) -> bool:
        """See `Tokenizer.programs`."""
        return self.base.programs

    @property
    def token_events(self) -> tuple[tuple[int, ...], ...]:
        """The events of each id; PAD, BOS and EOS stand for those of the base, UNKNOWN for none."""
        return self._pieces

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Tokenizer.parameters`: what the base is, and which model this is."""
        base = {"kind": self.base.kind, "parameters": self.base.parameters, "fingerprint": self.base.fingerprint}
        return {"base": base, "learned": self.learned, "sha256": hashlib.sha256(self._model).hexdigest()}

    def event_grammar(self) -> EventGrammar | None:
        """That of the base."""
        return self.base.event_grammar()

    def encode_notes(self, notes: Notes) -> np.ndarray:
        """See `Tokenizer.encode_notes`."""
        return self.from_events(self.base.encode_notes(notes))

    def from_events(self, events: np.ndarray) -> np.ndarray:
        """Ids of the base, PAD, BOS and EOS aside → BOS, the ids of the pieces that they make, EOS: (T,)."""
        special = [self.base.pad_id, self.base.bos_id, self.base.eos_id]
        events = events[~np.isin(events, special)]
        ids = self._processor.encode(_text(events), num_threads=1) if len(events) else []
        return np.concatenate([[BOS], ids, [EOS]]).astype(self.dtype)

    def whole(self, events: np.ndarray) -> np.ndarray:
        """See `Tokenizer.whole`."""
        return self.base.whole(events)

    def decode(self, ids) -> Notes:
        """See `Tokenizer.decode`."""
        return self.base.decode(self.to_events(ids))

    def save(self, folder: str | os.PathLike) -> None:
        """See `Tokenizer.save`; the model, the pieces and the files of the base lie beside it."""
        self.base.save(folder)
        super().save(folder)
        write_atomically(Path(folder) / MODEL, self._model)
        write_atomically(Path(folder) / PIECES, json.dumps({"pieces": self._pieces}) + "\n")

    @classmethod
    def restore(cls, folder: Path, parameters: dict[str, Any]) -> SubwordTokenizer:
        """See `Tokenizer.restore`. UserError for a model that is missing, damaged or another one, both sha256 shown."""
        if parameters.keys() != {"base", "learned", "sha256"}:
            raise TypeError("expected base, learned and sha256")
        if not isinstance(parameters["base"], dict) or parameters["base"].keys() != PARTS_OF_BASE:
            raise TypeError(f"base: expected {', '.join(sorted(PARTS_OF_BASE))}")
        try:
            model = (folder / MODEL).read_bytes()
        except OSError as error:
            raise BadFile(f"{folder / MODEL}: cannot be read ({error.strerror}), expected a subword model") from error
        found = hashlib.sha256(model).hexdigest()
        if found != parameters["sha256"]:
            expected = parameters["sha256"]
            raise BadFile(f"{folder / MODEL}: sha256 {found}, expected {expected}: damaged, or another model")
        base = restore_tokenizer(folder / TOKENIZER_FILE, parameters["base"])
        return cls(base, model, parameters["learned"], _read_pieces(folder / PIECES, base))

    def __getstate__(self) -> dict[str, Any]:
        """Without SentencePiece's object, which is built again where it is needed."""
        return {name: value for name, value in vars(self).items() if name != "_processor"}

    @cached_property
    def _processor(self) -> Any:
        return _processor(self._model)


def parse_subwords(text: str) -> tuple[str, int]:
    """`bpe:2000` → ("bpe", 2000), the size of the vocabulary. Raises UserError for anything else."""
    learned, _, size = text.partition(":")
    if learned in KINDS_OF_MODEL and size.isdecimal():
        return learned, int(size)
    raise UserError(f"--subwords {text}: expected bpe:SIZE or unigram:SIZE, such as bpe:2000")


def learn_subwords(base: Tokenizer, sequences: Sequence[np.ndarray], learned: str, size: int) -> SubwordTokenizer:
    """A tokenizer of `size` ids, learned from pieces of music as ids of `base` (T,) each. The same in, the same out.

    All events of the base become pieces, those too that do not occur. Of much music one line in so many counts.
    Raises UserError for a base that cannot have subwords, or a size that is too small or too large for the music.
    """
    check_subwords(base, learned, size)
    events = _events(base)
    lines = (line for sequence in sequences for line in _lines(sequence))
    step = -(-sum(-(-len(sequence) // LINE) for sequence in sequences) // MOST_LINES)
    texts = (_text(line[np.isin(line, events)]) for line in islice(lines, 0, None, max(step, 1)))
    model = _learn(chain((_text([event]) for event in events), filter(None, texts)), learned, size)
    return SubwordTokenizer(base, model, learned)


def check_subwords(base: Tokenizer, learned: str, size: int) -> None:
    """Raise UserError for a base that cannot have subwords, or a size that is too small or too large for any music."""
    if base.no_notes is not None or base.token_events is not None:
        raise UserError(f"--subwords: tokenizer {base.kind!r} has no events to put together, or has done so already")
    if base.vocab_size > MOST_EVENTS:
        raise UserError(f"--subwords: {base.vocab_size:,} events, expected at most {MOST_EVENTS:,}")
    events = len(_events(base))
    least = events + len(SPECIAL) + 1
    if not least <= size <= MOST_PIECES:
        raise UserError(
            f"--subwords {learned}:{size}: expected {least:,} to {MOST_PIECES:,}, for there are {events} events"
        )


def _events(base: Tokenizer) -> list[int]:
    """The ids of a base that can be put together."""
    return [i for i in range(base.vocab_size) if i not in (base.pad_id, base.bos_id, base.eos_id)]


def _lines(ids: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(ids), LINE):
        yield ids[start : start + LINE]


def _learn(texts: Iterator[str], learned: str, size: int) -> bytes:
    """SentencePiece's model, as it stores it."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=model,
            model_type=learned,
            vocab_size=size,
            character_coverage=1.0,  # else rare events would be lost
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
            num_threads=1,  # several find other unigram models
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        most = re.search(r"value <= (\d+)", str(error))
        expected = f"at most {most[1]}, for there is no more to learn from the music" if most else str(error)
        raise UserError(f"--subwords {learned}:{size}: expected {expected}") from error
    return model.getvalue()


def _text(events: Sequence[int] | np.ndarray) -> str:
    """Events as a text of one character each."""
    return (np.asarray(events).astype(np.int64) + FIRST_CHARACTER).astype("<u4").tobytes().decode("utf-32-le")


def _processor(model: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=model)


def _pieces_of(model: bytes, base: Tokenizer) -> list[tuple[int, ...]]:
    """The events of each id of a model."""
    processor = _processor(model)
    special = [(base.pad_id,), (base.bos_id,), (base.eos_id,), ()]
    texts = (processor.id_to_piece(i) for i in range(len(special), processor.get_piece_size()))
    return special + [tuple(ord(character) - FIRST_CHARACTER for character in text) for text in texts]


def _read_pieces(path: Path, base: Tokenizer) -> list[list[int]]:
    """The stored events of each id, checked to be events of the base."""
    try:
        content = read_json(path, "the events of subwords")
    except UserError as error:
        raise BadFile(str(error)) from error
    pieces = content.get("pieces") if isinstance(content, dict) else None
    if not isinstance(pieces, list) or not all(isinstance(piece, list) for piece in pieces):
        raise BadFile(f"{path}: expected an object with pieces, a list of lists")
    if not all(isinstance(event, int) and 0 <= event < base.vocab_size for piece in pieces for event in piece):
        raise BadFile(f"{path}: expected events from 0 to {base.vocab_size - 1}")
    return pieces
