"""The messages of clients, checked. `docs/studio-protocol.md` describes them."""

import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dsmr_mlx.common.errors import UserError, did_you_mean, shortened
from dsmr_mlx.common.parsing import parse_json
from dsmr_mlx.studio.takes import MAX_NAME

MAX_BYTES = 8 << 20  # of a message
MAX_ID, MAX_SEED = 2**53 - 1, 2**32 - 1  # what JavaScript can count to; what shows well
MAX_SECONDS = 3600.0  # of new music
MAX_TIME = 1e6  # seconds, of a place in the music
MAX_COUNT = 16  # takes side by side
MAX_DATA = MAX_BYTES  # characters of a file in base64
MAX_FILE_NAME = 100  # characters
MAX_NAME_BYTES = 200  # of them in UTF-8: files may have 255, also those beside a session

Check = Callable[[Any], Any]  # returns the value, raises ValueError(what is expected)


def number(low: float, high: float) -> Check:
    """A check for numbers from `low` to `high`."""

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"a number from {low:g} to {high:g}")  # NaN too
        return float(value)

    return check


def integer(low: int, high: int) -> Check:
    """A check for integers from `low` to `high`; 3.0 is one."""

    def check(value: Any) -> int:
        whole = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not whole or value != int(value) or not low <= value <= high:
            raise ValueError(f"an integer from {low} to {high:,}")
        return int(value)

    return check


def pair(low: int, high: int) -> Check:
    """A check for [lower, upper], two integers from `low` to `high`."""
    each = integer(low, high)

    def check(value: Any) -> list[int]:
        expected = f"[lower, upper], integers from {low} to {high}"
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError(expected)
        try:
            lower, upper = map(each, value)
        except ValueError:
            raise ValueError(expected) from None
        if lower > upper:
            raise ValueError(expected)
        return [lower, upper]

    return check


def text(most: int, least: int = 0) -> Check:
    """A check for text without control characters."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or not least <= len(value) <= most:
            raise ValueError(f"a text of {least} to {most:,} characters")
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
            raise ValueError("a text without control characters")
        return unicodedata.normalize("NFC", value)

    return check


def boolean(value: Any) -> bool:
    """Check for true or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def file_name(value: Any) -> str:
    """Check for the name of a session: part of a file's name, never a path."""
    name = text(MAX_FILE_NAME, 1)(value).strip()
    if not name or name.startswith(".") or set(name) & set('/\\:*?"<>|') or name.endswith("."):
        raise ValueError('a name without / \\ : * ? " < > | and no dot at its beginning or end')
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"a name of at most {MAX_NAME_BYTES} bytes in UTF-8")
    return name


def data(value: Any) -> str:
    """Check for a long text."""
    if not isinstance(value, str) or len(value) > MAX_DATA:
        raise ValueError(f"a text of at most {MAX_DATA:,} characters")
    return value


@dataclass(frozen=True)
class Nullable:
    """A field that may be null or left out; it is `default` then."""

    check: Check
    default: Any = None


SETTINGS: dict[str, Check] = {
    "model": text(1000, 1),
    "temperature": number(0.1, 2),
    "top_p": number(0.01, 1),
    "min_p": number(0, 0.99),
    "density": number(0.5, 40),
    "dynamics": number(-10, 10),
    "tempo": number(-3, 3),
    "pitch_temperature": number(0.1, 2),
    "tonality": number(-3, 3),
    "pitch_range": pair(0, 127),
    "key": text(40, 1),
    "velocity_range": pair(1, 127),
    "max_polyphony": integer(1, 88),
    "max_note_seconds": number(0.05, 60),
    "max_silence_seconds": number(0.05, 60),
    "end_within": number(0.5, 60),
    "best_of": integer(0, 32),
    "seed": integer(0, MAX_SEED),
}


def settings(value: Any) -> dict[str, Any]:
    """Check for settings, each of which may be null."""
    if not isinstance(value, dict):
        raise ValueError("an object")
    checked = {}
    for name, setting in value.items():
        if name not in SETTINGS:
            raise ValueError(f"known settings, found {shortened(name)}{did_you_mean(name, SETTINGS)}")
        try:
            checked[name] = None if setting is None else SETTINGS[name](setting)
        except ValueError as error:
            raise ValueError(f"{name} to be null or {error}, found {shortened(setting)}") from None
    return checked


