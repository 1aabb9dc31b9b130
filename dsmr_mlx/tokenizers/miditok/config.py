"""Settings of MidiTok tokenizers: defaults for performances, and JSON files in any of MidiTok's formats.

MidiTok's own defaults suit scores: a grid of 31 ms, 88 pitches. Here a tick is 10 ms, because every piece is converted
to real time, 120 quarters per minute, before MidiTok encodes it.
"""

from __future__ import annotations

import inspect
import json
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import read_json

if TYPE_CHECKING:
    from miditok import MusicTokenizer

SPECIAL_TOKENS = ("PAD", "BOS", "EOS")
ALL_PITCHES = (0, 127)
DEFAULTS: dict[str, Any] = {
    "pitch_range": ALL_PITCHES,
    "beat_res": {(0, 2): 50, (2, 8): 10, (8, 40): 2},  # a beat is 0.5 s: steps of 10, 50 and 250 ms, up to 20 s
    "num_velocities": 32,
    "special_tokens": list(SPECIAL_TOKENS),
    "encode_ids_split": "no",
    "use_time_signatures": False,
    "use_pitchdrum_tokens": False,
}
DEFAULTS_BY_NAME: dict[str, dict[str, Any]] = {
    "PerTok": {
        "beat_res": {(0, 4): 8, (4, 40): 4},  # microtiming restores what this rounds away
        "ticks_per_quarter": 320,
        "use_microtiming": True,
        "max_microtiming_shift": 0.125,
        "num_microtiming_bins": 30,
    },
    "BEAT": {"use_pitchdrum_tokens": True},  # always encodes instruments, and so drums
}
# A compound token flattened into its fields would be neither the published model nor a better REMI for one piano.
UNSUPPORTED = {
    **dict.fromkeys(("CPWord", "MuMIDI", "Octuple"), "its tokens are compounds of several fields"),
    "MMM": "it is for bands and encodes one instrument after the other",
}
# Settings of single tokenizers in addition to those of `TokenizerConfig`.
ADDITIONAL = {
    *("max_bar_embedding", "use_bar_end_tokens", "add_trailing_bars", "max_duration"),
    *("ticks_per_quarter", "use_microtiming", "max_microtiming_shift", "num_microtiming_bins", "use_position_toks"),
}
SPLITS_OF_IDS = ("bar", "beat", "no")
VERSIONS = ("miditok_version", "symusic_version", "hf_tokenizers_version")
TRAINED = ("_vocab_base", "_model", "_vocab_base_byte_to_token")  # what MidiTok stores of a trained tokenizer


def tokenizer_names() -> list[str]:
    """Return the names of the supported tokenizers of the installed MidiTok."""
    import miditok

    return sorted(
        name
        for name, value in vars(miditok).items()
        if inspect.isclass(value) and issubclass(value, miditok.MusicTokenizer)
        if not inspect.isabstract(value) and name not in UNSUPPORTED
    )


def describe(name: str, file: str | Path | None, programs: bool) -> dict[str, Any]:
    """Return everything that MidiTok needs to build a tokenizer, as JSON values in MidiTok's own format.

    file: a tokenizer or configuration saved by MidiTok, or an object with some of the settings of its
    `TokenizerConfig`; the others are as in `DEFAULTS`. Raises `UserError` that names the invalid setting.
    """
    where = f"`tokenizer` miditok:{name}"
    _check_name(name, where)
    where = where if file is None else str(file)
    settings, learned = ({}, {}) if file is None else _read(name, Path(file))
    settings = DEFAULTS | {"use_pitchdrum_tokens": programs} | DEFAULTS_BY_NAME.get(name, {}) | settings
    if programs:
        settings["use_programs"] = True
    if settings["use_pitchdrum_tokens"]:  # otherwise unused, and it would change the fingerprint
        settings.setdefault("drums_pitch_range", ALL_PITCHES)
    if not learned:
        special = list(settings["special_tokens"])
        present = {token.split("_")[0] for token in special}
        settings["special_tokens"] = special + [token for token in SPECIAL_TOKENS if token not in present]
    config = _built(lambda: _config(settings), where)
    tokenizer = _built(lambda: _class_of(name)(config), where)
    if tokenizer.config.use_programs and not tokenizer.one_token_stream:
        raise UserError(f"{where}: one_token_stream_for_programs = false, must be true: a piece is one sequence")
    description = {"tokenization": name, "config": tokenizer.config.to_dict(serialize=True), **learned}
    return json.loads(json.dumps(description))


