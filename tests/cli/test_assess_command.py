"""`dsmr-mlx assess`: files and excerpts that are read, warnings, output."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from support.midi_files import midi, note, track, tune, write_midi_files
from support.music import notes_of, random_music

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.corpus_writer import CorpusWriter
from dsmr_mlx.data.prepare import prepare
from dsmr_mlx.evaluation.music.assess import assess
from dsmr_mlx.evaluation.music.sets import Music, cut_excerpts, read_reference
from dsmr_mlx.music.midi import read_notes, write_notes
from dsmr_mlx.music.notes import DRUMS, Notes
from dsmr_mlx.music.summary import excerpt, summarize
from dsmr_mlx.tokenizers.miditok.tokenizer import MidiTokTokenizer
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer, encode_notes


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A corpus of 30 s pieces, `corpus`, from the folder `midi`; generated music of 20 s in `made`."""
    folder = tmp_path_factory.mktemp("assess")
    (folder / "midi").mkdir()
    (folder / "made").mkdir()
    for i in range(24):
        write_notes(random_music(i, seconds=30), folder / "midi" / f"{i:02}.mid")
    for i in range(12):
        write_notes(random_music(100 + i, seconds=20), folder / "made" / f"{i:02}.mid")
    prepare(folder / "midi", folder / "corpus", validation_fraction=0.5)
    return folder


def test_tables(run, world):
    """A row for each file with the figures of `show`, a row for each feature, and a summary."""
    shown = run("assess", world / "made", "--reference", world / "corpus")
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    summary = summarize(read_notes(world / "made" / "00.mid"))
    row = lines[1].split()
    assert row[:3] == [str(world / "made" / "00.mid"), f"{summary.notes:,}", f"{summary.seconds:.1f}"]
    assert row[3:6] == [f"{summary.notes_per_second:.1f}", f"{summary.mean_polyphony:.1f}", str(summary.max_polyphony)]
    assert "compared with 12 excerpts of 12 validation pieces" in shown.out
    for name in ("pitch class", "velocity", "polyphony", "density", "key clarity", "loop ratio"):
        assert any(line.startswith(name) for line in lines)
    told = r"a classifier tells generated from real music in \d+ % of the cases \(50 ± \d+ % by luck\), most by \w"
    assert re.search(told, shown.out)
    assert "overlap below 0.8" in shown.out or "every overlap is 0.8 or more" in shown.out


@pytest.mark.slow
def test_json_is_the_whole_assessment(run, world):
    shown = run("assess", world / "made", "--reference", world / "corpus", "--json")
    found = json.loads(shown.out)
    assert found.keys() == {
        "files", "skipped", "reference", "features", "low_overlap", "discriminator", "remarks"
    }  # fmt: skip
    assert 0 <= found["discriminator"]["right"] <= 1
    assert len(found["discriminator"]["by"]) == 4
    assert len(found["files"]) == 12
    by_key = {feature["key"]: feature for feature in found["features"]}
    assert by_key["velocity"]["overlap"] > 0.8
    assert by_key["key_clarity"]["overlap"] is None
    assert by_key["ioi"]["generated"].keys() == {"median", "mean"}
    assert found["reference"]["excerpts"] == 12
    assert run("assess", world / "made", "--reference", world / "corpus", "--json").out == shown.out
    other = json.loads(run("assess", world / "made", "--reference", world / "corpus", "--json", "--seed", 1).out)
    assert other["features"] != found["features"]
    alone = json.loads(run("assess", world / "made", "--json").out)
    assert alone["files"] == found["files"]
    assert alone.keys() == {"files", "skipped"}


def test_a_corpus_equals_its_midi_files(world):
    """Notes, ids and MIDI files of one piece have the same features."""
    corpus = Corpus.load(world / "corpus")
    piece = corpus.pieces("validation")[0]
    a = Music.of("", corpus.tokenizer.decode(corpus.tokens(piece)))
    b = Music.of("", read_notes(world / "midi" / piece.source))
    assert a.notes == b.notes
    assert np.array_equal(a.ids, b.ids)
    assert np.array_equal(a.ids, corpus.tokens(piece)[1:-1])


