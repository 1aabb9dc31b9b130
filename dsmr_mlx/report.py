"""A training run as one HTML page that needs nothing else: figures, curves, memory horizons, samples, settings.

Made from the run's folder alone (config.json, metrics.jsonl, samples/, checkpoints), at any time, also while the run
is going on. No MLX and no network; without a MIDI library the samples are left out.
"""

import base64
import dataclasses
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from dsmr_mlx import __version__, charts
from dsmr_mlx.charts import STYLE, Axis, Line, compact, element, text
from dsmr_mlx.config import Architecture
from dsmr_mlx.console import duration, size
from dsmr_mlx.errors import UserError
from dsmr_mlx.files import write_atomically
from dsmr_mlx.horizons import table
from dsmr_mlx.metrics import METRICS, Column, RunRecord, number
from dsmr_mlx.midi import Notes, read_notes
from dsmr_mlx.train_config import LIMITS, TrainConfig, setting_text, train_arguments

REPORT = "report.html"
LAST_SAMPLES = 4
LAST_VALIDATIONS = 8
ROLL_SECONDS = 60.0  # of a sample that are drawn
EMBEDDED_BYTES = 64 << 10  # a larger MIDI file is not put into the page
ITEMSIZES = {"float32": 4, "bfloat16": 2}


def write_report(run: str | Path, out: str | Path | None = None, force: bool = False) -> Path:
    """Write `make_report(run)` to `out`, by default RUN/report.html, all or nothing; the path written.

    RUN/report.html is replaced, another file only with `force`. Raises `UserError` as `make_report` does, and for an
    `out` that exists, is a folder, does not end in .html or cannot be written.
    """
    own = Path(run) / REPORT
    path = own if out is None else Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {path}: expected a name that ends in .html")
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder, expected a file")
    if path.exists() and not force and path.resolve() != own.resolve():
        raise UserError(f"--out {path}: already exists, --force overwrites it")
    page = make_report(run)
    try:
        write_atomically(path, page)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror or error})") from None
    return path


def make_report(run: str | Path) -> str:
    """The page for a run folder, as HTML that is XML as well.

    Raises `UserError`, which names the folder or file, for what is no run or has a configuration that is not valid.
    """
    r = RunRecord.read(run)
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
        f"<title>{text(r.name)} – dsmr-mlx</title><style>{STYLE}</style>"
    )
    content = "\n".join(body)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{content}\n</main></body></html>\n'


# Parts of the page


def section(title: str, *content: str) -> str:
    return element("section", element("h2", text(title)), element("div", *content, class_="grid"))


def figure(
    title: str,
    takeaway: str,
    *content: str,
    legend: Iterable[tuple[str, str]] = (),
    left_out: int = 0,
    style: str | None = None,
) -> str:
    """A picture with its title, what it shows in a few words, and the (class, name) of its lines."""
    keys = [element("li", element("i", " ", class_=style), text(name)) for style, name in legend]
    caption = [element("h3", text(title)), element("p", text(takeaway))] + ([element("ul", *keys)] if keys else [])
    remark = f"Left out because not finite or not positive: {left_out:,} value{'s' * (left_out > 1)}."
    return element(
        "figure",
        element("figcaption", *caption),
        *(content or [remark_element("Nothing to draw yet.")]),
        *([remark_element(remark, "warning")] if left_out else []),
        class_=style,
    )


def remark_element(words: str, style: str = "remark") -> str:
    return element("p", text(words), class_=style)


def html_table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    marked: Sequence[int],
    caption: str,
    style: str = "numbers",
) -> str:
    """A table whose first column names the rows; the rows `marked` stand out."""
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
    c = r.config
    n = f"{compact(r.parameters)} parameters ({r.parameters:,}), " if r.parameters else ""
    model = f"{n}{c.n_layers} layers, width {c.d_model}, {c.n_heads} heads of {c.head_dim}, segment {c.segment_length}"
    memory = c.schedule.describe(c.n_kv_heads, c.head_dim, ITEMSIZES[c.dtype])
    return element(
        "header",
        element("p", "Depth-Structured Music Recurrence · training run", class_="kind"),
        element("h1", text(r.name)),
        element("p", text(model)),
        element("p", text(memory)),
        element("p", text(progress(r)), class_="remark"),
    )


