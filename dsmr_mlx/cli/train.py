"""`dsmr-mlx train`: train a model on a corpus."""

import argparse
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.progress import BarColumn, Progress, TextColumn

from dsmr_mlx.cli.common import add_command, check_positive
from dsmr_mlx.cli.console import SECONDS_BETWEEN_LINES, count, err, hint_blas, out, table
from dsmr_mlx.common.allocator import keep_freed_memory
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.formatting import format_bytes, format_time
from dsmr_mlx.model.bundled import find_by_folder, locate

if TYPE_CHECKING:
    from dsmr_mlx.evaluation.losses import Evaluation
    from dsmr_mlx.training.plan import Plan
    from dsmr_mlx.training.run import Run
    from dsmr_mlx.training.trainer import StepRecord

MIN_COLUMNS = 110  # width of the terminal from which all numbers fit beside the bar


def add(commands) -> None:
    """Add the parser of the command."""
    example = "dsmr-mlx train --data corpus --out runs/first --preset small --max-minutes 90"
    p = add_command(commands, "train", run, example)
    p.setting_names = setting_names
    p.add_argument("--data", required=True, metavar="CORPUS", help="a corpus written by `dsmr-mlx prepare`")
    p.add_argument("--out", required=True, metavar="RUN", help="the folder of the run")
    p.add_argument("--preset", metavar="NAME", help="tiny (1 M parameters), small (5 M, the default) or base (40 M)")
    p.add_argument(
        "--init",
        metavar="CHECKPOINT",
        help="start from the weights and the architecture of a checkpoint or run: a preset then supplies only the "
        "other settings, and --set may change only horizons, segment_length and dropout of the architecture; with "
        "--resume it only says where the base of adapters is now",
    )
    p.add_argument("--config", metavar="FILE.toml", help="settings by name; they override the preset")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="override one setting, such as batch_size=8; RUN/config.json lists them all, an unknown KEY prints "
        "the nearest, or all",
    )
    p.add_argument(
        "--max-steps",
        type=int,
        metavar="N",
        help="number of updates (default: the preset's, 5,000 for small; none if another limit is given)",
    )
    p.add_argument("--max-tokens", type=int, metavar="N", help="number of training tokens")
    p.add_argument("--max-minutes", type=float, metavar="M", help="minutes of training, without validation")
    p.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of the run, or start it")
    p.add_argument("--force", action="store_true", help="delete the run in RUN and start anew")
    p.add_argument("--plan", action="store_true", help="only show the memory, steps and time that the run needs")


def setting_names() -> Collection[str]:
    """Return the names of all settings."""
    from dsmr_mlx.training.config import TrainConfig

    return TrainConfig.__dataclass_fields__


def run(a: argparse.Namespace) -> None:
    """Train a model, or show the plan."""
    from dsmr_mlx.data.corpus import Corpus
    from dsmr_mlx.model.checkpoint_folder import CheckpointStore
    from dsmr_mlx.training.config import LIMITS
    from dsmr_mlx.training.plan import make_plan
    from dsmr_mlx.training.run import saved_config, train
    from dsmr_mlx.training.saved_run import check_checkpoint
    from dsmr_mlx.training.settings import build_config

    if a.resume and a.force:
        raise UserError("--resume and --force: expected only one of them")
    check_positive(a, *LIMITS)
    saved = saved_config(a.out) if a.resume else None
    base = saved if a.preset is None else None
    options = {name: getattr(a, name) for name in (*LIMITS, "init") if getattr(a, name) is not None}
    config = build_config(a.preset, a.config, a.settings, base, saved, **options)
    hint_blas()
    if a.plan:
        corpus = Corpus.load(a.data)
        latest = CheckpointStore(Path(a.out), keep_last=1).latest() if a.resume else None
        if latest is not None:
            check_checkpoint(Path(a.out), latest, config, corpus)
        show_plan(make_plan(config, corpus, latest))
        return
    keep_freed_memory()
    with TrainingDisplay() as display:
        train(config, a.data, a.out, resume=a.resume, force=a.force, callback=display)


