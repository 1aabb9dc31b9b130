"""Checkpoints of PyTorch programs, opened for reading one tensor at a time.

model.safetensors, weights.pt …            a file
a Hugging Face folder                      config.json, and weights in one file or in shards with an index
model.safetensors.index.json               the index of shards
any other folder                           with one file of weights in it
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import read_json, sha256
from dsmr_mlx.convert.torch_file import TorchFile
from dsmr_mlx.convert.weights_file import SafetensorsFile

TORCH = (".pt", ".pth", ".bin", ".ckpt")
INDEX = ".index.json"
EXPECTED = f"expected a .safetensors file, a file of torch.save ({', '.join(TORCH)}) or a folder with one"
# Hugging Face's names, in the order in which they are tried.
USUAL = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
# What programs store beside the weights under the same suffixes.
NOT_WEIGHTS = re.compile(r"optim|scheduler|scaler|sampler|rng_state|random_state|training_args|trainer_state")
SHARD = re.compile(r"-\d{3,}-of-0*([2-9]|[1-9]\d+)\.")

# Entries that describe a model: this program's and those that share its words, nanoGPT's, and Hugging Face's.
DESCRIBING = {
    *("vocab_size", "horizons", "segment_length", "d_model", "d_ff", "n_layers", "n_heads", "n_kv_heads", "head_dim"),
    *("n_layer", "n_head", "n_embd", "n_inner", "block_size", "n_positions", "n_ctx"),
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "hidden_act", "activation_function", "tie_word_embeddings"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_scaling", "rope_parameters"),
    *("rotary_pct", "rotary_emb_base", "partial_rotary_factor", "use_parallel_residual", "sliding_window"),
}


class Source:
    """The tensors of a checkpoint, by the names under which they are stored, and what the checkpoint says of its model.

    path       what was opened
    files      the files with weights
    shapes     of every tensor, in the order of the files and of the tensors in them
    dtypes     of every tensor as `read` gives it, in the same order
    config     the description of the model in the file beside its weights, or config.json beside the file, else {}:
               what says more of a model, as training programs store their own settings under the same names
    config_name  what to call it, "config.json" or "configuration"
    tokenizer  the description of a tokenizer stored in a file that this program wrote, else None
    entry      where in a file of `torch.save` the weights were found, "" if they are the whole

    No tensor is kept in memory: `read` gives a new copy each time.
    """

    def __init__(self, path: Path, files: list[Path], index: dict[str, str] | None = None):
        """`index` gives the file name of every tensor, for weights in shards. Use `open_source`."""
        self.path = path
        self.files = files
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, mx.Dtype] = {}
        self.config: dict[str, Any] = {}
        self.config_name = "config.json"
        self.tokenizer: dict | None = None
        self.entry = ""
        self._file_of: dict[str, SafetensorsFile | Path] = {}
        self._mapped: TorchFile | None = None
        described: list[dict[str, Any]] = []
        for file in files:
            described += self._add(file, index)
        beside = files[0].parent / "config.json"
        self._choose_config(described, beside)

    def read(self, name: str) -> mx.array:
        """One tensor, evaluated, of the stored type, except that float64 becomes float32.

        Raises `KeyError` for a name that is not in `shapes`, `UserError` if the file can no longer be read.
        """
        file = self._file_of[name]
        if isinstance(file, SafetensorsFile):
            return file.read(name)
        if self._mapped is None or self._mapped.path != file:
            self._mapped = None  # released before the next file is mapped
            self._mapped = TorchFile(file)
        return self._mapped.read(name)

    def sha256(self) -> dict[str, str]:
        """The SHA-256 of each file with weights, by its name."""
        return {file.name: sha256(file) for file in self.files}

    def _choose_config(self, stored: list[dict[str, Any]], beside: Path) -> None:
        """That of this program if there is one, else the one with most entries that describe a model."""
        stored = [config for config in stored if not DESCRIBING.isdisjoint(config)]
        if ours := [config for config in stored if "horizons" in config]:
            stored = ours
        elif beside.is_file():
            self.config = read_json(beside, "the configuration of a model")
            if not isinstance(self.config, dict):
                raise UserError(f"{beside}: holds a {type(self.config).__name__}, expected a JSON object")
        says_most = max(stored, key=_describing, default={})
        if stored and _describing(says_most) >= _describing(self.config):
            self.config, self.config_name = says_most, "configuration"

    def _add(self, path: Path, index: dict[str, str] | None) -> list[dict[str, Any]]:
        """Take a file's tensors in. Gives what it stores beside them that may describe the model."""
        file = _open_file(path)
        shapes = file.shapes
        if index is not None:
            _check_shard(file, index)
            # What the index does not name is no less there.
            shapes = {name: shape for name, shape in shapes.items() if index.get(name, path.name) == path.name}
            for name in shapes.keys() & self.shapes.keys():
                raise UserError(f"{path}: has {name}, as has another shard, expected the index to name one of them")
        self.shapes |= shapes
        self.dtypes |= {name: file.dtypes[name] for name in shapes}
        self._file_of |= dict.fromkeys(shapes, file if isinstance(file, SafetensorsFile) else path)
        if isinstance(file, SafetensorsFile):
            self.tokenizer = self.tokenizer or _described(file.metadata, "tokenizer")
            config = _described(file.metadata, "config")
            return [config] if config else []
        self.entry = file.entry
        self.tokenizer = self.tokenizer or file.tokenizer
        return file.configs