def progress(r: RunRecord) -> str:
    """How far the run is, by the limit that is nearest its end."""
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


def whole(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def fixed(value: Any, decimals: int = 3) -> str:
    value = number(value)
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "–"


def headlines(r: RunRecord) -> str:
    """The figures that one looks for first."""
    best = r.best or {}
    when = f"best, after step {whole(number(best.get('step')))}, {compact(number(best.get('trained_tokens')))} tokens"
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
        ("tokens trained", compact(tokens) if len(loss) else "–", f"{fixed(epochs, 2)} epochs"),
        ("time trained", duration(seconds) if math.isfinite(seconds) else "–", "validation and samples aside"),
        ("throughput", whole(float(np.median(rate))) if len(rate) else "–", "tokens a second, median"),
        ("peak memory", size(peak.max()) if len(peak) else "–", f"in {r.config.dtype}, {r.config.batch_size} lanes"),
    ]
    return element(
        "dl",
        *(
            element("div", element("dt", text(name)), element("dd", element("b", text(v)), element("span", text(note))))
            for name, v, note in tiles
        ),
    )


# Curves


def smoothing(n: int) -> int:
    """How many steps on either side a smoothed line averages over: a fortieth of the run."""
    return n // 40


def smooth_lines(name: str, x: np.ndarray, y: np.ndarray, mean=charts.smoothed) -> list[Line]:
    """A line drawn lightly and its running mean over it; the line alone if there are few points."""
    if not len(x):
        return []
    if not (reach := smoothing(len(x))):
        return [Line(name, "train", x, y, dots=len(x) == 1)]
    return [
        Line(name, "train raw", x, y, told=False),
        Line(f"{name}, mean of {2 * reach + 1:,} steps", "train", x, mean(y, reach)),
    ]


def geometric(y: np.ndarray, reach: int) -> np.ndarray:
    return np.exp(charts.smoothed(np.log(y), reach))


def validation_lines(r: RunRecord, key: str) -> list[Line]:
    column = Column.of(r.validations, "trained_tokens", key, positive=True)
    return [Line("validation", "validation", column.x, column.y, dots=True)] if len(column) else []


def legend(lines: Sequence[Line]) -> list[tuple[str, str]]:
    return [(line.style, line.name) for line in lines]


def ring(r: RunRecord, key: str) -> tuple[float, float, str] | None:
    """The mark of the best validation, if there are several."""
    x, y = (number((r.best or {}).get(k)) for k in ("trained_tokens", key))
    if len(r.validations) < 2 or not (math.isfinite(x) and math.isfinite(y) and x > 0):
        return None
    return x, y, f"best {y:.3f}"


def token_axis(lines: Sequence[Line], log: bool = False) -> Axis:
    return Axis.over("tokens", *(line.x for line in lines), log=log, zero=not log)


def loss_figure(r: RunRecord) -> str:
    column = r.column("loss")
    training = smooth_lines("training", column.x, column.y)
    lines = training + validation_lines(r, "nats_per_token")
    if not lines:
        return figure("Loss", "", left_out=column.left_out, style="wide")
    x, y = token_axis(lines), Axis.over("nats per token", *(line.y for line in lines), margin=0.04)
    both = [f"training {training[-1].y[-1]:.3f}"] if training else []
    both += [f"validation {lines[-1].y[-1]:.3f}"] if len(lines) > len(training) else []
    takeaway = ", ".join(both) + " at the end"
    label, mark = f"loss over trained tokens: {takeaway}", ring(r, "nats_per_token")
    return figure(
        "Loss",
        takeaway,
        charts.line_chart(lines, x, y, label, ring=mark, width=charts.WIDE, height=330, style="on-wide"),
        charts.line_chart(lines, x, y, label, ring=mark, height=300, style="on-narrow"),
        legend=legend(lines),
        left_out=column.left_out,
        style="wide",
    )


