"""Piano rolls made of characters: two pitches in a line, one of `▀▄█` for each slice of time.

`text_systems` gives the cells with their velocities, for a display that has colours; `roll_text` plain text.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dsmr_mlx.common.formatting import clock
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.piano_roll import break_into_systems, clock_ticks
from dsmr_mlx.music.summary import pitch_name

MARGIN = 6  # characters left of the first cell: a pitch, a space, the axis
NARROWEST = 10  # columns, however narrow the display
SYSTEMS = 2
PREFERRED_SECONDS, SHORTEST_SECONDS = 0.1, 0.05  # of a column
FEWEST_PITCHES = 24
TICK_COLUMNS = 10  # one tick in so many columns at most
BLOCKS = " ▄▀█"  # by which of the two pitches sound: none, lower, upper, both
GUIDE = "·"  # in empty cells of a line with a C


@dataclass(frozen=True)
class TextSystem:
    """One system, R lines of C cells.

    velocity: (R, 2, C) uint8, the loudest note of the upper and the lower pitch of each cell, 0 for none; names: the
    pitch that each line is labelled with, or nothing; ruler, times: the lines below, with a margin like all.
    """

    velocity: np.ndarray
    names: tuple[str, ...]
    ruler: str
    times: str

    def blocks(self, row: int) -> str:
        """The C characters of a line."""
        upper, lower = self.velocity[row] > 0
        line = "".join(BLOCKS[i] for i in 2 * upper + lower)
        if not self.names[row]:
            return line
        return "".join(GUIDE if c == " " and i % 2 == 0 else c for i, c in enumerate(line))

    @staticmethod
    def margin(name: str) -> str:
        """What stands left of the cells of a line."""
        return f"{name:>{MARGIN - 2}} │"

    def lines(self) -> Iterator[str]:
        """The system as plain text."""
        for row, name in enumerate(self.names):
            yield f"{self.margin(name)}{self.blocks(row)}".rstrip()
        yield self.ruler
        yield self.times


def text_systems(notes: Notes, width: int = 80, systems: int = SYSTEMS, start: float = 0.0) -> list[TextSystem]:
    """The systems of a piece, at most so many, in `width` characters; none where there are no notes.

    A column is 0.05 s or more; `start` is what the clock shows at the left edge. Raises `UserError` for `systems`
    below 1.
    """
    columns = max(width - MARGIN, NARROWEST)
    preferred, shortest = PREFERRED_SECONDS * columns, SHORTEST_SECONDS * columns
    n, seconds = break_into_systems(notes.duration, preferred, shortest, systems)
    if not len(notes):
        return []
    step = seconds / columns
    highest, grid = velocity_grid(notes, step, n * columns)
    names = tuple(pitch_name(low) if low % 12 == 0 else "" for low in range(highest - 1, highest - len(grid), -2))
    result = []
    for i in range(n):
        used = min(columns, round(notes.duration / step + 0.499) - i * columns)
        cells = grid[:, i * columns : i * columns + max(used, NARROWEST)]
        ruler, times = time_axis(start + i * seconds, step, cells.shape[1], MARGIN + columns)
        result.append(TextSystem(cells.reshape(-1, 2, cells.shape[1]), names, ruler, times))
    return result


def velocity_grid(notes: Notes, step: float, columns: int) -> tuple[int, np.ndarray]:
    """The highest pitch shown, odd, and the loudest velocity (P, C) of each pitch, from there down, in each column."""
    lowest, highest = int(notes.pitch.min()), int(notes.pitch.max())
    spare = max(FEWEST_PITCHES - (highest - lowest + 1), 0)
    lowest = max(lowest - spare // 2, 0) // 2 * 2
    highest = max(highest, lowest + FEWEST_PITCHES - 1) | 1
    first = np.minimum((notes.onset / step + 1e-6).astype(int), columns - 1)
    last = np.clip(np.rint(notes.offset / step).astype(int), first + 1, columns)
    last = np.where(struck_again(notes.pitch, first, last), last - 1, last)
    grid = np.zeros((highest - lowest + 1, columns), np.uint8)
    for i in np.argsort(notes.velocity, kind="stable"):
        grid[highest - notes.pitch[i], first[i] : last[i]] = max(notes.velocity[i], 1)
    return highest, grid


def struck_again(pitch: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """(N,) whether a note of several columns is followed by one of its pitch without a gap, and looks like one note."""
    order = np.lexsort((first, pitch))
    same = (pitch[order][1:] == pitch[order][:-1]) & (first[order][1:] == last[order][:-1])
    result = np.zeros(len(pitch), bool)
    result[order[:-1]] = same & (last[order][:-1] - first[order][:-1] > 1)
    return result


def time_axis(start: float, step: float, columns: int, width: int) -> tuple[str, str]:
    """A ruler with ticks for columns of `step` seconds, and the line of times below it, both after a margin.

    A time that would reach beyond `width` is left out, or moved to the left where it is the only one.
    """
    ruler, times = [*" " * (MARGIN - 1), "└", *"─" * columns], ""
    for at, name in clock_ticks(start, start + step * columns, max(columns / TICK_COLUMNS, 2)):
        column = round((at - start) / step)
        if column < columns:
            ruler[MARGIN + column] = "┬"
            left = MARGIN + column if times else min(MARGIN + column, width - len(name))
            if left + len(name) <= width:
                times = f"{times:{left}}{name}"
    if not times:  # too short to have a round time in it
        ruler[MARGIN], times = "┬", f"{'':{MARGIN}}{clock(start, 1)}"
    return "".join(ruler), times


def roll_text(notes: Notes, *, width: int = 80, systems: int = SYSTEMS, start: float = 0.0) -> str:
    """A piano roll as plain text in `width` characters, broken into so many systems at most; no notes, no text.

    Raises `UserError` for `systems` below 1.
    """
    drawn = ("\n".join(system.lines()) for system in text_systems(notes, width, systems, start))
    return "\n\n".join(drawn)
