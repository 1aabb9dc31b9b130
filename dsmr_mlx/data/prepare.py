"""Prepare a folder of MIDI files as a corpus.

Every file ends up either in the corpus or among the skipped files, with the reason. A file is skipped if the vocabulary
can represent none of its notes; of the other files, the represented notes are counted. `midi_folder` finds the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.folders import folder_content, temporary_folder
from dsmr_mlx.common.paths import nfc
from dsmr_mlx.data.corpus import INDEX, TOKENIZER, TOKENS, Corpus, Skipped, count_by_split, token_hash
from dsmr_mlx.data.corpus_writer import CorpusWriter
from dsmr_mlx.data.encode import encode_files
from dsmr_mlx.data.midi_folder import MidiFolder, SharedWork, choose_splits, discover_files
from dsmr_mlx.music.midi import READER_VERSION, read_bytes
from dsmr_mlx.music.repairs import Repairs, parse_repairs
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.tokenizers.subwords import check_subwords, learn_subwords, parse_subwords

TOKEN_FIELDS = ("offset", "length", "sha256", "events")  # of a `Piece`: they depend on the tokenization

Progress = Callable[[int, int], None]  # files done, files in all


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did. Counts are sums over all pieces.

    out: folder of the corpus
    up_to_date: the corpus already existed, made from the same input
    pieces: number per split
    tokens, events, notes, seconds: for events see `corpus.Piece`; seconds of music
    tokenizer: its label
    notes_encoded: notes recoverable from the tokens
    out_of_time: pieces whose tokens differ in duration from the music by more than rounding
    repaired: source and repairs of each file with faults, see `music.repairs`
    skipped: files left out
    shared_works: works with performances in several official splits
    unused_metadata: MAESTRO's tables in subfolders, whose splits are ignored
    wall_seconds: running time
    """

    out: Path
    up_to_date: bool
    pieces: dict[str, int]
    tokens: int
    events: int
    notes: int
    seconds: float
    tokenizer: str
    notes_encoded: int
    out_of_time: int
    repaired: dict[str, Repairs] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    shared_works: list[SharedWork] = field(default_factory=list)
    unused_metadata: list[str] = field(default_factory=list)
    wall_seconds: float = 0.0


@dataclass(frozen=True)
class _Input:
    """The files of a folder, and how to split them; splitting: None if the splits are official."""

    midi_dir: Path
    folder: MidiFolder
    splitting: dict[str, Any] | None
    workers: int | None
    progress: Progress | None


def prepare(
    midi_dir: str | os.PathLike,
    out: str | os.PathLike,
    *,
    tokenizer: Tokenizer | None = None,
    subwords: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    strict_splits: bool = False,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    learning: Callable[[int], None] | None = None,
) -> PrepareReport:
    """Tokenize the MIDI files under `midi_dir` into a corpus at `out`. The same input gives the same corpus.

    tokenizer: by default `PerformanceTokenizer()`
    subwords: "bpe:SIZE" or "unigram:SIZE" learns subwords from the training pieces, see `tokenizers.subwords`
    validation_fraction, seed: how many files, in [0, 1), and which are for validation, see `choose_splits`; ignored if
        the splits are official, as in MAESTRO
    strict_splits: refuse official splits that share a work. By default they are taken as they are, and the report and
        the corpus name these works
    workers: number of processes; None: one per core if that is faster. A script needs the `if __name__ == "__main__"`
        guard of `multiprocessing` for several
    force: replace a corpus made from other input
    progress: called after each file with the numbers of files done and in all
    learning: called with the number of events before subwords are learned

    If `out` is a corpus made from the same input, nothing is done. Another corpus there is an error unless `force`;
    anything else there is never replaced. Input is compared by content, not by dates.

    Raises `UserError` for a missing folder, a folder without usable MIDI, invalid options, an incomplete table, shared
    works with `strict_splits`, and an `out` that is occupied or cannot be written.
    """
    began, midi_dir, out = time.perf_counter(), Path(midi_dir), Path(out)
    tokenizer = tokenizer or PerformanceTokenizer()
    _check_options(midi_dir, out, validation_fraction, workers)
    if subwords is not None:
        check_subwords(tokenizer, *parse_subwords(subwords))
    folder = discover_files(midi_dir)
    if strict_splits:
        _refuse_shared_works(midi_dir, folder)
    splitting = None if folder.has_splits else {"validation_fraction": validation_fraction, "seed": seed}
    files = _Input(midi_dir, folder, splitting, workers, progress)
    origin = _origin(files, subwords, tokenizer)
    if existing := _existing_corpus(out, origin["fingerprint"], tokenizer.programs, force):
        return _report(existing, out, folder, True, began)
    final = out.resolve()  # now, because the working folder may be replaced
    try:
        if subwords is None:
            _write_events(final, tokenizer, files, origin, force)
        else:
            _write_subwords(final, tokenizer, files, origin, parse_subwords(subwords), learning, force)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    return _report(Corpus.load(final), out, folder, False, began)


