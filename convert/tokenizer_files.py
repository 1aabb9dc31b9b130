"""A tokenizer stored inside a weights file: the files of its folder by name, base64-encoded."""

import base64
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import read_regular
from dsmr_mlx.common.folders import folder_content
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.registry import load_tokenizer


def pack(folder: str | Path) -> dict[str, str]:
    """Return the files of the `tokenizer/` folder of a corpus or checkpoint, name → base64 text."""
    files = sorted(path for path in folder_content(Path(folder)) if path.is_file())
    return {path.name: base64.b64encode(read_regular(path)).decode() for path in files}


def unpack(files: Mapping[str, str], where: str | Path) -> Tokenizer:
    """Return the tokenizer from the files that `pack` returned.

    Raises `UserError`, which names the weights file `where`, if they are damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            well_formed = isinstance(text, str) and isinstance(name, str) and Path(name).name == name
            if not well_formed or name in ("", "..") or "\0" in name:
                raise UserError(f"{where}: tokenizer: {name!r}: expected file names with base64 text")
            try:
                (Path(folder) / name).write_bytes(base64.b64decode(text, validate=True))
            except ValueError as error:
                raise UserError(f"{where}: tokenizer: {name}: not base64 ({error})") from None
        try:
            return load_tokenizer(folder)
        except UserError as error:
            raise UserError(f"{where}: tokenizer: {str(error).replace(f'{folder}/', '')}") from None
