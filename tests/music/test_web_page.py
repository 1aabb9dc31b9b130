"""The web page is self-contained and safe, and plays the notes on time."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from support.browser import Tab, open_browser
from support.music import on_grid, random_notes

from dsmr_mlx.music.notes import Notes
from dsmr_mlx.music.web_page import player_html

HOSTILE = "</title></script><script>window.hacked = 1</script><img src=x onerror='hacked = 1'>\" & \x1b\udcff"
LEAD = 0.06  # seconds from the button to the first sound
AHEAD = 0.4  # seconds that are scheduled

# Stand-ins for Web Audio and for the timer, driven by the test.
FAKE = """
window.fake = {now: 0, voices: [], timers: new Map(), buffers: 0};
window.setInterval = (call) => { fake.timers.set(fake.timers.size + 1, call); return fake.timers.size; };
window.clearInterval = (id) => fake.timers.delete(id);
fake.to = (now) => { fake.now = now; for (const call of fake.timers.values()) call(); };
fake.walk = (from, to, step) => { for (let t = from; t < to; t += step) fake.to(t); fake.to(to); };
class Parameter {
  constructor() { this.value = 1; this.events = []; }
  linearRampToValueAtTime(value, when) { this.events.push([value, when]); }
  setValueAtTime(value, when) { this.events.push([value, when]); }
  setTargetAtTime(value, when) { this.events.push([value, when]); }
  cancelScheduledValues(when) { this.events = this.events.filter(([, at]) => at < when); }
}
class Part {
  constructor() {
    const names = ["gain", "playbackRate", "threshold", "knee", "ratio", "attack", "release"];
    for (const name of names) this[name] = new Parameter();
  }
  connect() {}
  start(when, age) {
    if (this.buffer.duration < 0.5) throw new Error("a very short sound");
    if (this.buffer.layer === "edge") return; // each note has two layers
    Object.assign(this, {when, age: age / this.playbackRate.value, until: Infinity});
    fake.voices.push(this);
  }
  stop(when) { this.until = when; }
}
window.AudioContext = class {
  get currentTime() { return fake.now; }
  get sampleRate() { return 8000; }
  resume() { return Promise.resolve(); }
};
window.AudioBuffer = class {
  constructor({length, sampleRate}) {
    this.duration = length / sampleRate;
    this.layer = sampleRate === 8000 ? "room" : fake.buffers++ % 2 ? "edge" : "body";
  }
  copyToChannel() {}
};
for (const name of ["Gain", "BufferSource", "Convolver", "WaveShaper", "DynamicsCompressor"]) {
  AudioContext.prototype[`create${name}`] = () => new Part();
}
"""
OFFLINE = """
window.AudioContext = function () {
  window.offline = new OfflineAudioContext(1, 44100 * 2, 44100);
  const resume = offline.resume.bind(offline);
  offline.resume = () => Promise.resolve();
  for (let at = 0.2; at < 2; at += 0.2) {
    offline.suspend(at).then(() => {
      ticks.forEach((tick) => tick());
      resume();
    });
  }
  return offline;
};
window.ticks = [];
window.setInterval = (tick) => ticks.push(tick);
"""
# Rendering is faster than the page's timer: the page schedules notes whenever 0.2 seconds are rendered.
RENDER = """offline.startRendering().then((sound) => {
  const bytes = new Uint8Array(sound.getChannelData(0).buffer);
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
})"""
TIME = "document.getElementById('time').textContent"
LABEL = "document.getElementById('play').getAttribute('aria-label')"


class Elements(HTMLParser):
    """The elements and attributes of a page, and the content of its scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        """See `HTMLParser`."""
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        """See `HTMLParser`."""
        if self.found and self.cdata_elem in self.raw:
            self.raw[self.cdata_elem].append(data)


def stored_notes(page: str) -> Notes:
    """Return the notes in the JSON of the page."""
    stored = json.loads(re.search(r'<script type="application/json" id="notes">(.*?)</script>', page)[1])
    onset = np.cumsum(stored["wait"]) / 1000
    return Notes(onset, onset + np.array(stored["length"]) / 1000, stored["pitch"], stored["velocity"])