def open_source(path: str | os.PathLike) -> Source:
    """Open a file or folder of weights; where a folder has both, safetensors are preferred to files of `torch.save`.

    Raises `UserError` if nothing or more than one thing could be meant, a shard is missing, shards and index differ,
    or a file cannot be read, would run code, or holds types that MLX lacks; and without torch for what needs it.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder, {EXPECTED}")
    chosen = _weights_in(path) if path.is_dir() else path
    if chosen.name.endswith(INDEX):
        index = _read_index(chosen)
        return Source(path, [chosen.parent / name for name in sorted({*index.values()})], index)
    if not _is_weights(chosen):
        raise UserError(f"{path}: is a {chosen.suffix or 'file without suffix'}, {EXPECTED}")
    if SHARD.search(chosen.name):
        raise UserError(f"{path}: {chosen.name} is one shard of several, expected their index ({INDEX}) or its folder")
    return Source(path, [chosen])


def _is_weights(path: Path) -> bool:
    return path.suffix.lower() in (".safetensors", *TORCH)


def _weights_in(folder: Path) -> Path:
    """The file or index that a folder's weights are in."""
    for name in USUAL:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    weights = [path for path in found if _is_weights(path) and not NOT_WEIGHTS.search(path.name.lower())]
    safetensors = [path for path in weights if path.suffix.lower() == ".safetensors"]
    indices = [path for path in found if path.name.endswith(INDEX)]
    indices = [path for path in indices if ".safetensors" in path.name] or indices
    for kind in (indices, safetensors, weights):
        if len(kind) == 1:
            return kind[0]
        if kind:
            named = ", ".join(path.name for path in kind[:8]) + (" …" if len(kind) > 8 else "")
            sharded = kind is not indices and SHARD.search(kind[0].name)
            expected = f"their index ({INDEX}) too" if sharded else "one, or the path of the one that is meant"
            raise UserError(f"{folder}: has {len(kind)} files of weights ({named}), expected {expected}")
    raise UserError(f"{folder}: has no weights, {EXPECTED}")


def _read_index(path: Path) -> dict[str, str]:
    """The file name of every tensor, all of which are there."""
    content = read_json(path, "an index of shards")
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict) or not index:
        raise UserError(f"{path}: has no weight_map, expected an index that names the shard of every tensor")
    for tensor, name in index.items():
        if not isinstance(name, str) or Path(name).name != name or not _is_weights(Path(name)):
            raise UserError(f"{path}: puts {tensor} in {name!r}, expected a file of weights beside it")
    if missing := [name for name in sorted({*index.values()}) if not (path.parent / name).is_file()]:
        raise UserError(f"{path}: {', '.join(missing)} missing, expected {len({*index.values()})} shards beside it")
    return index


def _check_shard(file: SafetensorsFile | TorchFile, index: dict[str, str]) -> None:
    """Raise `UserError` unless a shard holds what the index says."""
    for name, shard in index.items():
        if shard == file.path.name and name not in file.shapes:
            raise UserError(f"{file.path}: lacks {name}, expected it here by the index")


def _open_file(path: Path) -> SafetensorsFile | TorchFile:
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}), {EXPECTED}") from None
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git LFS pointer, expected the weights it stands for: run git lfs pull")
    return SafetensorsFile(path) if path.suffix.lower() == ".safetensors" else TorchFile(path)


def _describing(config: dict[str, Any]) -> int:
    return len(DESCRIBING & config.keys())


def _described(metadata: dict[str, str], key: str) -> dict | None:
    """A JSON object in the metadata. What other programs wrote there is free text, and not for us to judge."""
    try:
        value = json.loads(metadata[key])
    except (KeyError, TypeError, ValueError):
        return None
    return value if isinstance(value, dict) else None
