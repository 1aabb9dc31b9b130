"""Corpora and tokens."""

from typing import Any

from dsmr_mlx.console.base import err, out, table


def show_prepare_report(report: Any) -> None:
    splits = ", ".join(f"{n} {split}" for split, n in report.pieces.items())
    if unsaid := report.notes - report.notes_said:
        err.print(f"warning: {unsaid:,} of {report.notes:,} notes cannot be said by {report.tokenizer}")
    if report.out_of_time:
        pieces = f"{report.out_of_time:,} of {sum(report.pieces.values()):,} pieces"
        err.print(f"warning: {pieces} last longer or shorter by more than 1 s as {report.tokenizer} says them")
    if report.up_to_date:
        out.print(f"{report.out} is up to date: {splits}, {report.tokens:,} tokens")
        return
    for skipped in report.skipped:
        err.print(f"skipped {skipped.source}: {skipped.reason}")
    out.print(f"{report.out}: {splits}")
    if report.events > report.tokens:
        out.print(f"{report.events:,} events in {report.tokens:,} subwords, {report.events / report.tokens:.2f} each")
    out.print(
        f"{report.tokens:,} tokens, {report.notes:,} notes, {_long(report.seconds)} of music; "
        f"{len(report.skipped)} files skipped; {report.wall_seconds:.1f} s"
    )


def _long(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


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
