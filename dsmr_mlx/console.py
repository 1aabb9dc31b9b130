"""What the command line shows: progress on standard error, results on standard output."""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dsmr_mlx.horizons import parse

WIDE = 10_000  # columns: a path is never cut
SECONDS_BETWEEN_LINES = 10.0  # of a log file, where no bar can move
VELOCITY_COLOURS = ("#7090c0", "#4d9cab", "#57a36a", "#b99a32", "#d67f2c", "#d0453c")  # quiet to loud
LONGEST_TEXT = 600  # characters of what a MIDI file says about itself

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
    if n_bytes < 2**20 / 10:
        return f"{n_bytes / 2**10:.1f} KiB"
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
    if report.events > report.tokens:
        out.print(f"{report.events:,} events in {report.tokens:,} subwords, {report.events / report.tokens:.2f} each")
    out.print(
        f"{report.tokens:,} tokens, {report.notes:,} notes, {report.seconds / 3600:.1f} hours of music; "
        f"{len(report.skipped)} files skipped; {report.wall_seconds:.1f} s"
    )


def show_tokens(report: Any, title: str, first: int) -> None:
    """A `token_report.TokenReport`, with the names of the `first` tokens."""
    r = report.round_trip
    out.print(f"{title}: {report.notes:,} notes in {report.seconds:.1f} s")
    out.print(f"{report.label}: {report.vocab_size:,} ids, fingerprint {report.fingerprint[:12]}")
    counts = f"{len(report.ids):,} tokens, {report.per_note:.2f} a note, {report.per_second:.1f} a second"
    subwords = f", for {report.events:,} events, {report.compression:.2f} each" if report.compression != 1 else ""
    out.print(counts + subwords)
    out.print()
    types = table("type", "events" if subwords else "tokens", "share")
    for name, count in report.types.items():
        types.add_row(name, f"{count:,}", f"{100 * count / report.events:.1f} %")
    out.print(types)
    out.print()
    out.print(f"round trip: {r.matched:,} of {r.given:,} notes come back, and {r.returned - r.matched:,} others")
    if r.matched:
        errors = table("", "mean", "largest")
        for name, difference in (("onset", r.onset), ("offset", r.offset)):
            errors.add_row(name, f"{1000 * difference.mean:.1f} ms", f"{1000 * difference.max:.1f} ms")
        errors.add_row("velocity", f"{r.velocity.mean:.1f}", f"{r.velocity.max:.0f}")
        out.print(errors)
    if first:
        out.print()
        out.print(" ".join(report.names[:first]) + (" …" if len(report.names) > first else ""))


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
        elif c.init is not None:
            self.say(f"weights: those of {c.init}")

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


def weight_type(weights: Any) -> str:
    """`float32`, or `4 bits in groups of 64` with the type of what is not quantized."""
    if weights.bits is None:
        return weights.dtype
    return f"{weights.bits} bits in groups of {weights.group_size}, {weights.dtype}"


def show_comparison(comparison: Any, split: str) -> None:
    c = comparison
    both = c.measured, c.reference
    e = c.measured.evaluation
    out.print(f"on {e.tokens:,} tokens of {e.pieces} {split} pieces")
    result = table("", *(m.checkpoint for m in both), "change")
    result.add_row("parameters", *(f"{m.weights.parameters:,}" for m in both))
    result.add_row("weights", *(weight_type(m.weights) for m in both))
    result.add_row("size on disk", *(size(m.weights.bytes) for m in both), f"{c.bytes_percent:+.2f} %")
    result.add_row("nats a token", *(f"{m.evaluation.nats_per_token:.4f}" for m in both))
    perplexities = (f"{m.evaluation.perplexity:.4f}" for m in both)
    result.add_row("perplexity", *perplexities, f"{c.perplexity_percent:+.2f} %")
    out.print(result)


def show_evaluation(measured: Any, split: str) -> None:
    e, w = measured.evaluation, measured.weights
    out.print(f"perplexity {e.perplexity:.4f} on {e.tokens:,} tokens of {e.pieces} {split} pieces")
    out.print(
        f"nats: {e.nats_per_token:.4f} a token, {e.nats_per_note:.4f} a note, {e.nats_per_second:.2f} a second of music"
    )
    out.print(f"weights: {w.parameters:,} parameters, {weight_type(w)}, {size(w.bytes)}")
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


def show_generation(report: Any, recordings: Sequence[Any]) -> None:
    files = table("file", "notes", "seconds", "notes/s", "pitches", "tokens")
    for made in recordings:
        notes, seconds = made.notes, made.seconds
        pitches = f"{made.lowest}–{made.highest}" if notes else "–"
        rate = notes / seconds if seconds else 0.0
        files.add_row(str(made.path), f"{notes:,}", f"{seconds:.1f}", f"{rate:.1f}", pitches, f"{made.tokens:,}")
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


