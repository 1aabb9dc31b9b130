"""The synthesized piano, rendered by a browser: levels, timbre, decay, dampers, pedal, no clicks."""

import base64
from functools import partial

import numpy as np
import pytest
from support.browser import open_browser, open_modules

RATE = 44100
BEGIN = 0.1  # seconds, of the first note
RENDER = """async ([notes, seconds, pedal, silence, live]) => {
  const {Piano, samples} = await import("/piano.js");
  samples.compute([...notes.map((note) => note[2]), ...live]);
  const context = new OfflineAudioContext(2, seconds * 44100, 44100), piano = new Piano(context);
  await piano.ready;
  for (const [time, down] of pedal) piano.setResonance(down, time);
  for (const [onset, offset, pitch, velocity] of notes) piano.play(pitch, velocity, onset, offset);
  if (silence !== null) context.suspend(silence).then(() => {
    piano.silenceAll();
    for (const pitch of live) piano.press(pitch, 90);
    context.resume();
  });
  const sound = await context.startRendering();
  return [0, 1].map((side) => {
    const bytes = new Uint8Array(sound.getChannelData(side).buffer);
    let text = "";
    for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
    return btoa(text);
  });
}"""
pytestmark = pytest.mark.slow


def render(tab, notes, seconds, pedal=(), silence=None, live=()) -> np.ndarray:
    """Return the sound (2, samples) of notes (onset, offset, pitch, velocity).

    silence: when all of them are silenced, and the pitches of `live` are pressed
    """
    sides = tab.page.evaluate(RENDER, [notes, seconds, list(pedal), silence, list(live)])
    return np.stack([np.frombuffer(base64.b64decode(side), "<f4") for side in sides])


@pytest.fixture(scope="module")
def play():
    """Return a function that renders notes."""
    with open_browser() as browser:
        tab = open_modules(browser)
        yield partial(render, tab)
        assert tab.problems == []


def level(sound: np.ndarray, start: float, end: float) -> float:
    """Root mean square in dB between two times."""
    return 10 * np.log10(np.mean(sound[..., int(start * RATE) : int(end * RATE)] ** 2) + 1e-15)


def centroid(sound: np.ndarray) -> float:
    """Spectral centroid in Hz of the first 0.2 s of the first note."""
    part = sound.mean(axis=0)[int(BEGIN * RATE) :][: RATE // 5]
    power = np.abs(np.fft.rfft(part * np.hanning(len(part)))) ** 2
    return float((np.fft.rfftfreq(len(part), 1 / RATE) * power).sum() / power.sum())


@pytest.mark.parametrize("pitch", [28, 52, 76])
def test_a_harder_blow_is_louder_and_brighter(play, pitch):
    sounds = [play([(BEGIN, 1, pitch, velocity)], 1) for velocity in (20, 64, 120)]
    levels = [level(sound, BEGIN, BEGIN + 0.2) for sound in sounds]
    assert levels[0] > -55
    assert levels[1] - levels[0] > 8
    assert levels[2] - levels[1] > 6
    brightness = [centroid(sound) for sound in sounds]
    assert brightness[0] * 1.1 < brightness[1]
    assert brightness[1] * 1.15 < brightness[2]
    assert all(np.abs(sound[:, : int(BEGIN * RATE)]).max() < 1e-6 for sound in sounds)


def test_low_notes_last_longer_in_two_stages(play):
    """Decay in dB/s: fast at first, then slow; faster for high notes."""
    early, late = [], []
    for pitch in (33, 57, 81):
        sound = play([(BEGIN, 9, pitch, 90)], 3)
        early.append(level(sound, 0.2, 0.4) - level(sound, 0.7, 0.9))
        late.append((level(sound, 1.5, 2.0) - level(sound, 2.4, 2.9)) / 1.8)
    assert early[0] < early[1] < early[2]
    assert 0.5 < early[0] < 5
    assert 8 < early[2] < 25
    assert all(slow < fast for slow, fast in zip(late, early, strict=True))


def test_chords_stay_within_bounds(play):
    keys = (36, 43, 48, 52, 55, 60, 64, 67, 72, 76)
    loud = play([(BEGIN, 2, key, 127) for key in keys], 2)
    soft = play([(BEGIN, 2, key, 25) for key in keys], 2)
    assert np.abs(loud).max() < 0.99
    assert -18 < level(loud, 0.1, 0.6) < -6
    assert -40 < level(soft, 0.1, 0.6) < -22


def test_dampers_and_pedal(play):
    """A damper ends a note; keys above F6 have none; with the pedal down, the other strings sound along."""
    damped = play([(BEGIN, 0.4, 60, 90)], 1.5)
    assert level(damped, 0.3, 0.4) - level(damped, 1.0, 1.4) > 40
    free = play([(BEGIN, 0.4, 92, 90)], 1.5)
    assert level(free, 0.3, 0.4) - level(free, 1.0, 1.4) < 30
    ringing = play([(BEGIN, 0.4, 60, 90)], 1.5, [(0, True)])
    assert 15 < level(ringing, 1.0, 1.4) - level(damped, 1.0, 1.4) < 60
    released = play([(BEGIN, 0.4, 60, 90)], 1.5, [(0, True), (0.6, False)])
    assert level(ringing, 1.2, 1.4) > level(released, 1.2, 1.4)


def test_silence_includes_what_is_scheduled(play):
    """Playback schedules notes and pedal ahead. After a pause the sound is as if they had never been scheduled."""
    sounding = [(BEGIN, 1, 60, 90)]
    coming = [(0.3 + 0.004 * i, 1, 61 + 3 * (i % 3), 90) for i in range(90)]  # more than can sound at once
    paused = play([*sounding, *coming], 1, [(0.25, True)], silence=0.2, live=[72])
    assert np.abs(paused - play(sounding, 1, silence=0.2, live=[72])).max() < 1e-4
    nothing = play([*sounding, *coming], 1, silence=0.2)
    levels = [level(nothing, start, start + 0.2) for start in (0.2, 0.4, 0.6, 0.8)]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] - levels[1] > 8


def test_fast_music_has_no_clicks(play):
    """No sudden jump: energy above 17 kHz, where no string reaches, stays 50 dB below the music in every 5 ms."""
    rng = np.random.default_rng(0)
    notes = [
        (BEGIN + 0.025 * i, BEGIN + 0.025 * i + rng.uniform(0.03, 1.5), int(rng.integers(36, 90)), 90)
        for i in range(120)
    ]
    sound = play(notes, 4)
    high = np.fft.rfft(sound * np.minimum(1, np.arange(sound.shape[1])[::-1] / RATE))
    high[:, np.fft.rfftfreq(sound.shape[1], 1 / RATE) < 17_000] = 0
    high = np.fft.irfft(high, sound.shape[1])
    windows = np.sqrt(np.mean(high[:, : len(high[0]) // 220 * 220].reshape(2, -1, 220) ** 2, axis=2))
    assert 20 * np.log10(windows.max()) < level(sound, BEGIN, 3) - 50
    assert np.abs(np.diff(sound)).max() < 0.3
    assert np.abs(sound).max() < 0.99


def test_low_keys_are_left_and_high_keys_right(play):
    sides = [level(side, 0.1, 0.5) for pitch in (30, 100) for side in play([(BEGIN, 1, pitch, 90)], 0.6)]
    assert 1 < sides[0] - sides[1] < 10
    assert 1 < sides[3] - sides[2] < 10
