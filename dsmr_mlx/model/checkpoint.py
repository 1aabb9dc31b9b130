"""Checkpoints: folders that are complete by themselves, and appear complete or not at all.

    config.json           the model's configuration
    model.safetensors     its weights
    tokenizer/            its vocabulary
    training.*            what only a resumed run needs
    checksums.json        size and SHA-256 of every other file, written last; not of `bundled.COMPANIONS`

A run keeps them as `checkpoints/step-00001000`, and `last` and `best` are links to two of them.
"""

import io
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from dsmr_mlx.common import paths as mistaken
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.model import bundled
from dsmr_mlx.model.checkpoint_folder import PARTS, CheckpointStore, verify
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.registry import load_tokenizer


def load(
    checkpoint: str | Path | None = None, dtype: mx.Dtype | None = None, *, as_stored: bool = False
) -> tuple[DSMR, Tokenizer]:
    """The model, in evaluation mode, and the tokenizer of a checkpoint folder, of a run's best checkpoint, or of a
    bundled model by its name; without a checkpoint of `bundled.DEFAULT`.

    dtype: what weights that are floats are cast to, and what the model computes in. None: on a CPU, which is several
        times slower with half precision, float32, which has the same values; elsewhere what is stored, float32,
        bfloat16 or float16
    as_stored: leave the weights as they are on a CPU, too

    Raises `UserError` that names the folder or file and what is wrong with it.
    """
    if dtype is None and not as_stored and mx.default_device().type == mx.DeviceType.cpu:
        dtype = mx.float32
    folder = resolve(checkpoint)
    config, tokenizer = describe(folder)
    model = DSMR(config)
    weights = load_arrays(folder / "model.safetensors")
    try:
        model.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}/model.safetensors: does not fit config.json ({reason})") from None
    if dtype is not None:
        model.set_dtype(dtype)
    return model.eval(), tokenizer


def describe(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    """The configuration and the tokenizer of a checkpoint folder, all of whose files are whole. See `load`."""
    verify(folder)
    config = ModelConfig.load(folder / "config.json")
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    return config, tokenizer


def save_model(folder: Path, model_config: ModelConfig, parameters: dict, tokenizer: Tokenizer) -> None:
    """Write what `load` reads into a folder; `parameters` is the model's parameter tree, quantized or not."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(model_config.to_json(), encoding="utf-8")
    save_arrays(folder / "model.safetensors", dict(tree_flatten(parameters)))
    tokenizer.save(folder / "tokenizer")


def weight_bytes(checkpoint: str | Path) -> int:
    """The size of a checkpoint's weights on disk, in bytes. Raises `UserError` if there is no checkpoint."""
    return (resolve(checkpoint) / "model.safetensors").stat().st_size


def resolve(checkpoint: str | Path | None) -> Path:
    """The checkpoint folder meant by a path or name: itself, the `best`, else the `last`, of a run, or that of a
    bundled model, see `bundled.locate`.
    """
    path = bundled.locate(checkpoint)
    if not path.is_dir():
        known = f", or a bundled model: {', '.join(bundled.names())}" if bundled.names() else ""
        hint = mistaken.no_checkpoint(path, bundled.names())
        raise UserError(f"{path}: {mistaken.kind(path)}, expected a checkpoint or a run{known}{hint}")
    for link in (path / "best", path / "last"):
        if link.is_symlink() or link.is_dir():
            return link
    if found := CheckpointStore(path, keep_last=1).complete():
        return found[-1]  # the run was killed before it could set its links
    missing = [part for part in PARTS if not (path / part).is_file()]
    if missing:
        unknown = f"not a checkpoint, {', '.join(missing)} missing, and not a run, no best or last in it"
        raise UserError(f"{path}: {mistaken.no_checkpoint_in(path) or unknown}")
    return path


def save_arrays(path: Path, arrays: dict[str, mx.array]) -> None:
    """Write a safetensors file. Raises `OSError` if it cannot be written whole."""
    with path.open("wb") as file:
        mx.save_safetensors(file, arrays)


def load_arrays(path: Path, data: bytes | None = None) -> dict[str, mx.array]:
    """Read a safetensors file, or its content as `data`, whole: what MLX loads lazily follows changes of the file."""
    try:
        arrays = mx.load(str(path)) if data is None else mx.load(io.BytesIO(data), format="safetensors")
        mx.eval(arrays)
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    return arrays
