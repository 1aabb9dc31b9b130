"""`dsmr-mlx tokenize`: what a tokenizer makes of a MIDI file."""

import argparse
import json

from dsmr_mlx.commands.common import add_command, add_tokenizer_options
from dsmr_mlx.errors import UserError

FIRST = 24  # tokens shown


def add(commands) -> None:
    p = add_command(
        commands,
        "tokenize",
        run,
        "show the tokens of a MIDI file, how many, and what is lost",
        "dsmr-mlx tokenize song.mid --tokenizer miditok:REMI\n  dsmr-mlx tokenize song.mid --tokenizer corpus --json",
    )
    p.add_argument("file", metavar="FILE.mid", help="a MIDI file")
    add_tokenizer_options(p)
    p.add_argument("--first", type=int, default=FIRST, metavar="N", help=f"tokens to show (default {FIRST})")
    p.add_argument("--json", action="store_true", help="everything as JSON on standard output, all tokens too")


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx import console
    from dsmr_mlx.midi import read_notes
    from dsmr_mlx.token_report import report_tokens
    from dsmr_mlx.tokenizer import make_tokenizer

    if a.first < 0:
        raise UserError(f"--first {a.first}: expected 0 or more")
    tokenizer = make_tokenizer(a.tokenizer, a.tokenizer_config, a.programs)
    report = report_tokens(tokenizer, read_notes(a.file, programs=tokenizer.programs))
    if a.json:
        print(json.dumps({"file": a.file, **report.to_dict()}, indent=2))
    else:
        console.show_tokens(report, a.file, a.first)