def perplexity_figure(r: RunRecord) -> str:
    column = r.column("perplexity", positive=True)
    lines = smooth_lines("training", column.x, column.y, geometric) + validation_lines(r, "perplexity")
    if not lines:
        return figure("Perplexity", "", left_out=column.left_out)
    x, y = token_axis(lines, log=True), Axis.over("perplexity", *(line.y for line in lines), log=True, margin=0.04)
    best = f"best validation {fixed(r.best['perplexity'])}, " if r.best and "perplexity" in r.best else ""
    chart = charts.line_chart(
        lines, x, y, "perplexity over trained tokens, both logarithmic", ring=ring(r, "perplexity")
    )
    return figure("Perplexity", f"{best}both axes logarithmic", chart, legend=legend(lines), left_out=column.left_out)


def rate_figure(r: RunRecord) -> str:
    column = r.column("learning_rate")
    if not len(column):
        return figure("Learning rate", "", left_out=column.left_out)
    power = math.floor(math.log10(column.y.max())) if column.y.max() > 0 else 0
    scale = 10.0**power if power < -1 else 1.0
    label = "learning rate" + (f" × 10{str(power).translate(charts.SUPERSCRIPTS)}" if scale != 1.0 else "")
    line = Line("learning rate", "train", column.x, column.y / scale, dots=len(column) == 1)
    x, y = token_axis([line]), Axis.over(label, line.y, zero=True, margin=0.04)
    takeaway = f"highest {compact(column.y.max())}, at the end {compact(column.y[-1])}"
    return figure("Learning rate", takeaway, charts.line_chart([line], x, y, takeaway), left_out=column.left_out)


def gradient_figure(r: RunRecord) -> str:
    column, clip = r.column("gradient_norm", positive=True), r.config.clip_norm
    lines = smooth_lines("gradient norm", column.x, column.y, geometric)
    if not lines:
        return figure("Gradient norm", "", left_out=column.left_out)
    x, y = token_axis(lines), Axis.over("gradient norm", column.y, np.array([clip]), log=True, margin=0.05)
    clipped = 100 * float((column.y > clip).mean())
    takeaway = f"above {compact(clip)} and clipped in {clipped:.0f} % of the steps"
    chart = charts.line_chart(lines, x, y, takeaway, rule=(clip, f"clip_norm {compact(clip)}"))
    return figure("Gradient norm", takeaway, chart, legend=legend(lines), left_out=column.left_out)


def throughput_figure(r: RunRecord) -> str:
    column = r.column("tokens_per_second", positive=True)
    lines = smooth_lines("throughput", column.x, column.y)
    if not lines:
        return figure("Throughput", "", left_out=column.left_out)
    x, y = token_axis(lines), Axis.over("tokens per second", column.y, zero=True, margin=0.04)
    takeaway = f"median {np.median(column.y):,.0f} tokens a second"
    chart = charts.line_chart(lines, x, y, takeaway)
    return figure("Throughput", takeaway, chart, legend=legend(lines), left_out=column.left_out)


def memory_figure(r: RunRecord) -> str:
    column = r.column("peak_memory", positive=True)
    if not len(column):
        return figure("Peak memory", "", left_out=column.left_out)
    unit, name = (2**30, "GiB") if column.y.max() >= 2**30 else (2**20, "MiB")
    line = Line("peak memory", "train", column.x, column.y / unit, dots=len(column) == 1)
    x, y = token_axis([line]), Axis.over(name, line.y, zero=True, margin=0.04)
    takeaway = f"{size(column.y.max())} at most"
    return figure("Peak memory", takeaway, charts.line_chart([line], x, y, takeaway), left_out=column.left_out)


