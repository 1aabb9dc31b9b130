"""A training run: a corpus and a configuration in, checkpoints, samples and metrics out.

    RUN/config.json      the configuration
    RUN/metrics.jsonl    one line for each step and each validation
    RUN/last, RUN/best   checkpoints (links into RUN/checkpoints)
    RUN/samples/         a piece of music for each validation

`python -m dsmr_mlx.train` is `dsmr-mlx train`. Needs only mlx, numpy and rich once a corpus is prepared.
"""

import json
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dsmr_mlx import checkpoint, runlock
from dsmr_mlx.checkpoint import CheckpointStore
from dsmr_mlx.config import Architecture
from dsmr_mlx.corpus import Corpus
from dsmr_mlx.distributed import Ranks
from dsmr_mlx.errors import UserError
from dsmr_mlx.evaluation import Evaluation
from dsmr_mlx.files import write_atomically
from dsmr_mlx.generation import generate_variations
from dsmr_mlx.metrics import METRICS, read_lines
from dsmr_mlx.midi import write_notes
from dsmr_mlx.runlock import RunLock
from dsmr_mlx.train_config import TrainConfig
from dsmr_mlx.trainer import NotFinite, StepRecord, Trainer

# What a resumed run cannot change: the weights' shapes, the lanes and what was random so far.
FIXED = (
    *(f.name for f in fields(Architecture) if f.name != "dropout"),
    *("horizons", "seed", "batch_size", "accumulate", "dtype"),
    *("augment_transpose", "augment_stretch", "augment_velocity"),
)
CONFIG = "config.json"
RUN_STATE = ("best_loss", "last_validation", "validations_since_best", "skips_in_a_row")


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

    With `resume` the run in `out` goes on from its newest complete checkpoint, or begins if it has none. The lock
    on the folder is held until the run ends. Raises `UserError` when `out` already holds something and neither
    `resume` nor `force` (begin anew, deleting the run there) is given, or when what is resumed does not fit.
    """
    out, ranks = Path(out), Ranks()
    corpus = Corpus.load(data)
    if ranks.is_main:
        _check_room(out, resume, force)
    with RunLock(out) if ranks.is_main else nullcontext():
        if ranks.is_main and force:
            _empty(out)
        ranks.any(False)  # nobody reads the folder before it is in order
        run = Run(config, corpus, out, callback or Callback(), ranks)
        run.start(resume)
        with ranks.watched():
            run.loop()
    return run


def _content(out: Path) -> list[Path]:
    return [path for path in out.iterdir() if path.name != runlock.FILE] if out.exists() else []


def _check_room(out: Path, resume: bool, force: bool) -> None:
    """Refuse a folder that holds something, unless it is a run and that is wanted."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: already exists and is a file, expected a folder for the run")
    if not _content(out):
        return
    if not resume and not force:
        raise UserError(f"{out}: already exists; --resume goes on with it, --force begins anew")
    if not (out / METRICS).is_file() and not (out / "checkpoints").is_dir():
        raise UserError(f"{out}: is not a training run, and it is not empty; expected another folder")


def _empty(out: Path) -> None:
    for path in _content(out):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def saved_config(out: str | Path) -> dict[str, Any] | None:
    """The configuration of the newest complete checkpoint of a run, None if it has none."""
    latest = CheckpointStore(Path(out), keep_last=1).latest(clean=False)
    return TrainConfig.load(latest / "training_config.json").to_dict() if latest else None


