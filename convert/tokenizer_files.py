"""A tokenizer that travels inside a file of weights: the files of its folder, by name, in base64."""

import base64
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.registry import load_tokenizer


def pack(folder: str | Path) -> dict[str, str]:
    """The files of a corpus's or checkpoint's `tokenizer/` folder as text by name."""
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    return {path.name: base64.b64encode(path.read_bytes()).decode() for path in files}


def unpack(files: Mapping[str, str], where: str | Path) -> Tokenizer:
    """The tokenizer whose files `pack` gave. Raises `UserError`, which names `where` they were, if they are damaged."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            well_formed = isinstance(text, str) and isinstance(name, str) and Path(name).name == name
            if not well_formed or name in ("", "..") or "\0" in name:
                raise UserError(f"{where}: tokenizer: {name!r}: expected files by name, their content in base64")
            try:
                (Path(folder) / name).write_bytes(base64.b64decode(text, validate=True))
            except ValueError as error:
                raise UserError(f"{where}: tokenizer: {name}: not base64 ({error})") from None
        try:
            return load_tokenizer(folder)
        except UserError as error:
            raise UserError(f"{where}: tokenizer: {str(error).replace(f'{folder}/', '')}") from None
