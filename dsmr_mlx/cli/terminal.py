"""Text for terminals: one-line messages, in the encoding of the terminal."""

import codecs
from typing import TextIO

from dsmr_mlx.common.formatting import one_line

LENIENT = "dsmr_mlx.lenient"  # name of the handler of characters that an encoding lacks
# Characters of the program's own texts, for terminals without them.
SUBSTITUTES = {
    **dict(zip("█▀▄▌▐│─╌└┴┬┼", '#"_|||--++++', strict=True)),
    **{"–": "-", "−": "-", "·": ".", "×": "x", "≥": ">=", "≤": "<=", "→": "->", "…": "...", "±": "+-", "²": "2"},
    **{"\u202f": " ", "\u00a0": " ", "′": "'", "Σ": "sum", "♯": "#", "♭": "b"},
    **dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True)),
}


def one_message(message: str) -> str:
    """Return a message as one line: spaces for line ends, escapes for control characters."""
    return one_line(" ".join(message.split()))


def encode_leniently(*streams: TextIO | None) -> None:
    """Make streams replace characters that their encoding lacks, as Latin-1 lacks piano-roll bars, without failing."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=LENIENT)


def _substitute(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    parts = (SUBSTITUTES.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing)
    return "".join(parts), error.end


codecs.register_error(LENIENT, _substitute)
