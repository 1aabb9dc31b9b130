"""What takes may hold: checked before it is written, and when it is read, because a file may come from someone else.

All checks raise `ValueError`, which says what was found and what is expected.
"""

from collections.abc import Container, Iterable, Sequence
from typing import Any

from dsmr_mlx.common.errors import shortened
from dsmr_mlx.studio.messages import MAX_SEED, MAX_TIME, PITCH, TAKE, TIME, Check, boolean, integer, number
from dsmr_mlx.studio.takes import KINDS, Take, ms


def instance(kind: type) -> Check:
    """A check for values of a type."""

    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError(f"a value of type {kind.__name__}")
        return value

    return check


def one_of(values: Sequence[str]) -> Check:
    """A check for some texts."""

    def check(value: Any) -> str:
        if value not in values:
            raise ValueError(f"one of {', '.join(values)}")
        return value

    return check


def nullable(check: Check) -> Check:
    """A check for what may be null."""
    return lambda value: None if value is None else check(value)


FIELDS: dict[str, Check] = {  # of a take
    "id": TAKE,
    "parent": nullable(TAKE),
    "kind": one_of(KINDS),
    "name": instance(str),
    "begin": TIME,
    "end": TIME,
    "after": nullable(number(-MAX_TIME, MAX_TIME)),
    "resume": nullable(TIME),
    "growing": boolean,
    "kept": nullable(boolean),
    "model": nullable(instance(str)),
    "seed": nullable(integer(0, MAX_SEED)),
    "settings": nullable(instance(dict)),
    "group": nullable(TAKE),
}
PEDAL_TIME = number(-MAX_TIME, MAX_TIME)


def checked_field(name: str, value: Any) -> Any:
    """Return a field of a take. Raises `KeyError` for an unknown one."""
    try:
        return FIELDS[name](value)
    except ValueError as error:
        raise ValueError(f"`{name}` {shortened(value)}: expected {error}") from None


def checked_fields(values: dict[str, Any], earlier: Container[int]) -> dict[str, Any]:
    """Return the fields of a take but its notes and pedal. earlier: ids of the takes that may be its parent."""
    checked = {name: checked_field(name, value) for name, value in values.items()}
    begin, resume, after = checked["begin"], checked["resume"], checked["after"]
    if checked["parent"] is not None and checked["parent"] not in earlier:
        raise ValueError(f"`parent` {checked['parent']}: expected an earlier take")
    if begin > checked["end"]:
        raise ValueError(f"`end` {checked['end']}: expected at least `begin`, {begin}")
    # The music around its own does not overlap: else it could double from each take to the next.
    if (resume is None) != (after is None) or (resume is not None and begin > min(resume, ms(resume + after))):
        raise ValueError(f"`resume` {resume}, `after` {after}: expected neither, or both, not before `begin`, {begin}")
    return checked


def check_notes(rows: Sequence[Any], voice: Sequence[Any] | None = None, first: int = 0) -> None:
    """Check own notes and their voices; first: index of the first of them."""
    for i, (onset, offset, pitch, velocity) in enumerate(rows, start=first):
        times = isinstance(onset, float | int) and isinstance(offset, float | int) and 0 <= onset < offset <= MAX_TIME
        whole = isinstance(pitch, int) and isinstance(velocity, int)
        if not (times and whole and 0 <= pitch < 128 and 1 <= velocity < 128):
            row = shortened([onset, offset, pitch, velocity])
            raise ValueError(f"note {i} {row}: expected [onset, offset, pitch, velocity] up to {MAX_TIME:g} s")
    if voice is not None and (len(voice) != len(rows) or not all(isinstance(each, int) for each in voice)):
        raise ValueError(f"voices {shortened([*voice])}: expected an integer for each of {len(rows)} notes")


def checked_pedal(time: Any, value: Any) -> tuple[float, int]:
    """Return a movement of the pedal."""
    try:
        return PEDAL_TIME(time), PITCH(value)
    except ValueError as error:
        raise ValueError(f"`pedal` {shortened([time, value])}: expected {error}") from None


def check_times(takes: Iterable[Take]) -> None:
    """Check that the music of all takes ends by `MAX_TIME`. Parents come first."""
    last = {}
    for take in takes:
        moved = 0.0 if take.parent is None or take.resume is None else last[take.parent] + take.after
        last[take.id] = max([take.begin, moved, *(row[1] for row in take.rows)])
        if not last[take.id] <= MAX_TIME:
            raise ValueError(f"music of {last[take.id]:g} s: expected at most {MAX_TIME:g}")


def check_take(take: Take, ancestors: Sequence[Take]) -> None:
    """Check a new take. ancestors: the parent last."""
    checked_fields(take.to_dict(), {each.id for each in ancestors})
    check_notes(take.rows, take.voice)
    for move in take.pedal:
        checked_pedal(*move)
    check_times([*ancestors, take])
