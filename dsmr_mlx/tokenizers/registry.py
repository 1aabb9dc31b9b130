"""Tokenizers by name, and those saved in a folder."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import TOKENIZER_FILE, read_json
from dsmr_mlx.tokenizers.base import FORMAT, BadFile, Tokenizer
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer

LONGEST_SHOWN = 300  # characters of the parameters in a message


# kind → module and class, imported when asked for: another tokenizer's library may be large or missing
KINDS = {
    "performance": "dsmr_mlx.tokenizers.performance:PerformanceTokenizer",
    "ids": "dsmr_mlx.tokenizers.ids:IdTokenizer",
    "miditok": "dsmr_mlx.tokenizers.miditok.tokenizer:MidiTokTokenizer",
    "subwords": "dsmr_mlx.tokenizers.subwords:SubwordTokenizer",
}


def make_tokenizer(name: str, config: str | os.PathLike | None = None, programs: bool = False) -> Tokenizer:
    """The tokenizer of a name: `performance`, `miditok:NAME`, or a folder that has one: a corpus, a checkpoint, a run.

    config: a JSON file with settings of MidiTok; programs: keep instruments apart. Both are for MidiTok only. Raises
    UserError for an unknown name or for settings that do not fit.
    """
    kind, _, variety = name.partition(":")
    if kind == "miditok" and variety:
        from dsmr_mlx.tokenizers.miditok.tokenizer import MidiTokTokenizer

        return MidiTokTokenizer.named(variety, config, programs)
    for option, value in (("--tokenizer-config", config), ("--programs", programs)):
        if value:
            raise UserError(f"{option}: --tokenizer {name}, expected one of MidiTok's with it, such as miditok:REMI")
    if name == PerformanceTokenizer.kind:
        return PerformanceTokenizer()
    for folder in (Path(name) / inner for inner in ("tokenizer", "best/tokenizer", "last/tokenizer", "")):
        if (folder / TOKENIZER_FILE).is_file():
            return load_tokenizer(folder)
    raise UserError(
        f"--tokenizer {name}: expected performance, miditok:NAME (REMI, TSD, MIDILike, …), or a folder with a tokenizer"
    )


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer saved in a folder.

    Raises UserError naming the file when it is missing or damaged, of an unknown kind, or when its
    fingerprint is not the one that this version of the program computes: ids would then mean something else.
    """
    path = Path(folder) / TOKENIZER_FILE
    return restore_tokenizer(path, _read_description(path))


def restore_tokenizer(path: Path, saved: dict[str, Any]) -> Tokenizer:
    """The tokenizer of which `saved` has the kind, the parameters and the fingerprint; its files lie beside `path`.

    Raises UserError as `load_tokenizer` does.
    """
    if not isinstance(saved["kind"], str) or saved["kind"] not in KINDS:
        raise UserError(f"{path}: kind {saved['kind']!r}, expected one of {', '.join(map(repr, KINDS))}")
    module, name = KINDS[saved["kind"]].split(":")
    tokenizer_class = getattr(importlib.import_module(module), name)
    try:
        tokenizer = tokenizer_class.restore(path.parent, saved["parameters"])
    except BadFile:
        raise
    except (TypeError, ValueError) as error:
        shown = str(saved["parameters"])
        shown = shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}…"
        raise UserError(f"{path}: parameters {shown} do not fit ({error})") from error
    if tokenizer.fingerprint != saved["fingerprint"]:
        raise UserError(
            f"{path}: fingerprint {saved['fingerprint']}, expected {tokenizer.fingerprint}: "
            "the vocabulary is not the one of this version"
        )
    return tokenizer


def _read_description(path: Path) -> dict[str, Any]:
    """The content of tokenizer.json, checked for its keys and format."""
    saved = read_json(path, "a tokenizer")
    keys = {"format", "kind", "parameters", "vocab_size", "fingerprint"}
    if not isinstance(saved, dict) or saved.keys() != keys:
        found = sorted(saved) if isinstance(saved, dict) else type(saved).__name__
        raise UserError(f"{path}: keys {found}, expected {sorted(keys)}")
    if saved["format"] != FORMAT:
        raise UserError(f"{path}: format {saved['format']!r}, expected {FORMAT}")
    return saved