def show_scores(scores: Sequence[Any], kept: dict[int, Path]) -> None:
    """Of candidates (`scoring.Score`) what the model thinks of each, and where those that are `kept` went."""
    candidates = table("candidate", "nats/note", "notes", "loop", "file")
    candidates.columns[-1].justify = "left"
    for i, score in enumerate(scores):
        loop = f"{score.loop.copies} × {score.loop.length} events" if score.loop else "–"
        candidates.add_row(
            str(i + 1),
            f"{score.nats_per_note:.3f}",
            f"{score.notes:,}",
            f"{loop}, out" if score.loops else loop,
            str(kept.get(i, "")),
        )
    out.print(candidates)
    out.print()


def show_piece(notes: Any, title: str | None = None, stored: str | None = None) -> None:
    """The figures of `midi.Notes` in a line, after its title, and in another what its file says about itself."""
    from dsmr_mlx.pianoroll import printable, stored_pairs, summarize

    out.print(f"{printable(title)}: {summarize(notes)}" if title else str(summarize(notes)))
    if pairs := stored_pairs(stored):
        told = printable(", ".join(f"{name}: {value}" for name, value in pairs))
        out.print(told if len(told) <= LONGEST_TEXT else f"{told[:LONGEST_TEXT]}…")


def show_pianoroll(
    notes: Any,
    *,
    title: str | None = None,
    stored: str | None = None,
    start: float = 0.0,
    systems: int | None = None,
) -> None:
    """The figures of `midi.Notes` and their piano roll, as wide as the terminal; loudness as colour where there is any.

    title, stored: what stands before the roll; stored is the text of a MIDI file (`midi.read_text`). start: what the
    clock shows at the left edge, in seconds. systems: the most lines that the piece is broken into (default 2).
    Raises `UserError` for `systems` below 1.
    """
    from dsmr_mlx.text_roll import SYSTEMS, text_systems

    width = shutil.get_terminal_size().columns
    drawn = text_systems(notes, width, SYSTEMS if systems is None else systems, start)
    show_piece(notes, title, stored)
    coloured = out.color_system is not None and not out.no_color
    for system in drawn:
        out.print()
        for line in coloured_lines(system) if coloured else system.lines():
            out.print(line)
    if drawn and coloured:
        out.print(Text.assemble("quiet ", *(("▄▄", colour) for colour in VELOCITY_COLOURS), " loud"))