def build(description: dict[str, Any]) -> MusicTokenizer:
    """Build MidiTok's tokenizer from the result of `describe`. Raises `UserError` if MidiTok refuses it."""
    _check_name(description["tokenization"], f"tokenization {description['tokenization']!r}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "miditok.json"
        file.write_text(json.dumps(description), encoding="utf-8")
        return _built(lambda: _class_of(description["tokenization"])(params=file), "MidiTok")


def is_trained(description: dict[str, Any]) -> bool:
    """Return whether MidiTok has trained the tokenizer, so that some ids stand for several events."""
    return "_model" in description


def _check_name(name: str, where: str) -> None:
    """Raise `UserError` for a tokenizer that is unknown or not supported."""
    if name not in (names := tokenizer_names()):
        reason = f"{reason}; " if (reason := why_unsupported(name)) else ""
        raise UserError(f"{where}: {reason}expected one of {', '.join(names)}")


def why_unsupported(name: str) -> str:
    """Return why one of MidiTok's tokenizers is not supported, "" for all others. Needs no MidiTok."""
    return f"not supported because {UNSUPPORTED[name]}" if name in UNSUPPORTED else ""


def _class_of(name: str) -> type[MusicTokenizer]:
    import miditok

    return getattr(miditok, name)


def _built(make: Any, where: str) -> Any:
    """Return the result of `make`. Warnings of MidiTok, such as for an ignored setting, become errors."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", category=UserWarning)
            return make()
    except UserError:
        raise
    except (Exception, UserWarning) as error:  # MidiTok does not document what it raises for invalid settings
        raise UserError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _read(name: str, file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a file: settings for `TokenizerConfig`, and what a trained tokenizer has learned."""
    content = read_json(file, "settings of MidiTok")
    if not isinstance(content, dict):
        raise UserError(f"{file}: a {type(content).__name__}, expected an object with settings of MidiTok")
    learned: dict[str, Any] = {}
    if "config" in content:
        if content.get("tokenization", name) != name:
            raise UserError(f"{file}: tokenization {content['tokenization']!r}, expected {name!r} as in `tokenizer`")
        learned = {key: content[key] for key in TRAINED if key in content}
        content = _object(file, content, "config")
    additional = _object(file, content, "additional_params")
    settings = {key: value for key, value in content.items() if key not in (*VERSIONS, "additional_params")}
    _refuse_unknown(file, settings | additional)
    _check_values(file, settings | additional)
    return _typed(file, settings) | additional, learned


def _object(file: Path, content: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a part of the settings, empty if it is missing."""
    part = content.get(key, {})
    if not isinstance(part, dict):
        raise UserError(f"{file}: {key} is {part!r}, expected an object with settings of MidiTok")
    return part


def _refuse_unknown(file: Path, settings: dict[str, Any]) -> None:
    from miditok import TokenizerConfig

    known = set(inspect.signature(TokenizerConfig.__init__).parameters) - {"self", "kwargs"} | ADDITIONAL
    if unknown := sorted(settings.keys() - known):
        raise UserError(f"{file}: unknown setting {', '.join(unknown)}, expected those of MidiTok's TokenizerConfig")


def _check_values(file: Path, settings: dict[str, Any]) -> None:
    """Raise `UserError` for values that MidiTok would accept and misinterpret."""
    special = settings.get("special_tokens", [])
    if not isinstance(special, list) or not all(isinstance(token, str) and token for token in special):
        raise UserError(f'{file}: special_tokens is {special!r}, expected a list of names such as ["PAD", "BOS"]')
    split = settings.get("encode_ids_split", "no")
    if split not in SPLITS_OF_IDS:
        raise UserError(f"{file}: encode_ids_split is {split!r}, expected one of {', '.join(SPLITS_OF_IDS)}")


def _typed(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Convert JSON values to those of MidiTok: tuples, and keys that are ranges or numbers."""
    typed = {key: tuple(value) if key.endswith("_range") and isinstance(value, list) else value
             for key, value in settings.items()}  # fmt: skip
    try:
        for key in {"beat_res", "beat_res_rest"} & typed.keys():
            typed[key] = {tuple(map(int, beats.split("_"))): res for beats, res in typed[key].items()}
        if "time_signature_range" in typed:
            typed["time_signature_range"] = {int(k): v for k, v in typed["time_signature_range"].items()}
        if "chord_maps" in typed:
            typed["chord_maps"] = {k: tuple(v) for k, v in typed["chord_maps"].items()}
    except (AttributeError, TypeError, ValueError) as error:
        form = '{"0_2": 50} for beat_res, {"4": [4]} for time_signature_range, {"maj": [0, 4, 7]} for chord_maps'
        raise UserError(f"{file}: {error}, expected the form in which MidiTok saves its settings: {form}") from error
    return typed


def _config(settings: dict[str, Any]) -> Any:
    from miditok import TokenizerConfig

    return TokenizerConfig(**settings)
