"""Numbers, times and sizes as text."""

import math
import unicodedata

NARROW_SPACE = "\u202f"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
ROUND_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_number(value: float) -> str:
    """Return a number with three digits, such as 0.018, 912, 2.5 M or 3.2 × 10⁻⁵; – if it is not finite."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    if not 1e-3 <= abs(value) < 1e15:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        power = str(int(exponent)).translate(SUPERSCRIPTS)
        mantissa = mantissa.rstrip("0").rstrip(".")
        return f"10{power}" if mantissa == "1" else f"{mantissa} × 10{power}"
    for unit, prefix in PREFIXES:
        if abs(value) >= 0.9995 * unit:  # from here on three digits round up to the unit
            return f"{value / unit:.3g}{NARROW_SPACE}{prefix}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def format_time(seconds: float, decimals: int = 0) -> str:
    """Return a time as 1:02, from an hour on as 1:02:03, with one decimal as 0:01.5."""
    units = round(seconds * 10**decimals)
    whole, part = divmod(units, 10**decimals)
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{part:0{decimals}}" if decimals else ""
    return f"{hours}:{minutes:02}:{whole:02}{fraction}" if hours else f"{minutes}:{whole:02}{fraction}"


def round_times(low: float, high: float, max_times: float) -> tuple[tuple[float, str], ...]:
    """Return at most about `max_times` round times in [low, high] seconds, with their texts."""
    fine = (step for step in ROUND_SECONDS if (high - low) / step < max_times)
    step = next(fine, ROUND_SECONDS[-1])
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple((i * step, format_time(i * step, 1 if step < 1 else 0)) for i in range(first, last + 1))


def format_bytes(n_bytes: float) -> str:
    """Return a size in B, KiB, MiB or GiB."""
    if n_bytes < 2**10:
        return f"{n_bytes:.0f} B"
    if n_bytes < 2**20:
        return f"{n_bytes / 2**10:.1f} KiB"
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def one_line(text: str) -> str:
    """Return a text as one line that is safe to print to a terminal.

    Control characters, line ends, invisible formatting such as text direction, and lone surrogates (from file names
    that are not UTF-8) become escapes. Messages quote names and values from untrusted files.
    """
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    unsafe = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return character.encode("unicode_escape").decode() if unsafe else character


def printable(line: str) -> str:
    """Return a text with unprintable and control characters replaced, so that a terminal or font can show it."""
    return "".join(c if c.isprintable() else "\ufffd" for c in line)
