"""Numbers, times and sizes as text."""

import math
import unicodedata

NARROW_SPACE = "\u202f"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
ROUND_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
BYTE_UNITS = ((1, "B", 0), (2**10, "KiB", 1), (2**20, "MiB", 1), (2**30, "GiB", 2))  # with their decimals


def format_number(value: float) -> str:
    """Return a number with three digits, such as 0.018, 912, 2.5 M or −3.2 × 10⁻⁵; – if it is not finite."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    sign, digits = "−" if value < 0 else "", f"{abs(value):.2e}"
    rounded = float(digits)  # to three digits, which may reach the next unit
    if not 1e-3 <= rounded < 1e15:
        mantissa, _, exponent = digits.partition("e")
        power = str(int(exponent)).translate(SUPERSCRIPTS)
        mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{sign}10{power}" if mantissa == "1" else f"{sign}{mantissa} × 10{power}"
    for unit, prefix in PREFIXES:
        if rounded >= unit:
            return f"{sign}{rounded / unit:.3g}{NARROW_SPACE}{prefix}"
    return f"{sign}{rounded:.3g}"


def format_time(seconds: float, decimals: int = 0) -> str:
    """Return a time as 1:02, from an hour on as 1:02:03, with one decimal as 0:01.5; – if it is not finite."""
    if not math.isfinite(seconds):
        return "–"
    units = round(seconds * 10**decimals)
    sign = "−" if units < 0 else ""
    whole, part = divmod(abs(units), 10**decimals)
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{part:0{decimals}}" if decimals else ""
    return f"{sign}{hours}:{minutes:02}:{whole:02}{fraction}" if hours else f"{sign}{minutes}:{whole:02}{fraction}"


def round_times(low: float, high: float, max_times: float) -> tuple[tuple[float, str], ...]:
    """Return at most about `max_times` round times in [low, high] seconds, with their texts."""
    fine = (step for step in ROUND_SECONDS if (high - low) / step < max_times)
    step = next(fine, ROUND_SECONDS[-1])
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple((i * step, format_time(i * step, 1 if step < 1 else 0)) for i in range(first, last + 1))


def format_bytes(n_bytes: float) -> str:
    """Return a size in B, KiB, MiB or GiB; – if it is not finite."""
    if not math.isfinite(n_bytes):
        return "–"
    for unit, name, decimals in BYTE_UNITS:
        shown = f"{n_bytes / unit:.{decimals}f} {name}"
        if abs(round(n_bytes / unit, decimals)) < 1024:
            break
    return shown.replace("-", "−")


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
