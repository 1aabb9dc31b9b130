"""Sessions of live playing."""

import contextlib
from collections.abc import Sequence
from typing import Any

from dsmr_mlx.console.base import err, out, table


def show_ports(inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """The MIDI ports of this computer."""
    for kind, names in (("input", inputs), ("output", outputs)):
        for name in names:
            out.print(f"{kind:<7} {name}")
        if not names:
            out.print(f"{kind:<7} none")


def say(text: str) -> None:
    """Print, if anybody is there to read it: no music ends because a terminal is gone."""
    with contextlib.suppress(OSError):
        print(text, file=err.file, flush=True)  # rich would exit


def show_live(options: Any, sources: Sequence[str], output: str | None) -> None:
    """Who plays with whom, when a session begins."""
    when = {"pause": f"{options.pause:g} s after your last key", "pedal": "at the pedal", "enter": "at Enter"}
    take_over = when.get(options.take_over, f"at {options.take_over}")
    ports = f"from {', '.join(sources)} to {output or 'the file'}"
    say(f"{ports}; the model takes over {take_over}; Ctrl-C ends the session")


def show_turn(turn: Any) -> None:
    """A turn of a session that has ended."""
    who = {"human": "you", "model": "model"}[turn.voice]
    slow = f"; too slow, fell behind {'once' if turn.behind == 1 else f'{turn.behind} times'}" if turn.behind else ""
    say(f"{who:<6} {turn.notes:>4} notes {turn.seconds:>6.1f} s  {turn.reason}{slow}")


def show_live_report(statistics: Any, reason: str, files: Sequence[Any]) -> None:
    """What a session took."""
    s = statistics
    times = table("milliseconds", "n", "median", "95 %", "largest")
    for name, measured in (
        ("take-over to first note, computing", s.first_computed),
        ("take-over to first note, sent", s.first_sent),
        ("notes behind their time", s.lateness),
        ("reading, for each token", s.reading),
    ):
        of = measured.spread
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
