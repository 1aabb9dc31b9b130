"""A player as one safetensors file: every array that its music depends on, and as metadata what it belongs to."""

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
from dsmr_mlx.common.files import write_atomically
from dsmr_mlx.generation import steering
from dsmr_mlx.generation.history import Past
from dsmr_mlx.generation.next_token import Source
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.sampling import Processor, Sampling
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.state import RecurrentState
from dsmr_mlx.tokenizers.base import Tokenizer

FORMAT = "dsmr-mlx player 2"
NOT_ASKED = -1


def save_player(player: Player, path: str | os.PathLike, asked: Sequence[int] | None) -> None:
    """See `Player.save`."""
    belongs = {
        "format": FORMAT,
        "model": json.dumps(player.model.config.to_dict()),
        "weights": weights_digest(player.model),
        "tokenizer": player.tokenizer.fingerprint,
        "sampling": json.dumps(player.sampling.to_dict()),
        "processors": json.dumps(described(player.processors)),
    }
    arrays = to_arrays(player, asked)
    sha256 = checksum(to_bytes(arrays, belongs), belongs)
    try:
        write_atomically(path, to_bytes(arrays, belongs | {"sha256": sha256}))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def load_player(
    player_class: type[Player],
    path: str | os.PathLike,
    model: DSMR,
    tokenizer: Tokenizer,
    processors: Sequence[Processor | Callable] | None,
    options: dict[str, Any],
) -> Player:
    """See `Player.load`; `options` are of the player that computes, not of its music."""
    arrays, belongs = read_arrays(path)
    check_belongs(path, belongs, model, tokenizer)
    stored = json.loads(belongs["processors"])
    if processors is None:
        if unknown := [each for each in stored if isinstance(each, str)]:
            raise UserError(f"{path}: processors {', '.join(unknown)} are not in the file, expected processors=[…]")
        processors = steering.from_dicts(stored, str(path))
    if len(processors) != len(stored):
        raise UserError(f"{path}: saved with {len(stored)} processors, expected as many, found {len(processors)}")
    player = player_class(
        model,
        tokenizer,
        n=len(arrays["keys"]),
        sampling=Sampling.from_dict(json.loads(belongs["sampling"]), f"{path}: sampling"),
        processors=processors,
        **options,
    )
    try:
        restore(player, arrays)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: is not what this player saves ({error})") from None
    return player


def described(processors: Sequence[Any]) -> list[dict[str, Any] | str]:
    """Each processor as JSON values, or its name where nothing could build it again."""
    known = steering.KINDS.values()
    return [p.to_dict() if type(p) in known else getattr(p, "__name__", type(p).__name__) for p in processors]


def to_arrays(player: Player, asked: Sequence[int] | None) -> dict[str, mx.array]:
    """All that the music depends on, in arrays whose shapes follow from the model, the lanes and the processors."""
    state, past = player.state, player.past
    lanes, rows = state.batch_size, 2 * player.model.config.segment_length + 1  # 1: drawn behind the last position
    first, second = past.marks[0], past.marks[-1]
    tokens = np.zeros((rows, lanes), np.int32)
    for row, token in zip(tokens[: len(past.tokens)], past.tokens, strict=True):
        row[:] = np.array(token)
    sources = np.zeros(rows, np.uint8)
    sources[: len(past.sources)] = [source.value for source in past.sources]
    blank = mx.zeros((lanes, player.model.config.vocab_size))
    arrays = {f"state.{name}": array for name, array in state.to_arrays().items()} | {
        "logits": blank if player.logits is None else player.logits,
        "keys": player.keys,
        "tokens": mx.array(tokens),
        "sources": mx.array(sources),
        # clock, whether there are logits, clocks of the marks
        "clocks": mx.array(np.array([past.clock, player.logits is not None, first[0], second[0]], np.int64)),
        "asked": mx.array(np.full(player.lanes, NOT_ASKED if asked is None else asked, np.int64)),
    }
    for name, heard in (("heard", player.heard), ("first", first[1]), ("second", second[1])):
        arrays |= {f"{name}.{place}": leaf for place, leaf in tree_flatten(heard)}
    return arrays


