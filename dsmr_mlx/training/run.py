"""A training run: a corpus and a configuration in, checkpoints, samples and metrics out.

    RUN/config.json      the configuration
    RUN/metrics.jsonl    one line per step and per validation
    RUN/last, RUN/best   checkpoints (links into RUN/checkpoints)
    RUN/before-cooldown  the last checkpoint at the full learning rate, if `lr_schedule` is "wsd" (a link too)
    RUN/samples/         a sample of music per validation
    RUN/LICENSE          the licence of the initial weights, if they have one; also in each checkpoint

`Run.loop` is the main loop. A step is taken by `Trainer.train_segment`; `Run._validate` runs a validation,
`Run._save_checkpoint` writes a checkpoint, `Run._resume` reads one.

Weights that have cooled down are not trained at the full rate again. If the newest checkpoint has, and the cool-down
of the resumed run begins later, the run continues from `before-cooldown`. The newest checkpoint, with the metrics up
to it and the samples since `before-cooldown`, and `best` are then kept as RUN/checkpoints/cooled-…; the others are
removed. `best` points at a cooled checkpoint until a validation has a lower loss; `patience` does not compare with it.
"""

import json
import math
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from typing import Any

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import read_regular, sync, write_atomically
from dsmr_mlx.common.signals import stop_requests
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.evaluation import Evaluation
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.base import BASE, Base
from dsmr_mlx.model.checkpoint_folder import MEMORY, CheckpointStore, checkpoint_name, verify_checkpoint
from dsmr_mlx.training import warm_start
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.distributed import Ranks
from dsmr_mlx.training.lock import RunLock
from dsmr_mlx.training.memory import too_large
from dsmr_mlx.training.optimizer import in_cooldown
from dsmr_mlx.training.run_folder import check_data, check_init, check_room, copy_licence, empty
from dsmr_mlx.training.run_record import METRICS_FILE, append_line, read_lines
from dsmr_mlx.training.samples import generate_sample, has_sample, set_samples_aside, write_sample
from dsmr_mlx.training.saved_run import check_corpus, check_fixed, parse_saved_config, parse_saved_run, resume_point
from dsmr_mlx.training.trainer import NotFinite, StepRecord, Trainer

CONFIG = "config.json"
RUN_STATE = (
    *("best", "best_loss", "validated_tokens", "last_validation", "validations_since_best"),
    *("skips_in_a_row", "lines", "before_cooldown"),
)


class Stopped(Exception):
    """Raised to end an evaluation early."""


class Callback:
    """The events of a run. Override the ones of interest; the run itself prints nothing."""

    def on_start(self, run: "Run", resumed_from: Path | None) -> None:
        """Before the first step."""

    def on_step(self, run: "Run", record: StepRecord) -> None:
        """After each update of the weights."""

    def on_validation(self, run: "Run", evaluation: Evaluation, is_best: bool) -> None:
        """After each validation, when its checkpoint and sample are written."""

    def on_validation_progress(self, run: "Run", done: int, total: int) -> None:
        """During a validation; `done` and `total` are tokens."""

    def on_message(self, run: "Run", message: str) -> None:
        """A remark that is not an error."""

    def on_lost(self, reason: str) -> None:
        """Right before the process ends because another process of the run is lost. Called from another thread."""

    def on_end(self, run: "Run", reason: str) -> None:
        """After the last checkpoint; `reason` is "done", "stopped" or about patience."""


def train(
    config: TrainConfig,
    data: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    callback: Callback | None = None,
) -> "Run":
    """Train on a prepared corpus until a limit of the configuration is reached. Return the finished run.

    data: a corpus folder. out: the run folder, locked until the run ends. resume: continue the run in `out` from its
    newest complete checkpoint, or from the one before a cool-down that now begins later, or start if it has none.
    force: delete the run in `out` and start anew. A new run starts from random weights, or from those of the checkpoint
    `config.init`.

    Raises `UserError`, before anything is deleted, if `out` is not empty and neither `resume` nor `force` is given, or
    if the configuration or the corpus does not match the run or checkpoint to start from.
    """
    callback = callback or Callback()
    out, ranks = Path(out), Ranks(config.rank_timeout, callback.on_lost)
    resume = resume and not force
    with ExitStack() as held, ranks.watched():
        with ranks.together():
            corpus = Corpus.load(data)
            corpus.verify()
            config = config.for_corpus(corpus)
            if ranks.is_main:
                check_room(out, resume, force)
                check_data(corpus, out, force)
                check_init(config, corpus, out, resume, force)
                held.enter_context(RunLock(out))
        ranks.agree(settings=config.to_json(), corpus=corpus.fingerprint)
        latest = CheckpointStore(out, config.keep_last).latest() if resume and ranks.is_main else None
        run = Run(config, corpus, out, callback, ranks, *warm_start.frozen_base(config, latest, ranks))
        with ranks.together():
            if force and ranks.is_main:
                empty(out)  # only now, when nothing can refuse the new run
        run.start(resume)
        run.loop()
    return run


