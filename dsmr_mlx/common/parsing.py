"""Parse JSON, TOML and numbers of unknown origin within fixed limits."""

import json
import re
import tomllib
from typing import Any

MAX_NESTING = 64  # levels of lists and objects
MAX_DIGITS = 40  # of an integer; 128 bits, as in the state of a random generator, have 39
# A dotted TOML key with too many parts, bare or quoted.
LONG_KEY = re.compile(rf"""(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){{{MAX_NESTING}}}""")


def is_whole_number(text: str) -> bool:
    """Return whether a text is 1 to 9 of the digits 0 to 9: `int` takes other digits too, and refuses thousands."""
    return re.fullmatch("[0-9]{1,9}", text) is not None


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises `ValueError` if it is invalid, too deeply nested, or has a long integer.

    NaN and infinity are accepted, as in Python's JSON; callers check ranges.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"lists and objects nested more than {MAX_NESTING} deep") from None
    _check_nesting(value)
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Return the table of a TOML text. Raises `ValueError` as `parse_json` does."""
    if LONG_KEY.search(text):  # tomllib would take quadratic time
        raise ValueError(f"a key of more than {MAX_NESTING} parts")
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"lists and tables nested more than {MAX_NESTING} deep") from None
    _check_nesting(value)
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, expected at most {MAX_DIGITS}")
    return int(digits)


def _check_nesting(value: Any) -> None:
    """Raise `ValueError` for a value that is nested too deeply, or holds an integer that is too large."""
    level, depth = [value], 0
    while level:
        if depth > MAX_NESTING:
            raise ValueError(f"lists and objects nested more than {MAX_NESTING} deep")
        for item in level:
            if type(item) is int and abs(item) >= 10**MAX_DIGITS:
                raise ValueError(f"an integer of more than {MAX_DIGITS} digits")
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
        depth += 1
