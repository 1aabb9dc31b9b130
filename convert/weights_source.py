"""Open checkpoints of PyTorch programs and read them one tensor at a time.

A source is a file of weights, a Hugging Face folder (config.json, and weights in one file or in shards with an index),
an index of shards, or any other folder with exactly one file of weights.
"""

import os
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import open_regular, read_json, sha256
from dsmr_mlx.common.parsing import parse_json
from dsmr_mlx.common.paths import WEIGHT_SUFFIXES
from dsmr_mlx.convert.file_stamp import FileStamp
from dsmr_mlx.convert.safetensors_file import SafetensorsFile
from dsmr_mlx.convert.torch_file import TorchFile

INDEX = ".index.json"
EXPECTED = f"expected a file of weights ({', '.join(WEIGHT_SUFFIXES)}) or a folder with one"
# Names in Hugging Face folders, in the order in which they are tried.
HUGGING_FACE_FILES = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)
# Other files with the suffixes of weights.
OTHER_FILES = re.compile(r"optim|scheduler|scaler|sampler|rng_state|random_state|training_args|trainer_state")
SHARD = re.compile(r"-\d{3,}-of-0*([2-9]|[1-9]\d+)\.")

# Keys that describe a model: of this program and those that share its terms, of nanoGPT, and of Hugging Face.
MODEL_KEYS = {
    *("vocab_size", "horizons", "segment_length", "d_model", "d_ff", "n_layers", "n_heads", "n_kv_heads", "head_dim"),
    *("n_layer", "n_head", "n_embd", "n_inner", "block_size", "n_positions", "n_ctx"),
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "hidden_act", "activation_function", "tie_word_embeddings"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_scaling", "rope_parameters"),
    *("rotary_pct", "rotary_emb_base", "partial_rotary_factor", "use_parallel_residual", "sliding_window"),
}


class WeightsSource:
    """The tensors of a checkpoint by their stored names, and its configuration. Made by `open_source`.

    path         the file or folder that was opened
    files        the files with weights
    shapes       tensor name → shape, in the order of the files and of the tensors in them
    dtypes       tensor name → dtype that `read` returns, in the same order
    config       the configuration stored with the weights or the config.json beside the file, whichever has more keys
                 that describe a model (training programs store other settings under the same names); {} without
    config_name  its name for messages, "config.json" or "configuration"
    tokenizer    the tokenizer stored in a file that this program wrote, see `tokenizer_files`, else None
    licence      the text of the licence stored in such a file, else None
    entry        key of the weights in a file of `torch.save`, "" if the whole file is a state dict
    floats       dtype of the converted model, if it is not that of the embedding
    left_out     key → number of tensors of other weights in such a file, such as averages

    No tensor is kept in memory: `read` returns a new copy each time.
    """

    floats: mx.Dtype | None = None
    licence: str | None = None

    def __init__(self, path: Path, files: list[Path], index: dict[str, str] | None = None, weights: str | None = None):
        """index: tensor name → file name, for weights in shards. weights: key in files of `torch.save`."""
        self.path = path
        self.files = files
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, mx.Dtype] = {}
        self.config: dict[str, Any] = {}
        self.config_name = "config.json"
        self.tokenizer: dict | None = None
        self.entry, self.left_out, self.weights = "", {}, weights
        self._file_of: dict[str, SafetensorsFile | Path] = {}
        self._stamps: dict[Path, FileStamp] = {}
        self._mapped: TorchFile | None = None
        stored_configs = [config for file in files for config in self._add(file, index)]
        self._choose_config(stored_configs, files[0].parent / "config.json")

    def read(self, name: str) -> mx.array:
        """Return one tensor, evaluated, in its stored type; float64 becomes float32.

        Raises `KeyError` for an unknown name, `UserError` if the file was changed or removed since it was opened.
        """
        file = self._file_of[name]
        if isinstance(file, SafetensorsFile):
            return file.read(name)
        if self._mapped is None or self._mapped.path != file:
            self._mapped = None  # released before the next file is mapped
            self._mapped = TorchFile(file, self.weights, self._stamps[file])
        return self._mapped.read(name)

    def sha256(self) -> dict[str, str]:
        """Return file name → SHA-256 of each file with weights. Raises `UserError` if one was changed or removed."""
        self._check_unchanged()
        hashes = {file.name: sha256(file) for file in self.files}
        self._check_unchanged()
        return hashes

    def _check_unchanged(self) -> None:
        for path, stamp in self._stamps.items():
            stamp.check(path)

    def _choose_config(self, stored: list[dict[str, Any]], config_file: Path) -> None:
        """Choose the configuration of this program, else the one with most keys that describe a model."""
        stored = [config for config in stored if not MODEL_KEYS.isdisjoint(config)]
        if ours := [config for config in stored if "horizons" in config]:
            stored = ours
        elif config_file.is_file():
            self.config = read_json(config_file, "the configuration of a model")
            if not isinstance(self.config, dict):
                raise UserError(f"{config_file}: contains a {type(self.config).__name__}, expected a JSON object")
        best = max(stored, key=_count_model_keys, default={})
        if stored and _count_model_keys(best) >= _count_model_keys(self.config):
            self.config, self.config_name = best, "configuration"

    def _add(self, path: Path, index: dict[str, str] | None) -> list[dict[str, Any]]:
        """Add the tensors of a file. Return its entries that may be the configuration of the model."""
        file = _open_file(path, self.weights)
        shapes = file.shapes
        if index is not None:
            _check_shard(file, index)
            # Tensors that the index omits are part of the checkpoint, too.
            shapes = {name: shape for name, shape in shapes.items() if index.get(name, path.name) == path.name}
            for name in shapes.keys() & self.shapes.keys():
                raise UserError(f"{path}: {name} is also in another shard, expected the index to name one of them")
        self.shapes |= shapes
        self._stamps[path] = file.stamp
        self.dtypes |= {name: file.dtypes[name] for name in shapes}
        self._file_of |= dict.fromkeys(shapes, file if isinstance(file, SafetensorsFile) else path)
        if isinstance(file, SafetensorsFile):
            self.tokenizer = self.tokenizer or _json_object(file.metadata, "tokenizer")
            self.licence = self.licence or file.metadata.get("licence")
            config = _json_object(file.metadata, "config")
            return [config] if config else []
        self.entry = file.entry
        self.left_out |= file.left_out
        self.tokenizer = self.tokenizer or file.tokenizer
        self.licence = self.licence or file.licence
        return file.configs


