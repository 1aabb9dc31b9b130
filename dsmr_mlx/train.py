"""A training run: a corpus and a configuration in, checkpoints, samples and metrics out.

    RUN/config.json      the configuration
    RUN/metrics.jsonl    one line for each step and each validation
    RUN/last, RUN/best   checkpoints (links into RUN/checkpoints)
    RUN/samples/         a piece of music for each validation

`python -m dsmr_mlx.train` is `dsmr-mlx train`. Needs only mlx, numpy and rich once a corpus is prepared.
"""

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from dsmr_mlx import checkpoint
from dsmr_mlx.checkpoint import CheckpointStore
from dsmr_mlx.config import Architecture
from dsmr_mlx.corpus import Corpus
from dsmr_mlx.errors import UserError
from dsmr_mlx.evaluation import Evaluation
from dsmr_mlx.generation import generate_variations
from dsmr_mlx.midi import write_notes
from dsmr_mlx.train_config import TrainConfig
from dsmr_mlx.trainer import StepRecord, Trainer

# What a resumed run cannot change: the weights' shapes, the lanes and what was random so far.
FIXED = (
    *(f.name for f in fields(Architecture) if f.name != "dropout"),
    *("horizons", "seed", "batch_size", "accumulate", "dtype"),
)
METRICS, CONFIG = "metrics.jsonl", "config.json"


class Callback:
    """What a run tells whoever watches it. Override what is of interest; the run itself prints nothing."""

    def on_start(self, run: "Run", resumed_from: Path | None) -> None:
        """Before the first step."""

    def on_step(self, run: "Run", record: StepRecord) -> None:
        """After each update of the weights."""

    def on_validation(self, run: "Run", evaluation: Evaluation, is_best: bool) -> None:
        """After each validation; the checkpoint and the sample are written."""

    def on_validation_progress(self, run: "Run", done: int, total: int) -> None:
        """During a validation, in tokens."""

    def on_message(self, run: "Run", message: str) -> None:
        """Something worth knowing that is not an error."""

    def on_end(self, run: "Run", reason: str) -> None:
        """After the last checkpoint; `reason` says why the run ended."""


def train(
    config: TrainConfig,
    data: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    callback: Callback | None = None,
) -> "Run":
    """Train on a prepared corpus until a limit of the configuration is reached, or go on with such a run.

    With `resume` the run in `out` goes on from its newest complete checkpoint, or begins if it has none.
    Raises `UserError` when `out` already holds something and neither `resume` nor `force` (begin anew, deleting
    the run there) is given, or when what is resumed does not fit.
    """
    out = Path(out)
    if out.exists() and not resume and not (out.is_dir() and not any(out.iterdir())):
        if not force:
            raise UserError(f"{out}: already exists; --resume goes on with it, --force begins anew")
        if not (out / METRICS).is_file() and not (out / "checkpoints").is_dir():
            raise UserError(f"{out}: is not a training run, --force will not delete it")
        shutil.rmtree(out)
    run = Run(config, Corpus.load(data), out, callback or Callback())
    run.start(resume)
    run.loop()
    return run


def saved_config(out: str | Path) -> dict[str, Any] | None:
    """The configuration of the newest complete checkpoint of a run, None if it has none."""
    latest = CheckpointStore(Path(out), keep_last=1).latest()
    return TrainConfig.load(latest / "training_config.json").to_dict() if latest else None