def saved_config(out: str | Path) -> dict[str, Any] | None:
    """Return the configuration that a run in `out` resumes with, as JSON values; None if there is no run.

    It is that of the last start or resumption, as found by rank 0.
    """
    ranks, path = Ranks(), Path(out)
    latest = CheckpointStore(path, keep_last=1).latest()
    candidates = (path / CONFIG, latest and latest / "training_config.json")
    with ranks.together():
        found = next((file for file in candidates if file and file.is_file()), None) if ranks.is_main else None
        config = TrainConfig.load(found).to_json() if found else "null"
    return json.loads(ranks.from_main(config.encode()))


class Run:
    """A trainer and its run folder: the main loop, validation, checkpoints and metrics."""

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        out: Path,
        callback: Callback,
        ranks: Ranks,
        base: Base | None = None,
        quantization: dict[str, int] | None = None,
    ):
        """base, quantization: see `warm_start.frozen_base`."""
        self.config = config
        self.corpus = corpus
        self.out = out
        self.ranks = ranks
        self.callback = callback if ranks.is_main else Callback()
        self.base = base
        self.trainer = Trainer(config, corpus, ranks, quantization)
        self.store = CheckpointStore(out, config.keep_last)
        self.best: str | None = None  # a checkpoint name
        self.best_loss: float | None = None
        self.validated_tokens: int | None = None
        self.last_validation = 0
        self.validations_since_best = 0
        self.skips_in_a_row = 0
        self.lines = 0  # in metrics.jsonl
        self.before_cooldown: str | None = None  # a checkpoint name; None at the full learning rate
        self.saved: tuple[Any, Path] | None = None  # the moment and the path of the last checkpoint

    def start(self, resume: bool) -> None:
        """Load the newest checkpoint (`resume`) or the initial weights, and cut the metrics to the same step."""
        source = latest = None
        if resume and self.ranks.is_main:
            self.store.remove_leftovers()
            source = latest = self.store.latest()
        if self.ranks.any(latest is not None):
            source = latest = self._resume(latest)
        elif self.config.init is not None:
            source = self._load_initial_weights()
        if self.ranks.is_main:
            self._truncate_metrics()  # first, because metrics.jsonl marks the folder as a run
            if source is not None:
                copy_licence(source, self.out)
            write_atomically(self.out / CONFIG, self.config.to_json())
        self.callback.on_start(self, latest)
        if self.ranks.any(self.ranks.is_main and self._lacks_sample()):
            self._write_sample(self.last_validation)
        if self.ranks.is_main and (warning := too_large(self.trainer, resumed=latest is not None)):
            self.callback.on_message(self, warning)
        if not self.can_validate:
            self.callback.on_message(self, "the corpus has no validation pieces: no validation, no best checkpoint")
        if self.config.sample_seconds and not self.can_sample:
            self.callback.on_message(self, "the corpus's ids do not decode to notes: no samples")

    def _lacks_sample(self) -> bool:
        """Whether the run was killed between a validation's checkpoint, which has these weights, and its sample."""
        p = self.trainer.progress
        validated = 0 < self.last_validation == p.step and not p.segments
        return validated and not has_sample(self.out, self.last_validation)

    @property
    def can_validate(self) -> bool:
        """Whether the corpus has a validation split."""
        return "validation" in self.corpus.splits

    @property
    def can_sample(self) -> bool:
        """Whether the corpus's token ids decode to notes."""
        return self.corpus.tokenizer.decodes

    @property
    def out_of_patience(self) -> bool:
        """Whether `config.patience` validations have passed without a new best."""
        return self.config.patience is not None and self.validations_since_best >= self.config.patience

    def loop(self) -> None:
        """Train until a limit, a signal or the end of patience, then write a last checkpoint."""
        with stop_requests() as stop:
            self._validate_if_due(stop)  # again, if a signal has ended it
            while self.trainer.done < 1 and not self.out_of_patience and not self.ranks.any(stop.is_set()):
                self._mark_cooldown()
                record = self._train_segment()
                if record is None:
                    continue
                self._validate_if_due(stop)
                if record.step % self.config.checkpoint_every == 0:
                    self._save_checkpoint()
            finished = self.trainer.done >= 1
            if finished and self.last_validation < self.trainer.progress.step:
                finished = self._validate(stop)
            self._save_checkpoint()
        patience = f"no new best in {self.validations_since_best} validations" if self.out_of_patience else None
        self.callback.on_end(self, patience or ("done" if finished else "stopped"))

    def _mark_cooldown(self) -> None:
        """Save a checkpoint, `before-cooldown`, if the cool-down begins here."""
        if not in_cooldown(self.config, self.trainer.done):
            self.before_cooldown = None
        elif self.before_cooldown is None:
            self._save_checkpoint()
            self.before_cooldown = self.saved[1].name
            if self.ranks.is_main:
                self.store.point("before-cooldown", self.saved[1])

    def _train_segment(self) -> StepRecord | None:
        """Train on one segment. Return and log the record of the step that it completes, None if it completes none."""
        try:
            record = self.trainer.train_segment()
        except NotFinite as error:
            self._skip_or_stop(error)
            return None
        if record is not None:
            self.skips_in_a_row = 0
            self._append_metrics("train", asdict(record))
            self.callback.on_step(self, record)
        return record

    def _skip_or_stop(self, error: NotFinite) -> None:
        """Skip the step if the configuration allows it, at most `max_skips` in a row; else raise with a diagnosis."""
        self.skips_in_a_row += 1
        if self.config.not_finite == "skip" and self.skips_in_a_row <= self.config.max_skips:
            self.trainer.skip_step()
            self._append_metrics("skip", {"step": self.trainer.progress.step + 1, "reason": str(error)})
            self.callback.on_message(self, f"skipped: {error}")
            return
        path = self.out / f"not-finite-{self.trainer.progress.step + 1:08d}.json"
        if self.ranks.is_main:
            write_atomically(path, json.dumps(self.trainer.diagnosis(), indent=2) + "\n")
        in_a_row = f", {self.skips_in_a_row} in a row" if self.skips_in_a_row > 1 else ""
        last = f"the last checkpoint is {self.saved[1]}" if self.saved else "there is no checkpoint yet"
        raise NotFinite(f"{error}{in_a_row}; see {path}; {last}")

    def _validate_if_due(self, stop: Event) -> None:
        step = self.trainer.progress.step
        if step % self.config.eval_every == 0 and self.last_validation < step:
            self._validate(stop)

    def _validate(self, stop: Event) -> bool:
        """Evaluate on rank 0, share the loss so that all ranks agree on the best, save a checkpoint, write a sample.

        Return False, with nothing changed, if a signal to rank 0 ends the evaluation.
        """
        if not self.can_validate:
            return True
        step, evaluation = self.trainer.progress.step, self._evaluate(stop) if self.ranks.is_main else None
        mine = [evaluation.nats_per_token, evaluation.tokens] if evaluation else [0.0, 0.0]
        loss, tokens = self.ranks.total(mine, patient=True)
        if not tokens:
            return False
        self.last_validation = step
        if evaluation:
            values = {name: value for name, value in evaluation.to_dict().items() if name != "by_piece"}
            self._append_metrics("validation", {"step": step, "trained_tokens": self.trainer.progress.tokens, **values})
        is_best = self._update_best(loss, tokens)
        self._save_checkpoint(best=is_best)
        self._write_sample(step)
        if evaluation:
            points = self.store.target("best") == self.saved[1]  # not if it stays at cooled weights
            self.callback.on_validation(self, evaluation, is_best and points)
        return True

    def _evaluate(self, stop: Event) -> Evaluation | None:
        """Return the evaluation of the current weights, None if it is stopped before its end."""

        def on_progress(done: int, total: int) -> None:
            self.callback.on_validation_progress(self, done, total)
            if stop.is_set() and done < total:
                raise Stopped

        try:
            return None if stop.is_set() else self.trainer.validate(on_progress)
        except Stopped:
            return None

    def _update_best(self, loss: float, tokens: float) -> bool:
        """Return whether a validation loss is the best so far. Losses on different validation sets are not compared."""
        if self.validated_tokens not in (None, int(tokens)):
            self.callback.on_message(self, "validation set changed; best loss reset")
            self.best_loss, self.validations_since_best = None, 0
        self.validated_tokens = int(tokens)
        is_best = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        self.best_loss = loss if is_best else self.best_loss
        self.validations_since_best = 0 if is_best else self.validations_since_best + 1
        return is_best

    def _write_sample(self, step: int) -> None:
        """Let rank 0 write a sample of music from the current weights, if samples are wanted and can be made."""
        if not self.config.sample_seconds or not self.can_sample:
            return
        if self.ranks.is_main:
            try:
                model, c = self.trainer.evaluation_model(), self.config
                sample = generate_sample(model, self.corpus.tokenizer, c.sample_seconds, c.seed)
                write_sample(self.out, step, sample)
            except (UserError, OSError, ModuleNotFoundError) as error:
                self.callback.on_message(self, f"no sample written: {error}")
        self.ranks.total([0.0], patient=True)  # the other ranks wait, however long a sample takes

    def _save_checkpoint(self, best: bool = False) -> None:
        """Write a checkpoint unless nothing has changed since the last one.

        All ranks must call it together, because each holds the memory of its lanes; rank 0 writes.
        """
        trainer, p = self.trainer, self.trainer.progress
        moment = (p.step, p.segments, p.skipped, self.last_validation)
        if self.saved and self.saved[0] == moment:
            return
        name = self.store.free_name(checkpoint_name(p.step, p.segments))
        self.best = name if best else self.best
        state = trainer.state_dict()
        self.saved = moment, self.store.folder / name
        with self.ranks.together(patient=True):  # the other ranks wait, however long writing takes
            if self.ranks.is_main:
                self._write_checkpoint(name, best, *state)

    def _write_checkpoint(
        self, name: str, best: bool, arrays: dict[str, Any], memory: dict[str, Any], values: dict[str, Any]
    ) -> None:
        """Write what `Trainer.state_dict` has returned, with the model and the state of the run."""
        sync(self.out / METRICS_FILE)
        values |= {"corpus": self.corpus.fingerprint, "data": str(self.corpus.path.resolve())}
        values |= {key: getattr(self, key) for key in RUN_STATE}

        def write(folder: Path) -> None:
            trainer = self.trainer
            checkpoint.save_model(folder, trainer.model_config, trainer.generation_weights, self.corpus.tokenizer)
            if self.base:
                (folder / BASE).write_text(self.base.to_json(self.store.folder / name), encoding="utf-8")
            checkpoint.save_arrays(folder / "training.safetensors", arrays)
            checkpoint.save_arrays(folder / MEMORY, memory)
            (folder / "training.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            (folder / "training_config.json").write_text(self.config.to_json(), encoding="utf-8")
            copy_licence(self.out, folder)

        path = self.store.save(name, write)
        if best and self._beats_cooled():
            self.store.point("best", path)

    def _beats_cooled(self) -> bool:
        """Whether the best loss is below that of the checkpoint `best` if that was set aside."""
        best = self.store.target("best")
        if best is None or not self.store.is_set_aside(best):
            return True
        theirs = parse_saved_run(read_regular(best / "training.json"), best / "training.json")
        if theirs["validated_tokens"] != self.validated_tokens:
            return True
        return self.best_loss is not None and self.best_loss < theirs["best_loss"]

    def _load_initial_weights(self) -> Path | None:
        """Load the weights of `config.init`, which rank 0 reads for all ranks. Return its folder on rank 0."""
        folder = None
        with self.ranks.together():
            if self.ranks.is_main:
                folder = self.base.folder if self.base else warm_start.check(self.config, self.corpus)
        warm_start.load_weights(self.trainer, folder, self.ranks)
        return folder

    def _resume(self, latest: Path | None) -> Path | None:
        """Load rank 0's newest checkpoint `latest`, or the one before its cool-down, and return its folder.

        The other ranks pass None, receive the content from rank 0 and return None.
        """
        folder = None
        with self.ranks.together():
            if latest is not None:
                folder = self._resume_point(latest)
        path = folder or self.out
        state, settings = (self.ranks.read(path / name) for name in ("training.json", "training_config.json"))
        with self.ranks.together():
            values = parse_saved_run(state, path / "training.json")
            saved = parse_saved_config(settings, path / "training_config.json")
            check_fixed(self.out, saved, self.config)
            check_corpus(self.out, values["corpus"], self.corpus)
        weights, arrays = (self._load_arrays(path / name) for name in ("model.safetensors", "training.safetensors"))
        memory = self._load_arrays(path / MEMORY) if self.ranks.any((path / MEMORY).exists()) else {}
        if self.config.lora_rank is not None:
            warm_start.load_weights(self.trainer, self.base and self.base.folder, self.ranks)
        with self.ranks.together():
            self.trainer.load_state_dict(weights, arrays, memory, values)
        if not memory:
            self.callback.on_message(self, f"{path}: no {MEMORY}, so the memory of all lanes begins empty")
        init = warm_start.resumed_init(self.config, saved, self.base)
        if self.config.init not in (None, init):
            first = init or "random weights"
            self.callback.on_message(self, f"init = {self.config.init}: ignored, the run started from {first}")
        self.config = replace(self.config, init=init)
        for name in RUN_STATE:
            setattr(self, name, values[name])
        p = self.trainer.progress
        self.saved = (p.step, p.segments, p.skipped, self.last_validation), path
        with self.ranks.together():
            if folder is not None:
                if folder != latest:
                    self._set_aside(latest, folder)
                self._restore_links(folder)
        return folder

    def _load_arrays(self, path: Path) -> dict[str, Any]:
        """Return the arrays in a file of rank 0 on every rank. Its bytes are held beside them only to be sent."""
        if self.ranks.size == 1:
            return checkpoint.load_arrays(path)
        content = self.ranks.read(path)
        with self.ranks.together():
            return checkpoint.load_arrays(path, content)

    def _resume_point(self, latest: Path) -> Path:
        """Return the newest checkpoint, or the one before its cool-down if that now begins later."""
        verify_checkpoint(latest)
        folder = resume_point(latest, self.config)
        if not folder.is_dir():
            self.callback.on_message(self, f"{folder}: missing, so the run continues from {latest.name}")
            return latest
        if folder != latest:
            verify_checkpoint(folder)
        return folder

    def _restore_links(self, folder: Path) -> None:
        """Point `last` and `best` to the checkpoints recorded in this one; a kill may have left them unset."""
        self.store.point("last", folder)
        best = self.store.folder / self.best if self.best else None
        if best is not None and best.is_dir() and self._beats_cooled():
            self.store.point("best", best)

    def _set_aside(self, latest: Path, folder: Path) -> None:
        """Keep the cooled checkpoint `latest`, with its metrics and samples; the run continues from `folder`."""
        set_samples_aside(self.out, self.trainer.progress.step, latest)
        if (metrics := self.out / METRICS_FILE).exists():
            write_atomically(latest / METRICS_FILE, read_regular(metrics))
        cooled = self.store.set_aside(folder)
        self.callback.on_message(
            self,
            f"the cool-down now begins later: the run continues from {folder.name}, before it; "
            f"{latest.name} is kept as {cooled}",
        )

    def _append_metrics(self, kind: str, values: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if self.ranks.is_main:
            append_line(self.out / METRICS_FILE, {"kind": kind, **values})
            self.lines += 1

    def _truncate_metrics(self) -> None:
        """Drop the lines written after the checkpoint: they will be written again."""
        path = self.out / METRICS_FILE
        kept = list(read_lines(path))[: self.lines]
        if len(kept) < self.lines:
            self.callback.on_message(
                self, f"{path}: only {len(kept)} of {self.lines} lines are intact, the rest is lost"
            )
            self.lines = len(kept)
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