def _write_events(
    out: Path, tokenizer: Tokenizer, files: _Input, origin: dict[str, Any], replace: bool = False
) -> None:
    """Encode the files into a corpus of events at `out`."""
    with CorpusWriter(out, tokenizer, replace) as writer:
        writer.skipped += files.folder.skipped
        _write_pieces(writer, files)
        if files.splitting:
            writer.assign_splits(
                choose_splits({piece.source: piece.work for piece in writer.pieces}, **files.splitting)
            )
        writer.commit(origin)


def _write_subwords(
    out: Path,
    tokenizer: Tokenizer,
    files: _Input,
    origin: dict[str, Any],
    subword_model: tuple[str, int],
    learning: Callable[[int], None] | None,
    replace: bool,
) -> None:
    """Encode the files into events, learn subwords from the training pieces, and write a corpus of subwords."""
    with temporary_folder(out.with_name(f"{out.name}.events")) as folder:
        _write_events(folder / "events", tokenizer, files, {})
        corpus = Corpus.load(folder / "events")
        if "train" not in corpus.splits:
            raise UserError(f"{files.midi_dir}: no piece for training, expected some to learn subwords from")
        sequences = [corpus.tokens(piece) for piece in corpus.pieces("train")]
        if learning:
            learning(sum(map(len, sequences)))
        subwords = learn_subwords(tokenizer, sequences, *subword_model)
        with CorpusWriter(out, subwords, replace) as writer:
            writer.skipped += corpus.skipped
            for piece in corpus.pieces():
                unchanged = {name: value for name, value in asdict(piece).items() if name not in TOKEN_FIELDS}
                writer.add(subwords.from_events(corpus.tokens(piece)), events=piece.length, **unchanged)
            writer.commit(origin)


def _check_options(midi_dir: Path, out: Path, validation_fraction: float, workers: int | None) -> None:
    if not midi_dir.is_dir():
        found = "is a file" if midi_dir.exists() else "does not exist"
        raise UserError(f"{midi_dir}: {found}, expected a folder of MIDI files")
    if not 0 <= validation_fraction < 1:
        raise UserError(f"`validation_fraction` {validation_fraction:g}: expected at least 0 and below 1")
    if workers is not None and workers < 1:
        raise UserError(f"`workers` {workers}: expected at least 1")
    if midi_dir.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out}: holds the MIDI files of {midi_dir}, expected another folder for the corpus")


def _refuse_shared_works(midi_dir: Path, folder: MidiFolder) -> None:
    if works := folder.shared_works:
        raise UserError(
            f"{midi_dir / folder.metadata}: expected every work in one split, {len(works)} in several: "
            f"{'; '.join(map(str, works))}"
        )


def _existing_corpus(out: Path, fingerprint: str, programs: bool, force: bool) -> Corpus | None:
    """Return the corpus at `out` if it comes from the same input, None if `out` is free or may be replaced.

    programs: whether the corpus should encode the instruments. Not every tokenizer has this in its fingerprint.

    Raises `UserError` if anything else is there.
    """
    if not out.exists() or (out.is_dir() and not folder_content(out)):
        return None
    if not (out / INDEX).is_file():
        raise UserError(f"{out}: exists and is not a corpus, expected a new folder or a corpus")
    if force:
        _check_only_a_corpus(out)
        return None
    try:
        corpus = Corpus.load(out)
        corpus.verify()
    except UserError as error:
        raise UserError(f"{error}; `force` replaces the corpus") from error
    found, difference = corpus.origin.get("fingerprint"), ""
    if found != fingerprint:
        difference = f"fingerprint {str(found)[:12]}, expected {fingerprint[:12]}"
    elif corpus.tokenizer.programs != programs:
        difference = "without programs, expected with" if programs else "with programs, expected without"
    if difference:
        raise UserError(f"{out}: a corpus of other input or options ({difference}); `force` replaces it")
    return corpus


