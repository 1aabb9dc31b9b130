"""The quality part of the schedules: train every schedule and seed, validate on whole pieces, store the results.

The results are a JSON lines file: the shared settings, then one line per finished run. Finished runs are not repeated,
so the work can be stopped and continued at any time; the unfinished run is lost.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
from schedule_setting import Setting

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.trainer import Trainer

OWN = ("horizons", "seed")  # what differs between the runs of a file
Report = Callable[[str], None]


class Runs:
    """The file of finished runs. Several processes may append; each knows the runs at its start and its own.

    Raises `UserError` that names the file and the setting if it has other settings or another corpus.
    """

    def __init__(self, path: str | Path, setting: Setting, corpus: Corpus):
        self.path = Path(path)
        self.shared = shared(setting.config(next(iter(setting.specs.values()))), corpus.fingerprint)
        self.finished: list[dict[str, Any]] = []
        if text := self._text():
            header, *self.finished = whole_lines(text) or [{}]
            self._check(header.get("settings"))

    def _text(self) -> str:
        return text_of(self.path)

    def _check(self, found: Any) -> None:
        if not isinstance(found, dict):
            raise UserError(f"{self.path}: no settings in the first line, not a file of runs")
        values = {name: value for name, value in found.items() if name != "corpus"} | {"horizons": "none"}
        # Through a configuration, so that settings newer than the file have their defaults.
        was = shared(TrainConfig.from_dict(values, f"{self.path}, settings"), found.get("corpus"))
        for name, wanted in self.shared.items():
            if was[name] != wanted:
                reason = f"has runs with {name} = {was[name]}, not {wanted}"
                raise UserError(f"{self.path}: {reason}; name another file")

    def find(self, spec: str, seed: int) -> dict[str, Any] | None:
        """The finished run of a schedule and seed, if any."""
        return next((run for run in self.finished if (run["spec"], run["seed"]) == (spec, seed)), None)

    def add(self, run: dict[str, Any]) -> None:
        """Append a finished run; it is on disk when this returns."""
        append_lines(self.path, [run] if self._text() else [{"settings": self.shared}, run])
        self.finished.append(run)


def text_of(path: Path) -> str:
    """The content of a file, empty if it does not exist."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def append_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Append objects to a JSON lines file, behind a last line that may be incomplete. They are on disk at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = text_of(path)
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" if text and not text.endswith("\n") else "")
        file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def whole_lines(text: str) -> list[dict[str, Any]]:
    """The objects of a JSON lines text, without a last line that a killed program left incomplete."""
    lines = []
    for line in text.splitlines():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def shared(config: TrainConfig, corpus: str | None) -> dict[str, Any]:
    """The settings that all runs of a file share."""
    return {name: value for name, value in config.to_dict().items() if name not in OWN} | {"corpus": corpus}


def train_all(setting: Setting, corpus: Corpus, seeds: Sequence[int], runs: Runs, report: Report) -> None:
    """Train what is not in the file yet, seed by seed."""
    for seed in seeds:
        for name, spec in setting.specs.items():
            if runs.find(spec, seed) is None:
                report(f"{name}, seed {seed}: start")
                runs.add({"schedule": name} | train_one(setting, corpus, spec, seed, report))
                mx.clear_cache()


def train_one(setting: Setting, corpus: Corpus, spec: str, seed: int, report: Report) -> dict[str, Any]:
    """Train and validate once. Losses are in nats.

    `by_position`: the loss by position in the piece; `training`: twenty pairs of (tokens, mean loss since the last
    pair).
    """
    trainer = Trainer(setting.config(spec, seed), corpus)
    curve, nats, since = [], 0.0, 0
    while trainer.done < 1:
        before = trainer.progress.tokens
        if (record := trainer.train_segment()) is None:
            continue
        nats += record.loss * (record.tokens - before)
        if record.tokens >= setting.tokens * (len(curve) + 1) / 20:
            curve.append((record.tokens, nats / (record.tokens - since)))
            nats, since = 0.0, record.tokens
            rate = record.tokens / record.seconds
            report(f"{spec}, seed {seed}: {record.tokens:,} tokens, {curve[-1][1]:.3f} nats, {rate:,.0f} tokens/s")
    began = time.perf_counter()
    found = trainer.validate()
    report(f"{spec}, seed {seed}: perplexity {found.perplexity:.4f}, {time.perf_counter() - began:.0f} s to validate")
    return {
        "spec": spec,
        "seed": seed,
        "perplexity": found.perplexity,
        "nats_per_token": found.nats_per_token,
        "validation_tokens": found.tokens,
        "validation_pieces": found.pieces,
        "by_position": [[each.start, each.nats_per_token] for each in found.by_position],
        "training": curve,
        "tokens": trainer.progress.tokens,
        "seconds": trainer.progress.seconds,
    }
