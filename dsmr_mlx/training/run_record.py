"""Read a training run's folder: configuration, metrics, size. Needs no MLX."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, Self

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import open_regular, read_json, read_regular
from dsmr_mlx.common.parsing import parse_json
from dsmr_mlx.model.checkpoint_folder import CheckpointStore
from dsmr_mlx.training.config import TrainConfig

METRICS_FILE = "metrics.jsonl"
MAX_METRIC = 1e100  # a larger metric counts as infinite


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl, each with its `kind`: "train", "validation" or "skip"."""
    return list(read_lines(Path(run) / METRICS_FILE))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a JSON lines file, up to the first that is damaged or was cut off by a crash."""
    if not path.is_file():
        return
    for line in read_regular(path).decode("utf-8", errors="replace").splitlines():
        try:
            values = parse_json(line)
        except ValueError:
            return
        if not isinstance(values, dict):
            return
        yield values


def of_kind(kind: str, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of a kind."""
    return [line for line in lines if line.get("kind") == kind]


def find_samples(folder: Path) -> dict[int, Path]:
    """Return the samples of a run, or of weights that were set aside, by step in rising order."""
    paths = [path for path in (folder / "samples").glob("step-*") if path.is_file()]
    matches = [(re.fullmatch(r"step-(\d+)\.(mid|npy)", path.name), path) for path in paths]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append a line to a JSON lines file. Raises `OSError`, which names the file, for instance on a full disk."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@dataclass(frozen=True)
class RunRecord:
    """A run folder as read; `steps` and `validations` are the lines of its metrics, in order.

    cooled: validations before each cooled checkpoint that the run did not continue from, if `best` points at one.
    """

    folder: Path
    config: TrainConfig
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    cooled: dict[Path, list[dict[str, Any]]]
    parameters: int | None  # None before the first checkpoint
    corpus: str | None  # its fingerprint, in hex

    @classmethod
    def read(cls, run: str | Path) -> Self:
        """Read a run. Raises `UserError`, naming the path, if it is not a run or its configuration is invalid."""
        folder = Path(run)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder, expected a training run")
        if missing := [name for name in ("config.json", METRICS_FILE) if not (folder / name).is_file()]:
            raise UserError(f"{folder}: not a training run, {' and '.join(missing)} missing")
        steps, validations = (of_kind(kind, read_metrics(folder)) for kind in ("train", "validation"))
        is_cooled = CheckpointStore.is_set_aside((folder / "best").resolve())
        aside = sorted(filter(CheckpointStore.is_set_aside, folder.glob("checkpoints/*"))) if is_cooled else []
        cooled = {checkpoint: of_kind("validation", read_metrics(checkpoint)) for checkpoint in aside}
        config = TrainConfig.load(folder / "config.json")
        return cls(folder, config, steps, validations, cooled, count_parameters(folder), corpus_fingerprint(folder))

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    @cached_property
    def best(self) -> dict[str, Any] | None:
        """The validation with the lowest loss on the last validation set, the first if several are equal."""
        tokens = self.validations[-1].get("tokens") if self.validations else None
        same = [*takewhile(lambda line: line.get("tokens") == tokens, self.validations[::-1])][::-1]
        same = [*(line for line in chain(*self.cooled.values()) if line.get("tokens") == tokens), *same]
        finite = [line for line in same if math.isfinite(number(line.get("nats_per_token")))]
        return min(finite, key=lambda line: line["nats_per_token"], default=None)

    @property
    def best_sample(self) -> Path | None:
        """The sample of the weights of `best`, None without one."""
        step = number(self.best.get("step")) if self.best else math.nan
        sources = {self.folder: self.validations, **self.cooled}
        samples = [find_samples(folder) for folder, lines in sources.items() if self.best in lines]
        return next((found[step] for found in samples if step in found), None)

    def last(self, key: str) -> float:
        """Return the last finite value of a training metric, NaN without one."""
        return next((v for line in reversed(self.steps) if math.isfinite(v := number(line.get(key)))), math.nan)

    def column(self, key: str, positive: bool = False) -> "Column":
        """Return a training metric over the trained tokens."""
        return Column.of(self.steps, "tokens", key, positive)


@dataclass(frozen=True)
class Column:
    """One metric over the trained tokens, each float64 `(N,)`, x rising; `left_out` counts non-finite values."""

    x: np.ndarray
    y: np.ndarray
    left_out: int

    @classmethod
    def of(cls, lines: Sequence[dict[str, Any]], x_key: str, y_key: str, positive: bool = False) -> Self:
        """Return the values of two keys; with `positive`, y must be positive as well."""
        x, y = (np.array([number(line.get(key)) for line in lines], np.float64) for key in (x_key, y_key))
        good = np.isfinite(x) & np.isfinite(y) & (x > 0) & ((y > 0) | (not positive))
        order = np.argsort(x[good], kind="stable")
        return cls(x[good][order], y[good][order], int((~good).sum()))

    def __len__(self) -> int:
        return len(self.x)


def number(value: Any) -> float:
    """Return a metric as a float, NaN if it is not a number or too large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) < MAX_METRIC else math.nan


def count_parameters(folder: Path) -> int | None:
    """Count the weights of a run's newest checkpoint from the header of its file; None without checkpoints."""
    try:
        with open_regular(folder / "last" / "model.safetensors") as file:
            header = parse_json(file.read(min(int.from_bytes(file.read(8), "little"), 64 << 20)))
        return sum(math.prod(array["shape"]) for name, array in header.items() if name != "__metadata__")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # also if a newer checkpoint replaces it at this moment


def corpus_fingerprint(folder: Path) -> str | None:
    """Return the fingerprint of the corpus, in hex, from a run's newest checkpoint; None without checkpoints."""
    try:
        return str(read_json(folder / "last" / "training.json", "the state of a run")["corpus"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