def test_the_page_has_the_notes_to_the_millisecond():
    rng = np.random.default_rng(0)
    onset = np.sort(rng.uniform(0, 5000, 2000))
    notes = Notes.sorted(
        onset, onset + rng.exponential(1, 2000), rng.integers(0, 128, 2000), rng.integers(1, 128, 2000)
    )
    page = player_html(notes)
    found = stored_notes(page)
    np.testing.assert_allclose(found.onset, notes.onset, atol=0.00051)
    np.testing.assert_allclose(found.offset, notes.offset, atol=0.00151)
    np.testing.assert_array_equal(found.pitch, notes.pitch)
    np.testing.assert_array_equal(found.velocity, notes.velocity)
    empty = len(player_html(Notes.empty()))
    assert empty < 55_000
    assert len(page) < empty + 20 * len(notes)
    assert player_html(notes) == page


@pytest.mark.parametrize("stored", [HOSTILE, json.dumps({HOSTILE: HOSTILE, "seed": 1}), None])
def test_title_and_text_are_escaped(stored):
    page = player_html(random_notes(0, 5), title=HOSTILE, stored=stored)
    elements = Elements(page)
    assert [attributes.get("type") for tag, attributes in elements.found if tag == "script"] == [
        "application/json",
        "module",
    ]
    assert not {tag for tag, _ in elements.found} & {"img", "iframe", "link", "object", "embed", "base", "form", "a"}
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|import\(", page)


def test_the_policy_allows_only_the_script_and_style_of_the_page():
    elements = Elements(player_html(random_notes(0, 5), title=HOSTILE))
    (policy,) = (a["content"] for tag, a in elements.found if tag == "meta" and a.get("http-equiv"))
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for name, raw in (("script", elements.raw["script"][-1]), ("style", "".join(elements.raw["style"]))):
        digest = base64.b64encode(hashlib.sha256(raw.encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"


# In a browser


@pytest.fixture(scope="module")
def browser():
    """Start a browser, shared by the tests of this module."""
    with open_browser() as browser:
        yield browser


@pytest.fixture
def opened(browser, tmp_path):
    """Return a function that opens the page of some notes. No page may have errors at the end."""
    tabs = []

    def opened(notes: Notes, before: str = FAKE, page: dict | None = None, **options) -> Tab:
        path = tmp_path / f"{len(tabs)}.html"
        path.write_text(player_html(notes, **(page or {})), encoding="utf-8")
        tabs.append(Tab(browser, before=before, **options).open(path))
        tabs[-1].wait(f"{TIME} !== ''")
        return tabs[-1]

    yield opened
    for tab in tabs:
        assert tab.problems == []
        tab.close()


def voices(page) -> list[dict]:
    """Return the notes that the page has scheduled."""
    return page.run("fake.voices.map(({when, age, until}) => ({when, age, until}))")


HIGH = (84, 89)  # pitches whose sounds are computed quickly


def even_notes(n: int, apart: float, length: float) -> Notes:
    """Return n notes at equal distances."""
    onset = np.arange(n) * apart
    return Notes(onset, onset + length, HIGH[0] + np.arange(n) % 5, np.full(n, 80))


@pytest.mark.slow
def test_every_note_is_played_once_and_on_time(opened):
    notes = on_grid(random_notes(1, 60, pitches=HIGH))
    page = opened(notes)
    page.click("#play")
    page.wait(f"{LABEL} === 'Pause'")
    page.run(f"fake.walk(0, {notes.duration + 0.9}, 0.1)")
    found = stored_notes(player_html(notes))
    played = voices(page)
    np.testing.assert_allclose([v["when"] for v in played], LEAD + found.onset, atol=1e-6)
    assert all(v["until"] >= LEAD + end for v, end in zip(played, found.offset, strict=True))
    assert {v["age"] for v in played} == {0}
    total = f"{int(found.duration) // 60}:{int(found.duration) % 60:02}"
    page.wait(f"{TIME} === '{total} / {total}' && {LABEL} === 'Pause'")
    page.run(f"fake.to({notes.duration + 1.2})")
    page.wait(f"{LABEL} === 'Play'")
    page.click("#play")
    page.wait(f"{TIME} === '0:00 / {total}'")
    assert len(voices(page)) > len(notes)


@pytest.mark.slow
def test_notes_are_scheduled_shortly_before_they_sound(opened):
    page, count = opened(even_notes(2000, 0.05, 0.2)), "fake.voices.length"
    page.click("#play")
    page.wait(f"{LABEL} === 'Pause'")
    assert page.run(count) <= AHEAD / 0.05 + 2
    for now in (0.3, 0.6, 1.0):
        page.run(f"fake.to({now})")
        assert (now + AHEAD - LEAD) / 0.05 - 1 <= page.run(count) <= (now + AHEAD) / 0.05 + 1
    page.run("fake.walk(1, 90, 0.2)")
    assert page.run(count) >= 1800


@pytest.mark.slow
def test_at_most_64_notes_sound_at_once(opened):
    """Of 1000 long notes at once, 64 continue and the others are ended."""
    page = opened(Notes(np.zeros(1000), np.full(1000, 50.0), HIGH[0] + np.arange(1000) % 5, np.full(1000, 100)))
    page.click("#play")
    page.wait(f"{LABEL} === 'Pause'")
    page.run("fake.to(1)")
    played = voices(page)
    assert len(played) <= 128
    assert sum(v["until"] > 40 for v in played) <= 64


@pytest.mark.slow
def test_seeking_continues_notes_that_sound_there(opened):
    """A click ends all scheduled notes, and a held note continues at its age."""
    notes = Notes.sorted([0, 8, *range(1, 20)], [2, 12, *np.arange(1, 20) + 0.5], [84, 86, *[88] * 19], [90] * 21)
    page = opened(notes)
    page.click("#play")
    page.run("fake.to(0.5)")
    page.click("#overview", across=10.25 / notes.duration)
    page.wait(f"{TIME}.startsWith('0:10')")
    before, (held, following) = voices(page)[:-2], voices(page)[-2:]
    assert all(v["until"] <= 0.6 for v in before)
    at = page.run("document.getElementById('overview').getAttribute('aria-valuetext')")
    assert at == "0:10 of 0:19"
    assert held["age"] == pytest.approx(2.25, abs=0.05)
    assert held["when"] == pytest.approx(0.5 + LEAD, abs=0.01)
    assert following["age"] == pytest.approx(0.25, abs=0.05)
    page.run("fake.walk(0.5, 2.6, 0.1)")
    assert [v["age"] for v in voices(page)[len(before) + 2 :]] == [0, 0]
    page.click("#roll", across=0.999)
    page.wait(f"{TIME}.startsWith('0:1') && !{TIME}.startsWith('0:10')")


@pytest.mark.slow
def test_the_page_can_be_used_with_the_keyboard_alone(opened):
    page = opened(even_notes(60, 0.5, 0.4), page={"start": 3600.0})
    assert page.run(TIME) == "1:00:00 / 1:00:29"
    page.press(" ")
    page.wait(f"{LABEL} === 'Pause'")
    page.press(" ")
    page.wait(f"{LABEL} === 'Play'")
    for key, time in (("ArrowRight", "05"), ("ArrowRight", "10"), ("ArrowLeft", "05"), ("End", "29"), ("Home", "00")):
        page.press(key)
        page.wait(f"{TIME} === '1:00:{time} / 1:00:29'")
    page.run("document.getElementById('overview').focus()")
    page.press("ArrowUp")
    page.wait("document.getElementById('overview').getAttribute('aria-valuenow') === '5'")
    page.run("document.getElementById('volume').focus()")
    page.press("ArrowRight")
    assert page.run(TIME) == "1:00:05 / 1:00:29"
    order = page.run("[...document.querySelectorAll('button, input, [tabindex]')].map((node) => node.id)")
    assert order == ["play", "volume", "wider", "closer", "overview"]
    assert page.run("document.querySelectorAll('button:not([aria-label]):empty').length") == 0


@pytest.mark.slow
def test_a_page_without_notes_says_so(opened):
    page = opened(Notes.empty(), page={"title": HOSTILE, "stored": HOSTILE})
    assert page.run("document.getElementById('problem').textContent") == "There are no notes."
    assert page.run("document.getElementById('play').disabled")
    page.press(" ")
    page.click("#overview")
    assert page.run(f"[{LABEL}, {TIME}]") == ["Play", "0:00 / 0:00"]
    assert page.run("window.hacked === undefined && document.images.length === 0")


@pytest.mark.slow
def test_without_sound_the_page_still_draws(opened):
    page = opened(random_notes(2, 20, pitches=HIGH), before="delete window.AudioContext;")
    assert page.run("document.getElementById('problem').textContent") == "This browser has no Web Audio."
    broken = "window.AudioContext = function () { throw new Error('no sound card'); };"
    page = opened(random_notes(2, 20, pitches=HIGH), before=broken)
    page.click("#play")
    assert page.run("document.getElementById('problem').textContent") == "Cannot open the sound output: no sound card"
    assert page.run(LABEL) == "Play"
    colours = "new Set(document.getElementById('roll').getContext('2d').getImageData(0, 0, 900, 300).data).size"
    assert page.run(colours) > 10


AXIS = """(() => {
  const roll = document.getElementById('roll'), copy = document.createElement('canvas');
  Object.assign(copy, {width: roll.width, height: 18});
  copy.getContext('2d').drawImage(roll, 0, 18 - roll.height);
  return copy.toDataURL();
})()"""


@pytest.mark.slow
@pytest.mark.parametrize("reduced", [False, True])
def test_the_view_turns_pages_with_reduced_motion(opened, reduced):
    """The time axis scrolls with the music, or stands still within a page."""
    page = opened(even_notes(100, 0.5, 0.4), reduced_motion="reduce" if reduced else "no-preference")
    axes = []
    for time in ("05", "10", "15"):
        page.press("ArrowRight")
        page.wait(f"{TIME} === '0:{time} / 0:49'")
        axes.append(page.run(AXIS))
    assert (axes[0] == axes[1]) is reduced
    assert axes[1] != axes[2]


def test_the_drawing_follows_the_colour_scheme(opened):
    page = opened(random_notes(3, 30, pitches=HIGH), color_scheme="light")
    pictures = []
    for scheme in ("light", "dark"):
        page.page.emulate_media(color_scheme=scheme)
        frames = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))"
        page.run(frames)
        pictures.append(page.run("document.getElementById('roll').toDataURL()"))
        ink = page.run("getComputedStyle(document.body).color")
        assert ink == {"light": "rgb(28, 33, 38)", "dark": "rgb(227, 231, 234)"}[scheme]
    assert pictures[0] != pictures[1]


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390, 1400])
def test_the_page_fits_the_screen(opened, width):
    title = "a_name_without_a_space_" * 8
    page = opened(even_notes(50, 200.0, 0.4), page={"title": title, "stored": title}, width=width, height=700)
    assert page.run("document.documentElement.scrollWidth") <= width
    boxes = "[...document.querySelectorAll('button')].map((node) => node.getBoundingClientRect())"
    assert page.run(f"{boxes}.every((box) => box.width >= 44 && box.height >= 44 && box.right <= {width})")


