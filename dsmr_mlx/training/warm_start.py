"""Warm starts: a run that begins with the weights of a checkpoint, trained here or converted, not with random ones.

The checkpoint gives the architecture. Horizons, segment length and dropout may be other ones, for no weight depends on
them: so a model that was trained with full attention becomes a DSMR.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.checkpoint_folder import verify
from dsmr_mlx.model.config import Architecture, ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.tokenizers.ids import IdTokenizer
from dsmr_mlx.tokenizers.registry import load_tokenizer
from dsmr_mlx.training.config import CHANGEABLE, KEPT, TrainConfig
from dsmr_mlx.training.distributed import Ranks


def initial_settings(init: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a `TrainConfig` that the checkpoint or run `init` stands for: architecture and horizons.

    Rank 0 reads it for all. Raises `UserError` for what is no checkpoint, is quantized, or has another architecture
    than is `asked` for, naming both values.
    """
    ranks = Ranks()
    with ranks.together():
        config = _model_config(init, _folder(init)) if ranks.is_main else None
    values = json.loads(ranks.from_main(config.to_json().encode() if config else b""))
    # None stands for a value that follows from others: what it comes to is compared when the run begins.
    _check_architecture(init, {name: value for name, value in asked.items() if value is not None}, values)
    horizons = f"custom:{','.join(map(str, values['horizons']))}"
    return {f.name: values[f.name] for f in fields(Architecture)} | {"horizons": horizons}


def check(config: TrainConfig, corpus: Corpus) -> Path:
    """The folder of the checkpoint that `config.init` names, when a run with `config` on `corpus` can begin from it.

    Raises `UserError`, naming both values where two differ: for a path that is no whole checkpoint, for a quantized
    one, another architecture, a vocabulary that is not the corpus's, and for weights that are missing, unknown, of
    another shape or no floats.
    """
    folder = _folder(config.init)
    verify(folder)
    model_config = _model_config(config.init, folder)
    _check_architecture(config.init, config.to_dict(), model_config.to_dict())
    _check_vocabulary(config.init, folder, model_config.vocab_size, corpus)
    _check_weights(folder / "model.safetensors", model_config)
    return folder


def _folder(init: str) -> Path:
    """The checkpoint's own folder, whichever link leads to it now."""
    try:
        return checkpoint.resolve(init).resolve()
    except UserError as error:
        raise UserError(f"--init {error}") from None


def _model_config(init: str, folder: Path) -> ModelConfig:
    config = ModelConfig.load(folder / "config.json")
    if config.quantization is not None:
        raise UserError(
            f"--init {init}: its weights are quantized to {config.quantization['bits']} bits, expected floats: "
            "start from the checkpoint that it was made from"
        )
    return config


def _check_architecture(init: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name in KEPT:
        if name in wanted and wanted[name] != found[name]:
            raise UserError(
                f"{name} = {wanted[name]!r}: --init {init} has {name} = {found[name]!r}, which its weights fix; "
                f"only horizons, {' and '.join(CHANGEABLE)} may be other ones"
            )


def _check_vocabulary(init: str, folder: Path, vocab_size: int, corpus: Corpus) -> None:
    """Where only the size of the checkpoint's vocabulary is known, the size is compared."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    mine, theirs = corpus.tokenizer.fingerprint, tokenizer.fingerprint
    if mine != theirs and not isinstance(tokenizer, IdTokenizer):
        raise UserError(
            f"--init {init}: vocabulary {theirs[:12]}, the corpus {corpus.path} has {mine[:12]}: not the same tokenizer"
        )
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}")
    if corpus.vocab_size != vocab_size:
        raise UserError(
            f"--init {init}: vocabulary of {vocab_size} tokens, the corpus {corpus.path} has {corpus.vocab_size}"
        )


def _check_weights(path: Path, config: ModelConfig) -> None:
    """Compare the names, shapes and types in a file with those of the model; no weight is read or computed."""
    expected = {name: array.shape for name, array in tree_flatten(DSMR(config).parameters())}
    try:
        found = mx.load(str(path))
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    for names, what in ((expected.keys() - found.keys(), "is missing"), (found.keys() - expected.keys(), "is unknown")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{path}: {min(names)} {what}{more}, expected the weights of config.json")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(f"{path}: {name} has shape {found[name].shape}, expected {shape}")
        if not mx.issubdtype(found[name].dtype, mx.floating):
            raise UserError(f"{path}: {name} is {found[name].dtype}, expected floats")
