"""Piano rolls as text: each note is in its place, and every line fits."""

import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.music import notes_of, random_piece

from dsmr_mlx import UserError
from dsmr_mlx.cli import show as show_command
from dsmr_mlx.cli.show import VELOCITY_COLOURS, show_pianoroll
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.summary import pitch_name
from dsmr_mlx.music.text_roll import MARGIN, roll_text, text_systems


def drawn_pitches(text: str) -> dict[int, list[bool]]:
    """Of a roll of one system: for each pitch whether it sounds in each column, by the labels beside the lines."""
    lines = text.splitlines()[:-2]
    labelled, label = next((i, line.split()[0]) for i, line in enumerate(lines) if line.strip().startswith("C"))
    found = {}
    for i, line in enumerate(lines):
        lower = 12 * (int(label[1:]) + 1) + 2 * (labelled - i)
        cells = line[MARGIN:]
        found[lower], found[lower + 1] = [c in "▄█" for c in cells], [c in "▀█" for c in cells]
    return found


@pytest.mark.parametrize("seed", range(5))
def test_the_text_shows_each_note_in_its_place(seed):
    """Notes start and end with columns of 0.1 s: a cell is filled if and only if a note covers its middle."""
    rng = np.random.default_rng(seed)
    rows = []
    for pitch in rng.choice(np.arange(21, 109), 30, replace=False):
        edges = np.sort(rng.choice(100, 6, replace=False))
        rows += [(a / 10, b / 10, int(pitch), int(rng.integers(1, 128))) for a, b in zip(edges[::2], edges[1::2])]  # noqa: B905
    rows.append((9.9, 10.0, 108, 64))
    shown = drawn_pitches(roll_text(notes_of(*rows), width=MARGIN + 100, systems=1))
    for pitch, columns in shown.items():
        covering = [(a, b) for a, b, p, _ in rows if p == pitch]
        expected = [any(a < (i + 0.5) / 10 < b for a, b in covering) for i in range(len(columns))]
        assert columns == expected, pitch_name(pitch)
    assert {p for _, _, p, _ in rows} <= shown.keys()


def test_a_repeated_note_differs_from_a_long_one():
    pressed_twice = drawn_pitches(roll_text(notes_of((0, 5, 60, 9), (5, 10, 60, 9)), width=MARGIN + 100, systems=1))
    assert pressed_twice[60] == [i != 49 for i in range(100)]


def test_the_shortest_note_is_visible():
    shown = drawn_pitches(roll_text(notes_of((0, 3600, 40, 1), (1800, 1800.001, 80, 1)), width=80, systems=1))
    assert sum(shown[80]) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 6), st.floats(0.01, 14000), st.integers(0, 100), st.floats(0, 14000))
def test_the_text_fits_the_width(width, systems, seconds, seed, start):
    notes = random_piece(seed, 1 + seed, seconds)
    drawn = text_systems(notes, width, systems, start)
    assert 1 <= len(drawn) <= systems
    for system in drawn:
        lines = list(system.lines())
        assert len(lines) == len(system.names) + 2 <= 66
        assert all(len(line) <= max(width, MARGIN + 10) for line in lines)
        assert re.search(r"\d:\d\d", lines[-1])
        assert any(name.startswith("C") for name in system.names)
    presses = sum(np.count_nonzero(np.diff((s.velocity > 0).astype(int), axis=-1, prepend=0) > 0) for s in drawn)
    assert presses >= len(set(notes.pitch.tolist()))


def test_a_system_without_a_round_time_has_its_start_as_label():
    system = text_systems(random_piece(0, 1, 1.0), 1, 1, 0.015625)[0]
    assert list(system.lines())[-1].strip() == "0:00.0"


def test_no_notes_give_no_text():
    assert roll_text(Notes.empty()) == ""
    with pytest.raises(UserError, match="`systems` 0: expected at least 1"):
        roll_text(Notes.empty(), systems=0)


def test_hours_of_music_are_drawn():
    notes = random_piece(0, 200_000, 4 * 3600)
    text = roll_text(notes, width=100)
    assert len(text.splitlines()) < 120
    assert "3:" in text.splitlines()[-1]


def test_times_of_days_of_music_do_not_run_together():
    notes = notes_of((0, 1, 60, 64), (199_999, 200_000, 60, 64))
    ruler, times = roll_text(notes, systems=1).splitlines()[-2:]
    for label in re.finditer(r"\S+", times):
        assert re.fullmatch(r"\d+:\d\d(:\d\d)?", label.group())
        assert ruler[label.start()] == "┬"


def shown_on(monkeypatch, notes: Notes, columns: int = 60, **look) -> str:
    """Return what `show_pianoroll` writes to a terminal."""
    stream = io.StringIO()
    options = {"width": 10_000, "highlight": False, "soft_wrap": True, "markup": False, "emoji": False}
    monkeypatch.setattr(show_command, "out", Console(file=stream, **options, **look))
    monkeypatch.setenv("COLUMNS", str(columns))
    show_pianoroll(notes, title="a.mid")
    return stream.getvalue()


def test_colours_show_velocities(monkeypatch):
    notes = notes_of((0, 1, 60, 5), (0, 1, 61, 120), (1, 2, 60, 5))
    plain = shown_on(monkeypatch, notes)
    assert "\x1b" not in plain
    assert "█" in plain
    coloured = shown_on(monkeypatch, notes, force_terminal=True, color_system="truecolor")
    quiet, loud = (";".join(str(int(c[i : i + 2], 16)) for i in (1, 3, 5)) for c in VELOCITY_COLOURS[::5])
    assert f"\x1b[38;2;{loud};48;2;{quiet}m▀" in coloured  # the upper pitch over the lower one
    assert f"\x1b[38;2;{quiet}m▄" in coloured
    for line, same in zip(re.sub(r"\x1b\[[\d;]*m", "", coloured).splitlines(), plain.splitlines(), strict=False):
        assert line.replace("▀", "█") == same.replace("▀", "█").ljust(len(line))
    assert "\x1b" not in shown_on(monkeypatch, notes, force_terminal=True, no_color=True, color_system=None)
