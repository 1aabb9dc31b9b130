"""Piano rolls: the figures are those of the notes, and each note is in its place, in text, SVG and PNG."""

import io
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.midi_files import META_END, midi, note, track, write_midi_files
from support.music import notes_of

from dsmr_mlx import UserError
from dsmr_mlx.cli import main
from dsmr_mlx.cli import show as show_command
from dsmr_mlx.cli.show import VELOCITY_COLOURS, show_pianoroll
from dsmr_mlx.common.formatting import ROUND_SECONDS, format_time, printable, round_times
from dsmr_mlx.common.plotting import DARK, DPI, LIGHT
from dsmr_mlx.music import piano_roll
from dsmr_mlx.music.midi import read_notes, write_notes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.piano_roll import roll_picture
from dsmr_mlx.music.summary import excerpt, pitch_name, summarize, text_fields
from dsmr_mlx.music.text_roll import MARGIN, roll_text, text_systems

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<img src=x onerror=alert(1)> & \"'\x1b[31m.mid"


def random_piece(seed: int, n: int, seconds: float) -> Notes:
    rng = np.random.default_rng(seed)
    onset = np.sort(rng.uniform(0, seconds, n))
    lengths, pitches, velocities = rng.exponential(0.4, n) + 0.02, rng.integers(21, 109, n), rng.integers(1, 128, n)
    return Notes.sorted(onset - onset[0], onset - onset[0] + lengths, pitches, velocities)


milliseconds = st.tuples(st.integers(0, 400), st.integers(1, 300), st.integers(0, 127), st.integers(1, 127))


@settings(max_examples=60, deadline=None)
@given(st.lists(milliseconds, min_size=1, max_size=12))
def test_figures_equal_a_count_of_every_millisecond(rows):
    notes = notes_of(*((on / 1000, (on + length) / 1000, pitch, v) for on, length, pitch, v in rows))
    sounding = np.zeros(max(on + length for on, length, _, _ in rows), int)
    for on, length, _, _ in rows:
        sounding[on : on + length] += 1
    silences = re.findall("0+", "".join("0" if n == 0 else "1" for n in sounding))
    found = summarize(notes)
    assert found.notes == len(rows)
    assert found.seconds == pytest.approx(len(sounding) / 1000)
    assert found.notes_per_second == pytest.approx(1000 * len(rows) / len(sounding))
    assert (found.lowest, found.highest) == (min(r[2] for r in rows), max(r[2] for r in rows))
    assert found.mean_polyphony == pytest.approx(sounding[sounding > 0].mean())
    assert found.max_polyphony == sounding.max()
    assert found.longest_silence == pytest.approx(max(map(len, silences), default=0) / 1000)


def test_figures_as_text():
    assert str(summarize(Notes.empty())) == "no notes"
    one = str(summarize(notes_of((0, 0.5, 60, 9))))
    assert one == "1 note in 0.5 s, 2.0 a second, C4, 1.0 at once, 1 at most, longest silence 0.0 s"
    two = str(summarize(notes_of((0, 1, 21, 9), (3, 4, 108, 9))))
    assert two == "2 notes in 4.0 s, 0.5 a second, A0 to C8, 1.0 at once, 1 at most, longest silence 2.0 s"


def test_pitch_names():
    assert [pitch_name(p) for p in (0, 21, 60, 61, 69, 108, 127)] == ["C-1", "A0", "C4", "C#4", "A4", "C8", "G9"]


def test_times_as_minutes_and_seconds():
    assert [format_time(s) for s in (0, 59.4, 59.6, 3599.9, 3661)] == ["0:00", "0:59", "1:00", "1:00:00", "1:01:01"]
    assert [format_time(s, 1) for s in (0.04, 0.96, 61.25, 59.99)] == ["0:00.0", "0:01.0", "1:01.2", "1:00.0"]


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 14000), st.floats(0.3, 14400), st.integers(2, 30))
def test_ticks_are_round_and_not_too_many(low, seconds, max_times):
    ticks = [value for value, _ in round_times(low, low + seconds, max_times)]
    assert len(ticks) <= max_times + 1
    assert all(low - 1e-6 <= tick <= low + seconds + 1e-6 for tick in ticks)
    steps = {round(b - a, 6) for a, b in pairwise(ticks)}
    assert len(steps) <= 1
    assert steps <= set(ROUND_SECONDS)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 0.99))
