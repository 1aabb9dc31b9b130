"""Make a tokenizer by name, or load a saved one from its folder."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from dsmr_mlx.common.errors import UserError, shortened
from dsmr_mlx.common.files import TOKENIZER_FILE, read_json
from dsmr_mlx.common.limits import MAX_SIZES
from dsmr_mlx.tokenizers.base import FORMAT, BadFile, Tokenizer
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer

# kind → module and class, imported on use: the library of a tokenizer may be large or missing
KINDS = {
    "performance": "dsmr_mlx.tokenizers.performance:PerformanceTokenizer",
    "aria": "dsmr_mlx.tokenizers.aria.tokenizer:AriaTokenizer",
    "ids": "dsmr_mlx.tokenizers.ids:IdTokenizer",
    "miditok": "dsmr_mlx.tokenizers.miditok.tokenizer:MidiTokTokenizer",
    "subwords": "dsmr_mlx.tokenizers.subwords:SubwordTokenizer",
}


def make_tokenizer(
    tokenizer: str, tokenizer_config: str | os.PathLike | None = None, programs: bool = False
) -> Tokenizer:
    """Make a tokenizer by name: `performance`, `miditok:NAME`, `aria`, or the path of a corpus, checkpoint or run.

    tokenizer_config: a JSON file with MidiTok settings; programs: encode the instruments, with MidiTok or Aria only.
    Raises `UserError` for an unknown name or invalid settings.
    """
    kind, _, name = tokenizer.partition(":")
    if kind == "miditok" and name:
        from dsmr_mlx.tokenizers.miditok.tokenizer import MidiTokTokenizer

        return MidiTokTokenizer.from_name(name, tokenizer_config, programs)
    if kind == "aria" and not tokenizer_config:
        from dsmr_mlx.tokenizers.aria.tokenizer import AriaTokenizer

        return AriaTokenizer.parse(name, programs)
    if tokenizer_config:
        raise UserError(f"`tokenizer_config`: needs a MidiTok `tokenizer` such as miditok:REMI, not {tokenizer}")
    if programs:
        raise UserError(f"`programs`: needs the `tokenizer` miditok:NAME or aria, not {tokenizer}")
    if tokenizer == PerformanceTokenizer.kind:
        return PerformanceTokenizer()
    for folder in (Path(tokenizer) / inner for inner in ("tokenizer", "best/tokenizer", "last/tokenizer", "")):
        if (folder / TOKENIZER_FILE).is_file():
            return load_tokenizer(folder)
    raise UserError(
        f"`tokenizer` {tokenizer}: expected performance, miditok:NAME (REMI, TSD, MIDILike, …), aria, or a folder with "
        "a tokenizer"
    )


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Load the tokenizer saved in a folder.

    Raises `UserError`, naming the file, if it is missing, damaged or of an unknown kind, or if its fingerprint is not
    that of this version: its ids would have other meanings. The message names known earlier versions.
    """
    path = Path(folder) / TOKENIZER_FILE
    return restore_tokenizer(path, _read_description(path))


def restore_tokenizer(path: Path, saved: dict[str, Any]) -> Tokenizer:
    """Build the tokenizer with the kind, parameters and fingerprint in `saved`; its files are next to `path`.

    Raises `UserError` like `load_tokenizer`.
    """
    if not isinstance(saved["kind"], str) or saved["kind"] not in KINDS:
        raise UserError(f"{path}: kind {saved['kind']!r}, expected one of {', '.join(map(repr, KINDS))}")
    module, name = KINDS[saved["kind"]].split(":")
    tokenizer_class = getattr(importlib.import_module(module), name)
    try:
        tokenizer = tokenizer_class.restore(path.parent, saved["parameters"], restore_tokenizer)
        _check_ids(tokenizer)
        fingerprint = tokenizer.fingerprint
    except BadFile:
        raise
    except Exception as error:  # for invalid parameters, libraries that do not check them raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: invalid parameters {shortened(saved['parameters'])} ({reason})") from error
    if fingerprint != saved["fingerprint"]:
        if version := tokenizer.earlier_versions.get(str(saved["fingerprint"])):
            raise BadFile(
                f"{path}: version {version} of the {tokenizer.kind} vocabulary, expected version {tokenizer.version}: "
                "prepare the corpus again and train a new model, or use a bundled one"
            )
        raise BadFile(
            f"{path}: fingerprint {saved['fingerprint']}, expected {fingerprint}: this version has another vocabulary"
        )
    return tokenizer


def _check_ids(tokenizer: Tokenizer) -> None:
    """Raise `UserError` for a vocabulary that is too large, or special ids outside it."""
    size, most = tokenizer.vocab_size, MAX_SIZES["vocab_size"]
    if not 1 <= size <= most:
        raise UserError(f"{size:,} ids, expected 1 to {most:,}")
    for name in ("pad_id", "bos_id", "eos_id", "fill_id", "play_id"):
        value = getattr(tokenizer, name)
        if value is not None and not 0 <= value < size:
            raise UserError(f"{name} is {value}, expected 0 to {size - 1}")


def _read_description(path: Path) -> dict[str, Any]:
    """Return the content of `tokenizer.json` after checking its keys and format."""
    saved = read_json(path, "a tokenizer")
    keys = {"format", "kind", "parameters", "vocab_size", "fingerprint"}
    if not isinstance(saved, dict) or saved.keys() != keys:
        found = sorted(saved) if isinstance(saved, dict) else type(saved).__name__
        raise UserError(f"{path}: keys {found}, expected {sorted(keys)}")
    if saved["format"] != FORMAT:
        raise UserError(f"{path}: format {saved['format']!r}, expected {FORMAT}")
    return saved
