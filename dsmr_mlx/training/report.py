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

import numpy as np

from dsmr_mlx import __version__
from dsmr_mlx.common import charts
from dsmr_mlx.common.charts import SCHEMES, STYLE, element, text
from dsmr_mlx.common.config import setting_text
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import check_output, write_output
from dsmr_mlx.common.formatting import compact, duration, size
from dsmr_mlx.model.config import Architecture
from dsmr_mlx.model.horizons import table
from dsmr_mlx.music.midi import read_notes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.piano_roll import MAX_DRAWN, piano_roll
from dsmr_mlx.training.config import LIMITS, TrainConfig
from dsmr_mlx.training.report_curves import (
    figure,
    fixed,
    gradient_figure,
    loss_figure,
    memory_figure,
    perplexity_figure,
    position_figure,
    rate_figure,
    remark_element,
    smoothing,
    throughput_figure,
    whole,
)
from dsmr_mlx.training.run_record import METRICS, RunRecord, number
from dsmr_mlx.training.settings import train_arguments

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
    if not own.parent.is_dir():
        raise UserError(f"{run}: no such folder, expected a training run")
    path = own if out is None else Path(out)
    check_output("--out", path, (".html", ".htm"), force or path.resolve() == own.resolve())
    write_output("--out", path, make_report(run))
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
        f"<title>{text(r.name)} – dsmr-mlx</title><style>{SCHEMES}{STYLE}</style>"
    )
    content = "\n".join(body)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{content}\n</main></body></html>\n'


def section(title: str, *content: str) -> str:
    return element("section", element("h2", text(title)), element("div", *content, class_="grid"))


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
    heads = {"perplexity": "perplexity", "nats_per_token": "nats/token", "nats_per_event": "nats/event"}
    heads |= {"nats_per_note": "nats/note", "nats_per_second": "nats/s"}
    keys = [key for key in heads if any(key in v for v in chosen)]
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
    head = ("step", "tokens", *(heads[key] for key in keys))
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
    roll = piano_roll(shown, seconds, pitches, f"piano roll of {path.name}: {takeaway}")
    data, link = path.read_bytes(), text(path.name)
    if len(data) <= EMBEDDED_BYTES:
        href = f"data:audio/midi;base64,{base64.b64encode(data).decode()}"
        link = element("a", text(path.name), href=href, download=path.name)
    cut = "" if notes.duration <= seconds and len(notes) <= MAX_DRAWN else ", its beginning"
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
