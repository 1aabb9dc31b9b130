"""A training run as one self-contained HTML page: figures, curves, memory horizons, samples, settings.

It is made from the run's folder alone (config.json, metrics.jsonl, samples/, checkpoints), also while the run goes on.
It needs matplotlib, but neither MLX nor a network nor a MIDI library.
"""

import base64
import dataclasses
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from dsmr_mlx import __version__
from dsmr_mlx.common.config import setting_text
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import check_output, read_regular, write_output
from dsmr_mlx.common.formatting import format_bytes, format_number, format_time, printable
from dsmr_mlx.common.html import SCHEMES, element, text
from dsmr_mlx.common.plotting import LIGHT, require_matplotlib
from dsmr_mlx.model.config import Architecture
from dsmr_mlx.model.horizons import LayerRow, table
from dsmr_mlx.music.midi import read_notes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.piano_roll import draw_system, pitch_range
from dsmr_mlx.training.config import LIMITS, TrainConfig
from dsmr_mlx.training.report_curves import (
    CHART,
    add_axes,
    figure,
    fixed,
    gradient_figure,
    inline_svg,
    loss_figure,
    memory_figure,
    perplexity_figure,
    position_figure,
    rate_figure,
    remark_element,
    set_scale,
    smoothing,
    throughput_figure,
    whole,
)
from dsmr_mlx.training.run_record import METRICS_FILE, RunRecord, find_samples, number
from dsmr_mlx.training.settings import train_arguments

REPORT = "report.html"
LAST_SAMPLES = 4
LAST_VALIDATIONS = 8
MAX_SECONDS, MAX_NOTES = 60.0, 4000  # of a sample that is drawn
MAX_EMBEDDED_BYTES = 64 << 10  # a larger MIDI file is not put into the page
BAR_INCHES = 0.24  # the height of a layer in the picture of the horizons
ITEMSIZES = {"float32": 4, "bfloat16": 2}


def write_report(run: str | Path, out: str | Path | None = None, force: bool = False) -> Path:
    """Write `make_report(run)` to `out`, by default RUN/report.html, atomically. Return the path.

    RUN/report.html is replaced, another file only with `force`. Raises `UserError` as `make_report` does, and if
    `out` exists, is a folder, does not end in .html or cannot be written.
    """
    own = Path(run) / REPORT
    if not own.parent.is_dir():
        raise UserError(f"{run}: no such folder, expected a training run")
    path = own if out is None else Path(out)
    check_output("`out`", path, (".html", ".htm"), force or path.resolve() == own.resolve())
    write_output("`out`", path, make_report(run))
    return path


def make_report(run: str | Path) -> str:
    """Return the page for a run folder, as HTML that is well-formed XML too.

    Raises `UserError`, naming the folder or file, if it is not a run or its configuration is invalid, and if
    matplotlib is missing.
    """
    require_matplotlib("`report`")
    r = RunRecord.read(run)
    css = resources.files("dsmr_mlx.training").joinpath("report.css").read_text(encoding="utf-8")
    curves = (perplexity_figure, rate_figure, gradient_figure, throughput_figure, memory_figure, position_figure)
    body = [
        header(r),
        headlines(r),
        section("Training", loss_figure(r), *(curve(r) for curve in curves)),
        section("Memory", horizon_figure(r), horizon_table(r)),
        section("Validations", validation_table(r)),
        section("Samples", *samples(r)),
        section("Configuration", *configuration(r)),
        section("To reproduce", reproduction(r)),
        footer(r),
    ]
    head = (
        '<meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{text(r.name)} – dsmr-mlx</title><style>{SCHEMES}\n{css}</style>"
    )
    content = "\n".join(body)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{content}\n</main></body></html>\n'


def section(title: str, *content: str) -> str:
    """A section of the page, its content in a grid."""
    return element("section", element("h2", text(title)), element("div", *content, class_="grid"))


