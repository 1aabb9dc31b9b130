"""The studio's page in a browser: what its tests share."""

import base64
import itertools
from pathlib import Path

from support.browser import Tab
from support.music import random_notes

import dsmr_mlx.music
from dsmr_mlx.music.midi import write_notes

DRAWN = "!studio.stale"  # the page shows what it knows
READY = f"window.studio && studio.socket && studio.socket.open && studio.session.name !== '' && {DRAWN}"
DROP = """([name, data]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: "audio/midi" }));
  for (const type of ["dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true }));
  }
}"""
SOUNDS = Path(dsmr_mlx.music.__file__).parent / "page" / "strings.js"
FULL, SHORT = "MAX_PARTIALS = 48,\n  BODY_SECONDS = 6", "MAX_PARTIALS = 3,\n  BODY_SECONDS = 2"
names = (f"Session {i}" for i in itertools.count())


def serve_short_sounds(tab: Tab) -> None:
    """Let the page compute simpler sounds of keys: those of a real piano take seconds for each page."""
    script = SOUNDS.read_text(encoding="utf-8")
    assert FULL in script
    body = script.replace(FULL, SHORT)
    tab.page.route("**/shared/strings.js", lambda route: route.fulfill(body=body, content_type="text/javascript"))


def drop(tab: Tab, tmp_path, seed: int = 0, notes: int = 40) -> None:
    """Drop a MIDI file on the page, and wait until its notes are shown."""
    path = tmp_path / "Tune.mid"
    write_notes(random_notes(seed, notes), path)
    tab.page.evaluate(DROP, [path.name, base64.b64encode(path.read_bytes()).decode()])
    tab.wait(f"studio.music.count === {notes} && {DRAWN}")
