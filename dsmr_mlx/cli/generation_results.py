"""The tables that `generate` prints: files, scores of candidates, speed; and piano rolls."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsmr_mlx.cli.console import out, table
from dsmr_mlx.cli.show import show_pianoroll
from dsmr_mlx.common.formatting import format_bytes

if TYPE_CHECKING:
    from dsmr_mlx.generation.filling import Filled, FillReport
    from dsmr_mlx.generation.generate import GenerationReport
    from dsmr_mlx.generation.joins import JoinScore
    from dsmr_mlx.generation.ranking import Score
    from dsmr_mlx.generation.recording import Recording
    from dsmr_mlx.music.loops import Loop

AROUND = 5.0  # seconds shown before the first passage and after the last


def show_generation(report: "GenerationReport", recordings: "Sequence[Recording]") -> None:
    """Show a row for each file, and the speed."""
    files = table("file", "notes", "seconds", "notes/s", "pitches", "tokens")
    for lane in recordings:
        notes, seconds = lane.notes, lane.seconds
        pitches = f"{lane.lowest}–{lane.highest}" if notes else "–"
        rate = notes / seconds if seconds else 0.0
        files.add_row(str(lane.path), f"{notes:,}", f"{seconds:.1f}", f"{rate:.1f}", pitches, f"{lane.tokens:,}")
    out.print(files)
    show_speed(report)


def show_speed(report: "GenerationReport | FillReport") -> None:
    """Show how long reading and playing took."""
    prompt = (
        f"prompt of {report.prompt_tokens:,} tokens in {report.prefill_seconds:.2f} s; "
        if report.prompt_tokens > 1
        else ""
    )
    out.print(
        f"{prompt}{report.tokens:,} tokens in {report.decode_seconds:.2f} s, {report.tokens_per_second:,.0f} tokens/s; "
        f"recurrent state {format_bytes(report.state_bytes)}"
    )


def show_scores(scores: "Sequence[Score]", kept: dict[int, Path]) -> None:
    """Show the score of each candidate, and the files of those that were kept (index → path)."""
    candidates = table("candidate", "nats/note", "notes", "loop", "file")
    candidates.columns[-1].justify = "left"
    for i, score in enumerate(scores):
        row = f"{score.nats_per_note:.3f}", f"{score.notes:,}", loop_name(score.loop, score.loops)
        candidates.add_row(str(i + 1), *row, str(kept.get(i, "")))
    out.print(candidates)
    out.print()


def loop_name(loop: "Loop | None", last: bool) -> str:
    """Format a loop; last: whether it puts a candidate last."""
    return "–" if loop is None else f"{loop.copies} × {loop.length} events{', ranked last' * last}"


def show_passages(filled: "Sequence[Filled]", paths: Sequence[Path], report: "FillReport") -> None:
    """Show a row for each passage of each file, and the speed."""
    rows = table("file", "passage", "notes", "notes/s", "pitches", "tokens")
    for version, path in zip(filled, paths, strict=True):
        for passage in version.passages:
            n, pitch = len(passage.notes), passage.notes.pitch
            pitches = f"{pitch.min()}–{pitch.max()}" if n else "–"
            span = f"{passage.start:.1f}–{passage.end:.1f} s"
            rate = f"{n / (passage.end - passage.start):.1f}"
            rows.add_row(str(path), span, f"{n:,}", rate, pitches, f"{passage.tokens:,}")
    out.print(rows)
    show_speed(report)


def show_joins(scores: "Sequence[Sequence[JoinScore]]", kept: dict[int, Path]) -> None:
    """Show how the passages of each candidate join, a row for each, and the files of those that were kept."""
    rows = table("candidate", "passage", "what follows", "sum", "notes", "loop", "file")
    rows.columns[-1].justify = "left"
    for i, candidate in enumerate(scores):
        for place, score in enumerate(candidate):
            following = f"{score.following.nats_per_note:.3f}" if score.following else "–"
            values = f"{score.passage.nats_per_note:.3f}", following, f"{score.nats_per_note:.3f}"
            loop = loop_name(score.passage.loop, score.passage.loops)
            number, file = ("", "") if place else (str(i + 1), str(kept.get(i, "")))
            rows.add_row(number, *values, f"{score.passage.notes:,}", loop, file)
    out.print(rows)
    out.print("nats per note of the passage and of what follows it: lower is likelier; what was shown does not count")
    out.print()


def show_filled_rolls(a: argparse.Namespace, filled: "Sequence[Filled]", paths: Sequence[Path]) -> None:
    """Show the passages and some seconds around them as piano rolls, with --show; the passages are marked."""
    from dsmr_mlx.music.summary import excerpt

    for version, path in zip(filled, paths, strict=True) if a.show else ():
        marks = [(passage.start, passage.end) for passage in version.passages]
        start = max(marks[0][0] - AROUND, 0.0)
        around = excerpt(version.notes, start, marks[-1][1] + AROUND - start)
        show_pianoroll(around, title=f"{path}, from {start:.1f} s", start=start, marks=marks)


def show_rolls(a: argparse.Namespace, paths: Sequence[Path]) -> None:
    """Show the piano rolls of files, with --show."""
    from dsmr_mlx.music.midi import read_notes

    for path in paths if a.show else ():
        show_pianoroll(read_notes(path, allow_empty=True), title=str(path))
