"""What was generated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsmr_mlx.console.base import out, size, table


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
