"""What a check of the doctor finds."""

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

MIDI_PACKAGES = {"mido", "miditok", "sentencepiece", "symusic"}  # training on a prepared corpus works without


class Status(StrEnum):
    """How it stands: `NOTE` is a fact or an advice, `ABSENT` an optional part that is missing."""

    OK = "ok"
    NOTE = "note"
    ABSENT = "absent"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """The result of a check: one line for people, `values` for programs, and what to do if something is wrong."""

    name: str
    status: Status
    text: str
    values: dict[str, Any] = field(default_factory=dict)
    advice: str = ""

    def named(self, name: str) -> Self:
        """The same finding under a name."""
        return dataclasses.replace(self, name=name)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; advice only if there is one."""
        stored = dataclasses.asdict(self) | {"status": self.status.value}
        return {name: value for name, value in stored.items() if value not in ("", {})}


def judged(right: bool, text: str, values: dict[str, Any], advice: str) -> Finding:
    """Return a finding that is ok, or wrong with an advice."""
    return Finding("", Status.OK if right else Status.WRONG, text, values, "" if right else advice)
