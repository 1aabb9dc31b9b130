"""Where music is read from and written to: all of it or nothing, and never over something else."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from midi_files import midi, note, track
from stand_ins import PlainTokenizer

from dsmr_mlx import outputs
from dsmr_mlx.checkpoint import sha256
from dsmr_mlx.errors import UserError
from dsmr_mlx.generation import GenerationReport, Variation
from dsmr_mlx.midi import read_notes, read_text
from dsmr_mlx.outputs import output_paths, provenance, read_prompt, write_variations
from dsmr_mlx.performance import BOS, EOS, NOTE_OFF, NOTE_ON, TIME_SHIFT, VELOCITY, performance_grammar
from dsmr_mlx.tokenizer import PerformanceTokenizer

TOKENIZER = PerformanceTokenizer()
G = performance_grammar()


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
def test_paths_that_cannot_be(tmp_path, monkeypatch, out, n, message):
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
    whole = read_prompt(TOKENIZER, steps, None)
    assert np.array_equal(whole, TOKENIZER.encode(steps))
    for hundredths in range(1, 203):
        cut = read_prompt(TOKENIZER, steps, hundredths / 100)  # 0.29 / 0.01 is 28.999999999999996
        assert np.array_equal(cut, whole[: len(cut)])
        assert G.ticks[cut].sum() == hundredths
        assert (G.press[cut] >= 0).sum() == min(hundredths + 1, 200)
        assert len(cut) == len(whole) or G.ticks[whole[len(cut)]] == 1
    assert np.array_equal(read_prompt(TOKENIZER, steps, 2.02), whole)
    assert G.ticks[read_prompt(TOKENIZER, steps, 0.999)].sum() == 99
    assert read_prompt(TOKENIZER, None, None) is None


def test_a_cut_prompt_stops_before_a_pause_that_it_would_divide(tmp_path):
    path = tmp_path / "rest.mid"
    path.write_bytes(midi(track(note(0, 500, 60), note(3700, 100, 62))))
    shift = TIME_SHIFT - 1
    first = [BOS, VELOCITY + 15, NOTE_ON + 60, shift + 50, NOTE_OFF + 60]
    for seconds, pause in [(1.4, []), (1.5, [shift + 100]), (3.6, [shift + 100] * 3)]:
        assert read_prompt(TOKENIZER, path, seconds).tolist() == [*first, *pause]
    assert read_prompt(TOKENIZER, path, 3.8)[-1] == EOS


@pytest.mark.parametrize("seconds", [2.03, 1e9, float("inf")])
def test_a_prompt_shorter_than_asked_is_refused(steps, seconds):
    with pytest.raises(UserError, match=r"--prompt-seconds \S+: .*steps\.mid lasts 2\.02 s, expected no more"):
        read_prompt(TOKENIZER, steps, seconds)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_prompt_of_no_length_is_refused(steps, seconds):
    with pytest.raises(UserError, match=r"--prompt-seconds \S+: expected more than 0"):
        read_prompt(TOKENIZER, steps, seconds)


def test_prompt_seconds_need_a_prompt_and_a_clock(steps):
    with pytest.raises(UserError, match=r"--prompt-seconds 5: expected --prompt FILE\.mid with it"):
        read_prompt(TOKENIZER, None, 5)
    with pytest.raises(UserError, match="--prompt-seconds 1: tokenizer 'plain' has no clock, give a shorter file"):
        read_prompt(PlainTokenizer(), steps, 1)


def report_of(n: int) -> GenerationReport:
    notes = [[VELOCITY + i, NOTE_ON + 60 + i, TIME_SHIFT + 9, NOTE_OFF + 60 + i, EOS] for i in range(n)]
    return GenerationReport(variations=[Variation(np.array(ids), TOKENIZER.decode(ids)) for ids in notes])


def test_what_is_written_is_read(tmp_path):
    paths = output_paths(tmp_path / "new" / "folder", 2, force=False)
    write_variations(paths, TOKENIZER, report_of(2), None, {"seed": 7})
    assert [path.name for path in sorted(paths[0].parent.iterdir())] == ["1.mid", "2.mid"]
    for i, path in enumerate(paths):
        assert json.loads(read_text(path)) == {"seed": 7, "variation": i + 1}
        assert read_notes(path) == TOKENIZER.decode([VELOCITY + i, NOTE_ON + 60 + i, TIME_SHIFT + 9, NOTE_OFF + 60 + i])
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_the_prompt_comes_first(tmp_path):
    prompt = np.array([BOS, VELOCITY + 20, NOTE_ON + 40, TIME_SHIFT + 99])
    path = tmp_path / "a.mid"
    ids = np.array([NOTE_OFF + 40, TIME_SHIFT + 99, NOTE_ON + 50, TIME_SHIFT + 49, NOTE_OFF + 50, EOS])
    report = GenerationReport(variations=[Variation(ids, TOKENIZER.decode(ids))])
    write_variations([path], TOKENIZER, report, prompt, {})
    notes = read_notes(path)
    assert notes.pitch.tolist() == [40, 50]
    assert notes.onset.tolist() == [0.0, 2.0]
    assert notes.offset.tolist() == [1.0, 2.5]
    assert notes.velocity.tolist() == [82, 82]


@pytest.mark.parametrize("fails_at", [0, 2])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UserError("broken"), KeyboardInterrupt()])
def test_an_error_in_the_middle_leaves_nothing(tmp_path, monkeypatch, fails_at, error):
    old = tmp_path / "a-1.mid"
    old.write_bytes(b"the old one")
    calls = []

    def failing(path, data):
        calls.append(path)
        if len(calls) > fails_at:
            raise error
        path.write_bytes(data)

    monkeypatch.setattr(outputs, "write_atomically", failing)
    for out in ("a.mid", "new/folder"):
        calls.clear()
        with pytest.raises((UserError, KeyboardInterrupt)) as caught:
            write_variations(output_paths(tmp_path / out, 3, force=True), TOKENIZER, report_of(3), None, {})
        if isinstance(error, OSError):
            assert re.fullmatch(r"--out \S+: cannot be written \(No space left on device\)", str(caught.value))
        assert len(calls) == fails_at + 1
        assert [path.name for path in tmp_path.iterdir()] == ["a-1.mid"]
        assert old.read_bytes() == b"the old one"


def test_the_origin_of_a_file(trained, steps):
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
    assert options == {"prompt": str(steps), "seed": 3}


def test_variations_and_paths_must_agree(tmp_path):
    with pytest.raises(ValueError, match=r"shorter|longer"):
        write_variations([tmp_path / "a.mid"], TOKENIZER, report_of(3), None, {})
    assert not list(tmp_path.iterdir())
