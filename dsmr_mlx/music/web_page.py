"""A self-contained HTML page that shows a piece and plays it with its own synthesizer.

The script and the style sheet are joined from the modules in `page/`, which the studio serves as they are. The Content
Security Policy of the page has their hashes, so that no other script can run, whatever the name or the text of a MIDI
file contains.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from importlib import resources

import numpy as np

from dsmr_mlx.common.html import SCHEMES, element, text
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.summary import summarize, text_fields

ICON = (
    '<svg viewBox="0 0 24 24" aria-hidden="true"><path class="start" d="M7 4v16l13-8z"/>'
    '<path class="stop" d="M6 4h4v16H6zM14 4h4v16h-4z"/></svg>'
)
CONTROLS = f"""\
<div class="controls">
<button type="button" id="play" aria-label="Play">{ICON}</button>
<span id="time"></span>
<label class="push"><b class="word">Volume</b>
<input type="range" id="volume" min="0" max="1" step="0.01" value="0.8"></label>
<span><button type="button" id="wider" aria-label="Show more time">−</button>
<button type="button" id="closer" aria-label="Show less time">+</button></span>
</div>
<p id="problem" class="problem" role="alert"></p>
<noscript><p class="problem">This page needs JavaScript to draw and play the notes.</p></noscript>"""
MODULES = (
    "music.js",
    "strings.js",
    "piano.js",
    "transport.js",
    "piano_roll.js",
    "player.js",
)  # none imports a later one
IMPORT_OR_EXPORT = re.compile(r"^(import [^\n]*;\n|export )", re.MULTILINE)
KEYS = (
    '<p class="remark keys"><kbd>Space</kbd> plays and pauses, <kbd>←</kbd> <kbd>→</kbd> move by 5 seconds, '
    "<kbd>+</kbd> <kbd>−</kbd> zoom; click where to listen.</p>"
)


def player_html(notes: Notes, *, title: str = "Piano roll", stored: str | None = None, start: float = 0.0) -> str:
    """Return a page with a piano roll, a moving playhead, play and pause, seeking and volume.

    title: plain text, which is escaped. stored: the text of the MIDI file (`midi.read_text`); the options of a
    generation are listed one by one. start: the time shown at the beginning, in seconds. Times are rounded to
    milliseconds.
    """
    script = join_modules(MODULES)
    style = "\n".join((SCHEMES, page_file("look.css"), page_file("player.css")))
    policy = f"default-src 'none'; script-src {source_hash(script)}; style-src {source_hash(style)}; base-uri 'none'"
    summary = str(summarize(notes))
    body = [
        element("header", element("h1", text(title)), element("p", text(summary), class_="remark")),
        CONTROLS,
        f'<canvas id="roll" role="img" aria-label="{text(f"Piano roll: {summary}")}"></canvas>',
        f'<canvas id="overview" role="slider" tabindex="0" aria-label="Position" aria-valuemin="0" '
        f'aria-valuemax="{int(notes.duration)}" aria-valuenow="0"></canvas>',
        KEYS,
        file_text(stored),
        f'<script type="application/json" id="notes">{notes_json(notes, start)}</script>',
        f'<script type="module">{script}</script>',
    ]
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{text(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{style}</style>"
    )
    content = "\n".join(part for part in body if part)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{content}\n</main></body></html>\n'


def page_file(name: str) -> str:
    """Read a script or style sheet in `page/`."""
    return resources.files("dsmr_mlx.music").joinpath("page", name).read_text(encoding="utf-8")


def join_modules(names: Sequence[str]) -> str:
    """Join modules in `page/` into one script, which needs no imports: top-level names are unique across them."""
    return "\n".join(IMPORT_OR_EXPORT.sub("", page_file(name)) for name in names)


def source_hash(content: str) -> str:
    """Return the source expression of a script or style sheet in a Content Security Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def notes_json(notes: Notes, start: float) -> str:
    """Return the notes as JSON: milliseconds since the previous onset and of length, pitch, velocity; and the start."""
    onset = np.rint(notes.onset * 1000).astype(int)
    length = np.maximum(np.rint(notes.offset * 1000).astype(int) - onset, 1)
    stored = {
        "start": round(start, 3),
        "wait": np.diff(onset, prepend=0).tolist(),
        "length": length.tolist(),
        "pitch": notes.pitch.tolist(),
        "velocity": notes.velocity.tolist(),
    }
    return json.dumps(stored, separators=(",", ":"), allow_nan=False)


def file_text(stored: str | None) -> str:
    """Return the text of the MIDI file as a collapsed list, "" without text."""
    pairs = text_fields(stored)
    if not pairs:
        return ""
    items = (element("dt", text(name)) + element("dd", text(value)) for name, value in pairs)
    return element("details", element("summary", "Stored in the MIDI file"), element("dl", *items))