def html_table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    marked: Sequence[int],
    caption: str,
    style: str = "numbers",
) -> str:
    """A table with row names in the first column; the rows `marked` are bold."""
    body = [
        element(
            "tr",
            element("th", text(row[0]), scope="row"),
            *(element("td", text(value)) for value in row[1:]),
            class_="marked" if i in marked else None,
        )
        for i, row in enumerate(rows)
    ]
    parts = (
        [element("thead", element("tr", *(element("th", text(name), scope="col") for name in head)))] if head else []
    )
    content = element("div", element("table", *parts, element("tbody", *body)), class_="scroll")
    return element("div", remark_element(caption), content, class_=style)


def header(r: RunRecord) -> str:
    """The name of the run, its model and how far it is."""
    c = r.config
    n = f"{format_number(r.parameters)} parameters ({r.parameters:,})" if r.parameters else ""
    adapters = f"Adapters of rank {c.lora_rank} in {c.lora['layers']} of {c.n_layers} layers" if c.lora else ""
    adapters = adapters and ", ".join(part for part in (adapters, n, f"on {c.init}, which is frozen") if part)
    n = f"{n}, " if n and not adapters else ""
    model = f"{n}{c.n_layers} layers, width {c.d_model}, {c.n_heads} heads of {c.head_dim}, segment {c.segment_length}"
    memory = c.schedule.describe(c.n_kv_heads, c.head_dim, ITEMSIZES[c.dtype], c.canon_size)
    return element(
        "header",
        element("p", "Depth-Structured Music Recurrence · training run", class_="kind"),
        element("h1", text(r.name)),
        element("p", text(model)),
        *([element("p", text(adapters))] if adapters else []),
        element("p", text(memory)),
        element("p", text(progress(r)), class_="remark"),
    )


def progress(r: RunRecord) -> str:
    """The progress of the run, by the limit that is nearest its end."""
    if not r.steps:
        return "No step is recorded yet."
    values = {"max_steps": r.last("step"), "max_tokens": r.last("tokens"), "max_minutes": r.last("seconds") / 60}
    limits = {name: getattr(r.config, name) for name in LIMITS}
    done = {name: values[name] / limit for name, limit in limits.items() if limit and math.isfinite(values[name])}
    step = f"Step {whole(r.last('step'))}"
    if not done:
        return f"{step}."
    nearest = max(done, key=lambda name: done[name])
    return f"{step}, {min(100 * done[nearest], 100):.0f} % of {nearest} = {limits[nearest]:,}."


def headlines(r: RunRecord) -> str:
    """The most important figures, as tiles."""
    best = r.best or {}
    step, trained = (number(best.get(key)) for key in ("step", "trained_tokens"))
    when = f"best, after step {whole(step)}, {format_number(trained)} tokens"
    loss = r.column("loss")
    recent = loss.y[-(smoothing(len(loss)) + 1) :]
    epochs, tokens, seconds = r.last("epoch"), r.last("tokens"), r.last("seconds")
    rate = r.column("tokens_per_second").y
    peak = r.column("peak_memory").y
    tiles = [
        ("validation perplexity", fixed(best.get("perplexity")), when if best else "no validation yet"),
        (
            "training perplexity",
            fixed(np.exp(min(recent.mean(), 700.0))) if len(loss) else "–",
            f"over the last {len(recent):,} steps" if len(recent) > 1 else "of the last step",
        ),
        ("tokens trained", format_number(tokens) if len(loss) else "–", f"{fixed(epochs, 2)} epochs"),
        ("time trained", format_time(seconds) if math.isfinite(seconds) else "–", "validation and samples aside"),
        ("throughput", whole(float(np.median(rate))) if len(rate) else "–", "tokens a second, median"),
        (
            "peak memory",
            format_bytes(peak.max()) if len(peak) else "–",
            f"in {r.config.dtype}, {r.config.batch_size} lanes",
        ),
    ]
    return element(
        "dl",
        *(
            element("div", element("dt", text(name)), element("dd", element("b", text(v)), element("span", text(note))))
            for name, v, note in tiles
        ),
    )


def layer_rows(r: RunRecord) -> list[LayerRow]:
    """Horizon, reach and state size of each layer."""
    c = r.config
    return table(c.schedule, c.n_kv_heads, c.head_dim, c.segment_length, ITEMSIZES[c.dtype], c.canon_size)


