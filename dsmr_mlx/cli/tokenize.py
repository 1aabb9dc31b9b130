"""`dsmr-mlx tokenize`: show how a tokenizer encodes a MIDI file."""

import argparse
from typing import TYPE_CHECKING

from dsmr_mlx.cli.common import add_command, add_tokenizer_options, print_json
from dsmr_mlx.cli.console import out, table
from dsmr_mlx.common.errors import UserError

if TYPE_CHECKING:
    from dsmr_mlx.tokenizers.round_trip import TokenReport

SHOWN_TOKENS = 24


def add(commands) -> None:
    """Add the parser of the command."""
    p = add_command(
        commands,
        "tokenize",
        run,
        "dsmr-mlx tokenize song.mid --tokenizer miditok:REMI",
        "dsmr-mlx tokenize song.mid --tokenizer corpus --json",
    )
    p.add_argument("file", metavar="FILE.mid", help="a MIDI file")
    add_tokenizer_options(p)
    p.add_argument(
        "--first", type=int, default=SHOWN_TOKENS, metavar="N", help=f"tokens to show (default {SHOWN_TOKENS})"
    )
    p.add_argument("--json", action="store_true", help="print everything as JSON, with all tokens")


def run(a: argparse.Namespace) -> None:
    """Tokenize a MIDI file."""
    from dsmr_mlx.music.repairs import warn_of_repairs
    from dsmr_mlx.tokenizers.registry import make_tokenizer
    from dsmr_mlx.tokenizers.round_trip import report_tokens

    if a.first < 0:
        raise UserError(f"--first {a.first}: expected 0 or more")
    tokenizer = make_tokenizer(a.tokenizer, a.tokenizer_config, a.programs)
    (notes, repairs), ids = tokenizer.read(a.file)
    warn_of_repairs(a.file, repairs)
    report = report_tokens(tokenizer, notes, ids)
    if a.json:
        print_json({"file": a.file, **report.to_dict()})
    else:
        show_tokens(report, a.file, a.first)


def show_tokens(report: "TokenReport", title: str, first: int) -> None:
    """Show counts, the losses of a round trip, and the names of the first tokens."""
    r = report.round_trip
    out.print(f"{title}: {report.notes:,} notes in {report.seconds:.1f} s")
    out.print(f"{report.label}: {report.vocab_size:,} ids, fingerprint {report.fingerprint[:12]}")
    counts = f"{len(report.ids):,} tokens, {report.per_note:.2f} per note, {report.per_second:.1f} per second"
    subwords = f", for {report.events:,} events, {report.compression:.2f} each" if report.compression > 1 else ""
    out.print(counts + subwords)
    out.print()
    types = table("type", "events" if subwords else "tokens", "share")
    for name, count in report.types.items():
        types.add_row(name, f"{count:,}", f"{100 * count / report.events:.1f} %")
    out.print(types)
    out.print()
    out.print(f"round trip: {r.matched:,} of {r.given:,} notes recovered, {r.returned - r.matched:,} added")
    if r.matched:
        errors = table("", "mean", "largest")
        for name, difference in (("onset", r.onset), ("offset", r.offset)):
            errors.add_row(name, f"{1000 * difference.mean:.1f} ms", f"{1000 * difference.max:.1f} ms")
        errors.add_row("velocity", f"{r.velocity.mean:.1f}", f"{r.velocity.max:.0f}")
        out.print(errors)
    if first:
        out.print()
        out.print(" ".join(report.names[:first]) + (" …" if len(report.names) > first else ""))