@pytest.mark.slow
@pytest.mark.parametrize("pitch", [33, 61, 96])
def test_a_note_sounds_at_its_pitch_and_decays(opened, pitch):
    """Rendered by the browser, the strongest low partial is within a third of a semitone of the pitch."""
    page = opened(Notes([0], [1.5], [pitch], [100]), before=OFFLINE)
    page.click("#play")
    sound = np.frombuffer(base64.b64decode(page.run(RENDER)), "<f4")
    start = sound[int(0.1 * 44100) : int(0.6 * 44100)]
    spectrum = np.abs(np.fft.rfft(start * np.hanning(len(start)), 1 << 18))
    frequency = np.fft.rfftfreq(1 << 18, 1 / 44100)
    expected = 440 * 2 ** ((pitch - 69) / 12)
    near = (frequency > expected * 0.7) & (frequency < expected * 1.4)
    assert 12 * abs(np.log2(frequency[near][spectrum[near].argmax()] / expected)) < 0.33
    assert spectrum[near].max() > 10 * spectrum[frequency < expected * 0.6].max()
    loudness = [float(np.sqrt(np.mean(sound[int(t * 44100) :][:4410] ** 2))) for t in (0.0, 0.1, 0.7, 1.3, 1.85)]
    assert loudness[1] > loudness[2] > loudness[3]
    assert loudness[3] > 10 * loudness[4] or pitch == 96  # which has no damper
    assert 0.02 < np.abs(sound).max() < 1.0


@pytest.mark.slow
def test_loudness_follows_velocity(opened):
    onset, apart = np.array([0, 0.6, 1.2]), int(0.6 * 44100)
    page = opened(Notes(onset, onset + 0.4, [60] * 3, [20, 60, 120]), before=OFFLINE)
    page.click("#play")
    sound = np.abs(np.frombuffer(base64.b64decode(page.run(RENDER)), "<f4"))
    peaks = [sound[i * apart :][:apart].max() for i in range(3)]
    assert peaks[2] > 2 * peaks[1] > 8 * peaks[0] > 0


@pytest.mark.slow
def test_it_plays_with_real_web_audio(opened):
    page = opened(even_notes(200, 0.1, 0.3), before="")
    page.click("#play")
    page.wait(f"{TIME} === '0:01 / 0:20'")