def coloured_lines(system: Any) -> Iterator[Text]:
    """The lines of a `text_roll.TextSystem`; each half of a cell has the colour of its loudness."""
    colours = [VELOCITY_COLOURS[velocity * len(VELOCITY_COLOURS) // 128] for velocity in range(128)]
    for row, name in enumerate(system.names):
        line = Text.assemble((system.margin(name), "dim"))
        cells = zip(system.blocks(row), *([colours[v] for v in half] for half in system.velocity[row]), strict=True)
        for (character, upper, lower), run in groupby(cells):
            styles = {"▀": upper, "▄": lower, "█": f"{upper} on {lower}"}
            line.append(("▀" if character == "█" else character) * len(list(run)), styles.get(character, "dim"))
        yield line
    for below in (system.ruler, system.times):
        yield Text(below, "dim")


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


def show_conversion(conversion: Any) -> None:
    """What a source is taken for, before it is converted."""
    c = conversion.config
    for note in conversion.notes:
        err.print(f"note: {note}")
    out.print(f"{conversion.source.path}: {conversion.family.name} ({conversion.family.about})")
    heads = f"{c.n_heads} heads of {c.head_dim}" + (f", {c.n_kv_heads} for keys" if c.n_kv_heads != c.n_heads else "")
    out.print(f"model: {c.n_layers} layers, d_model {c.d_model}, {heads}, vocabulary of {c.vocab_size:,}")
    horizons = parse(f"custom:{','.join(map(str, c.horizons))}", c.n_layers).describe(c.n_kv_heads, c.head_dim, 4)
    out.print(f"memory: {horizons}, segment {c.segment_length}")
    out.print(exactness(conversion.exactness, c.max_positions))


def exactness(e: Any, positions: int | None) -> str:
    """In words how far a converted model computes what the original does; `positions` are those that it has learned."""
    end = f"; a stream ends at {positions:,} tokens, where its table of positions does" if positions else ""
    if e.tokens is None:
        return f"exact: the horizons are the original's{end}"
    if not e.warm_start:
        return f"exact up to {e.tokens:,} tokens{end or '; beyond them it remembers what its horizons say'}"
    knows = f"the original knows {e.context:,}" if e.context else "the original's context is not known"
    if e.recurrent and e.context is None:
        knows = "the original reads any number with its own horizons"
    return f"a warm start: exact up to {e.tokens:,} tokens only, {knows}; train --init fine-tunes it{end}"


def show_verification(verification: Any, compared: str) -> None:
    """Differences of a converted model from its original; `compared` says which of its weights they are of."""
    rows = table("", "max absolute", "max relative")
    for what, absolute, relative in verification.rows:
        rows.add_row(what, f"{absolute:.2e}", f"{relative:.2e}")
    out.print(rows)
    verdict = "equal" if verification.passed else "NOT equal"
    tokens = " x ".join(map(str, verification.tokens))
    out.print(
        f"{verdict} to {verification.against} on {tokens} tokens, tolerance {verification.tolerance:.0e} relative; "
        f"the same likeliest token after {verification.agreement:.2%}; compared: {compared}"
    )


def show_assessment(assessment: Any) -> None:
    """The files, how they compare with the reference, and what to make of it."""
    for skipped in [*assessment.skipped, *(assessment.reference.skipped if assessment.reference else [])]:
        err.print(f"skipped {skipped.source}: {skipped.reason}")
    columns = ("notes", "seconds", "notes/s", "polyphony", "most", "silence", "longest note", "loop", "errors")
    files = table("file", *columns)
    for f in assessment.files:
        figures = (f"{f.notes:,}", f"{f.seconds:.1f}", f"{f.notes_per_second:.1f}", f"{f.mean_polyphony:.1f}")
        loop = f"{f.loop.copies} × {f.loop.length}" if f.loop else "–"
        errors = "–" if f.syntax_errors is None else str(f.syntax_errors)
        times = (f"{f.longest_silence:.1f} s", f"{f.longest_note:.1f} s")
        files.add_row(f.name, *figures, str(f.max_polyphony), *times, loop, errors)
    out.print(files)
    if assessment.reference is not None:
        out.print()
        show_set_comparison(assessment)
    warnings = [f"{f.name}: {warning}" for f in assessment.files for warning in f.warnings]
    if warnings:
        out.print()
    for warning in warnings:
        out.print(f"warning: {warning}")


def show_set_comparison(assessment: Any) -> None:
    def shown(value: float) -> str:
        return f"{value:.2f}" if math.isfinite(value) else "–"

    def centre(median: float, mean: float) -> str:
        return " / ".join(charts.compact(round(value, 3)) for value in (median, mean)) if math.isfinite(mean) else "–"

    from dsmr_mlx import charts

    reference = assessment.reference
    out.print(f"beside {len(reference.music)} excerpts of {reference.pieces} {reference.kind}, as long as the files")
    columns = ("generated", "reference", "overlap", "real", "KL", "OA", "real", "KL of distances")
    result = table("median / mean of the pieces", *columns)
    for c in assessment.compared:
        figures = (c.overlap, c.real_overlap, c.kl, c.oa, c.real_oa, c.distance_kl)
        result.add_row(c.title, centre(*c.generated), centre(*c.reference), *map(shown, figures))
    out.print(result)
    out.print("overlap, KL: of all notes or moments; OA: of distances of pieces; real: as much of other real pieces")
    low = ", ".join(f"{c.title} {c.overlap:.2f} (real {shown(c.real_overlap)})" for c in assessment.low)
    out.print(f"overlap below 0.8: {low}" if low else "every overlap is 0.8 or more")
    for remark in assessment.remarks:
        out.print(f"note: {remark}")


def show_ports(inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """The MIDI ports of this computer."""
    for kind, names in (("input", inputs), ("output", outputs)):
        for name in names:
            out.print(f"{kind:<7} {name}")
        if not names:
            out.print(f"{kind:<7} none")


def show_live(options: Any, sources: Sequence[str], output: str | None) -> None:
    """Who plays with whom, when a session begins."""
    when = {"pause": f"{options.pause:g} s after your last key", "pedal": "at the pedal", "enter": "at Enter"}
    err.print(f"from {', '.join(sources)} to {output or 'the file'}; the model takes over ", end="")
    err.print(f"{when.get(options.take_over, f'at {options.take_over}')}; Ctrl-C ends the session")


def show_turn(turn: Any) -> None:
    """A turn of a session that has ended."""
    who = {"human": "you", "model": "model"}[turn.voice]
    err.print(f"{who:<6} {turn.notes:>4} notes {turn.seconds:>6.1f} s  {turn.reason}")


def show_live_report(statistics: Any, reason: str, files: Sequence[Any]) -> None:
    """What a session took."""
    from dsmr_mlx.live.statistics import spread

    s = statistics
    times = table("milliseconds", "n", "median", "95 %", "largest")
    for name, values in (
        ("take-over to first note, computing", s.first_computed),
        ("take-over to first note, sent", s.first_sent),
        ("notes behind their time", s.lateness),
        ("reading, for each event", s.reading),
    ):
        of = spread(values)
        shown = (f"{1000 * value:.1f}" if of.n else "–" for value in of[1:])
        times.add_row(name, f"{of.n:,}", *shown)
    out.print(reason)
    out.print(times)
    out.print(
        f"{s.played:,} events played, {s.tokens_per_second:,.0f} a second of computing; {s.rewound:,} taken back; "
        f"{s.dropped:,} notes too late to be played; fell behind {s.behind:,} times"
    )
    for path in files:
        out.print(str(path))