def position_figure(r: RunRecord) -> str:
    """Loss by position in the piece: what longer memory is for."""
    title, measured = "Loss by position in the piece", [v for v in r.validations if position_rows(v)]
    best, last = r.best, measured[-1] if measured else None
    shown = [("best", "validation", best)] if best in measured else []
    if last is not None and last is not best:
        shown.insert(0, ("last", "train", last))
    if not shown:
        return figure(title, "", *([remark_element("Not recorded by this run.")] if r.validations else []))
    edges = sorted({(row["start"], row["end"] or math.inf) for _, _, v in shown for row in position_rows(v)})
    names = [f"{short(start)}–{short(end)}" if end < math.inf else f"{short(start)} on" for start, end in edges]
    lines = []
    for name, style, validation in shown:
        rows = {(row["start"], row["end"] or math.inf): row["nats_per_token"] for row in position_rows(validation)}
        places = [i for i, edge in enumerate(edges) if edge in rows]
        values = np.array([rows[edges[i]] for i in places], np.float64)
        label = f"{name} validation, step {whole(number(validation.get('step')))}"
        lines.append(Line(label, style, np.array(places, np.float64), values, dots=True))
    x = Axis("position in tokens", -0.5, len(edges) - 0.5, named=tuple(enumerate(names)))
    y = Axis.over("nats per token", *(line.y for line in lines), margin=0.12)
    first, final = lines[-1].y[[0, -1]]
    takeaway = f"from {first:.3f} at the start to {final:.3f} at {names[int(lines[-1].x[-1])]} tokens"
    return figure(title, takeaway, charts.line_chart(lines, x, y, takeaway), legend=legend(lines))


