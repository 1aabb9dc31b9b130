"""Piano rolls as pictures: each note is in its place, in SVG and PNG."""

import io
import re
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from support.music import notes_of, random_piece

from dsmr_mlx import UserError
from dsmr_mlx.common.plotting import DARK, DPI, LIGHT
from dsmr_mlx.music import piano_roll
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.piano_roll import roll_picture

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<img src=x onerror=alert(1)> & \"'\x1b[31m.mid"


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