def test_two_excerpts_have_each_note_once(seed, place):
    notes = random_piece(seed, 20, 8.0)
    border = place * notes.duration
    first, second = excerpt(notes, 0.0, border), excerpt(notes, border)
    np.testing.assert_allclose(np.concatenate([first.onset, second.onset + border]), notes.onset, atol=1e-9)
    np.testing.assert_array_equal(np.concatenate([first.pitch, second.pitch]), notes.pitch)
    assert first.duration <= border
    np.testing.assert_allclose(second.offset + border, notes.offset[len(first) :], atol=1e-9)


@pytest.mark.parametrize(
    ("start", "seconds", "message"),
    [
        (-1.0, None, "`start` -1: expected 0 or more"),
        (float("nan"), None, "`start` nan: expected 0 or more"),
        (9.0, None, r"`start` 9: the music lasts 2.00 s, expected less"),
        (0.0, 0.0, "`seconds` 0: expected more than 0"),
        (0.0, float("nan"), "`seconds` nan: expected more than 0"),
    ],
)
def test_an_invalid_excerpt_is_an_error(start, seconds, message):
    with pytest.raises(UserError, match=message):
        excerpt(notes_of((0, 2, 60, 60)), start, seconds)


def test_text_fields_of_a_file():
    assert text_fields(None) == text_fields("") == []
    assert text_fields("Intro") == [("text", "Intro")]
    assert text_fields("[" * 100_000) == [("text", "[" * 100_000)]
    assert text_fields('{"program": "x", "seed": 0, "top": null}') == [("program", "x"), ("seed", "0")]


# Text


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


# Pictures


def svg_of(notes: Notes, **look) -> ET.Element:
    """Return the SVG as a tree, after the checks that hold for every picture."""
    svg = roll_picture(notes, "svg", **look).decode()
    outside = re.sub("<title>.*?</title>|<text .*?</text>", "", svg, flags=re.DOTALL)
    assert not re.search(r"src=|url\((?!#)|href=\"(?!#)|@import|script", outside)
    assert re.findall(r"http[^\"]*", outside) == ["http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"]
    return ET.fromstring(svg)


def points(path: ET.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d"))]


def bars_of(node: ET.Element) -> list[tuple[float, float, float, float]]:
    """Return start, end, height and opacity of each note drawn, in points."""
    bars = []
    for path in node.iter(f"{SVG}path"):
        if f"stroke: {LIGHT['train']}" in (style := path.get("style", "")):
            strength = re.search(r"stroke-opacity: ([\d.]+)", style)
            ends = points(path)
            for (a, y), (b, _) in zip(ends[::2], ends[1::2], strict=True):
                bars.append((a, b, y, float(strength[1]) if strength else 1.0))
    return bars


def labels_of(node: ET.Element, anchor: str) -> list[tuple[str, float, float]]:
    """Return text, x and y of the labels of the time axes ("middle") or the pitch axes ("end")."""
    labels = [t for t in node.iter(f"{SVG}text") if f"text-anchor: {anchor}" in t.get("style")]
    return [(t.text, float(t.get("x")), float(t.get("y"))) for t in labels]


def grid_of(node: ET.Element) -> list[float]:
    """Return the heights of the grid lines, one on each C."""
    paths = (p for p in node.iter(f"{SVG}path") if f"stroke: {LIGHT['grid']}" in p.get("style", ""))
    return [points(path)[0][1] for path in paths]


@pytest.mark.slow
def test_the_svg_shows_each_note_in_its_place():
    """Onsets, offsets and pitches are read back from the bars with two ticks on each axis."""
    notes = random_piece(3, 40, 12.0)
    tree = svg_of(notes, systems=1)
    times = [(60 * int(t.split(":")[0]) + int(t.split(":")[1]), x) for t, x, _ in labels_of(tree, "middle")]
    octaves = [12 * (int(t[1:]) + 1) for t, _, _ in labels_of(tree, "end")]
    heights = grid_of(tree)
    assert len(octaves) == len(heights)
    (t0, x0), (t1, x1) = times[0], times[-1]
    seconds, semitones = (t1 - t0) / (x1 - x0), (octaves[-1] - octaves[0]) / (heights[-1] - heights[0])
    bars = bars_of(tree)
    found = [
        (t0 + (a - x0) * seconds, t0 + (b - x0) * seconds, octaves[0] + (y - heights[0]) * semitones)
        for a, b, y, _ in bars
    ]
    expected = list(zip(notes.onset, notes.offset, notes.pitch.astype(float), strict=True))
    for one, other in zip(sorted(found), sorted(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=0.05)


@pytest.mark.slow
def test_louder_notes_are_darker():
    bars = bars_of(svg_of(notes_of((0, 1, 60, 1), (1, 2, 60, 64), (2, 3, 60, 127))))
    strengths = [strength for _, _, _, strength in sorted(bars)]
    assert strengths == sorted(set(strengths))
    assert strengths[-1] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "n"), [(3.0, 1), (59.0, 3), (500.0, 8), (14000.0, 8)])
