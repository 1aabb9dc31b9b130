"""Faults that were repaired or dropped while reading a damaged MIDI file, counted by kind."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum


class Repair(StrEnum):
    """A kind of fault that does not prevent reading."""

    OUTSIDE = "bytes outside of chunks"
    FORMAT = "headers of an unknown format"
    TRACK_COUNT = "tracks more or fewer than the header says"
    TRACK_LENGTH = "tracks of another length than declared"
    NO_END = "tracks without an End of Track"
    EARLY_END = "messages after an End of Track"
    UNREADABLE_END = "unreadable bytes after an End of Track"
    CUT_MESSAGE = "messages cut off by the end of their track"
    LONG_WAIT = "delta times of more than four bytes"
    DATA_BYTE = "data bytes above 127"
    RUNNING_STATUS = "running status after SysEx, meta and system messages"
    SYSTEM_MESSAGE = "system messages that a file cannot have"
    ESCAPED = "channel messages in escapes (not read)"
    TEMPO = "tempo events of 0 or without a value (not used)"
    PATTERNS = "independent patterns (format 2) read as simultaneous"
    NO_NOTE_OFF = "notes without an end"


Repairs = Counter[Repair]


class RepairWarning(UserWarning):
    """A MIDI file has faults; the message names the file and counts what was repaired or dropped."""


def describe_repairs(repairs: Mapping[str, int]) -> str:
    """Format repairs as `notes without an end: 3; data bytes above 127: 1`; empty without repairs."""
    return "; ".join(f"{name}: {count}" for name, count in repairs.items())


def repair_remark(repairs: Mapping[str, int]) -> str:
    """Return `read with repairs (notes without an end: 3)`; empty without repairs."""
    return f"read with repairs ({describe_repairs(repairs)})" if repairs else ""


def parse_repairs(text: str) -> Repairs:
    """Parse the text of `describe_repairs`. Invalid parts are ignored."""
    found = Repairs()
    for part in text.split("; "):
        name, _, count = part.rpartition(": ")
        if name in set(Repair) and re.fullmatch("[0-9]{1,15}", count):
            found[Repair(name)] = int(count)
    return found


def warn_of_repairs(name: str | os.PathLike | None, repairs: Mapping[str, int]) -> None:
    """Warn the caller of the caller with `RepairWarning` if a file was repaired. name: None if it has none."""
    if remark := repair_remark(repairs):
        warnings.warn(remark if name is None else f"{name}: {remark}", RepairWarning, stacklevel=3)