def open_source(path: str | os.PathLike, weights: str | None = None) -> WeightsSource:
    """Open a file or folder of weights. In a folder, .safetensors files are preferred to files of `torch.save`.

    weights: the key of the weights in files of `torch.save` that hold several, such as "ema".

    Raises `UserError` if no file or several files fit, a shard is missing, shards and index differ, a file cannot be
    read, would run code or has types that MLX lacks, or torch is needed and missing.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder, {EXPECTED}")
    chosen = _weights_in(path) if path.is_dir() else path
    if chosen.name.endswith(INDEX):
        index = _read_index(chosen)
        return WeightsSource(path, [chosen.parent / name for name in sorted({*index.values()})], index, weights)
    if not _is_weights(chosen):
        raise UserError(f"{path}: is a {chosen.suffix or 'file without suffix'}, {EXPECTED}")
    if SHARD.search(chosen.name):
        raise UserError(f"{path}: {chosen.name} is one of several shards, expected their index ({INDEX}) or folder")
    return WeightsSource(path, [chosen], weights=weights)


def _is_weights(path: Path) -> bool:
    return path.suffix.lower() in WEIGHT_SUFFIXES


def _weights_in(folder: Path) -> Path:
    """Return the file of weights in a folder, or the index of its shards."""
    for name in HUGGING_FACE_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    weights = [path for path in found if _is_weights(path) and not OTHER_FILES.search(path.name.lower())]
    safetensors = [path for path in weights if path.suffix.lower() == ".safetensors"]
    indices = [path for path in found if path.name.endswith(INDEX)]
    indices = [path for path in indices if ".safetensors" in path.name] or indices
    for kind in (indices, safetensors, weights):
        if len(kind) == 1:
            return kind[0]
        if kind:
            named = ", ".join(path.name for path in kind[:8]) + (" …" if len(kind) > 8 else "")
            sharded = kind is not indices and SHARD.search(kind[0].name)
            expected = f"their index ({INDEX}) too" if sharded else "one, or the path of one"
            raise UserError(f"{folder}: has {len(kind)} files of weights ({named}), expected {expected}")
    raise UserError(f"{folder}: has no weights, {EXPECTED}")


def _read_index(path: Path) -> dict[str, str]:
    """Return tensor name → file name. All files exist."""
    content = read_json(path, "an index of shards")
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict) or not index:
        raise UserError(f"{path}: has no weight_map, expected an index that names the shard of every tensor")
    for tensor, name in index.items():
        if not isinstance(name, str) or Path(name).name != name or not _is_weights(Path(name)):
            raise UserError(f"{path}: lists {name!r} for {tensor}, expected a file of weights in the same folder")
    if missing := [name for name in sorted({*index.values()}) if not (path.parent / name).is_file()]:
        raise UserError(f"{path}: {', '.join(missing)} missing, expected {len({*index.values()})} shards in its folder")
    return index


def _check_shard(file: SafetensorsFile | TorchFile, index: dict[str, str]) -> None:
    """Raise `UserError` if a shard lacks a tensor that the index lists for it."""
    for name, shard in index.items():
        if shard == file.path.name and name not in file.shapes:
            raise UserError(f"{file.path}: lacks {name}, which the index lists for this shard")


def _open_file(path: Path, weights: str | None) -> SafetensorsFile | TorchFile:
    try:
        with open_regular(path) as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), {EXPECTED}") from None
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git LFS pointer; git lfs pull downloads the weights")
    if path.suffix.lower() != ".safetensors":
        return TorchFile(path, weights)
    if weights is not None:
        raise UserError(f"`weights` {weights}: not with {path.name}, only files of torch.save have entries")
    return SafetensorsFile(path)


def _count_model_keys(config: dict[str, Any]) -> int:
    return len(MODEL_KEYS & config.keys())


def _json_object(metadata: dict[str, str], key: str) -> dict | None:
    """Return a JSON object from the metadata, or None: other programs may store any text there."""
    try:
        value = parse_json(metadata[key])
    except (KeyError, TypeError, ValueError):
        return None
    return value if isinstance(value, dict) else None