def test_a_long_piece_is_broken_into_systems(seconds, n):
    def systems(tree: ET.Element) -> int:
        return sum(name == "C5" for name, _, _ in labels_of(tree, "end"))

    notes = notes_of((0, seconds, 60, 60), *((t, t + 0.1, 72, 90) for t in np.linspace(0, seconds - 0.2, 50)))
    tree = svg_of(notes, start=600.0)
    assert systems(tree) == n
    bars = bars_of(tree)
    assert len(bars) >= 50 + n  # the long note is in all of them
    left, right = 0.34 * 72, (9.8 - 0.26) * 72
    assert min(a for a, *_ in bars) == pytest.approx(left, abs=0.01)
    assert max(b for _, b, *_ in bars) <= right + 0.01
    assert any("10:00" in name for name, _, _ in labels_of(tree, "middle"))
    assert systems(svg_of(notes, systems=5)) == min(n, 5)


def test_a_picture_has_at_most_as_many_pixels_as_matplotlib_can_draw(monkeypatch):
    """Before version 3.10; a piece of hours in many systems would be taller."""
    sizes, notes = [], notes_of((0, 1, 21, 60), (90_000, 90_001, 108, 60))
    monkeypatch.setattr(piano_roll, "picture", lambda draw, size, *_: sizes.append(size))
    roll_picture(notes, "png", systems=500)
    assert 60_000 < sizes[0][1] * DPI < 1 << 16


def test_a_picture_without_notes_and_titles_that_are_markup():
    tree = svg_of(Notes.empty(), title=HOSTILE)
    assert "no notes" in [t.text for t in tree.iter(f"{SVG}text")]
    shown = HOSTILE.replace("\x1b", "\ufffd")
    assert tree.find(f"{SVG}title").text == f"{shown}: no notes"
    assert shown in [t.text for t in tree.iter(f"{SVG}text")]
    names = ("svg", "title", "defs", "style", "g", "path", "use", "text", "clipPath", "rect")
    assert {node.tag for node in tree.iter()} <= {f"{SVG}{name}" for name in names}
    long = svg_of(Notes.empty(), title="x" * 500)
    assert max(len(t.text or "") for t in long.iter(f"{SVG}text")) <= 90
    number = svg_of(Notes.empty(), title="take 1.23456 rotate(-0 1)")
    assert "take 1.23456 rotate(-0 1)" in [t.text for t in number.iter(f"{SVG}text")]


