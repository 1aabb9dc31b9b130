"""Choose the corpus on which a checkpoint is evaluated, and the pieces that several corpora share."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import read_json
from dsmr_mlx.data.corpus import Corpus, Piece
from dsmr_mlx.evaluation.losses import sample_pieces
from dsmr_mlx.model.bundled import CARD
from dsmr_mlx.tokenizers.base import Tokenizer

HASH_DIGITS = 16  # of a piece's sha256, enough to tell pieces apart


def training_corpus(checkpoint: Path) -> Corpus | None:
    """Return the corpus on which the checkpoint of a run was trained; None if the checkpoint does not record it.

    Raises `UserError` if the corpus no longer exists or has changed.
    """
    path = checkpoint / "training.json"
    values = read_json(path, "the record of a run") if path.is_file() else {}
    if not isinstance(values, dict) or not all(isinstance(values.get(key), str) for key in ("data", "corpus")):
        return None
    try:
        corpus = Corpus.load(values["data"])
    except UserError as error:
        raise UserError(f"{checkpoint}: training corpus not found, expected another as `data` ({error})") from error
    if corpus.fingerprint != values["corpus"]:
        raise UserError(
            f"{checkpoint}: trained on {corpus.path} with fingerprint {values['corpus'][:12]}, but the corpus now has "
            f"{corpus.fingerprint[:12]}; `data` {corpus.path} uses it anyway"
        )
    return corpus


def choose_corpora(checkpoints: Sequence[tuple[str, Path, Tokenizer]], data: Sequence[str | Path] = ()) -> list[Corpus]:
    """Return for each checkpoint (name, folder, tokenizer) a corpus with its tokenizer's fingerprint.

    The corpora are taken from the paths `data`. If that is empty, each checkpoint's training corpus is used; a
    checkpoint that records none uses that of another checkpoint with the same vocabulary. Raises `UserError` if a
    checkpoint has no corpus, or if two of `data` have the same vocabulary.
    """
    given = [Corpus.load(path) for path in data]
    own = [training_corpus(folder) for _, folder, _ in checkpoints] if not data else [None] * len(checkpoints)
    candidates = {corpus.path.resolve(): corpus for corpus in [*given, *filter(None, own)]}
    by_vocabulary: dict[str, Corpus] = {}
    for corpus in candidates.values():
        other = by_vocabulary.setdefault(corpus.tokenizer.fingerprint, corpus)
        if given and other is not corpus:
            raise UserError(
                f"`data` {other.path} and `data` {corpus.path} have the same vocabulary, "
                f"{corpus.tokenizer.fingerprint[:12]}: expected one corpus for each vocabulary"
            )
    chosen = [corpus or by_vocabulary.get(c[2].fingerprint) for c, corpus in zip(checkpoints, own, strict=True)]
    for (name, _, tokenizer), corpus in zip(checkpoints, chosen, strict=True):
        if corpus is None:
            raise UserError(_no_corpus(name, tokenizer, list(candidates.values()), "`data` " * bool(given)))
    return chosen


def _no_corpus(checkpoint: str, tokenizer: Tokenizer, corpora: Sequence[Corpus], prefix: str) -> str:
    """Return the error message for a checkpoint whose vocabulary none of the corpora has."""
    if not corpora:
        return f"{checkpoint}: no record of the corpus that it was trained on, expected `data`"
    others = ", ".join(f"{prefix}{c.path}: vocabulary {c.tokenizer.fingerprint[:12]}" for c in corpora)
    advice = ""
    same = [corpus.path for corpus in corpora if corpus.vocab_size == tokenizer.vocab_size]
    if not tokenizer.decodes and same:
        advice = f"; if its ids mean the same, run dsmr-mlx convert {checkpoint} NEW --tokenizer {same[0]}"
    mine = tokenizer.fingerprint[:12]
    return f"{others}, the checkpoint {checkpoint} has {mine}: not the same tokenizer{advice}"


def leak_remark(name: str, checkpoint: Path, corpus: Corpus, pieces: Sequence[Piece]) -> list[str]:
    """Return a remark if a checkpoint was trained on some of these pieces of another corpus, else nothing.

    The card of a bundled model names its pieces. Those of a run are unknown if its own corpus is not recorded, no
    longer exists or has changed.
    """
    known, where = _trained_on(checkpoint, corpus)
    if not (n := sum(piece.sha256[:HASH_DIGITS] in known for piece in pieces)):
        return []
    return [f"{name} was trained on {n} of these {len(pieces)} pieces{where}: its losses are too low"]


def _trained_on(checkpoint: Path, corpus: Corpus) -> tuple[set[str], str]:
    """Return the short hashes of the pieces of another corpus that a checkpoint was trained on, and where they are."""
    if (path := checkpoint / CARD).is_file():
        splits = read_json(path, "a model card")["data"].get("splits", {})
        return set(splits.get("train", {}).get("sha256", ())), ""
    try:
        own = training_corpus(checkpoint)
    except UserError:
        return set(), ""
    if own is None or own.fingerprint == corpus.fingerprint:
        return set(), ""
    return {piece.sha256[:HASH_DIGITS] for piece in own.pieces("train")}, f", in {own.path}"


def shared_pieces(corpora: Sequence[Corpus], split: str, max_tokens: int | None = None) -> list[list[Piece]]:
    """Return for each corpus its pieces of a split, the same music in the order of the first corpus.

    max_tokens: take a fixed sample of pieces with about this many tokens, counted in the longest encoding. Raises
    `UserError`, which names a piece, if the corpora do not have the same pieces in this split.
    """
    found = [{piece.source: piece for piece in corpus.pieces(split)} for corpus in corpora]
    for corpus, pieces in zip(corpora[1:], found[1:], strict=True):
        if pieces.keys() != found[0].keys():
            raise UserError(_difference(corpora[0], corpus, split))
    longest = [
        replace(piece, length=max(pieces[source].length for pieces in found)) for source, piece in found[0].items()
    ]
    sample = [piece.source for piece in sample_pieces(longest, max_tokens)]
    return [[pieces[source] for source in sample] for pieces in found]


def _difference(a: Corpus, b: Corpus, split: str) -> str:
    """Return the error message that names a piece which only one of two corpora has in a split."""
    here, there = ({piece.source for piece in corpus.pieces(split)} for corpus in (a, b))
    if not here - there:
        a, b, here, there = b, a, there, here
    piece, count = min(here - there), len(here - there)
    elsewhere = next((other.split for other in b.pieces() if other.source == piece), None)
    where = f"has it in {elsewhere}" if elsewhere else "does not"
    more = f", the same for {count - 1} more" if count > 1 else ""
    return (
        f"{a.path} has {piece} in {split}, {b.path} {where}{more}: expected corpora prepared from the same files with "
        "the same splits"
    )
