"""Piano rolls as pictures, drawn by matplotlib.

A long piece is broken into systems, one below the other, like a score. Times are seconds; `start` is the time at the
left edge, for notes that are an excerpt of something longer.
"""

from typing import Any

import numpy as np

from dsmr_mlx.common.formatting import printable, round_times
from dsmr_mlx.common.plotting import LIGHT, picture
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.summary import break_into_systems, pitch_name, summarize

SYSTEMS = 8  # at most; they fill a page
MAX_SYSTEMS = 170  # of any picture: matplotlib before 3.10 draws at most 2¹⁶ pixels in height
PREFERRED_SECONDS, MIN_SECONDS = 20.0, 5.0  # of a system
WIDTH, LEFT, RIGHT = 9.8, 0.34, 0.26  # inches: of the picture, and its margins
HEAD, MARGIN, TIMES = 0.56, 0.12, 0.3  # inches: above the systems, below them, and below each for its times
SEMITONE, MIN_HEIGHT, MAX_HEIGHT = 0.024, 0.9, 2.0  # inches: of a semitone, and of a system
TICK_INCHES = 0.7  # at least, between two times
MAX_TITLE = 90  # characters
MIN_SEMITONES = 26
SHADES = 8  # of a note, by its velocity
GAP, MIN_LENGTH = 0.006, 0.008  # inches: between two notes of one pitch, and of the shortest note


def pitch_range(*pieces: Notes) -> tuple[float, float]:
    """Return the range of a pitch axis: the pitches of the pieces and a little more, at least `MIN_SEMITONES`."""
    pitches = np.concatenate([notes.pitch for notes in pieces] or [[]])
    lowest, highest = (int(pitches.min()), int(pitches.max())) if len(pitches) else (60, 60)
    middle, span = (lowest + highest) / 2, max(highest - lowest + 4, MIN_SEMITONES)
    return middle - span / 2, middle + span / 2


def roll_picture(notes: Notes, kind: str, *, title: str = "", start: float = 0.0, systems: int = SYSTEMS) -> bytes:
    """Draw a piece as a file: title, summary, piano roll in at most `systems` and `MAX_SYSTEMS` systems. Deterministic.

    kind: "png" or "svg". Raises `UserError` if `systems` is below 1 or matplotlib is missing.
    """
    n, seconds = break_into_systems(notes.duration, PREFERRED_SECONDS, MIN_SECONDS, min(systems, MAX_SYSTEMS))
    pitches, summary = pitch_range(notes), str(summarize(notes))
    tall = min(max(SEMITONE * (pitches[1] - pitches[0]), MIN_HEIGHT), MAX_HEIGHT)
    height = HEAD + n * (tall + TIMES) + MARGIN
    title = printable(title)

    def draw(figure: Any) -> None:
        shown = title if len(title) <= MAX_TITLE else f"{title[: MAX_TITLE - 1]}…"
        figure.text(LEFT / WIDTH, 1 - 0.24 / height, shown, size=11.5, weight="bold")
        figure.text(LEFT / WIDTH, 1 - 0.44 / height, summary, color=LIGHT["muted"])
        for i in range(n):
            bottom = 1 - (HEAD + i * (tall + TIMES) + tall) / height
            panel = figure.add_axes((LEFT / WIDTH, bottom, (WIDTH - LEFT - RIGHT) / WIDTH, tall / height))
            draw_system(panel, notes, start, (start + i * seconds, start + (i + 1) * seconds), pitches)

    return picture(draw, (WIDTH, height), kind, f"`{kind}`", f"{title or 'Piano roll'}: {summary}")


def draw_system(
    panel: Any, notes: Notes, start: float, times: tuple[float, float], pitches: tuple[float, float]
) -> None:
    """Draw the notes that sound between two times on matplotlib axes; `start` is the time of their 0 s. Louder notes
    are darker.
    """
    (low, high), (lowest, highest) = times, pitches
    width, height = panel.get_position().size * panel.figure.get_size_inches()
    panel.set(xlim=times, ylim=pitches)
    ticks = round_times(low, high, width / TICK_INCHES)
    panel.set_xticks([at for at, _ in ticks], [name for _, name in ticks])
    octaves = [c for c in range(0, 128, 12) if lowest < c < highest]
    panel.set_yticks(octaves, [pitch_name(c) for c in octaves])
    inch = (high - low) / width
    onset, offset = np.maximum(notes.onset + start, low), np.minimum(notes.offset + start, high)
    end = np.minimum(np.maximum(offset - GAP * inch, onset + MIN_LENGTH * inch), high)
    seen = (notes.onset + start < high) & (notes.offset + start > low)
    shade = notes.velocity.astype(int) * SHADES // 128
    look = {"color": LIGHT["train"], "linewidth": 72 * max(0.9 * height / (highest - lowest), 0.012)}  # in points
    for level in np.unique(shade[seen]):
        i = np.flatnonzero(seen & (shade == level))
        # One path for all notes of a shade: a NaN after each note ends its line.
        x = np.stack([onset[i], end[i], np.full(len(i), np.nan)], axis=1)
        y = np.repeat(notes.pitch[i].astype(float), 3)
        alpha = 0.25 + 0.75 * level / (SHADES - 1)
        panel.plot(x.ravel(), y, alpha=alpha, solid_capstyle="butt", **look)