def test_a_picture_has_a_dark_scheme_for_screens_only():
    style = svg_of(Notes.empty()).find(f"{SVG}defs/{SVG}style").text
    always, _, dark = style.partition("@media screen and (prefers-color-scheme: dark)")
    assert "#" not in always
    for use, name in (("fill", "paper"), ("fill", "muted"), ("stroke", "grid")):
        assert f'[style*="{use}: {LIGHT[name]}"] {{ {use}: {DARK[name]} !important; }}' in dark
    assert "var(" not in style  # many programs that read SVG do not know custom properties


@pytest.mark.slow
def test_the_png_shows_the_same_notes_as_the_svg():
    """A pixel in the middle of each bar of the SVG is blue in the PNG, and its surroundings are not."""
    image = pytest.importorskip("matplotlib.image")
    notes = notes_of((0, 2, 60, 127), (1, 3, 67, 127), (20, 24, 55, 127), (38, 40, 72, 127))
    title = "a $x$ \\frac{"
    png, tree = roll_picture(notes, "png", title=title), svg_of(notes)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = (255 * image.imread(io.BytesIO(png))[..., :3]).round().astype(int)
    scale = DPI / 72
    size = [float(tree.get(name).removesuffix("pt")) for name in ("height", "width")]
    np.testing.assert_allclose(pixels.shape[:2], np.multiply(size, scale), atol=1)
    bars = bars_of(tree)
    assert len(bars) == 4
    for a, b, y, _ in bars:
        row, column = round(scale * y), round(scale * (a + b) / 2)
        assert tuple(pixels[row, column]) == (0x3A, 0x6E, 0xA5)
        assert pixels[row + 10, column].min() > 200
    assert roll_picture(notes, "png", title=title) == png
    assert roll_picture(notes, "svg", title=title) == roll_picture(notes, "svg", title=title)


