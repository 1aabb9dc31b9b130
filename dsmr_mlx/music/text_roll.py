"""Piano rolls as text: two pitches in a line, one of `▀▄█` for each slice of time.

`text_systems` returns cells with velocities, for a display with colours; `roll_text` returns plain text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dsmr_mlx.common.formatting import format_time, round_times
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.summary import break_into_systems, pitch_name

MARGIN = 6  # characters left of the cells: pitch, space, axis
MIN_COLUMNS = 10
SYSTEMS = 2
PREFERRED_SECONDS, MIN_SECONDS = 0.1, 0.05  # of a column
MIN_PITCHES = 24
TICK_COLUMNS = 10  # per tick, at least
BLOCKS = " ▄▀█"  # neither pitch sounds, the lower, the upper, both
MARK, MARKED_TICK = "━", "┯"  # of the ruler below a marked passage
GUIDE = "·"  # in empty cells of a line with a C


@dataclass(frozen=True)
class TextSystem:
    """One system: R lines of C cells.

    velocity: `(R, 2, C)` uint8, loudest note of the upper and the lower pitch of each cell, 0 for none; names: R
    labels, a pitch or ""; ruler, times: the two lines below, margin included.
    """

    velocity: np.ndarray
    names: tuple[str, ...]
    ruler: str
    times: str

    def blocks(self, row: int) -> str:
        """Return the C characters of a line."""
        upper, lower = self.velocity[row] > 0
        line = "".join(BLOCKS[i] for i in 2 * upper + lower)
        if not self.names[row]:
            return line
        return "".join(GUIDE if c == " " and i % 2 == 0 else c for i, c in enumerate(line))

    @staticmethod
    def margin(name: str) -> str:
        """Return the margin of a line with its label."""
        return f"{name:>{MARGIN - 2}} │"

    def lines(self) -> Iterator[str]:
        """Yield the system as lines of plain text."""
        for row, name in enumerate(self.names):
            yield f"{self.margin(name)}{self.blocks(row)}".rstrip()
        yield self.ruler
        yield self.times


def text_systems(
    notes: Notes,
    width: int = 80,
    systems: int = SYSTEMS,
    start: float = 0.0,
    marks: Sequence[tuple[float, float]] = (),
) -> list[TextSystem]:
    """Break a piece into at most `systems` systems of `width` characters; none without notes.

    A column is at least 0.05 s. start: the time shown at the left edge; marks: passages whose ruler is drawn bold, from
    start to end on that clock. Raises `UserError` if `systems` is below 1.
    """
    columns = max(width - MARGIN, MIN_COLUMNS)
    n, seconds = break_into_systems(notes.duration, PREFERRED_SECONDS * columns, MIN_SECONDS * columns, systems)
    if not len(notes):
        return []
    step = seconds / columns
    highest, grid = velocity_grid(notes, step, n * columns)
    names = tuple(pitch_name(low) if low % 12 == 0 else "" for low in range(highest - 1, highest - len(grid), -2))
    result = []
    for i in range(n):
        used = min(columns, round(notes.duration / step + 0.499) - i * columns)
        cells = grid[:, i * columns : i * columns + max(used, MIN_COLUMNS)]
        ruler, times = time_axis(start + i * seconds, step, cells.shape[1], MARGIN + columns)
        ruler = marked(ruler, start + i * seconds, step, marks)
        result.append(TextSystem(cells.reshape(-1, 2, cells.shape[1]), names, ruler, times))
    return result


def velocity_grid(notes: Notes, step: float, columns: int) -> tuple[int, np.ndarray]:
    """Return the highest pitch shown, which is odd, and the loudest velocity `(P, C)` of each pitch from there down."""
    lowest, highest = int(notes.pitch.min()), int(notes.pitch.max())
    spare = max(MIN_PITCHES - (highest - lowest + 1), 0)
    lowest = max(lowest - spare // 2, 0) // 2 * 2
    highest = max(highest, lowest + MIN_PITCHES - 1) | 1
    first = np.minimum((notes.onset / step + 1e-6).astype(int), columns - 1)
    last = np.clip(np.rint(notes.offset / step).astype(int), first + 1, columns)
    last = np.where(repeated(notes.pitch, first, last), last - 1, last)
    grid = np.zeros((highest - lowest + 1, columns), np.uint8)
    for i in np.argsort(notes.velocity, kind="stable"):
        grid[highest - notes.pitch[i], first[i] : last[i]] = max(notes.velocity[i], 1)
    return highest, grid


def repeated(pitch: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return `(N,)` whether the next note of the same pitch follows without a gap, for notes of several columns."""
    order = np.lexsort((first, pitch))
    same = (pitch[order][1:] == pitch[order][:-1]) & (first[order][1:] == last[order][:-1])
    result = np.zeros(len(pitch), bool)
    result[order[:-1]] = same & (last[order][:-1] - first[order][:-1] > 1)
    return result


def time_axis(start: float, step: float, columns: int, width: int) -> tuple[str, str]:
    """Return a ruler for columns of `step` seconds and the line of times below it, margins included.

    A time that does not fit, into `width` or behind the one before, is left out, or moved left if it is the only one.
    """
    ruler, times = [*" " * (MARGIN - 1), "└", *"─" * columns], ""
    for at, name in round_times(start, start + step * columns, max(columns / TICK_COLUMNS, 2)):
        column = round((at - start) / step)
        if column < columns:
            ruler[MARGIN + column] = "┬"
            left = MARGIN + column if times else min(MARGIN + column, width - len(name))
            if left + len(name) <= width and (not times or len(times) < left):
                times = f"{times:{left}}{name}"
    if not times:  # too short to contain a round time
        ruler[MARGIN], times = "┬", f"{'':{MARGIN}}{format_time(start, 1)}"
    return "".join(ruler), times


def marked(ruler: str, start: float, step: float, marks: Sequence[tuple[float, float]]) -> str:
    """Return a ruler, margin included; columns whose middle is in a marked passage are bold."""
    bold = {"─": MARK, "┬": MARKED_TICK}
    middles = [start + (column - MARGIN + 0.5) * step for column in range(len(ruler))]
    inside = [any(begin <= middle < end for begin, end in marks) for middle in middles]
    return "".join(bold.get(c, c) if within else c for c, within in zip(ruler, inside, strict=True))


def roll_text(notes: Notes, *, width: int = 80, systems: int = SYSTEMS, start: float = 0.0) -> str:
    """Return a piano roll as plain text of `width` characters, in at most `systems` systems; "" without notes.

    Raises `UserError` if `systems` is below 1.
    """
    drawn = ("\n".join(system.lines()) for system in text_systems(notes, width, systems, start))
    return "\n\n".join(drawn)