def kibibytes(n_bytes: int) -> str:
    """Bytes as KiB, without the unit."""
    return f"{n_bytes / 1024:,.1f}".removesuffix(".0")


def horizon_figure(r: RunRecord) -> str:
    """A bar for each layer, the lowest at the bottom: its memory, to the left of the segment."""
    c, horizons = r.config, np.array(r.config.schedule.horizons)
    layers = np.arange(len(horizons))

    def draw(figure: Any) -> None:
        axes = add_axes(figure, "tokens before and after the segment's start", "layer")
        axes.barh(layers, horizons, left=-horizons, height=0.76, color=LIGHT["train"])
        axes.barh(layers, c.segment_length, height=0.76, color=LIGHT["segment"])
        axes.axvline(0, color=LIGHT["ink"], linewidth=0.7)
        longest = max(horizons.max(), c.segment_length)
        axes.set(xlim=(-longest, c.segment_length), ylim=(-0.6, len(layers) - 0.4))
        axes.grid(False)
        every = -(-len(layers) // 12)
        axes.set_yticks(layers[::every])
        set_scale(axes, "x", log=False)
        for layer, horizon in list(enumerate(horizons))[::every]:
            fits = horizon > 0.15 * (longest + c.segment_length)
            look = {"color": LIGHT["paper"]} if fits else {"color": LIGHT["muted"], "ha": "right"}
            axes.annotate(
                f"{horizon:,}",
                (-horizon, layer),
                (4 if fits else -4, 0),
                textcoords="offset points",
                va="center",
                **look,
            )

    inches = CHART[0], 0.7 + min(BAR_INCHES, max(0.07, 2.4 / len(layers))) * len(layers)
    keys = [("memory", "remembered"), ("segment", f"the segment, {c.segment_length:,} tokens")]
    title = f"memory horizons of {len(layers)} layers: {', '.join(map(str, horizons))} tokens"
    return figure("Memory horizons", c.schedule.spec, inline_svg(draw, inches, title), lines=keys)


def horizon_table(r: RunRecord) -> str:
    """Horizon, state size and reach of each layer, the highest on top."""
    layers = layer_rows(r)[::-1]
    rows = [(row.layer, f"{row.horizon:,}", kibibytes(row.bytes), f"{row.reach:,}") for row in layers]
    total = ("all", f"{r.config.schedule.budget:,}", kibibytes(sum(row.bytes for row in layers)), "")
    caption = "Reach: how many tokens before the segment can influence this layer. KiB of one lane."
    return html_table(("layer", "horizon", "KiB", "reach"), [*rows, total], [len(rows)], caption)


def validation_table(r: RunRecord) -> str:
    """The last validations and the best one."""
    if not r.validations:
        return remark_element("No validation yet.")
    chosen = r.validations[-LAST_VALIDATIONS:]
    if r.best is not None and r.best not in chosen:
        chosen = [r.best, *chosen]
    heads = {"perplexity": "perplexity", "nats_per_token": "nats/token", "nats_per_event": "nats/event"}
    heads |= {"nats_per_note": "nats/note", "nats_per_second": "nats/s"}
    keys = [key for key in heads if any(key in v for v in chosen)]
    rows = [
        (
            whole(number(v.get("step"))),
            format_number(number(v.get("trained_tokens"))),
            *(fixed(v.get(key)) for key in keys),
        )
        for v in chosen
    ]
    tokens, pieces = (whole(number(chosen[-1].get(key))) for key in ("tokens", "pieces"))
    caption = (
        f"On {tokens} tokens of {pieces} whole pieces, streamed as in training; s: a second of music. Bold: the best."
    )
    head = ("step", "tokens", *(heads[key] for key in keys))
    return html_table(head, rows, [i for i, v in enumerate(chosen) if v is r.best], caption, "numbers wide")


def samples(r: RunRecord) -> list[str]:
    """The last samples and the one of the best weights, as piano rolls."""
    steps = {path: step for step, path in list(find_samples(r.folder).items())[-LAST_SAMPLES:]}
    if best := r.best_sample:
        steps[best] = int(r.best["step"])
    if not steps:
        return [remark_element("No samples.")]
    music = {path: sample_notes(path) for path in sorted(steps, key=lambda path: (steps[path], path == best))[::-1]}
    drawn = [notes for notes in music.values() if isinstance(notes, Notes)]
    seconds = min(max((notes.duration for notes in drawn), default=0.0), MAX_SECONDS)
    pitches = pitch_range(*drawn)
    titles = {path: f"Step {steps[path]:,}" + (", the best weights" if path == best else "") for path in music}
    return [sample_figure(titles[path], path, notes, seconds, pitches) for path, notes in music.items()]


def sample_notes(path: Path) -> Notes | str:
    """The notes of a sample, or the reason why it cannot be drawn."""
    if path.suffix == ".npy":
        return "Token ids only: the machine that trained has no MIDI library."
    try:
        return read_notes(path)
    except UserError as error:
        return f"Not drawn: {str(error).removeprefix(f'{path}: ')}."


def sample_figure(title: str, path: Path, notes: Notes | str, seconds: float, pitches: tuple[float, float]) -> str:
    """The piano roll of a sample with a link to its MIDI file, or the reason why it cannot be drawn."""
    if isinstance(notes, str):
        return figure(title, path.name, remark_element(notes))
    first = slice(MAX_NOTES)
    shown = Notes(notes.onset[first], notes.offset[first], notes.pitch[first], notes.velocity[first])
    takeaway = f"{len(notes):,} notes in {notes.duration:.1f} s"
    name = f"piano roll of {printable(path.name)}: {takeaway}"
    roll = inline_svg(lambda figure: draw_system(add_axes(figure), shown, 0.0, (0.0, seconds), pitches), CHART, name)
    data, link = read_regular(path), text(path.name)
    if len(data) <= MAX_EMBEDDED_BYTES:
        href = f"data:audio/midi;base64,{base64.b64encode(data).decode()}"
        link = element("a", text(path.name), href=href, download=path.name)
    cut = "" if notes.duration <= seconds and len(notes) <= MAX_NOTES else ", its beginning"
    return figure(title, takeaway + cut, roll, element("p", link, class_="remark"))


def configuration(r: RunRecord) -> list[str]:
    """Two tables, of the model and of the training; settings other than the default are bold."""
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    model = [*(f.name for f in dataclasses.fields(Architecture)), "horizons"]
    defaults = TrainConfig()
    parts = []
    for caption, group in (("Model", model), ("Training", [name for name in names if name not in model])):
        rows = [(name, setting_text(getattr(r.config, name))) for name in group]
        changed = [i for i, name in enumerate(group) if getattr(r.config, name) != getattr(defaults, name)]
        parts.append(html_table((), rows, changed, f"{caption}. Bold: not the default.", "settings"))
    return parts


def reproduction(r: RunRecord) -> str:
    """The command that repeats the run."""
    words = ["dsmr-mlx", "train", "--data", "CORPUS", "--out", "RUN", *train_arguments(r.config)]
    command = re.sub(r" (?=--(?!data|out))", " \\\n  ", shlex.join(words))
    corpus = f"the corpus with the fingerprint {r.corpus}" if r.corpus else "the corpus that the run was trained on"
    remarks = [f"CORPUS is {corpus}, RUN a new folder."]
    if r.config.max_minutes is not None:
        remarks.append(
            "The learning rate depends on elapsed time (max_minutes), so the result is similar, not identical."
        )
    return element("div", element("pre", element("code", text(command))), *map(remark_element, remarks), class_="wide")


def footer(r: RunRecord) -> str:
    """The program's version and the age of the metrics."""
    written = datetime.fromtimestamp((r.folder / METRICS_FILE).stat().st_mtime, UTC)
    words = f"Made by dsmr-mlx {__version__} from {METRICS_FILE} as of {written:%Y-%m-%d, %H:%M} UTC."
    return element("footer", text(words))