def _check_only_a_corpus(out: Path) -> None:
    """Raise `UserError` if the folder of a corpus also holds something else, which replacing it would delete."""
    if others := sorted({path.name for path in folder_content(out)} - {INDEX, TOKENS, TOKENIZER}):
        raise UserError(f"{out}: holds {others[0]}, which `force` would delete, expected only a corpus")


def _report(corpus: Corpus, out: Path, folder: MidiFolder, up_to_date: bool, began: float) -> PrepareReport:
    pieces = corpus.pieces()
    return PrepareReport(
        out=out,
        up_to_date=up_to_date,
        pieces=count_by_split(pieces),
        tokens=corpus.n_tokens,
        events=sum(piece.events for piece in pieces),
        notes=sum(piece.notes for piece in pieces),
        seconds=sum(piece.duration for piece in pieces),
        tokenizer=corpus.tokenizer.label,
        notes_encoded=sum(piece.notes_encoded for piece in pieces),
        out_of_time=sum(not piece.keeps_time for piece in pieces),
        repaired={piece.source: parse_repairs(piece.repairs) for piece in pieces if piece.repairs},
        skipped=corpus.skipped,
        shared_works=folder.shared_works,
        unused_metadata=folder.unused,
        wall_seconds=time.perf_counter() - began,
    )


def _origin(files: _Input, subwords: str | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `origin` of the corpus; its fingerprint is the SHA-256, in hex, of all the input."""
    options = (files.splitting or {}) | ({"subwords": subwords} if subwords else {})
    folder = files.folder
    plan = [
        folder.metadata,
        options,
        tokenizer.fingerprint,
        READER_VERSION,
        [(nfc(entry.source), entry.split, nfc(entry.composer), nfc(entry.title)) for entry in folder.entries],
        [(nfc(entry.source), entry.reason) for entry in folder.skipped],
    ]
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode())
    for entry in folder.entries:
        try:
            content = read_bytes(files.midi_dir / entry.source)
        except UserError as error:
            content = str(error).encode()
        digest.update(hashlib.sha256(content).digest())
    return {
        "folder": str(files.midi_dir.resolve()),
        "metadata": folder.metadata,
        "options": options,
        "shared_works": [asdict(work) for work in folder.shared_works],
        "fingerprint": digest.hexdigest(),
    }


def _write_pieces(writer: CorpusWriter, files: _Input) -> None:
    """Encode the files and append them in order, skipping files with the tokens of an earlier one.

    Raises `UserError` if no file can be used.
    """
    sources: dict[str, str] = {}  # hash of the tokens → source
    entries = files.folder.entries
    results = encode_files([files.midi_dir / entry.source for entry in entries], writer.tokenizer, files.workers)
    for i, (entry, encoded) in enumerate(zip(entries, results, strict=True)):
        if encoded.ids is None:
            writer.skip(entry.source, encoded.reason)
        elif (content := token_hash(encoded.ids)) in sources:
            writer.skip(entry.source, f"same music as {sources[content]}")
        else:
            sources[content] = entry.source
            writer.add(
                encoded.ids,
                source=entry.source,
                split=entry.split,
                composer=entry.composer,
                title=entry.title,
                duration=encoded.duration,
                notes=encoded.notes,
                notes_encoded=encoded.notes_encoded,
                duration_encoded=encoded.duration_encoded,
                repairs=encoded.repairs,
            )
        if files.progress:
            files.progress(i + 1, len(entries))
    if not writer.pieces:
        reasons = "; ".join(f"{entry.source}: {entry.reason}" for entry in writer.skipped[:3])
        raise UserError(f"{files.midi_dir}: none of {len(writer.skipped)} files can be used ({reasons})")
