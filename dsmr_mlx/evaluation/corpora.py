"""Which corpus a checkpoint is measured on, and the pieces that several corpora share."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import read_json
from dsmr_mlx.data.corpus import Corpus, Piece
from dsmr_mlx.evaluation.losses import sample_pieces
from dsmr_mlx.tokenizers.base import Tokenizer


def recorded_corpus(checkpoint: Path) -> Corpus | None:
    """The corpus that the checkpoint of a run was trained on; None if the checkpoint does not tell where it is.

    Raises `UserError`, which names the checkpoint, if the corpus is no longer there or was prepared anew.
    """
    path = checkpoint / "training.json"
    values = read_json(path, "where a run stands") if path.is_file() else {}
    if not isinstance(values, dict) or not all(isinstance(values.get(key), str) for key in ("data", "corpus")):
        return None
    try:
        corpus = Corpus.load(values["data"])
    except UserError as error:
        raise UserError(f"{checkpoint}: its corpus is gone, expected another with --data ({error})") from error
    if corpus.fingerprint != values["corpus"]:
        raise UserError(
            f"{checkpoint}: was trained on {corpus.path} with fingerprint {values['corpus'][:12]}, which has "
            f"{corpus.fingerprint[:12]} now; --data {corpus.path} says that it is meant nevertheless"
        )
    return corpus


def choose_corpora(
    checkpoints: Sequence[tuple[str, Path, Tokenizer]], paths: Sequence[str | Path] = ()
) -> list[Corpus]:
    """For each checkpoint, (name, folder, tokenizer), the corpus of its vocabulary.

    It is the one of `paths` that has the tokenizer's fingerprint. Without paths it is the corpus that the run was
    trained on, for a checkpoint that knows none that of another one with the same vocabulary. Raises `UserError` if
    there is none, or if two of the paths have one vocabulary.
    """
    given = [Corpus.load(path) for path in paths]
    own = [recorded_corpus(folder) for _, folder, _ in checkpoints] if not paths else [None] * len(checkpoints)
    offered = {corpus.path.resolve(): corpus for corpus in [*given, *filter(None, own)]}
    by_vocabulary: dict[str, Corpus] = {}
    for corpus in offered.values():
        other = by_vocabulary.setdefault(corpus.tokenizer.fingerprint, corpus)
        if given and other is not corpus:
            raise UserError(
                f"--data {other.path} and --data {corpus.path} have one vocabulary, "
                f"{corpus.tokenizer.fingerprint[:12]}: expected one corpus for each"
            )
    chosen = [corpus or by_vocabulary.get(c[2].fingerprint) for c, corpus in zip(checkpoints, own, strict=True)]
    for (name, _, tokenizer), corpus in zip(checkpoints, chosen, strict=True):
        if corpus is None:
            raise UserError(_no_corpus(name, tokenizer, list(offered.values()), "--data " * bool(given)))
    return chosen


def _no_corpus(checkpoint: str, tokenizer: Tokenizer, corpora: Sequence[Corpus], option: str) -> str:
    """What is said where none of the corpora has the vocabulary of a checkpoint."""
    if not corpora:
        return f"{checkpoint}: no record of the corpus that it was trained on, expected --data CORPUS"
    others = ", ".join(f"{option}{c.path}: vocabulary {c.tokenizer.fingerprint[:12]}" for c in corpora)
    advice = ""
    same = [corpus.path for corpus in corpora if corpus.vocab_size == tokenizer.vocab_size]
    if tokenizer.no_notes is not None and same:
        advice = f"; if its ids mean the same, dsmr-mlx convert {checkpoint} NEW --tokenizer {same[0]} says so"
    mine = tokenizer.fingerprint[:12]
    return f"{others}, the checkpoint {checkpoint} has {mine}: not the same tokenizer{advice}"


def shared_pieces(corpora: Sequence[Corpus], split: str, max_tokens: int | None = None) -> list[list[Piece]]:
    """For each corpus its pieces of a split: the same music in all of them, in the order of the first.

    With `max_tokens` a fixed sample of pieces that has at most so many tokens in every corpus, or is one piece. Raises
    `UserError`, which names a piece, if the corpora do not hold the same pieces in this split.
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
    """A piece that one corpus has in a split and another one has not."""
    here, there = ({piece.source for piece in corpus.pieces(split)} for corpus in (a, b))
    if not here - there:
        a, b, here, there = b, a, there, here
    piece, count = min(here - there), len(here - there)
    elsewhere = next((other.split for other in b.pieces() if other.source == piece), None)
    where = f"has it in {elsewhere}" if elsewhere else "does not"
    more = f", and so with {count - 1} more" if count > 1 else ""
    return (
        f"{a.path} has {piece} in {split}, {b.path} {where}{more}: expected corpora that were prepared from the same "
        "files with the same splits"
    )
