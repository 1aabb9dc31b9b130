"""JSON lines files of finished runs, so that a benchmark can be stopped and continued at any time."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, none if it does not exist, without a last line that a killed program left incomplete."""
    lines = []
    for line in _text(path).splitlines():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def append_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Append objects to a file, behind a last line that may be incomplete. They are on disk at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _text(path)
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" if text and not text.endswith("\n") else "")
        file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