@pytest.mark.parametrize("notes", [Notes.empty(), notes_of((0, 0.5, 60, 60))], ids=["none", "one"])
def test_a_picture_of_few_notes_in_a_script_that_the_font_lacks(notes, recwarn):
    pytest.importorskip("matplotlib")
    assert roll_picture(notes, "png", title="音楽\n\x1b").startswith(b"\x89PNG")
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_missing_matplotlib_is_named_with_what_to_install(monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    expected = rf"`{kind}`: matplotlib is not installed, expected `pip install 'dsmr-mlx\[plot\]'`"
    with pytest.raises(UserError, match=expected):
        roll_picture(Notes.empty(), kind)


# The command


@pytest.fixture
def show(capsys, monkeypatch, tmp_path):
    """Run `dsmr-mlx show` in a folder with some MIDI files. Return exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "70")
    write_notes(random_piece(1, 300, 40.0), "a.mid", text='{"program": "dsmr-mlx 9", "seed": 3}')
    empty, drums = midi(b"MTrk\0\0\0\4\0" + META_END), midi(track(note(0, 500, 40, channel=9)))
    write_midi_files(tmp_path, {"empty.mid": empty, "drums.mid": drums, "one.mid": midi(track(note(0, 500, 60)))})
    (tmp_path / "bad.mid").write_bytes(b"no MIDI")

    def show(*arguments: object) -> Namespace:
        capsys.readouterr()
        try:
            code = main(["show", *map(str, arguments)])
        except SystemExit as exit:
            code = exit.code
        found = capsys.readouterr()
        return Namespace(code=code, out=found.out, err=found.err)

    return show


def test_show_in_the_terminal(show):
    whole = show("a.mid")
    assert whole.code == 0
    notes = read_notes("a.mid")
    lines = whole.out.splitlines()
    assert lines[0] == f"a.mid: {summarize(notes)}"
    assert lines[1] == "program: dsmr-mlx 9, seed: 3"
    assert whole.out.rstrip("\n").endswith(roll_text(notes, width=70))
    assert all(len(line) <= 70 for line in lines[2:])
    part = show("a.mid", "--start", 10, "--seconds", 5, "--systems", 1)
    assert part.out.splitlines()[0] == f"a.mid: {summarize(excerpt(notes, 10, 5))}"
    assert "0:10" in part.out.splitlines()[-1]


@pytest.mark.parametrize("name", ["empty.mid", "drums.mid"])
def test_show_a_file_without_notes(show, name):
    assert show(name).out == f"{name}: no notes\n"
    assert show(name, "--svg", "a.svg", "--html", "a.html").code == 0


def test_show_one_note(show):
    assert "1 note in 0.5 s" in show("one.mid").out


@pytest.mark.slow
def test_show_writes_the_given_files(show):
    result = show("a.mid", "--svg", "a.svg", "--html", "a.HTM", "--start", 5, "--systems", 3)
    assert result.code == 0
    assert re.fullmatch(r"a\.mid: .*\nprogram: .*\na\.svg: .* KiB\na\.HTM: .* KiB\n", result.out)
    notes = excerpt(read_notes("a.mid"), 5)
    assert Path("a.svg").read_bytes() == roll_picture(notes, "svg", title="a.mid", start=5, systems=3)
    before = Path("a.svg").read_bytes()
    refused = show("a.mid", "--html", "new.html", "--svg", "a.svg")
    assert (refused.code, refused.err) == (2, "dsmr-mlx: error: --svg a.svg: already exists, --force overwrites it\n")
    assert not Path("new.html").exists()
    assert show("a.mid", "--svg", "a.svg", "--force").code == 0
    assert Path("a.svg").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("missing.mid", "missing.mid: cannot be read (No such file or directory)"),
        ("bad.mid", "bad.mid: not a readable MIDI file"),
        (". ", ".: cannot be read (Is a directory)"),
        ("a.mid --start 99", "--start 99: the music lasts"),
        ("a.mid --systems 0", "--systems 0: expected at least 1"),
        ("a.mid --systems 2 --html b.html", "--systems 2: expected --png or --svg with it"),
        ("a.mid --svg a.mid --force", "--svg a.mid: expected a name that ends in .svg"),
        ("a.mid --html a.png", "--html a.png: expected a name that ends in .html or .htm"),
        ("a.mid --svg no/a.svg", "--svg no/a.svg: no such folder no"),
        ("a.mid --audio a.mp3", "--audio a.mp3: expected a name that ends in .wav or .flac or .ogg"),
        ("a.mid --soundfont a.sf2", "--soundfont a.sf2: expected --audio FILE.wav with it"),
    ],
)
def test_errors_of_show(show, arguments, message):
    files = sorted(Path().iterdir())
    result = show(*arguments.split())
    assert result.code == 2
    assert result.err.startswith(f"dsmr-mlx: error: {message}")
    assert result.err.count("\n") == 1
    assert sorted(Path().iterdir()) == files


def test_control_characters_in_a_name_are_replaced(show):
    undecodable = "" if sys.platform == "darwin" else "\udcff"  # macOS has UTF-8 names only
    name = f"\x1b]0;owned\x07\u202e{undecodable}.mid"
    write_notes(random_piece(2, 5, 2.0), name, text="\x1b[2J" + "x" * 5000)
    result = show(name)
    assert result.code == 0
    assert result.out.startswith(printable(name))
    assert all(c.isprintable() or c == "\n" for c in result.out)
    assert len(result.out.splitlines()[1]) < 700


@pytest.mark.slow
def test_show_needs_matplotlib_for_pictures_only(show):
    """Text and pages need only NumPy, symusic and rich; a picture says what to install, before anything is written."""
    code = (
        "import sys\nfor name in ('mlx', 'matplotlib', 'matplotlib.figure'): sys.modules[name] = None\n"
        "from dsmr_mlx.cli import main\nsys.exit(main(sys.argv[1:]))"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, "show", "a.mid", *arguments]
        return subprocess.run(command, env=os.environ, check=False, capture_output=True, text=True)

    assert run("--html", "a.html").returncode == 0
    assert run().returncode == 0
    refused = run("--html", "b.html", "--svg", "b.svg")
    assert refused.returncode == 2
    expected = "--svg: matplotlib is not installed, expected `pip install 'dsmr-mlx[plot]'`"
    assert expected in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not Path("b.html").exists()
