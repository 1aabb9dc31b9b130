"""Load models from checkpoints, and write the files of a checkpoint.

    config.json           the model's configuration
    model.safetensors     its weights; if it has adapters, only these
    base.json             with adapters: where the other weights are, see `base`
    tokenizer/            its vocabulary
    training.*            only for resuming a run
    checksums.json        size and SHA-256 of every other file except `COMPANIONS`, written last

`checkpoint_folder` commits and verifies such folders. A run keeps them as `checkpoints/step-00001000`; its `last` and
`best` are links to two of them.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.safetensors_header import parse_header, read_header
from dsmr_mlx.model.base import WEIGHTS, find_base
from dsmr_mlx.model.checkpoint_folder import resolve, verify_checkpoint
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.lora import is_adapter
from dsmr_mlx.model.state import FLOATS
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.registry import load_tokenizer


def load(
    checkpoint: str | Path | None = None, dtype: mx.Dtype | None = None, *, as_stored: bool = False
) -> tuple[DSMR, Tokenizer]:
    """Load a model, in evaluation mode, and its tokenizer.

    checkpoint: a checkpoint folder, a run (its best checkpoint), or the name of a bundled model; None: the default one
    dtype: to cast floating-point weights to, and to compute in; None: the stored dtype (float32, bfloat16 or float16),
        but float32 on a CPU, which has the same values and is several times faster there
    as_stored: keep the stored dtype on a CPU, too

    Raises `UserError`, which names the folder or file, if a part is missing, damaged or does not fit the others.
    """
    if dtype is None and not as_stored and mx.default_device().type == mx.DeviceType.cpu:
        dtype = mx.float32
    folder = resolve(checkpoint)
    config, tokenizer = load_config_and_tokenizer(folder)
    model = DSMR(config)
    model.load_weights(list(load_weights(folder, model).items()), strict=True)
    if dtype is not None:
        model.set_dtype(dtype)
    return model.eval(), tokenizer


def load_config_and_tokenizer(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    """Verify a checkpoint folder and read all but its weights. Raises `UserError` as `load` does."""
    verify_checkpoint(folder)
    config = ModelConfig.load(folder / "config.json")
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    return config, tokenizer


def load_weights(folder: Path, model: DSMR) -> dict[str, mx.array]:
    """Return the weights of a checkpoint of this model, with those of its base if it holds adapters.

    Adapters get the type of the base's floats. Raises `UserError` as `load` does.
    """
    expected = dict(tree_flatten(model.parameters()))
    adapted = model.config.lora is not None
    own = load_checked(folder, {name: p for name, p in expected.items() if is_adapter(name) == adapted})
    if not adapted:
        return own
    base = load_checked(find_base(folder).folder, {name: p for name, p in expected.items() if not is_adapter(name)})
    return base | {name: array.astype(base["norm.weight"].dtype) for name, array in own.items()}


def load_checked(folder: Path, expected: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Return the weights in a folder. Raises `UserError` if they are damaged or not as `check_weights` expects."""
    weights = load_arrays(folder / WEIGHTS)
    check_weights(folder / WEIGHTS, weights, expected)
    return weights


def save_model(folder: Path, model_config: ModelConfig, parameters: dict, tokenizer: Tokenizer) -> None:
    """Write the files that `load` reads into a folder.

    parameters: the model's parameter tree, quantized or not; with adapters only these, and the caller writes
        `base.json`

    To replace a checkpoint safely, call this within `checkpoint_folder.write_checkpoint`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(model_config.to_json(), encoding="utf-8")
    save_arrays(folder / "model.safetensors", dict(tree_flatten(parameters)))
    tokenizer.save(folder / "tokenizer")


def weight_bytes(checkpoint: str | Path) -> int:
    """Return the size of a checkpoint's own weights on disk, in bytes. Raises `UserError` if there is no checkpoint."""
    return (resolve(checkpoint) / WEIGHTS).stat().st_size


def save_arrays(path: Path, arrays: dict[str, mx.array]) -> None:
    """Write a safetensors file. Raises `OSError` if it cannot be written completely."""
    with path.open("wb") as file:
        mx.save_safetensors(file, arrays)


def load_arrays(path: Path, data: bytes | None = None) -> dict[str, mx.array]:
    """Read a safetensors file, or its content given as `data`. Raises `UserError` if it is damaged.

    The arrays are evaluated at once: arrays that MLX loads lazily would follow later changes of the file.
    """
    if data is None:
        read_header(path)
    else:
        parse_header(io.BytesIO(data), len(data), path)
    try:
        arrays = mx.load(str(path)) if data is None else mx.load(io.BytesIO(data), format="safetensors")
        mx.eval(arrays)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    return arrays


def lazy_arrays(path: Path) -> dict[str, mx.array]:
    """Return the arrays of a safetensors file, each read on first use; types and shapes are known at once.

    Raises `UserError` if the file is damaged.
    """
    read_header(path)
    try:
        return mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None


def check_weights(path: Path, arrays: Mapping[str, mx.array], expected: Mapping[str, mx.array]) -> None:
    """Raise `UserError` unless the names, shapes and types of arrays are the `expected` ones; no array is read.

    Floats may have any floating-point type; quantized weights are uint32.
    """
    missing, unknown = expected.keys() - arrays.keys(), arrays.keys() - expected.keys()
    for names, what in ((missing, "is missing"), (unknown, "is unknown")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{path}: {min(names)} {what}{more}, expected the weights of config.json")
    for name, weight in expected.items():
        found = arrays[name]
        if found.shape != weight.shape:
            raise UserError(f"{path}: {name} has shape {found.shape}, expected {weight.shape} as in config.json")
        floats = mx.issubdtype(weight.dtype, mx.floating)
        if found.dtype not in FLOATS if floats else found.dtype != weight.dtype:
            given, wanted = (str(dtype).removeprefix("mlx.core.") for dtype in (found.dtype, weight.dtype))
            raise UserError(f"{path}: {name} is {given}, expected {'floats' if floats else wanted}")