class Run:
    """A trainer with a folder: what is written, and when."""

    def __init__(self, config: TrainConfig, corpus: Corpus, out: Path, callback: Callback, ranks: Ranks):
        self.config = config
        self.corpus = corpus
        self.out = out
        self.ranks = ranks
        self.callback = callback if ranks.is_main else Callback()
        self.trainer = Trainer(config, corpus, ranks)
        self.store = CheckpointStore(out, config.keep_last)
        self.best_loss: float | None = None
        self.last_validation = 0
        self.validations_since_best = 0
        self.skips_in_a_row = 0

    def start(self, resume: bool) -> None:
        latest = self.store.latest(clean=self.ranks.is_main) if resume else None
        if latest:
            self._restore(latest)
        if self.ranks.is_main:
            self._truncate_metrics()
            write_atomically(self.out / CONFIG, self.config.to_json())
        self.callback.on_start(self, latest)
        if not self.can_validate:
            self.callback.on_message(self, "the corpus has no validation pieces: no validation, no best checkpoint")

    @property
    def can_validate(self) -> bool:
        return "validation" in self.corpus.splits

    @property
    def out_of_patience(self) -> bool:
        return self.config.patience is not None and self.validations_since_best >= self.config.patience

    def loop(self) -> None:
        """Train until a limit, a signal or the end of patience; all of them end with a checkpoint."""
        with stop_requests() as stop:
            while self.trainer.done < 1 and not self.out_of_patience and not self.ranks.any(stop.is_set()):
                record = self._segment()
                if record is None:
                    continue
                if record.step % self.config.eval_every == 0:
                    self._validate()
                if record.step % self.config.checkpoint_every == 0:
                    self._save()
            finished = self.trainer.done >= 1
            if finished and self.last_validation < self.trainer.progress.step:
                self._validate()
            self._save()
        patience = f"no better for {self.validations_since_best} validations" if self.out_of_patience else None
        self.callback.on_end(self, patience or ("done" if finished else "stopped; --resume goes on from here"))

    def _segment(self) -> StepRecord | None:
        """Train on a segment; what it completes is written down, and what is not finite is dealt with."""
        try:
            record = self.trainer.train_segment()
        except NotFinite as error:
            self._not_finite(error)
            return None
        if record is not None:
            self.skips_in_a_row = 0
            self._log("train", asdict(record))
            self.callback.on_step(self, record)
        return record

    def _not_finite(self, error: NotFinite) -> None:
        """Stop with a diagnostic, or skip the step if the configuration says so and it does not go on and on."""
        self.skips_in_a_row += 1
        if self.config.not_finite == "skip" and self.skips_in_a_row <= self.config.max_skips:
            self.trainer.skip_step()
            self._log("skip", {"step": self.trainer.progress.step, "reason": str(error)})
            self.callback.on_message(self, f"skipped: {error}")
            return
        path = self.out / f"not-finite-{self.trainer.progress.step + 1:08d}.json"
        if self.ranks.is_main:
            path.write_text(json.dumps(self.trainer.diagnosis(), indent=2) + "\n", encoding="utf-8")
        in_a_row = f", {self.skips_in_a_row} in a row" if self.skips_in_a_row > 1 else ""
        raise NotFinite(f"{error}{in_a_row}; see {path}; the last checkpoint is whole")

    def _validate(self) -> None:
        """Rank 0 evaluates, plays a sample and tells the others the loss, so that all agree on what is best."""
        if not self.can_validate:
            return
        step, evaluation = self.trainer.progress.step, None
        self.last_validation = step
        if self.ranks.is_main:
            evaluation = self.trainer.validate(partial(self.callback.on_validation_progress, self))
            values = {name: value for name, value in evaluation.to_dict().items() if name != "by_piece"}
            self._log("validation", {"step": step, "trained_tokens": self.trainer.progress.tokens, **values})
            if self.config.sample_seconds:
                self._write_sample(step)
        (loss,) = self.ranks.total([evaluation.nats_per_token if evaluation else 0.0])
        is_best = self.best_loss is None or loss < self.best_loss
        self.validations_since_best = 0 if is_best else self.validations_since_best + 1
        if is_best:
            self.best_loss = loss
            best = self._save()
            if self.ranks.is_main:
                self.store.point("best", best)
        if evaluation:
            self.callback.on_validation(self, evaluation, is_best)

    def _write_sample(self, step: int) -> None:
        """A MIDI file from the current weights; the ids alone on a machine without a MIDI library."""
        model, tokenizer = self.trainer.evaluation_model(), self.corpus.tokenizer
        report = generate_variations(
            model, tokenizer, seconds=self.config.sample_seconds, tokens=8192, seed=self.config.seed
        )
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        (variation,) = report.variations
        try:
            write_notes(variation.notes, folder / f"step-{step:08d}.mid", text=f"dsmr-mlx {self.out.name} step {step}")
        except ModuleNotFoundError:
            np.save(folder / f"step-{step:08d}.npy", variation.ids)

    def _save(self) -> Path:
        """Write a checkpoint; all ranks together, for each holds the memory of its lanes."""
        trainer, p = self.trainer, self.trainer.progress
        arrays, values = trainer.state_dict()
        values |= {"corpus": self.corpus.fingerprint, **{name: getattr(self, name) for name in RUN_STATE}}

        def write(folder: Path) -> None:
            checkpoint.save_model(folder, trainer.model_config, trainer.generation_weights, self.corpus.tokenizer)
            checkpoint.save_arrays(folder / "training.safetensors", arrays)
            (folder / "training.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            (folder / "training_config.json").write_text(self.config.to_json(), encoding="utf-8")

        name = checkpoint.checkpoint_name(p.step, p.segments)
        return self.store.save(name, write) if self.ranks.is_main else self.store.folder / name

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
        for name in RUN_STATE:
            setattr(self, name, values[name])

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        if not self.ranks.is_main:
            return
        with (self.out / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")

    def _truncate_metrics(self) -> None:
        """Drop the lines of steps that the checkpoint does not know: they will be written again."""
        path = self.out / METRICS
        step = self.trainer.progress.step
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


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
