"""The files that `generate` reads and writes: complete or not at all, and never over other files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from support.midi_files import midi, note, pedal, track
from support.stand_ins import PlainTokenizer

from dsmr_mlx.cli.outputs import Recordings, encode_prompt, output_paths, provenance
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import sha256
from dsmr_mlx.music.midi import read_notes, read_text
from dsmr_mlx.tokenizers.aria.tokenizer import AriaTokenizer
from dsmr_mlx.tokenizers.event_grammar import beginning
from dsmr_mlx.tokenizers.performance import (
    BOS,
    EOS,
    NOTE_OFF,
    NOTE_ON,
    PAD,
    TIME_SHIFT,
    VELOCITY,
    PerformanceTokenizer,
    performance_grammar,
)

TOKENIZER = PerformanceTokenizer()
G = performance_grammar()
AFTER_20 = beginning(TOKENIZER.event_grammar())._replace(velocity=20)


@pytest.mark.parametrize(
    ("out", "n", "expected"),
    [
        ("a.mid", 1, ["a.mid"]),
        ("a.MIDI", 1, ["a.MIDI"]),
        ("a.b.midi", 3, ["a.b-1.midi", "a.b-2.midi", "a.b-3.midi"]),
        ("new", 1, ["new/1.mid"]),
        ("new/deeper", 2, ["new/deeper/1.mid", "new/deeper/2.mid"]),
        ("there", 2, ["there/1.mid", "there/2.mid"]),
        ("there/x.mid", 2, ["there/x-1.mid", "there/x-2.mid"]),
    ],
)
def test_paths(tmp_path, monkeypatch, out, n, expected):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    assert output_paths(out, n, force=False) == [Path(path) for path in expected]
    absolute = output_paths(tmp_path / out, n, force=False)
    assert absolute == [tmp_path / path for path in expected]
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("out", "n", "message"),
    [
        ("a.mid", 0, "-n 0: expected at least 1"),
        ("taken.mid", 1, "--out taken.mid: already exists, --force overwrites it"),
        ("some.mid", 3, "--out some-2.mid: already exists, --force overwrites it"),
        ("full", 3, "--out full/3.mid: already exists, --force overwrites it"),
        ("folder.mid", 1, "--out folder.mid: is a folder, expected a MIDI file"),
        ("no/a.mid", 1, "--out no/a.mid: no such folder no"),
        ("taken.mid/a.mid", 1, "--out taken.mid/a.mid: no such folder taken.mid"),
        ("song.txt", 1, "--out song.txt: song.txt is a file, expected a folder, or a name that ends in .mid"),
        ("song.txt/a/b", 1, "song.txt is a file, expected a folder"),
    ],
)
def test_invalid_paths(tmp_path, monkeypatch, out, n, message):
    monkeypatch.chdir(tmp_path)
    for name in ("taken.mid", "some-2.mid", "song.txt"):
        Path(name).touch()
    Path("folder.mid").mkdir()
    Path("full").mkdir()
    Path("full/3.mid").touch()
    with pytest.raises(UserError, match=re.escape(message)):
        output_paths(out, n, force=False)
    if "already exists" in message:
        assert len(output_paths(out, n, force=True)) == n


@pytest.fixture
def steps(tmp_path) -> Path:
    """A note every 10 ms for 2 s, each 30 ms long; its last key goes up at 2.02 s."""
    path = tmp_path / "steps.mid"
    path.write_bytes(midi(track(*(note(10 * i, 30, 21 + i % 80) for i in range(200)))))
    return path


def test_a_prompt_is_cut_at_its_seconds(steps):
    whole = encode_prompt(TOKENIZER, steps, None, None)
    assert np.array_equal(whole, TOKENIZER.encode(steps))
    for hundredths in range(1, 203):
        cut = encode_prompt(TOKENIZER, steps, None, hundredths / 100)  # 0.29 / 0.01 is 28.999999999999996
        assert np.array_equal(cut, whole[: len(cut)])
        assert G.ticks[cut].sum() == hundredths
        assert (G.press[cut] >= 0).sum() == min(hundredths + 1, 200)
        assert len(cut) == len(whole) or G.ticks[whole[len(cut)]] == 1
    assert np.array_equal(encode_prompt(TOKENIZER, steps, None, 2.02), whole)
    assert G.ticks[encode_prompt(TOKENIZER, steps, None, 0.999)].sum() == 99
    assert encode_prompt(TOKENIZER, None, None, None) is None


def test_a_cut_prompt_ends_before_a_pause_that_it_would_split(tmp_path):
    path = tmp_path / "rest.mid"
    path.write_bytes(midi(track(note(0, 500, 60), note(3700, 100, 62))))
    shift = TIME_SHIFT - 1
    first = [BOS, VELOCITY + 15, NOTE_ON + 60, shift + 50, NOTE_OFF + 60]
    for seconds, pause in [(1.4, []), (1.5, [shift + 100]), (3.6, [shift + 100] * 3)]:
        assert encode_prompt(TOKENIZER, path, None, seconds).tolist() == [*first, *pause]
    assert encode_prompt(TOKENIZER, path, None, 3.8)[-1] == EOS


@pytest.mark.parametrize("seconds", [2.03, 1e9, float("inf")])
def test_a_prompt_that_is_too_short_is_refused(steps, seconds):
    with pytest.raises(UserError, match=r"--prompt-seconds \S+: .*steps\.mid lasts 2\.02 s, expected at most that"):
        encode_prompt(TOKENIZER, steps, None, seconds)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_invalid_prompt_seconds(steps, seconds):
    with pytest.raises(UserError, match=r"--prompt-seconds \S+: expected more than 0"):
        encode_prompt(TOKENIZER, steps, None, seconds)


def test_prompt_seconds_need_a_prompt_and_times(steps):
    with pytest.raises(UserError, match=r"--prompt-seconds 5: expected --prompt FILE\.mid with it"):
        encode_prompt(TOKENIZER, None, None, 5)
    with pytest.raises(UserError, match="--prompt-seconds 1: tokenizer plain does not encode time, so"):
        encode_prompt(PlainTokenizer(), steps, None, 1)


@pytest.mark.parametrize("start", [0, 0.5, 0.501, 1.99])
def test_prompt_start(steps, start):
    """The first note from there on is at 0 s; notes that began before are left out, even if they still sound."""
    whole = TOKENIZER.decode(encode_prompt(TOKENIZER, steps, None, None))
    late = TOKENIZER.decode(encode_prompt(TOKENIZER, steps, start, None))
    kept = whole.take(whole.onset >= start - 1e-9)
    assert np.array_equal(late.pitch, kept.pitch)
    np.testing.assert_allclose(late.onset, kept.onset - kept.onset[0], atol=1e-9)
    if start < 1.9:
        cut = encode_prompt(TOKENIZER, steps, start, 0.1)
        assert np.array_equal(cut, encode_prompt(TOKENIZER, steps, start, None)[: len(cut)])
        assert G.ticks[cut].sum() == 10


def test_prompt_start_keeps_the_pedal_in_vocabularies_that_have_one(tmp_path):
    """From the first note on, and only if it holds one of the notes."""
    path, tokenizer = tmp_path / "pedal.mid", AriaTokenizer(2675)
    notes = [note(0, 100, 60), note(1000, 200, 62), note(2000, 100, 64)]
    pedals = [(900, pedal(127)), (1500, pedal(0)), (2050, pedal(127)), (2400, pedal(0))]
    path.write_bytes(midi(track(*notes, *pedals)))
    names = [tokenizer.tokens[i] for i in encode_prompt(tokenizer, path, 0.5, None)[2:-1]]
    assert " ".join(names) == (
        "Pedal_down Onset_0 piano_62.60 Onset_0 Duration_500 Pedal_up Onset_500 "
        "piano_64.60 Onset_1000 Duration_400 Pedal_down Onset_1050 Pedal_up Onset_1400"
    )
    assert len(encode_prompt(tokenizer, path, 1.5, None)) == 3 + 7


def test_invalid_prompt_start(steps):
    with pytest.raises(UserError, match=r"--prompt-start 2: the last note of .*steps\.mid is at 1\.99 s"):
        encode_prompt(TOKENIZER, steps, 2.0, None)
    with pytest.raises(UserError, match=r"--prompt-start -1: expected 0 or more"):
        encode_prompt(TOKENIZER, steps, -1.0, None)
    with pytest.raises(UserError, match=r"--prompt-seconds 1\.9: .* lasts 1\.02 s from 1 s on, expected at most that"):
        encode_prompt(TOKENIZER, steps, 1.0, 1.9)
    with pytest.raises(UserError, match=r"--prompt-start 5: expected --prompt FILE\.mid with it"):
        encode_prompt(TOKENIZER, None, 5.0, None)


def lanes_of(n: int) -> np.ndarray:
    """Tokens `(T, n)`: each lane has one note, of another pitch and velocity, and ends one step after the last."""
    note = [
        [VELOCITY + i, NOTE_ON + 60 + i, TIME_SHIFT + 9, NOTE_OFF + 60 + i, *[TIME_SHIFT] * i, EOS] for i in range(n)
    ]
    return np.array([ids + [PAD] * (n + 5 - len(ids)) for ids in note]).T


def write(paths, steps, made_by=None, **options) -> Recordings:
    with Recordings(paths, TOKENIZER, made_by or {}, **{"moments": [None] * len(paths)} | options) as recordings:
        for step in steps:
            recordings.play(step)
    return recordings


def test_written_files_have_the_notes_and_the_text(tmp_path):
    paths = output_paths(tmp_path / "new" / "folder", 2, force=False)
    recordings = write(paths, lanes_of(2), {"seed": 7}, details=[{"score": 1}, {"score": 2}])
    assert [path.name for path in sorted(paths[0].parent.iterdir())] == ["1.mid", "2.mid"]
    for i, path in enumerate(paths):
        assert json.loads(read_text(path)) == {"seed": 7, "variation": i + 1, "score": i + 1}
        assert read_notes(path) == TOKENIZER.decode([VELOCITY + i, NOTE_ON + 60 + i, TIME_SHIFT + 9, NOTE_OFF + 60 + i])
        assert (recordings.lanes[i].notes, recordings.lanes[i].tokens) == (1, 5 + i), "tokens after EOS are ignored"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_the_prompt_is_at_the_start_of_the_file(tmp_path):
    prompt = np.array([BOS, VELOCITY + 20, NOTE_ON + 40, TIME_SHIFT + 99])
    new = [NOTE_OFF + 40, TIME_SHIFT + 99, NOTE_ON + 50, TIME_SHIFT + 49, NOTE_OFF + 50, EOS]
    write([tmp_path / "a.mid"], np.array([new]).T, moments=[None], prompt=prompt)
    notes = read_notes(tmp_path / "a.mid")
    assert notes.pitch.tolist() == [40, 50]
    assert notes.onset.tolist() == [0.0, 2.0]
    assert notes.offset.tolist() == [1.0, 2.5]
    assert notes.velocity.tolist() == [82, 82]
    write([tmp_path / "b.mid"], np.array([new]).T, moments=[AFTER_20])
    notes = read_notes(tmp_path / "b.mid")
    assert (notes.pitch.tolist(), notes.velocity.tolist()) == ([50], [82])


@pytest.mark.parametrize("error", [UserError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("played", [0, 2])
def test_an_error_leaves_the_music_so_far_or_the_old_file(tmp_path, error, played):
    old = tmp_path / "a-1.mid"
    old.write_bytes(b"the old one")

    def steps():
        yield from lanes_of(2)[:played]
        raise error

    with pytest.raises(type(error)):
        write(output_paths(tmp_path / "a.mid", 2, force=True), steps(), prompt=np.array([BOS]))
    if not played:
        assert [path.name for path in tmp_path.iterdir()] == ["a-1.mid"]
        assert old.read_bytes() == b"the old one"
    else:
        assert [read_notes(tmp_path / f"a-{i}.mid").pitch.tolist() for i in (1, 2)] == [[60], [61]]


def test_a_write_error_names_the_file(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsmr_mlx.music.growing_midi.write_atomically", full)
    with pytest.raises(UserError, match=r"--out \S+a\.mid: cannot be written \(No space left on device\)"):
        write([tmp_path / "a.mid"], lanes_of(1))
    assert list(tmp_path.iterdir()) == []


def test_provenance(trained, steps):
    options = {"prompt": str(steps), "seed": 3}
    found = provenance(trained.run, options)
    assert found.pop("program").startswith("dsmr-mlx ")
    assert found == {
        "weights": sha256(trained.checkpoint / "model.safetensors"),
        "prompt": "steps.mid",
        "prompt_sha256": sha256(steps),
        "seed": 3,
    }
    assert provenance(trained.run, {"prompt": None})["prompt"] is None
    assert provenance(trained.run, {"from_state": str(steps)})["from_state_sha256"] == sha256(steps)
    assert options == {"prompt": str(steps), "seed": 3}