def position_rows(validation: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a validation's loss by position that can be drawn; lines of older versions have none."""
    rows = validation.get("by_position")
    good = []
    for row in rows if isinstance(rows, list) else []:
        known = isinstance(row, dict) and math.isfinite(number(row.get("start")))
        if known and math.isfinite(number(row.get("nats_per_token"))):
            good.append({**row, "end": row.get("end") if math.isfinite(number(row.get("end"))) else None})
    return good


def short(position: float) -> str:
    """512, 1 k, 2 k: powers of two as people say them."""
    return f"{position / 1024:g}{charts.NARROW_SPACE}k" if position >= 1024 and position % 512 == 0 else f"{position:g}"


# Memory, validations, samples


def layer_rows(r: RunRecord) -> list:
    c = r.config
    return table(c.schedule, c.n_kv_heads, c.head_dim, c.segment_length, ITEMSIZES[c.dtype])


def kibibytes(n_bytes: int) -> str:
    return f"{n_bytes / 1024:,.1f}".removesuffix(".0")


def horizon_figure(r: RunRecord) -> str:
    c = r.config
    tooltips = [
        f"layer {row.layer}: {row.horizon:,} tokens, {kibibytes(row.bytes)} KiB a lane" for row in layer_rows(r)
    ]
    picture = charts.horizon_picture(c.schedule.horizons, c.segment_length, tooltips)
    keys = [("memory", "remembered"), ("segment", f"the segment, {c.segment_length:,} tokens")]
    return figure("Memory horizons", c.schedule.spec, picture, legend=keys)


def horizon_table(r: RunRecord) -> str:
    layers = layer_rows(r)[::-1]
    rows = [(row.layer, f"{row.horizon:,}", kibibytes(row.bytes), f"{row.reach:,}") for row in layers]
    total = ("all", f"{r.config.schedule.budget:,}", kibibytes(sum(row.bytes for row in layers)), "")
    caption = "Reach: how many tokens before the segment the stack up to this layer can have heard of. KiB of one lane."
    return html_table(("layer", "horizon", "KiB", "reach"), [*rows, total], [len(rows)], caption)


def validation_table(r: RunRecord) -> str:
    """The last validations, and the best one."""
    if not r.validations:
        return remark_element("No validation yet.")
    chosen = r.validations[-LAST_VALIDATIONS:]
    if r.best is not None and r.best not in chosen:
        chosen = [r.best, *chosen]
    keys = ("perplexity", "nats_per_token", "nats_per_note", "nats_per_second")
    rows = [
        (
            whole(number(v.get("step"))),
            compact(number(v.get("trained_tokens"))),
            *(fixed(v.get(key)) for key in keys),
        )
        for v in chosen
    ]
    tokens, pieces = (whole(number(chosen[-1].get(key))) for key in ("tokens", "pieces"))
    caption = (
        f"On {tokens} tokens of {pieces} whole pieces, streamed as in training; s: a second of music. Bold: the best."
    )
    head = ("step", "tokens", "perplexity", "nats/token", "nats/note", "nats/s")
    return html_table(head, rows, [i for i, v in enumerate(chosen) if v is r.best], caption, "numbers wide")


def samples(r: RunRecord) -> list[str]:
    """The last samples and the one of the best weights, as piano rolls."""
    found = {}
    for path in sorted((r.folder / "samples").glob("step-*")):
        if (match := re.fullmatch(r"step-(\d+)\.(mid|npy)", path.name)) and path.is_file():
            found[int(match[1])] = path
    if not found:
        return [remark_element("No samples.")]
    best = int(number(r.best["step"])) if r.best and math.isfinite(number(r.best.get("step"))) else None
    chosen = sorted({*sorted(found)[-LAST_SAMPLES:], *({best} & found.keys())}, reverse=True)
    music = {step: sample_notes(found[step]) for step in chosen}
    heard = [notes for notes in music.values() if isinstance(notes, Notes)]
    seconds = min(max((notes.duration for notes in heard), default=0.0), ROLL_SECONDS)
    pitches = (
        min((int(notes.pitch.min()) for notes in heard), default=60),
        max((int(notes.pitch.max()) for notes in heard), default=60),
    )
    titles = {step: f"Step {step:,}" + (", the best weights" if step == best else "") for step in chosen}
    return [sample_figure(titles[step], found[step], music[step], seconds, pitches) for step in chosen]


def sample_notes(path: Path) -> Notes | str:
    """The notes of a sample, or in words why there are none to show."""
    if path.suffix == ".npy":
        return "Token ids only: the machine that trained has no MIDI library."
    try:
        return read_notes(path)
    except ModuleNotFoundError as error:
        return f"Not drawn: {error.name} is not installed."
    except UserError as error:
        return f"Not drawn: {str(error).removeprefix(f'{path}: ')}."


def sample_figure(title: str, path: Path, notes: Notes | str, seconds: float, pitches: tuple[int, int]) -> str:
    if isinstance(notes, str):
        return figure(title, path.name, remark_element(notes))
    takeaway = f"{len(notes):,} notes in {notes.duration:.1f} s"
    seen = notes.onset < seconds
    shown = Notes(notes.onset[seen], notes.offset[seen], notes.pitch[seen], notes.velocity[seen])
    roll = charts.piano_roll(shown, seconds, pitches, f"piano roll of {path.name}: {takeaway}")
    data, link = path.read_bytes(), text(path.name)
    if len(data) <= EMBEDDED_BYTES:
        href = f"data:audio/midi;base64,{base64.b64encode(data).decode()}"
        link = element("a", text(path.name), href=href, download=path.name)
    cut = "" if notes.duration <= seconds and len(notes) <= charts.MAX_NOTES else ", its beginning"
    return figure(title, takeaway + cut, roll, element("p", link, class_="remark"))


# Configuration


def configuration(r: RunRecord) -> list[str]:
    """Two tables, of the model and of the training; what differs from the defaults stands out."""
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
    words = ["dsmr-mlx", "train", "--data", "CORPUS", "--out", "RUN", *train_arguments(r.config)]
    command = re.sub(r" (?=--(?!data|out))", " \\\n  ", shlex.join(words))
    corpus = f"the corpus with the fingerprint {r.corpus}" if r.corpus else "the corpus that the run was trained on"
    remarks = [f"CORPUS is {corpus}, RUN a new folder."]
    if r.config.max_minutes is not None:
        remarks.append(
            "The learning rate follows the clock (max_minutes): a run of the same speed comes close, not more."
        )
    return element("div", element("pre", element("code", text(command))), *map(remark_element, remarks), class_="wide")


def footer(r: RunRecord) -> str:
    written = datetime.fromtimestamp((r.folder / METRICS).stat().st_mtime, UTC)
    words = f"Made by dsmr-mlx {__version__} from what {METRICS} held on {written:%Y-%m-%d at %H:%M} UTC."
    return element("footer", text(words))
