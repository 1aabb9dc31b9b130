"""What the command line shows: progress on standard error, results on standard output."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

WIDE = 10_000  # columns: a path is never cut
SECONDS_BETWEEN_LINES = 10.0  # of a log file, where no bar can move

# No markup: a file may be called "[b] :warning:.mid".
out = Console(width=WIDE, highlight=False, soft_wrap=True, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def table(*columns: str) -> Table:
    """A plain table; the first column is text, the others are numbers."""
    result = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i == 0 else "right")
    return result


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


@contextmanager
def progress(title: str, unit: str, quiet: bool = False) -> Iterator[Callable[[float, float], None]]:
    """A bar to be told (done, total); lines now and then where standard error is no terminal."""
    if quiet:
        yield lambda done, total: None
    elif err.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
        with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bar:
            task = bar.add_task(title, total=None, count="")
            yield lambda done, total: bar.update(
                task, completed=done, total=total, count=f"{min(done, total):,.0f} of {total:,.0f} {unit}"
            )
    else:
        last = time.monotonic()

        def line(done: float, total: float) -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                err.print(f"{title}: {min(done, total):,.0f} of {total:,.0f} {unit}")

        yield line


def show_prepare_report(report: Any) -> None:
    splits = ", ".join(f"{n} {split}" for split, n in report.pieces.items())
    if report.up_to_date:
        out.print(f"{report.out} is up to date: {splits}, {report.tokens:,} tokens")
        return
    for skipped in report.skipped:
        err.print(f"skipped {skipped.source}: {skipped.reason}")
    out.print(f"{report.out}: {splits}")
    out.print(
        f"{report.tokens:,} tokens, {report.notes:,} notes, {report.seconds / 3600:.1f} hours of music; "
        f"{len(report.skipped)} files skipped; {report.wall_seconds:.1f} s"
    )


class TrainingDisplay:
    """Watches a run: a moving bar in a terminal, lines in a log file."""

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.task: Any = None
        self.last_line = 0.0
        self.validating = ""

    def __enter__(self) -> Self:
        if err.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[numbers]}"))
            self.bar = Progress(*columns, console=err, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("starting", total=1.0, numbers="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, text: str) -> None:
        (self.bar.console if self.bar else err).print(text)

    def on_start(self, run: Any, resumed_from: Path | None) -> None:
        c, t = run.config, run.trainer
        self.say(
            f"model: {t.model.n_parameters:,} parameters, {c.n_layers} layers, d_model {c.d_model}, "
            f"segment {c.segment_length}"
        )
        itemsize = t.dtype.size
        self.say(f"memory: {c.schedule.describe(c.n_kv_heads, c.head_dim, itemsize)}, {c.batch_size} lanes")
        self.say(f"data: {len(t.pieces)} pieces, {t.tokens_per_epoch:,} tokens an epoch")
        if resumed_from:
            self.say(f"resumed from {resumed_from}")

    def on_step(self, run: Any, record: Any) -> None:
        done = run.trainer.done
        left = record.seconds / done * (1 - done) if done else 0.0
        numbers = (
            f"loss {record.loss:.3f}  perplexity {record.perplexity:.2f}  {record.tokens_per_second:,.0f} tokens/s  "
            f"peak {size(record.peak_memory)}  left {duration(left)}"
        )
        if self.bar:
            self.bar.update(self.task, completed=done, description=f"step {record.step:,}", numbers=numbers)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES or done >= 1:
            self.last_line = time.monotonic()
            self.say(f"step {record.step:,}  {100 * done:.1f} %  tokens {record.tokens:,}  {numbers}")

    def on_validation_progress(self, run: Any, done: int, total: int) -> None:
        if self.bar:
            self.bar.update(self.task, numbers=f"validating: {done:,} of {total:,} tokens")

    def on_validation(self, run: Any, evaluation: Any, is_best: bool) -> None:
        p = run.trainer.progress
        self.say(
            f"validation after step {p.step:,}, {p.tokens:,} tokens: perplexity {evaluation.perplexity:.3f} "
            f"on {evaluation.tokens:,} tokens of {evaluation.pieces} pieces{', the best so far' if is_best else ''}"
        )

    def on_message(self, run: Any, message: str) -> None:
        self.say(message)

    def on_lost(self, reason: str) -> None:
        self.say(f"dsmr-mlx: error: {reason}")

    def on_end(self, run: Any, reason: str) -> None:
        self.say(
            f"{reason}: {run.out}, {run.trainer.progress.tokens:,} tokens in {duration(run.trainer.progress.seconds)}"
        )


def show_plan(plan: Any) -> None:
    memory = table("memory", "")
    for name in ("weights", "gradients", "optimizer", "state", "activations"):
        shown = {"state": "recurrent state", "activations": "activations, estimated"}.get(name, name)
        memory.add_row(shown, size(getattr(plan, f"{name}_bytes")))
    memory.add_row("together, estimated", size(plan.peak_estimated))
    memory.add_row("peak, measured", size(plan.peak_measured))
    out.print(f"{plan.parameters:,} parameters")
    out.print(memory)
    out.print(
        f"an epoch: {plan.tokens_per_epoch:,} tokens, {plan.steps_per_epoch:,.0f} steps of {plan.tokens_per_step:,.0f} "
        f"tokens, {duration(plan.steps_per_epoch * plan.seconds_per_step)}"
    )
    out.print(
        f"the run: {plan.steps:,.0f} steps of {plan.seconds_per_step:.2f} s, {duration(plan.seconds)}, validation aside"
    )


def show_evaluation(evaluation: Any, split: str) -> None:
    e = evaluation
    out.print(f"perplexity {e.perplexity:.4f} on {e.tokens:,} tokens of {e.pieces} {split} pieces")
    out.print(
        f"nats: {e.nats_per_token:.4f} a token, {e.nats_per_note:.4f} a note, {e.nats_per_second:.2f} a second of music"
    )
    positions = table("position in the piece", "tokens", "nats a token", "perplexity")
    for row in e.by_position:
        end = "…" if row.end is None else f"{row.end:,}"
        positions.add_row(
            f"{row.start:,} – {end}",
            f"{row.tokens:,}",
            f"{row.nats_per_token:.4f}",
            f"{math.exp(row.nats_per_token):.3f}",
        )
    out.print()
    out.print(positions)
    extremes = table("best and worst pieces", "tokens", "perplexity")
    shown = e.by_piece if len(e.by_piece) <= 6 else [*e.by_piece[:3], *e.by_piece[-3:]]
    for piece in shown:
        extremes.add_row(piece.source, f"{piece.tokens:,}", f"{piece.perplexity:.3f}")
    out.print()
    out.print(extremes)


def show_generation(report: Any, paths: Sequence[Path]) -> None:
    files = table("file", "notes", "seconds", "notes/s", "pitches", "tokens")
    for path, variation in zip(paths, report.variations, strict=True):
        notes = variation.notes
        pitches = f"{notes.pitch.min()}–{notes.pitch.max()}" if len(notes) else "–"
        rate = len(notes) / notes.duration if notes.duration else 0.0
        files.add_row(
            str(path), f"{len(notes):,}", f"{notes.duration:.1f}", f"{rate:.1f}", pitches, f"{len(variation.ids):,}"
        )
    out.print(files)
    prompt = (
        f"prompt of {report.prompt_tokens:,} tokens in {report.prefill_seconds:.2f} s; "
        if report.prompt_tokens > 1
        else ""
    )
    out.print(
        f"{prompt}{report.tokens:,} tokens in {report.decode_seconds:.2f} s, {report.tokens_per_second:,.0f} tokens/s; "
        f"recurrent state {size(report.state_bytes)}"
    )


def show_horizons(description: str, rows: Sequence[Any]) -> None:
    out.print(description)
    result = table("layer", "horizon", "bytes", "reach", "")
    result.columns[-1].justify = "left"
    longest = max((row.horizon for row in rows), default=0)
    for row in reversed(rows):
        bar = "█" * round(40 * row.horizon / longest) if longest else ""
        result.add_row(str(row.layer), f"{row.horizon:,}", f"{row.bytes:,}", f"{row.reach:,}", bar or "·")
    out.print(result)
    out.print("reach: how many tokens before the current segment the stack up to this layer can have heard of")
