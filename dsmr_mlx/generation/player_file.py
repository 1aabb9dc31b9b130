"""A saved player: one safetensors file of its arrays, with its model, vocabulary and options as metadata."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import read_regular, write_atomically
from dsmr_mlx.common.parsing import parse_json
from dsmr_mlx.common.safetensors_header import parse_header
from dsmr_mlx.generation import steering
from dsmr_mlx.generation.sampling import Processor, Sampling
from dsmr_mlx.model.checkpoint import load_arrays
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.tokenizers.base import Tokenizer

FORMAT = "dsmr-mlx player 3"


def write(
    path: str | os.PathLike,
    arrays: dict[str, mx.array],
    model: DSMR,
    tokenizer: Tokenizer,
    sampling: Sampling,
    processors: Sequence[Processor | Callable],
) -> None:
    """Write a player's arrays and metadata atomically. Raises `UserError` if that fails."""
    metadata = {
        "format": FORMAT,
        "model": json.dumps(model.config.to_dict()),
        "weights": weights_digest(model),
        "tokenizer": tokenizer.fingerprint,
        "sampling": json.dumps(sampling.to_dict()),
        "processors": json.dumps(described(processors)),
    }
    sha256 = checksum(to_bytes(arrays, metadata), metadata)
    try:
        write_atomically(path, to_bytes(arrays, metadata | {"sha256": sha256}))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def read(
    path: str | os.PathLike,
    model: DSMR,
    tokenizer: Tokenizer,
    processors: Sequence[Processor | Callable] | None = None,
) -> tuple[dict[str, mx.array], Sampling, Sequence[Processor | Callable]]:
    """The arrays, the sampling and the processors of a saved player. `processors` replace the stored ones.

    Raises `UserError` that names the file if it does not belong to this model, vocabulary or these processors.
    """
    arrays, metadata = read_arrays(path)
    if missing := sorted({"model", "weights", "tokenizer", "sampling", "processors"} - metadata.keys()):
        raise UserError(f"{path}: {', '.join(missing)} missing in its metadata, expected a saved player")
    check_belongs(path, metadata, model, tokenizer)
    stored, sampled = (_json(path, metadata, name) for name in ("processors", "sampling"))
    if not isinstance(stored, list):
        raise UserError(f"{path}: processors is a {type(stored).__name__}, expected a list")
    if processors is None:
        if unknown := [each for each in stored if isinstance(each, str)]:
            raise UserError(f"{path}: processors {', '.join(unknown)} are not in the file, expected processors=[…]")
        processors = steering.from_dicts(stored, str(path))
    if len(processors) != len(stored):
        raise UserError(f"{path}: saved with {len(stored)} processors, expected as many, found {len(processors)}")
    return arrays, Sampling.from_dict(sampled, f"{path}: sampling"), processors


def _json(path: str | os.PathLike, metadata: dict[str, str], name: str) -> Any:
    try:
        return parse_json(metadata[name])
    except ValueError as error:
        raise UserError(f"{path}: {name} is not valid JSON ({error}), expected a saved player") from None


def described(processors: Sequence[Any]) -> list[dict[str, Any] | str]:
    """Each built-in processor as JSON values, any other by its name: the file cannot rebuild it."""
    known = steering.KINDS.values()
    return [p.to_dict() if type(p) in known else getattr(p, "__name__", type(p).__name__) for p in processors]


def unflatten(tree: Any, arrays: dict[str, mx.array], name: str) -> Any:
    """The tree with its leaves replaced by the arrays `name`.PLACE, which `player_check` has checked."""
    remaining = iter([arrays[f"{name}.{place}"] for place, _ in tree_flatten(tree)])
    return tree_map(lambda _: next(remaining), tree)


def to_bytes(arrays: dict[str, mx.array], metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file."""
    file = io.BytesIO()
    mx.save_safetensors(file, arrays, metadata)
    return file.getvalue()


def checksum(file: bytes, metadata: dict[str, str]) -> str:
    """The sha256, in hex, of the metadata and of a safetensors file without its header."""
    header = 8 + int.from_bytes(file[:8], "little")
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    digest.update(memoryview(file)[header:])  # a slice would be a copy of the whole state
    return digest.hexdigest()


def read_arrays(path: str | os.PathLike) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays and metadata of a saved player. Raises `UserError` that names the file if it is missing or damaged."""
    try:
        file = read_regular(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), expected a saved player") from None
    arrays, metadata = load_arrays(Path(path), file), parse_header(io.BytesIO(file), len(file), Path(path))[1]
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: format {metadata.get('format')!r}, expected {FORMAT!r}, a saved player")
    recorded = metadata.pop("sha256", None)
    if (found := checksum(file, metadata)) != recorded:
        raise UserError(f"{path}: damaged, sha256 is {found}, expected {recorded}")
    return arrays, metadata


def check_belongs(path: str | os.PathLike, metadata: dict[str, str], model: DSMR, tokenizer: Tokenizer) -> None:
    """Raise `UserError` with both values if a player was saved with another model or vocabulary."""
    if metadata["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"{path}: saved with the vocabulary {metadata['tokenizer']}, the checkpoint's is {tokenizer.fingerprint}"
        )
    saved, own = ModelConfig.from_json(metadata["model"], f"{path}: model").to_dict(), model.config.to_dict()
    if different := [f"{name} = {saved[name]}, the model has {own[name]}" for name in own if saved[name] != own[name]]:
        raise UserError(f"{path}: saved with {'; '.join(different)}")
    if metadata["weights"] != (digest := weights_digest(model)):
        raise UserError(f"{path}: saved with the weights {metadata['weights']}, the model's are {digest}")


def weights_digest(model: DSMR) -> str:
    """16 hex digits that differ between checkpoints: a hash of weights that every training step changes.

    Computed in float32, so that half-precision weights on a GPU match the same weights in float32 on a CPU.
    """
    layers = [block.attention.qkv for block in model.layers]
    samples = [model.norm.weight, *(layer.weight[0] for layer in layers)]
    samples += [layer.lora.v["b"] for layer in layers if "lora" in layer]
    data = b"".join(np.array(sample.astype(mx.float32)).tobytes() for sample in samples)
    return hashlib.sha256(data).hexdigest()[:16]
