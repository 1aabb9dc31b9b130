"""Warm starts: a run that starts from a checkpoint, trained here or converted, or trains adapters for it.

The checkpoint fixes the architecture. Horizons, segment length and dropout are free, because no weight depends on
them: so a model that was trained with full attention can become a DSMR.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.base import BASE, WEIGHTS, Base, find_base
from dsmr_mlx.model.checkpoint_folder import verify_checkpoint
from dsmr_mlx.model.config import Architecture, ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.horizons import HorizonSchedule
from dsmr_mlx.tokenizers.ids import IdTokenizer
from dsmr_mlx.tokenizers.registry import load_tokenizer
from dsmr_mlx.training.config import FIXED_BY_WEIGHTS, FREE, TrainConfig
from dsmr_mlx.training.distributed import Ranks
from dsmr_mlx.training.trainer import Trainer


def initial_settings(init: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the architecture and the horizons of the checkpoint or run `init`, as settings of a `TrainConfig`.

    Rank 0 reads it for all ranks. Raises `UserError` if it is not a checkpoint, is quantized and not to be frozen,
    holds adapters, or has another architecture than the settings `given`, naming both values.
    """
    frozen = given.get("lora_rank") is not None
    ranks = Ranks()
    with ranks.together():
        config = _model_config(init, _folder(init), frozen) if ranks.is_main else None
    values = json.loads(ranks.from_main(config.to_json().encode() if config else b""))
    # None stands for a value derived from others; the derived value is compared when the run starts.
    _check_architecture(init, {name: value for name, value in given.items() if value is not None}, values)
    horizons = HorizonSchedule.custom(values["horizons"]).spec
    return {f.name: values[f.name] for f in fields(Architecture)} | {"horizons": horizons}


def check(config: TrainConfig, corpus: Corpus) -> Path:
    """Return the folder of the checkpoint `config.init` if a run with `config` on `corpus` can start from it.

    Raises `UserError`, with both values if two differ, for an incomplete checkpoint, one that is quantized unless only
    adapters are trained, another architecture, another vocabulary than the corpus's, and weights that are missing,
    unknown or of another shape or type.
    """
    folder = _folder(config.init)
    verify_checkpoint(folder)
    model_config = _model_config(config.init, folder, config.lora_rank is not None)
    _check_architecture(config.init, config.to_dict(), model_config.to_dict())
    _check_vocabulary(config.init, folder, model_config.vocab_size, corpus)
    _check_weights(folder / "model.safetensors", model_config)
    return folder


def _folder(init: str) -> Path:
    """Return the checkpoint's own folder, with links resolved."""
    try:
        return checkpoint.resolve(init).resolve()
    except UserError as error:
        raise UserError(f"`init` {error}") from None


def _model_config(init: str, folder: Path, frozen: bool) -> ModelConfig:
    config = ModelConfig.load(folder / "config.json")
    if config.lora is not None:
        raise UserError(f"`init` {init}: holds adapters only, expected all weights: dsmr-mlx convert --fuse makes them")
    if config.quantization is not None and not frozen:
        raise UserError(
            f"`init` {init}: its weights are quantized to {config.quantization['bits']} bits, expected floats: "
            "start from the checkpoint that was quantized, or train adapters with lora_rank"
        )
    return config


def _check_architecture(init: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name in FIXED_BY_WEIGHTS:
        if name in wanted and wanted[name] != found[name]:
            raise UserError(
                f"{name} = {wanted[name]!r}: `init` {init} has {name} = {found[name]!r}, which its weights fix; "
                f"only horizons, {' and '.join(FREE)} may differ"
            )


def _check_vocabulary(init: str, folder: Path, vocab_size: int, corpus: Corpus) -> None:
    """Compare the vocabularies, only by size if the checkpoint has ids without a meaning."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    mine, theirs = corpus.tokenizer.fingerprint, tokenizer.fingerprint
    if mine != theirs and not isinstance(tokenizer, IdTokenizer):
        raise UserError(
            f"`init` {init}: vocabulary {theirs[:12]}, the corpus {corpus.path} has {mine[:12]}: not the same tokenizer"
        )
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}")
    if corpus.vocab_size != vocab_size:
        raise UserError(
            f"`init` {init}: vocabulary of {vocab_size} tokens, the corpus {corpus.path} has {corpus.vocab_size}"
        )


def _check_weights(path: Path, config: ModelConfig) -> None:
    """Compare the names, shapes and types in a file with those of the model, without reading any weight."""
    checkpoint.check_weights(path, checkpoint.lazy_arrays(path), dict(tree_flatten(DSMR(config).parameters())))


def frozen_base(config: TrainConfig, latest: Path | None, ranks: Ranks) -> tuple[Base | None, dict[str, int] | None]:
    """Return the base of a run that trains adapters, only on rank 0, and the quantization of its weights.

    latest: the checkpoint of the run that it resumes from, None for a new run. A run that trains all weights has
    neither. Raises `UserError` as `find_base` does.
    """
    base, quantization = None, None
    if config.lora_rank is None:
        return base, quantization
    with ranks.together():
        if ranks.is_main and (latest is None or (latest / BASE).is_file()):
            base = find_base(latest, [config.init]) if latest else Base.of(_folder(config.init))
            quantization = ModelConfig.load((latest or base.folder) / "config.json").quantization
    return base, json.loads(ranks.from_main(json.dumps(quantization).encode()))


def resumed_init(config: TrainConfig, saved: TrainConfig, base: Base | None) -> str | None:
    """Return the `init` of a resumed run: the saved one, or the one of `config` if its base was found there."""
    try:
        moved = base is not None and _folder(config.init) == base.folder
    except UserError:
        moved = False
    return config.init if moved else saved.init


def load_weights(trainer: Trainer, folder: Path | None, ranks: Ranks) -> None:
    """Load the weights in a folder of rank 0 as the initial or frozen weights of all ranks."""
    path = (folder or Path(trainer.config.init)) / WEIGHTS
    if ranks.size == 1:  # one tensor after the other
        trainer.start_from(checkpoint.lazy_arrays(path))
        return
    content = ranks.read(path)
    with ranks.together():
        trainer.start_from(checkpoint.load_arrays(path, content))
