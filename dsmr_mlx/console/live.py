"""Sessions of live playing."""

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