def restore(player: Player, arrays: dict[str, mx.array]) -> None:
    """Bring a new player to where the arrays say. `ValueError` or `KeyError` for arrays of another player."""
    state = {name.removeprefix("state."): array for name, array in arrays.items() if name.startswith("state.")}
    player.state = RecurrentState.from_arrays(player.model.config, state)
    clock, has_logits, first, second = np.array(arrays["clocks"]).tolist()
    player.logits = arrays["logits"] if has_logits else None
    asked = tuple(arrays["asked"].tolist())
    player.keys, player.asked = arrays["keys"], None if NOT_ASKED in asked else asked
    blank = player.heard
    player.heard, *heards = (filled(blank, arrays, name) for name in ("heard", "first", "second"))
    marks = list(zip((first, second), heards, strict=True))[: 1 + (second > first)]
    tokens, sources = (np.array(arrays[name])[: clock - first] for name in ("tokens", "sources"))
    player.past = Past(marks, clock, [mx.array(row) for row in tokens], [Source(i) for i in sources.tolist()])


def filled(tree: Any, arrays: dict[str, mx.array], name: str) -> Any:
    """The tree with the arrays of that name. `ValueError` where one has another shape, lanes aside."""
    leaves = []
    for place, leaf in tree_flatten(tree):
        array = arrays[f"{name}.{place}"]
        if array.shape[1:] != leaf.shape[1:] or array.dtype != leaf.dtype:
            expected = f"{leaf.dtype} {leaf.shape[1:]}"
            raise ValueError(f"{name}.{place} is {array.dtype} {array.shape[1:]} a lane, expected {expected}")
        leaves.append(array)
    remaining = iter(leaves)
    return tree_map(lambda _: next(remaining), tree)


def to_bytes(arrays: dict[str, mx.array], metadata: dict[str, str]) -> bytes:
    """A safetensors file."""
    file = io.BytesIO()
    mx.save_safetensors(file, arrays, metadata)
    return file.getvalue()


def checksum(file: bytes, metadata: dict[str, str]) -> str:
    """sha256, in hex, of the metadata and of a safetensors file without its header."""
    header = 8 + int.from_bytes(file[:8], "little")
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode() + file[header:]).hexdigest()


def read_arrays(path: str | os.PathLike) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Arrays and metadata of a saved player. Raises `UserError` that names the file for anything else."""
    try:
        file = Path(path).read_bytes()
        arrays, metadata = mx.load(io.BytesIO(file), format="safetensors", return_metadata=True)
        mx.eval(arrays)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), expected a saved player") from None
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}), expected a saved player") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: format {metadata.get('format')!r}, expected {FORMAT!r}, a saved player")
    recorded = metadata.pop("sha256", None)
    if (found := checksum(file, metadata)) != recorded:
        raise UserError(f"{path}: damaged, sha256 is {found}, expected {recorded}")
    return arrays, metadata


def check_belongs(path: str | os.PathLike, belongs: dict[str, str], model: DSMR, tokenizer: Tokenizer) -> None:
    """Raise `UserError` that names both sides if a player was saved with another model or vocabulary."""
    if belongs["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"{path}: saved with the vocabulary {belongs['tokenizer']}, the checkpoint's is {tokenizer.fingerprint}"
        )
    saved, own = ModelConfig.from_json(belongs["model"], f"{path}: model").to_dict(), model.config.to_dict()
    if different := [f"{name} = {saved[name]}, the model has {own[name]}" for name in own if saved[name] != own[name]]:
        raise UserError(f"{path}: saved with {'; '.join(different)}")
    if belongs["weights"] != (digest := weights_digest(model)):
        raise UserError(f"{path}: saved with the weights {belongs['weights']}, the model's are {digest}")


def weights_digest(model: DSMR) -> str:
    """16 hex digits that differ between checkpoints: of weights that every step of training changes.

    They do not depend on the type of the floats, as far as it holds their values: what is half precision on a GPU may
    be computed in float32 on a CPU.
    """
    samples = [model.norm.weight, *(block.attention.qkv.weight[0] for block in model.layers)]
    data = b"".join(np.array(sample.astype(mx.float32)).tobytes() for sample in samples)
    return hashlib.sha256(data).hexdigest()[:16]
