"""Playback of music that still grows: each note once and on time, notes held at the end, waiting."""

import numpy as np
import pytest
from support.browser import open_browser, open_modules

LEAD = 0.06  # seconds from the button to the first sound
pytestmark = pytest.mark.slow

# `walk` plays with a clock and a piano of the test. steps: [time, rows, made], what is known from a time on.
SETUP = """async () => {
  window.setInterval = () => 0;
  const { Transport } = await import("/transport.js"), { Music } = await import("/music.js");
  window.walk = (steps, from, until) => {
    const log = [], waits = [], context = { currentTime: 0, state: "running", outputLatency: 0 };
    const transport = new Transport({ onChange: () => {}, onFail: (text) => { throw new Error(text); } });
    const play = (pitch, velocity, when, end, age) => {
      log.push({ pitch, when, end, age });
      return log[log.length - 1];
    };
    const release = (voice, at) => (voice.end = at);
    const silenceAll = () => log.forEach((voice) => release(voice, Math.min(voice.end, context.currentTime)));
    transport.piano = { context, play, release, silenceAll, setResonance: () => {} };
    const learn = ([, rows, made], same) => transport.setMusic(new Music(rows, made === null ? {} : { made }), same);
    learn(steps[0], false);
    transport.seek(from);
    transport.play();
    let known = 1;
    for (let tick = 1; tick <= until * 50; tick++) {
      context.currentTime = tick / 50;
      while (known < steps.length && steps[known][0] <= context.currentTime) learn(steps[known++], true);
      if (transport.playing) transport.schedule();
      if (transport.waiting) waits.push(context.currentTime);
    }
    return { log, waits, playing: transport.playing };
  };
}"""


@pytest.fixture(scope="module")
def walk():
    """Return a function that plays steps from a position until a time."""
    with open_browser() as browser:
        tab = open_modules(browser)
        tab.page.evaluate(SETUP)

        def walk(steps, start=0.0, until=5.0):
            found = tab.page.evaluate("([steps, from, until]) => walk(steps, from, until)", [steps, start, until])
            return (
                [
                    note | {"end": note["end"] if isinstance(note["end"], float | int) else np.inf}
                    for note in found["log"]
                ],
                found["waits"],
                found["playing"],
            )

        yield walk
        assert tab.problems == []


def growing(rows, step, speed, delay=0.0):
    """Return what is known from which time on if rows are made at a speed, in steps of seconds of music."""
    end = max(row[1] for row in rows)
    made = np.arange(1, int(end / step) + 1) * step
    steps = [[0, [], 0.0]]
    for m in made:
        steps.append([delay + m / speed, [[a, min(b, m), p, v] for a, b, p, v in rows if a < m], float(m)])
    return [*steps, [delay + end / speed, rows, None]]


def random_rows(seed, n=60):
    """Return rows within some 6 s; the same key is never struck twice within its note."""
    rng = np.random.default_rng(seed)
    onset = np.round(np.sort(rng.uniform(0, 6, n)), 3)
    return [[float(t), float(np.round(t + rng.uniform(0.05, 1.5), 3)), 21 + i % 88, 80] for i, t in enumerate(onset)]


@pytest.mark.parametrize("speed", [1.5, 20])
def test_each_note_of_growing_music_is_played_once_and_as_long_as_it_lasts(walk, speed):
    rows = random_rows(0)
    log, waits, playing = walk(growing(rows, 0.4, speed), until=12)
    begin = waits[-1] if waits else 0.0
    assert max(waits, default=0) < 1
    assert [note["pitch"] for note in log] == [row[2] for row in rows]
    shift = log[0]["when"] - rows[0][0]
    assert 0 <= shift - LEAD - begin < 0.05
    for note, (onset, end, *_) in zip(log, rows, strict=True):
        assert note["when"] - shift == pytest.approx(onset, abs=1e-6)
        assert note["end"] - shift == pytest.approx(end, abs=0.03)
    assert not playing


def test_playback_waits_for_slow_music_and_goes_on_where_it_was(walk):
    """Notes that sound where it stops are heard again at their age; none is left out, none is held for ever."""
    rows = random_rows(1)
    log, waits, _ = walk(growing(rows, 0.4, 0.6), until=30)
    assert len(waits) > 20
    fresh = [note for note in log if note["age"] == 0]
    assert sorted(note["pitch"] for note in fresh) == sorted(row[2] for row in rows)
    assert all(np.isfinite(note["end"]) for note in log)
    lasted = {row[2]: row[1] - row[0] for row in rows}
    assert all(note["end"] - note["when"] + note["age"] < lasted[note["pitch"]] + 0.1 for note in log)


def test_known_music_sounds_while_the_new_is_read(walk):
    """From 1 s before the join at 3 s; the new music comes 2 s later."""
    old = [[0.5 * i, 0.5 * i + 0.3, 40 + i, 80] for i in range(6)]
    new = [[3 + 0.25 * i, 3.2 + 0.25 * i, 70 + i, 80] for i in range(8)]
    log, waits, _ = walk([[0, old, 3.0], [2, [*old, *new[:4]], 4.0], [2.5, [*old, *new], None]], start=2.0, until=6)
    assert [note["pitch"] for note in log] == [44, 45, *range(70, 78)]
    assert log[0]["when"] == pytest.approx(LEAD)
    assert min(waits) > 1.0
    assert max(waits) < 2.05
    assert log[2]["when"] == pytest.approx(2 + LEAD, abs=0.05)


def test_pausing_and_ending(walk):
    log, waits, playing = walk([[0, [[0, 1, 60, 80]], None]], until=1.5)
    assert (len(log), waits, playing) == (1, [], True)
    assert not walk([[0, [[0, 1, 60, 80]], None]], until=3)[2]