@pytest.mark.parametrize("seconds", [4.0, 13.0, 100.0])
def test_excerpts_are_disjoint_and_have_the_length(seconds):
    """Notes at 0, 1, … 39 s, so that the pitches tell where an excerpt was cut."""
    notes = notes_of(*((i, i + 0.5, 20 + i, 64) for i in range(40)))
    for seed in range(20):
        cut = cut_excerpts(notes, seconds, 5, np.random.default_rng(seed))
        assert len(cut) == min(max(int(39.5 // seconds), 1), 5)
        places = [set((part.pitch - 20).tolist()) for part in cut]
        assert all(abs(len(place) - min(seconds, 40)) <= 1 for place in places)
        assert sum(map(len, places)) == len(set().union(*places))
        assert all(part.duration <= seconds + 1e-9 for part in cut)


def test_the_choice_of_reference_excerpts(world):
    """Deterministic for a seed; more excerpts than pieces are spread evenly; shorter pieces are counted."""
    first, again, other = (read_reference(world / "corpus", [20.0], excerpts=6, seed=s) for s in (0, 0, 1))
    assert [m.name for m in first.music] == [m.name for m in again.music] != [m.name for m in other.music]
    assert all(a.notes == b.notes for a, b in zip(first.music, again.music, strict=True))
    assert len({m.name for m in first.music}) == first.pieces == 6
    many = [m.name for m in read_reference(world / "corpus", [5.0], excerpts=40, split="train").music]
    assert sorted(many.count(name) for name in set(many)) == [3] * 8 + [4] * 4
    assert read_reference(world / "corpus", [500.0]).shorter == 12
    assert {round(m.notes.duration / 10) for m in read_reference(world / "corpus", [10.0, 20.0]).music} == {1, 2}


def test_drums_only_is_skipped(run, tmp_path):
    drums, piano = (
        Notes.sorted(*np.array([(i / 2, i / 2 + 0.2, 36 + i % 3, 80, program) for i in range(40)]).T)
        for program in (DRUMS, 0)
    )
    tokenizer = MidiTokTokenizer.from_name("TSD", programs=True)
    with CorpusWriter(tmp_path / "corpus", tokenizer) as writer:
        for name, notes in (("drums", drums), ("piano", piano)):
            writer.add(tokenizer.encode_notes(notes), source=name, split="validation", notes=40, duration=20.0)
        writer.commit({})
    (tmp_path / "ids").mkdir()
    for name, notes in (("drums", drums), ("piano", piano)):
        np.save(tmp_path / "ids" / f"{name}.npy", tokenizer.encode_notes(notes))
    assert {m.name for m in read_reference(tmp_path / "corpus", [10.0]).music} == {"piano"}
    shown = run("assess", tmp_path / "ids", "--reference", tmp_path / "corpus")
    assert shown.code == 0
    assert "drums.npy: no notes but drums" in shown.err


def test_a_folder_as_reference(run, world):
    write_midi_files(
        world / "some", {"a.mid": tune(1, 90), "b/c.MID": tune(2, 90), "bad.mid": b"no", ".hidden.mid": b""}
    )
    shown = run("assess", world / "made", "--reference", world / "some")
    assert shown.code == 0
    assert "compared with 2 excerpts of 2 files in" in shown.out
    assert shown.err.startswith("skipped bad.mid: not a readable MIDI file")
    assert "note: 2 reference: OA and the KL of distances are unreliable below 10" in shown.out


def test_warnings(run):
    """Silence, a loop, a stuck key, keys outside the piano, syntax errors, duplicates."""
    pattern = [(0.0, 0.2, 60, 64), (0.3, 0.5, 64, 70), (0.7, 1.0, 67, 64)]
    looped = [(on + 1.2 * i, off + 1.2 * i, pitch, v) for i in range(6) for on, off, pitch, v in pattern]
    write_notes(notes_of(*looped), "loop.mid")
    write_notes(notes_of((0, 1, 60, 64), (4.5, 5, 62, 64)), "silent.mid")
    write_notes(notes_of((0, 1, 5, 64), (1.5, 40, 62, 64)), "stuck.mid")
    write_notes(notes_of((0, 1, 60, 64), (4.5, 5, 62, 64)), "twice.mid")
    good = encode_notes(notes_of((0, 1, 60, 64), (1, 2, 64, 64)))
    np.save("good.npy", good)
    np.save("bad.npy", np.insert(good, 2, good[1]))
    rng = np.random.default_rng(0)
    write_notes(notes_of(*((0.5 * i, 0.5 * i + 0.3, 60 + i % 7, rng.integers(128)) for i in range(60))), "pitches.mid")
    names = ("loop.mid", "silent.mid", "stuck.mid", "twice.mid", "good.npy", "bad.npy", "pitches.mid")
    shown = run("assess", *names)
    assert shown.code == 0
    found = [line.removeprefix("warning: ") for line in shown.out.splitlines() if line.startswith("warning: ")]
    assert found == [
        "loop.mid: 14 events 5 times in a row from 0:00 on",  # the sixth time its last pause is missing
        "silent.mid: 3.5 s of silence from 0:01 on",
        "stuck.mid: a note of 38 s at 0:02",
        "stuck.mid: 1 note outside the piano, F-1 to D4",
        "twice.mid: 3.5 s of silence from 0:01 on",
        "twice.mid: the same music as silent.mid",
        "bad.npy: 1 syntax error, first NOTE_ON_60 at index 2",
        "bad.npy: the same music as good.npy",
        "pitches.mid: 100% of the notes are in loops of pitches",
    ]
    rows = {line.split()[0]: line.split() for line in shown.out.splitlines()[1:8]}
    assert rows["loop.mid"][-4:] == ["5", "×", "14", "–"]
    assert rows["bad.npy"][-1] == "1"
    assert rows["good.npy"][-1] == "0"


def test_unusable_files_are_listed(run, world):
    folder = write_midi_files(
        Path("made"), {"a.mid": tune(0), "b.mid": b"no", "c.mid": midi(track(note(0, 9, 60, channel=9)))}
    )
    np.save(folder / "d.npy", np.zeros((2, 3)))
    np.save(folder / "e.npy", np.array([1, 2]))
    (folder / "f.npy").write_bytes(b"nothing")
    np.save(folder / "g.npy", np.array([None, "x"], object), allow_pickle=True)
    shown = run("assess", "made")
    assert shown.code == 0
    reasons = dict(line.removeprefix("skipped ").split(": ", 1) for line in shown.err.splitlines())
    assert list(reasons) == [f"made/{name}" for name in ("b.mid", "c.mid", "d.npy", "e.npy", "f.npy", "g.npy")]
    assert reasons["made/d.npy"] == "2-d float64, expected 1-d integers"
    assert reasons["made/e.npy"] == "no notes"
    assert reasons["made/g.npy"].startswith("not a NumPy file of ids")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nowhere", "nowhere: does not exist, expected MIDI files or a folder of them"),
        ("empty", "empty: no MIDI file (.mid, .midi, .kar, .rmi) and no .npy, expected at least one"),
        ("bad.mid", "bad.mid: not a readable MIDI file"),
        ("a.mid --split train", "--split train: expected --reference CORPUS with it"),
        ("a.mid --reference nowhere", "--reference nowhere: does not exist, expected a corpus or a folder"),
        ("a.mid --reference a.mid", "--reference a.mid: is a file, expected a corpus or a folder"),
        ("a.mid --reference empty", "--reference empty: neither a corpus nor a folder with MIDI files"),
        ("a.mid --reference some --split test", "--split test: some is not a prepared corpus and has no splits"),
        ("a.mid --reference CORPUS --split test", "no test pieces, expected --split train or validation"),
        ("a.mid --reference some --excerpts 0", "--excerpts 0: expected at least 1"),
        ("a.mid --reference some --seed -1", "--seed -1: expected at least 0"),
        ("a.mid --plot a.pdf", "--plot a.pdf: expected a name that ends in .png or .svg"),
        ("a.mid --plot old.png", "--plot old.png: already exists, --force overwrites it"),
    ],
)
def test_invalid_arguments_are_a_one_line_error(run, world, arguments, message):
    write_midi_files(Path(), {"a.mid": tune(0), "bad.mid": b"no", "some/a.mid": tune(1), "old.png": b""})
    Path("empty").mkdir()
    shown = run("assess", *arguments.replace("CORPUS", str(world / "corpus")).split())
    assert shown.code == 2
    assert message in shown.err
    assert shown.err.startswith("dsmr-mlx: error: ")
    assert shown.err.count("\n") == 1


def test_a_vocabulary_of_ids_cannot_be_a_reference(world, tmp_path):
    from dsmr_mlx.data.corpus_writer import CorpusWriter
    from dsmr_mlx.tokenizers.ids import IdTokenizer

    with CorpusWriter(tmp_path / "ids", IdTokenizer(10, "aria")) as writer:
        writer.add(np.arange(5), source="a", split="validation", duration=1.0, notes=1)
        writer.commit({})
    with pytest.raises(UserError, match="ids: the vocabulary of aria is not part of this program"):
        assess([world / "made"], tmp_path / "ids")


@pytest.mark.slow
def test_plot(run, world):
    """PNG and deterministic SVG with a reference; one note without a reference."""
    image = pytest.importorskip("matplotlib.image")
    made = sorted((world / "made").iterdir())[:3]
    arguments = ["assess", *made, "--reference", world / "corpus", "--plot"]
    for name in ("a.png", "a.svg"):
        shown = run(*arguments, name)
        assert (shown.code, shown.err) == (0, "")
        assert shown.out.splitlines()[-1].startswith(f"{name}: ")
    assert image.imread("a.png").shape[:2] == (1376, 1760)
    first = Path("a.svg").read_bytes()
    assert run(*arguments, "a.svg", "--force", "--json").code == 0
    assert Path("a.svg").read_bytes() == first
    write_notes(notes_of((0, 1, 60, 64)), "one $x$.mid")
    shown = run("assess", "one $x$.mid", "--plot", "one.png")
    assert (shown.code, shown.err) == (0, "")


def test_a_missing_matplotlib_is_an_error_that_says_what_to_install(run, world, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shown = run("assess", world / "made", "--plot", "a.png")
    assert shown.code == 2
    assert "--plot: matplotlib is not installed, expected `pip install 'dsmr-mlx[plot]'`" in shown.err
    assert run("assess", world / "made").code == 0


@pytest.mark.slow
@pytest.mark.asap
def test_real_music_overlaps_with_real_music(asap_dir, tmp_path):
    """Twenty performances compared with twenty others; with random pitches and velocities they overlap less."""
    files = sorted(asap_dir.glob("*/**/*.mid"))[::25]
    found = [excerpt(read_notes(path), 0, 60) for path in files]
    rng = np.random.default_rng(0)

    def assessed(name: str, change) -> dict:
        for i, notes in enumerate(found[::2]):
            np.save(tmp_path / f"{name}-{i}.npy", PerformanceTokenizer().encode_notes(change(notes)))
        result = assess(sorted(tmp_path.glob(f"{name}-*.npy")), tmp_path / "real")
        return {c.key: c for c in result.compared}

    (tmp_path / "real").mkdir()
    for i, path in enumerate(files[1::2]):
        (tmp_path / "real" / f"{i}.mid").symlink_to(path)
    same = assessed("same", lambda n: n)
    noisy = assessed(
        "noisy",
        lambda n: Notes(n.onset, n.offset, rng.permutation(n.pitch), rng.integers(1, 128, len(n))),
    )
    for key in ("pitch_class", "ioi", "duration", "velocity"):
        assert same[key].overlap > 0.8
    assert noisy["velocity"].overlap < 0.65
    assert noisy["interval"].overlap < same["interval"].overlap - 0.1
    assert noisy["loudness_spread"].oa < 0.4 < same["loudness_spread"].oa
