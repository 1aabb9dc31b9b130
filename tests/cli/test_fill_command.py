"""`dsmr-mlx generate` with gaps: --replace, --insert and --lead-to."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import save
from support.midi_files import midi, note, tempo, track, tune, write_midi_files

from dsmr_mlx.cli.fill import parse_span
from dsmr_mlx.generation import filling
from dsmr_mlx.generation.player import Player
from dsmr_mlx.music.midi import read_notes, read_text
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer


@pytest.fixture(scope="module")
def knowing(tmp_path_factory) -> Path:
    """A checkpoint of random weights that counts as trained with gaps."""
    folder = tmp_path_factory.mktemp("knowing") / "model"
    save(folder, PerformanceTokenizer(), fill=0.5)
    return folder


@pytest.fixture
def song(run) -> Notes:
    """Write song.mid and other.mid into the working folder, and return the notes of the song."""
    write_midi_files(Path.cwd(), {"song.mid": tune(1, 60), "other.mid": tune(2, 30)})
    return read_notes("song.mid")


def assert_holds(path: str, given: Notes, start: float, end: float) -> Notes:
    """Assert that a file has the given notes, to a millisecond, and others only in a gap. Return these."""
    notes = read_notes(path)
    new = np.ones(len(notes), bool)
    for onset, offset, pitch, velocity in given.rows:
        same = np.isclose(notes.onset, onset, atol=1e-3) & np.isclose(notes.offset, offset, atol=1e-3)
        (found,) = np.flatnonzero(same & (notes.pitch == pitch) & (notes.velocity == velocity) & new)
        new[found] = False
    added = notes.take(new)
    assert len(added)
    assert ((added.onset >= start) & (added.offset <= end + 1e-3)).all()
    return added


def test_a_passage_is_replaced(run, song, knowing):
    ended = run("generate", knowing, "--prompt", "song.mid", "--replace", "3-6", "-n", 2, "--best-of", 3, "--out", "a")
    assert ended.code == 0, ended.err
    assert ended.err == ""
    outside = song.take((song.onset < 3) | (song.onset >= 6))
    added = [assert_holds(f"a/{i}.mid", outside, 3, 6) for i in (1, 2)]
    assert added[0] != added[1]
    lines = ended.out.splitlines()
    assert lines[0].split() == ["candidate", "passage", "what", "follows", "sum", "notes", "loop", "file"]
    rows = [line.split() for line in lines[1:4]]
    totals = {row[-1]: float(row[3]) for row in rows if row[-1].endswith(".mid")}
    assert totals["a/1.mid"] == min(float(row[3]) for row in rows)
    assert totals["a/1.mid"] <= totals["a/2.mid"]
    stored = json.loads(read_text("a/1.mid"))
    assert stored["replace"] == ["3-6"]
    (passage,) = stored["passages"]
    assert (passage["start"], passage["end"], passage["notes"]) == (3, 6, len(added[0]))
    assert passage["score"]["following"]["nats"] > 0
    again = run("generate", knowing, "--prompt", "song.mid", "--replace", "3-6", "-n", 2, "--best-of", 3, "--out", "b")
    assert again.code == 0
    for i in (1, 2):
        first, second = (json.loads(read_text(f"{out}/{i}.mid")) for out in "ab")
        assert first == second
        assert Path(f"a/{i}.mid").read_bytes() == Path(f"b/{i}.mid").read_bytes()


def test_a_model_that_knows_no_gaps_makes_candidates_and_says_so(generate, song):
    ended = generate("--prompt", "song.mid", "--replace", "3-4", "--out", "a.mid", "--temperature", 0.9)
    assert ended.code == 0
    assert ended.err.startswith("note: ")
    reason = "it does not read what follows a gap (fill is 0 in its config.json)"
    assert f"{reason}; it plays 8 candidates" in ended.err
    assert_holds("a.mid", song.take((song.onset < 3) | (song.onset >= 4)), 3, 4)
    assert len([line for line in ended.out.splitlines() if line.split()[:1] and line.split()[0].isdecimal()]) == 8
    stored = json.loads(read_text("a.mid"))
    assert (stored["best_of"], stored["temperature"]) == (8, 0.9)
    ended = generate("--prompt", "song.mid", "--replace", "3-4", "--best-of", 1, "--out", "b.mid")
    assert ended.err.endswith(f"{reason}; more candidates (--best-of) help\n")


def test_several_passages_the_whole_shown_and_marked(run, song, knowing):
    options = ["--replace", "0:06-0:07.5", "--replace", "2-3", "--seed", 4, "--show"]
    ended = run("generate", knowing, "--prompt", "song.mid", *options)
    assert ended.code == 0, ended.err
    notes = read_notes("song-4.mid")
    inside = ((notes.onset >= 2) & (notes.onset < 3)) | ((notes.onset >= 6) & (notes.onset < 7.5))
    original = ((song.onset >= 2) & (song.onset < 3)) | ((song.onset >= 6) & (song.onset < 7.5))
    assert notes.pitch[~inside].tolist() == song.pitch[~original].tolist()
    assert [passage["start"] for passage in json.loads(read_text("song-4.mid"))["passages"]] == [2, 6]
    rolls = ended.out.partition("recurrent state")[2]
    rulers = "".join(line[6:] for line in rolls.splitlines() if "└" in line)
    bold = sum(c in "━┯" for c in rulers)
    assert 0.5 * 2.5 / 12.5 < bold / len(rulers) < 2 * 2.5 / 12.5
    assert "━━ new music" in rolls


def test_music_is_opened_and_led_into_another_piece(run, song, knowing):
    ended = run("generate", knowing, "--prompt", "song.mid", "--insert", 4, "--seconds", 2, "--out", "a.mid")
    assert ended.code == 0, ended.err
    later = np.where(song.onset >= 4, 2.0, 0.0)
    moved = Notes(song.onset + later, song.offset + later, song.pitch, song.velocity)
    assert_holds("a.mid", moved, 4, 6)

    ended = run("generate", knowing, "--prompt", "song.mid", "--lead-to", "other.mid", "--out", "b.mid", "--show")
    assert ended.code == 0, ended.err
    other, end = read_notes("other.mid"), song.duration + 10
    moved = Notes.sorted(*(np.concatenate(pair) for pair in (
        (song.onset, other.onset + end), (song.offset, other.offset + end),
        (song.pitch, other.pitch), (song.velocity, other.velocity),
    )))  # fmt: skip
    assert_holds("b.mid", moved, song.duration, end)
    assert json.loads(read_text("b.mid"))["lead_to"] == "other.mid"

    part = ["--prompt-start", 1, "--prompt-seconds", 3, "--seconds", 1.5]
    ended = run("generate", knowing, "--prompt", "song.mid", "--lead-to", "other.mid", *part, "--out", "c.mid")
    assert ended.code == 0, ended.err
    late = song.take(song.onset >= 1).from_first_onset()
    first = late.take(late.onset < 3)
    notes = read_notes("c.mid")
    assert notes.pitch[: len(first)].tolist() == first.pitch.tolist()
    assert notes.pitch[-len(other) :].tolist() == other.pitch.tolist()
    np.testing.assert_allclose(notes.onset[-len(other) :], other.onset + 4.5, atol=2e-3)


def test_notes_that_sound_into_a_gap(run, knowing):
    events = [note(0, 5000, 40), note(100, 100, 60), note(200, 50, 64), note(3000, 200, 67), note(6000, 100, 72)]
    write_midi_files(Path.cwd(), {"held.mid": midi(track(*events))})
    for options, end in ([], 5.0), (["--cut-into-gap"], 1.0):
        out = f"{end:g}.mid"
        ended = run("generate", knowing, "--prompt", "held.mid", "--replace", "1-4", "--out", out, *options)
        assert ended.code == 0, ended.err
        notes = read_notes(out)
        assert notes.rows[0] == (0.0, end, 40, 64)
        assert notes.rows[-1] == (6.0, 6.1, 72, 64)


def test_ctrl_c_leaves_a_complete_piece(run, song, knowing, monkeypatch):
    with monkeypatch.context() as patched:
        original = Player.play

        def play(self, *limits):
            for count, step in enumerate(original(self, *limits)):
                if count == 5:
                    signal.raise_signal(signal.SIGINT)
                yield step

        patched.setattr(Player, "play", play)
        stopped = run("generate", knowing, "--prompt", "song.mid", "--replace", "3-6", "--out", "a.mid")
    assert (stopped.code, stopped.err) == (130, "dsmr-mlx: interrupted\n")
    notes = read_notes("a.mid")
    outside = song.take((song.onset < 3) | (song.onset >= 6))
    assert notes.pitch[(notes.onset < 3) | (notes.onset >= 6)].tolist() == outside.pitch.tolist()


def test_ctrl_c_before_the_ranking_keeps_the_first_candidates(run, song, knowing, monkeypatch):
    with monkeypatch.context() as patched:
        original = filling.score_passage

        def score(*arguments, **options):
            signal.raise_signal(signal.SIGINT)
            return original(*arguments, **options)

        patched.setattr(filling, "score_passage", score)
        options = ["--replace", "3-6", "--best-of", 3, "--out", "a.mid"]
        stopped = run("generate", knowing, "--prompt", "song.mid", *options)
    note = "note: interrupted before the candidates were ranked; the first of them are kept\n"
    assert (stopped.code, stopped.err) == (130, f"{note}dsmr-mlx: interrupted\n")
    assert "what follows" not in stopped.out
    read_notes("a.mid")


@pytest.mark.slow
@pytest.mark.asap
def test_everything_outside_random_gaps_of_performances_is_exact(run, knowing, asap_dir):
    rng = np.random.default_rng(3)
    files = sorted(path for path in asap_dir.rglob("*.mid") if "score" not in path.name)
    for i in range(6):
        path = files[rng.integers(len(files))]
        piece = read_notes(path)
        start = round(float(rng.uniform(1, piece.duration - 5)), 3)
        span = f"{start}-{start + 3:.3f}"
        ended = run("generate", knowing, "--prompt", path, "--replace", span, "--out", f"{i}.mid", "--seed", i)
        assert ended.code == 0, ended.err
        notes = read_notes(f"{i}.mid")
        outside = [(n.onset < start) | (n.onset >= round(start + 3, 3)) for n in (piece, notes)]
        given, kept = piece.take(outside[0]), notes.take(outside[1])
        order = [np.lexsort((n.pitch, np.rint(n.onset * 1000))) for n in (given, kept)]
        for name, error in (("pitch", 0), ("velocity", 0), ("onset", 1e-3), ("offset", 1e-3)):
            ours, theirs = (getattr(n, name)[o].astype(float) for n, o in zip((kept, given), order, strict=True))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=error + 1e-9)


@pytest.mark.parametrize(("program", "files"), [(40, [40]), (3, [0])])
def test_one_instrument_is_kept(run, knowing, program, files):
    change = (0, bytes([0xC0, program]))
    write_midi_files(Path.cwd(), {"violin.mid": midi(track(change, *[note(300 * i, 200, 60 + i) for i in range(30)]))})
    ended = run("generate", knowing, "--prompt", "violin.mid", "--replace", "2-4", "--out", "a.mid")
    assert ended.code == 0, ended.err
    assert read_notes("a.mid", programs=True).programs == files


@pytest.mark.parametrize("programs", [(40, 73), (40, 0), (0, 40)])
def test_a_piece_for_another_instrument_does_not_follow(run, knowing, programs):
    for name, program in zip(("a.mid", "b.mid"), programs, strict=True):
        Path(name).write_bytes(midi(track((0, bytes([0xC0, program])), *[note(300 * i, 200, 60) for i in range(9)])))
    ended = run("generate", knowing, "--prompt", "a.mid", "--lead-to", "b.mid", "--out", "c.mid")
    assert ended.err == "dsmr-mlx: error: --lead-to b.mid: another instrument than that of a.mid, expected the same\n"
    assert ended.code == 2


WRONG = {
    "alone": (["--replace", "3-6"], "--replace: expected the piece as --prompt FILE.mid with it"),
    "cut alone": (["--cut-into-gap"], "--cut-into-gap: expected --replace, --insert or --lead-to with it"),
    "two kinds": (
        ["--prompt", "song.mid", "--replace", "3-6", "--insert", 3],
        "--replace and --insert: expected only one of them",
    ),
    "no span": (
        ["--prompt", "song.mid", "--replace", "3"],
        "--replace 3: expected START-END in seconds, such as 12.5-20, or 1:05-1:12.5",
    ),
    "no time": (["--prompt", "song.mid", "--insert", "x", "--seconds", 3], "--insert x: expected a time in seconds"),
    "empty": (["--prompt", "song.mid", "--replace", "3-3"], "--replace 3-3: expected an end after the start"),
    "outside": (["--prompt", "song.mid", "--replace", "300-301"], "--replace 300-301: the piece lasts "),
    "overlap": (
        ["--prompt", "song.mid", "--replace", "5-7", "--replace", "3-6"],
        "--replace 5-7: overlaps 3-6; expected passages apart, or one passage",
    ),
    "long": (["--prompt", "song.mid", "--replace", "3-3700"], "3,697 s long, expected at most 3,600"),
    "all": (["--prompt", "song.mid", "--replace", "0-100"], "--replace 0-100: no note of the piece is left"),
    "seconds": (
        ["--prompt", "song.mid", "--replace", "3-6", "--seconds", 3],
        "--seconds: not with --replace, the passage is as long as the one that it replaces",
    ),
    "tokens": (
        ["--prompt", "song.mid", "--replace", "3-6", "--tokens", 9],
        "--tokens: not with --replace, expected se",
    ),
    "no length": (["--prompt", "song.mid", "--insert", "3"], "--insert 3: expected --seconds with it, the length of"),
    "no seconds": (["--prompt", "song.mid", "--insert", "3", "--seconds", 0], "--seconds 0: expected more than 0"),
    "place": (["--prompt", "song.mid", "--insert", "300", "--seconds", 3], "--insert 300: expected 0 to "),
    "only": (
        ["--prompt", "song.mid", "--replace", "3-6", "--continuation-only"],
        "--continuation-only: not with --replace, the whole piece is written",
    ),
    "part": (
        ["--prompt", "song.mid", "--replace", "3-6", "--prompt-seconds", 9],
        "--prompt-seconds: not with --replace, the whole piece is written",
    ),
    "end": (["--prompt", "song.mid", "--replace", "3-6", "--may-end"], "--may-end: not with --replace, the end of"),
    "state": (
        ["--prompt", "song.mid", "--replace", "3-6", "--save-state", "a.safetensors"],
        "--save-state: not with --replace, the whole piece is written",
    ),
    "no other": (["--prompt", "song.mid", "--lead-to", "no.mid"], "no.mid: cannot be read (No such file"),
    "too much": (
        ["--prompt", "song.mid", "--lead-to", "other.mid", "--prompt-seconds", 999],
        "--prompt-seconds 999: song.mid lasts ",
    ),
    "late": (
        ["--prompt", "song.mid", "--lead-to", "other.mid", "--prompt-start", 999],
        "--prompt-start 999: the last note of song.mid is at ",
    ),
    "band": (
        ["--prompt", "band.mid", "--replace", "3-6"],
        "band.mid: program 0, drums; expected one instrument without drums, as the model has only one",
    ),
    "exists": (["--prompt", "song.mid", "--replace", "3-6", "--out", "other.mid"], "--out other.mid: already exists"),
    "few": (["--prompt", "song.mid", "--replace", "3-6", "-n", 3, "--best-of", 2], "--best-of 2: expected at least 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_gaps_are_one_line(run, song, knowing, case):
    options, message = WRONG[case]
    drums = midi(track((0, tempo(500_000)), note(0, 100, 60)), track(note(50, 100, 38, channel=9)))
    write_midi_files(Path.cwd(), {"band.mid": drums})
    before = sorted(Path.cwd().iterdir())
    ended = run("generate", knowing, *options)
    assert ended.code == 2
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert ended.out == ""
    assert sorted(Path.cwd().iterdir()) == before


def test_times_may_have_minutes():
    assert parse_span("1:05-1:12.5") == (65, 72.5)
    assert parse_span(" 12.5 – 20. ") == (12.5, 20)
    assert parse_span(".5-0:59") == (0.5, 59)