class Run:
    """A trainer with a folder: what is written, and when."""

    def __init__(self, config: TrainConfig, corpus: Corpus, out: Path, callback: Callback):
        self.config = config
        self.corpus = corpus
        self.out = out
        self.callback = callback
        self.trainer = Trainer(config, corpus)
        self.store = CheckpointStore(out, config.keep_last)
        self.best_loss: float | None = None
        self.last_validation = 0

    def start(self, resume: bool) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        latest = self.store.latest() if resume else None
        if latest:
            self._restore(latest)
        self._truncate_metrics()
        (self.out / CONFIG).write_text(self.config.to_json(), encoding="utf-8")
        self.callback.on_start(self, latest)
        if not self.can_validate:
            self.callback.on_message(self, "the corpus has no validation pieces: no validation, no best checkpoint")

    @property
    def can_validate(self) -> bool:
        return "validation" in self.corpus.splits

    def loop(self) -> None:
        """Train until a limit or a signal; a checkpoint is written in any case, except when the loss is not finite."""
        with stop_requests() as stop:
            while self.trainer.done < 1 and not stop.is_set():
                record = self.trainer.train_segment()
                if record is None:
                    continue
                self._log("train", asdict(record))
                self.callback.on_step(self, record)
                if record.step % self.config.eval_every == 0:
                    self._validate()
                if record.step % self.config.checkpoint_every == 0:
                    self._save()
            finished = self.trainer.done >= 1
            if finished and self.last_validation < self.trainer.progress.step:
                self._validate()
            self._save()
        self.callback.on_end(self, "done" if finished else "stopped; --resume goes on from here")

    def _validate(self) -> None:
        if not self.can_validate:
            return
        step = self.trainer.progress.step
        self.last_validation = step
        evaluation = self.trainer.validate(lambda done, total: self.callback.on_validation_progress(self, done, total))
        names = ("perplexity", "nats_per_token", "nats_per_note", "nats_per_second", "tokens", "pieces")
        values = {name: getattr(evaluation, name) for name in names}
        self._log("validation", {"step": step, "trained_tokens": self.trainer.progress.tokens, **values})
        is_best = self.best_loss is None or evaluation.nats_per_token < self.best_loss
        if is_best:
            self.best_loss = evaluation.nats_per_token
            self.store.point("best", self._save())
        if self.config.sample_seconds:
            self._write_sample(step)
        self.callback.on_validation(self, evaluation, is_best)

    def _write_sample(self, step: int) -> None:
        """A MIDI file from the current weights; the ids alone on a machine without a MIDI library."""
        model, tokenizer = self.trainer.evaluation_model(), self.corpus.tokenizer
        report = generate_variations(
            model, tokenizer, seconds=self.config.sample_seconds, tokens=8192, seed=self.config.seed
        )
        model.train()
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        (variation,) = report.variations
        try:
            write_notes(variation.notes, folder / f"step-{step:08d}.mid", text=f"dsmr-mlx {self.out.name} step {step}")
        except ModuleNotFoundError:
            np.save(folder / f"step-{step:08d}.npy", variation.ids)

    def _save(self) -> Path:
        trainer, p = self.trainer, self.trainer.progress

        def write(folder: Path) -> None:
            checkpoint.save_model(folder, trainer.model_config, trainer.parameters, self.corpus.tokenizer)
            arrays, values = trainer.state_dict()
            checkpoint.save_arrays(folder / "training.safetensors", arrays)
            values |= {
                "corpus": self.corpus.fingerprint,
                "best_loss": self.best_loss,
                "last_validation": self.last_validation,
            }
            (folder / "training.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            (folder / "training_config.json").write_text(self.config.to_json(), encoding="utf-8")

        return self.store.save(checkpoint.checkpoint_name(p.step, p.segments), write)

    def _restore(self, folder: Path) -> None:
        checkpoint.verify(folder)
        saved = TrainConfig.load(folder / "training_config.json")
        for name in FIXED:
            before, now = getattr(saved, name), getattr(self.config, name)
            if before != now:
                raise UserError(f"{name} = {now!r}: the run in {self.out} has {name} = {before!r}, which is fixed")
        values = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        if values["corpus"] != self.corpus.fingerprint:
            raise UserError(
                f"--data {self.corpus.path}: fingerprint {self.corpus.fingerprint[:12]}, "
                f"the run in {self.out} has {values['corpus'][:12]}: not the same corpus"
            )
        weights = checkpoint.load_arrays(folder / "model.safetensors")
        self.trainer.load_state_dict(weights, checkpoint.load_arrays(folder / "training.safetensors"), values)
        self.best_loss, self.last_validation = values["best_loss"], values["last_validation"]

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        with (self.out / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")

    def _truncate_metrics(self) -> None:
        """Drop the lines of steps that the checkpoint does not know: they will be written again."""
        path = self.out / METRICS
        step = self.trainer.progress.step
        kept = [line for line in read_lines(path) if line["step"] <= step]
        temporary = path.with_suffix(".incomplete")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, each with its `kind`: "train" or "validation"."""
    return list(read_lines(Path(run) / METRICS))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON lines file; a last one that was cut off by a crash is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second signal ends the program at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    from dsmr_mlx.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
