"""Record the base of a checkpoint that holds adapters only, see `lora`, by path and SHA-256, and find it again.

`base.json` in such a checkpoint:

    path      the folder of the base, absolute
    relative  the same, relative to the checkpoint
    sha256    of its model.safetensors

A base that was moved is also found through a link RUN/base, where RUN is the run of the checkpoint or, for a checkpoint
outside of a run, the checkpoint itself. A bundled model is found in any installation. Needs no MLX.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsmr_mlx.common.errors import UserError, shortened
from dsmr_mlx.common.files import read_json, sha256
from dsmr_mlx.model import bundled
from dsmr_mlx.model.checkpoint_folder import CHECKSUMS, resolve, verify_checkpoint

BASE = "base.json"
WEIGHTS = "model.safetensors"
LINK = "base"


@dataclass(frozen=True)
class Base:
    """A verified base: its folder, absolute and without links, and the SHA-256 of its weights in hex."""

    folder: Path
    sha256: str

    @classmethod
    def of(cls, folder: Path) -> "Base":
        """Verify a checkpoint and return it as a base. Raises `UserError` if it is damaged."""
        verify_checkpoint(folder)
        if (folder / CHECKSUMS).is_file():
            return cls(folder.resolve(), read_json(folder / CHECKSUMS, "checksums")[WEIGHTS]["sha256"])
        return cls(folder.resolve(), sha256(folder / WEIGHTS))

    def to_json(self, checkpoint: Path) -> str:
        """Return the content of `base.json` for a checkpoint at this path, which need not exist yet."""
        relative = os.path.relpath(self.folder, checkpoint.resolve())
        return json.dumps({"path": str(self.folder), "relative": relative, "sha256": self.sha256}, indent=2) + "\n"


def find_base(checkpoint: Path, also: Sequence[str | Path] = ()) -> Base:
    """Return the base of a checkpoint folder; also: other places to look at first, checkpoints or runs.

    Raises `UserError`, which names the places, if it is missing, damaged or its weights have changed.
    """
    recorded = parse_base(read_json(checkpoint / BASE, "the base of adapters"), checkpoint / BASE)
    link, path = base_link(checkpoint), Path(recorded["path"])
    shipped = [bundled.FOLDER / path.name] if path.name in bundled.names() else []
    others = []
    for place in (*also, link, path, checkpoint.resolve() / recorded["relative"], *shipped):
        try:
            folder = resolve(place)
        except UserError:
            continue
        base = Base.of(folder)
        if base.sha256 == recorded["sha256"]:
            return base
        others.append(base)
    expected = f"expected the base that was trained on, with SHA-256 {recorded['sha256'][:12]}"
    if others:
        found = others[-1]
        raise UserError(f"{checkpoint}: its base {found.folder} has weights of SHA-256 {found.sha256[:12]}, {expected}")
    raise UserError(
        f"{checkpoint}: its base {path} is missing, {expected}; if it was moved, link to it: ln -s FOLDER {link}"
    )


def parse_base(values: object, path: Path) -> dict[str, str]:
    """Return the content of `base.json`. Raises `UserError`, which names the file, for anything else."""
    names = {"path", "relative", "sha256"}
    valid = isinstance(values, dict) and values.keys() == names
    if not valid or not all(isinstance(text, str) and "\0" not in text for text in values.values()):
        raise UserError(f"{path}: damaged, found {shortened(values)}, expected the texts {', '.join(sorted(names))}")
    return values


def base_link(checkpoint: Path) -> Path:
    """Return the path of a user's link to a base that was moved."""
    folder = checkpoint.resolve()
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    return run / LINK