class TrainingDisplay:
    """A `training.run.Callback` that shows a progress bar in a terminal, or lines in a log file."""

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.task: Any = None
        self.last_line = 0.0

    def __enter__(self) -> Self:
        if err.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[numbers]}"))
            self.bar = Progress(*columns, console=err, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("starting", total=1.0, numbers="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()

    def print_line(self, text: str) -> None:
        """Print a line above the bar."""
        (self.bar.console if self.bar else err).print(text)

    def on_start(self, run: "Run", resumed_from: Path | None) -> None:
        """Show the model, its memory and the data."""
        c, t = run.config, run.trainer
        self.print_line(
            f"model: {t.model.n_parameters:,} parameters, {c.n_layers} layers, d_model {c.d_model}, "
            f"segment {c.segment_length}"
        )
        if c.lora_rank is not None:
            self.print_line(
                f"adapters: rank {c.lora_rank}, {t.n_trained:,} parameters; base: {run.base.folder}, frozen"
            )
        memory = c.schedule.describe(c.n_kv_heads, c.head_dim, t.dtype.size, c.canon_size)
        self.print_line(f"memory: {memory}, {c.batch_size} lanes")
        self.print_line(f"data: {count(len(t.pieces), 'piece')}, {t.tokens_per_epoch:,} tokens per epoch")
        if resumed_from:
            ended = "; it has reached its limit, a higher --max-tokens, --max-steps or --max-minutes goes on"
            self.print_line(f"resumed from {resumed_from}{ended if t.done >= 1 else ''}")
        elif c.init is not None:
            self.print_line(f"weights: from {c.init}")
            if model := find_by_folder(locate(c.init)):
                self.print_line(model.notice)

    def on_step(self, run: "Run", record: "StepRecord") -> None:
        """Show the progress, the loss and the speed."""
        done = run.trainer.done
        left = record.seconds / done * (1 - done) if done else 0.0
        perplexity, speed = f"perplexity {record.perplexity:.2f}", f"{record.tokens_per_second:,.0f} tokens/s"
        remaining = f"left {format_time(left)}"
        numbers = f"loss {record.loss:.3f}  {perplexity}  {speed}  peak {format_bytes(record.peak_memory)}  {remaining}"
        if self.bar:
            if err.width < MIN_COLUMNS:
                numbers = f"{perplexity}  {speed}  {remaining}"
            self.bar.update(self.task, completed=done, description=f"step {record.step:,}", numbers=numbers)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES or done >= 1:
            self.last_line = time.monotonic()
            self.print_line(f"step {record.step:,}  {100 * done:.1f} %  tokens {record.tokens:,}  {numbers}")

    def on_validation_progress(self, run: "Run", done: int, total: int) -> None:
        """Show the progress of a validation, in a terminal only."""
        if self.bar:
            self.bar.update(self.task, numbers=f"validating: {done:,} of {total:,} tokens")

    def on_validation(self, run: "Run", evaluation: "Evaluation", is_best: bool) -> None:
        """Show the result of a validation."""
        p, measured = run.trainer.progress, f"{evaluation.tokens:,} tokens of {count(evaluation.pieces, 'piece')}"
        self.print_line(
            f"validation after step {p.step:,}, {p.tokens:,} tokens: perplexity {evaluation.perplexity:.3f} "
            f"on {measured}{', the best so far' if is_best else ''}"
        )

    def on_message(self, run: "Run", message: str) -> None:
        """Show a message."""
        self.print_line(message)

    def on_lost(self, reason: str) -> None:
        """Show the error that ends this process."""
        self.print_line(f"dsmr-mlx: error: {reason}")

    def on_end(self, run: "Run", reason: str) -> None:
        """Show why and where the run ended."""
        hint = "; --resume continues it" if reason == "stopped" else ""
        done, warm_up = run.trainer.progress, run.config.warmup_steps
        self.print_line(f"{reason}{hint}: {run.out}, {done.tokens:,} tokens in {format_time(done.seconds)}")
        if reason == "done" and done.step < warm_up:
            self.print_line(f"note: it ended within its warm-up of {warm_up} steps (warmup_steps), with low rates")


def show_plan(plan: "Plan") -> None:
    """Show the memory, the steps and the time of a run."""
    memory = table("memory", "")
    adapted = plan.needed.frozen > 0
    names = {"frozen": "frozen weights"} if adapted else {}
    names |= {"weights": "adapters" if adapted else "weights", "gradients": "gradients", "optimizer": "optimizer"}
    names |= {"state": "recurrent state", "activations": "activations, estimated"}
    if plan.needed.validation > plan.needed.activations:
        names |= {"validation": "or the state of a validation"}
    for name, shown in names.items():
        memory.add_row(shown, format_bytes(getattr(plan.needed, name)))
    memory.add_row("total, estimated", format_bytes(plan.needed.total))
    if plan.peak_measured is not None:
        memory.add_row("peak, measured", format_bytes(plan.peak_measured))
    out.print(f"{plan.parameters:,} parameters" + (f", {plan.trained:,} of them trained" if adapted else ""))
    out.print(memory)
    if mac := plan.smallest_mac:
        out.print(f"fits into a Mac with {mac[0]} GB, whose GPU may use about {format_bytes(mac[1])}")
    if plan.warning:
        out.print(plan.warning)
    show_advice(plan)
    if plan.peak_measured is None:
        out.print(f"an epoch: {plan.tokens_per_epoch:,} tokens; not measured: the run does not fit into the machine")
        return
    out.print(
        f"an epoch: {plan.tokens_per_epoch:,} tokens, {plan.steps_per_epoch:,.0f} steps of {plan.tokens_per_step:,.0f} "
        f"tokens, {format_time(plan.steps_per_epoch * plan.seconds_per_step)}"
    )
    what = f"what is left after {count(plan.tokens_done, 'token')}" if plan.tokens_done else "the run"
    out.print(
        f"{what}: {plan.steps:,.0f} steps of {plan.seconds_per_step:.2f} s, {format_time(plan.seconds)}, "
        "without validation"
    )


def show_advice(plan: "Plan") -> None:
    """Show how many lanes of long memories fit into the machine."""
    if not plan.advice:
        return
    lanes = table("a lane of long memories", "state", "activations", "lanes that fit")
    for each in plan.advice:
        lanes.add_row(
            each.dtype, format_bytes(each.state_bytes), format_bytes(each.activations_bytes), f"{each.lanes:,}"
        )
    out.print(lanes)
    out.print(
        f"into {format_bytes(plan.memory_bytes)}, a fifth of which is left free; choose with --set batch_size and "
        "--set dtype, or shrink the state with n_kv_heads and whole:CAP"
    )
    out.print("steps get slower while memories fill: times are those of the first steps")