TAKE, TIME, PITCH = integer(1, MAX_ID), number(0, MAX_TIME), integer(0, 127)
MAKING = {"count": Nullable(integer(1, MAX_COUNT), 1), "seed": Nullable(integer(0, MAX_SEED))}
LENGTH = number(0.1, MAX_SECONDS)

# type of a message of a client → its fields
CLIENT: dict[str, dict[str, Check | Nullable]] = {
    "continue": {"take": Nullable(TAKE), "at": Nullable(TIME), "seconds": Nullable(LENGTH), **MAKING},
    "replace": {"take": TAKE, "start": TIME, "end": TIME, **MAKING},
    "insert": {"take": TAKE, "at": TIME, "seconds": LENGTH, **MAKING},
    "lead": {"take": TAKE, "at": Nullable(TIME), "to": TAKE, "seconds": LENGTH, **MAKING},
    "stop": {},
    "import": {"name": text(MAX_NAME), "data": data},
    "listen": {"on": boolean},
    "key": {"pitch": PITCH, "velocity": PITCH},
    "pedal": {"value": PITCH},
    "duet": {
        "on": boolean,
        "take": Nullable(TAKE),
        "pause": Nullable(number(0.1, 10), 1.0),
        "max_turn": Nullable(number(0.5, 600)),
    },
    "turn": {},
    "keep": {"take": TAKE, "kept": Nullable(boolean)},
    "rename": {"take": TAKE, "name": text(MAX_NAME, 1)},
    "select": {"take": Nullable(TAKE)},
    "undo": {},
    "redo": {},
    "settings": {"settings": settings, "at": Nullable(TIME)},
    "midi": {"input": Nullable(text(MAX_NAME, 1)), "output": Nullable(text(MAX_NAME, 1))},
    "play": {"take": TAKE, "at": Nullable(TIME, 0.0)},
    "stop_playing": {},
    "sessions": {},
    "new": {"name": file_name},
    "open": {"name": file_name},
    "save_as": {"name": file_name},
    "ping": {},
}


@dataclass(frozen=True)
class Message:
    """A checked message; request: the client's number for it, or None."""

    type: str
    fields: dict[str, Any] = field(default_factory=dict)
    request: int | None = None


class InvalidMessage(UserError):
    """Raised for a message that is not one of `CLIENT`; request: its number, if it has a valid one."""

    def __init__(self, message: str, request: int | None = None):
        super().__init__(message)
        self.request = request


def parse(content: str | bytes) -> Message:
    """Return the message that a client has sent. Raises `InvalidMessage`."""
    if len(content) > MAX_BYTES:
        raise InvalidMessage(f"a message of {len(content):,} bytes, expected at most {MAX_BYTES:,}")
    try:
        values = parse_json(content)
    except ValueError as error:
        raise InvalidMessage(f"not valid JSON ({shortened(str(error))})") from None
    if not isinstance(values, dict):
        raise InvalidMessage("a message that is no JSON object, expected one with a `type`")
    return check(values)


def check(values: dict[str, Any]) -> Message:
    """Return a message given as an object. Raises `InvalidMessage`."""
    request = values.get("request")
    if request is not None:
        try:
            request = integer(-MAX_ID, MAX_ID)(request)
        except ValueError as error:
            raise InvalidMessage(f"`request` {shortened(values['request'])}: expected {error}") from None
    kind = values.get("type")
    if not isinstance(kind, str) or kind not in CLIENT:
        near = did_you_mean(kind[:40], CLIENT) if isinstance(kind, str) else ""
        raise InvalidMessage(f"`type` {shortened(kind)}: no such message{near}", request)
    spec = CLIENT[kind]
    if unknown := sorted(values.keys() - spec.keys() - {"type", "request"}):
        raise InvalidMessage(f"`{kind}`: unknown field {shortened(unknown[0])}", request)
    fields = {}
    for name, rule in spec.items():
        value = values.get(name)
        try:
            if isinstance(rule, Nullable):
                fields[name] = rule.default if value is None else rule.check(value)
            else:
                fields[name] = rule(value)
        except ValueError as error:
            raise InvalidMessage(f"`{name}` {shortened(value)}: expected {error}", request) from None
    return Message(kind, fields, request)
