"""`dsmr-mlx assess --training`: the longest runs that music shares with the training music of a model."""

import json

import numpy as np
import pytest
from support.midi_files import write_midi_files
from support.music import random_music

from dsmr_mlx.cli.assess import show_shared
from dsmr_mlx.data.corpus import Corpus, Skipped
from dsmr_mlx.data.prepare import prepare
from dsmr_mlx.evaluation.music.copies import (
    SharedRun,
    SharedRuns,
    SharedWithTraining,
    TrainingMusic,
    read_training,
    shared_with_training,
)
from dsmr_mlx.evaluation.music.sets import Music
from dsmr_mlx.evaluation.music.shared_runs import READINGS
from dsmr_mlx.music.midi import write_notes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.registry import make_tokenizer


def shifted(notes: Notes, seconds: float, semitones: int = 0, stretch: float = 1.0) -> Notes:
    """Return notes stretched in time, moved in time and transposed."""
    onset, offset = (seconds + stretch * times for times in (notes.onset, notes.offset))
    return Notes(onset, offset, notes.pitch + semitones, notes.velocity)


def joined(*parts: Notes) -> Notes:
    """Return the notes of several parts, sorted."""
    columns = ("onset", "offset", "pitch", "velocity")
    return Notes.sorted(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A corpus of random pieces of 30 s, and four generated pieces of 20 s.

    From 10 s on, three of these continue with 5 s of a training piece: unchanged, 3 semitones higher, and 1.5 times
    slower.
    """
    folder = tmp_path_factory.mktemp("copies")
    (folder / "midi").mkdir()
    for i in range(12):
        write_notes(random_music(i, seconds=30), folder / "midi" / f"{i:02}.mid")
    prepare(folder / "midi", folder / "corpus", validation_fraction=0.5)
    corpus = Corpus.load(folder / "corpus")
    piece = corpus.pieces("train")[2]
    notes = corpus.tokenizer.decode(corpus.tokens(piece))
    part = notes.take((notes.onset >= 12) & (notes.onset < 17))
    part = shifted(part, -part.onset[0])
    (folder / "made").mkdir()
    changes = {"copied": {}, "higher": {"semitones": 3}, "slower": {"stretch": 1.5}}
    for i, (name, change) in enumerate(changes.items()):
        own = random_music(100 + i, seconds=20)
        own = own.take((own.offset < 9.9) | (own.onset > 18))
        write_notes(joined(own, shifted(part, 10.0, **change)), folder / "made" / f"{name}.mid")
    write_notes(random_music(200, seconds=20), folder / "made" / "new.mid")
    return folder, piece, part


def found_in(world, run, *options) -> dict[str, dict[str, dict]]:
    """The shared runs by reading and file name."""
    folder = world[0]
    shown = run("assess", folder / "made", "--training", folder / "corpus", "--json", *options)
    assert shown.code == 0, shown.err
    training = json.loads(shown.out)["training"]
    assert training["kind"] == f"train pieces of {folder / 'corpus'}"
    return {
        r["reading"]: {found["name"].split("/")[-1][:-4]: found for found in r["generated"]}
        for r in training["readings"]
    }


def test_copies_are_found_in_the_readings_that_ignore_the_change(world, run):
    """At the right place of the right piece; the other readings and the new piece share little."""
    _, piece, part = world
    found = found_in(world, run)
    assert list(found) == list(READINGS)
    new = {reading: found[reading]["new"]["length"] for reading in READINGS}
    assert all(length < len(part) / 2 for length in new.values())
    detecting = {"copied": set(READINGS), "higher": {"transposed", "notes"}, "slower": {"notes"}}
    for name, readings in detecting.items():
        for reading in READINGS:
            run_of = found[reading][name]
            if reading not in readings:
                assert run_of["length"] < len(part)
                continue
            assert run_of["length"] >= len(part) if reading == "notes" else run_of["length"] > 2 * len(part)
            assert run_of["piece"] == piece.source
            assert run_of["semitones"] == (3 if name == "higher" else 0)
            assert run_of["piece_at"] - run_of["at"] == pytest.approx(12 - 10, abs=0.6)
            assert run_of["pitches"] == len(set(part.pitch.tolist()))
            assert run_of["seconds"] == pytest.approx(5 * (1.5 if name == "slower" else 1), rel=0.15)


@pytest.mark.slow
def test_runs_of_the_reference_are_reported_too(world, run):
    """Of as many excerpts as there are files, of the same lengths."""
    folder = world[0]
    options = ["--training", folder / "corpus", "--reference", folder / "corpus"]
    values = json.loads(run("assess", folder / "made", *options, "--json").out)["training"]
    for reading in values["readings"]:
        assert len(reading["reference"]) == reading["reference_summary"]["files"] == 4
        assert reading["generated_summary"]["longest"] == max(found["length"] for found in reading["generated"])
        assert reading["reference_summary"]["longest"] < len(world[2])
    shown = run("assess", folder / "made", *options)
    lines = shown.out.splitlines()
    heading = f"longest runs shared with 6 train pieces of {folder / 'corpus'}, {values['events']:,} events"
    row = lines[lines.index(heading) + 4].split()
    longest = values["readings"][2]["generated_summary"]["longest"]
    assert row[:5] == ["notes", "alone,", "transposed", *row[3:4], f"{longest}"]
    assert any(line.startswith("events: ") and "copied.mid at 0:10" in line for line in lines)


def test_training_music_may_be_a_folder_or_any_corpus(world, run, tmp_path):
    """The same pieces as MIDI files, and as a corpus of other tokens, share the same runs."""
    folder = world[0]
    corpus = Corpus.load(folder / "corpus")
    train = {piece.source: (folder / "midi" / piece.source).read_bytes() for piece in corpus.pieces("train")}
    write_midi_files(tmp_path / "train", train | {"bad.mid": b"no"})
    prepare(folder / "midi", tmp_path / "tsd", tokenizer=make_tokenizer("miditok:TSD"), validation_fraction=0.5)
    lengths = {}
    for training in (folder / "corpus", tmp_path / "train"):
        shown = run("assess", folder / "made", "--training", training, "--json")
        readings = json.loads(shown.out)["training"]["readings"]
        lengths[training] = [[found["length"] for found in reading["generated"]] for reading in readings]
    assert lengths[folder / "corpus"] == lengths[tmp_path / "train"]
    assert [skipped["source"] for skipped in json.loads(shown.out)["training"]["skipped"]] == ["bad.mid"]
    shown = run("assess", folder / "made", "--training", tmp_path / "train")
    assert "skipped bad.mid: not a readable MIDI file" in shown.err
    training = json.loads(run("assess", folder / "made", "--training", tmp_path / "tsd", "--json").out)["training"]
    assert training["pieces"] == 6
    assert [found["length"] for found in training["readings"][2]["generated"]] == lengths[folder / "corpus"][2]


def test_the_longest_runs_of_fewer_excerpts_are_not_compared(capsys):
    """Only their medians are, also in the tables and in JSON."""
    runs = [SharedRun(f"{n}", n, 1.0, 0.0, 1, "a", 0.0, 0) for n in (3, 5, 9)]
    assert SharedRuns("events", runs, runs[:2]).summaries == {
        "generated": {"files": 3, "median": 5, "longest": 9},
        "reference": {"files": 2, "median": 4, "longest": None},
    }
    assert SharedRuns("events", runs[:2], runs[:2]).summaries["reference"]["longest"] == 5
    assert SharedRuns("events", runs, []).summaries.keys() == {"generated"}
    shared = SharedWithTraining("pieces", 1, 9, [SharedRuns("events", runs, runs[:2])], [Skipped("bad.mid", "broken")])
    assert shared.to_dict()["readings"][0]["reference_summary"]["longest"] is None
    assert shared.to_dict()["skipped"] == [{"source": "bad.mid", "reason": "broken"}]
    show_shared(shared)
    shown = capsys.readouterr().out
    assert shown.splitlines()[2].split()[-4:] == ["5", "9", "4", "–"]
    assert "2 excerpts of the reference for 3 files: their longest runs cannot be compared" in shown


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("nowhere", "--training nowhere: does not exist, expected a corpus or a folder of MIDI files"),
        ("made/new.mid", "new.mid: is a file, expected a corpus or a folder of MIDI files"),
        ("empty", "--training empty: neither a corpus nor a folder with MIDI files"),
        ("silent", "--training silent: no notes in any of 1 files in silent"),
    ],
)
def test_invalid_training_music_is_refused(world, run, tmp_path, monkeypatch, training, message):
    monkeypatch.chdir(tmp_path)
    write_midi_files(tmp_path / "silent", {"bad.mid": b"no"})
    (tmp_path / "empty").mkdir()
    path = world[0] / training if training.startswith("made") else training
    monkeypatch.chdir(tmp_path)
    ended = run("assess", world[0] / "made", "--training", path)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err


def test_pieces_of_one_note_share_it_up_to_transposition():
    one, other = (Notes.sorted([0.0], [1.0], [pitch], [70]) for pitch in (60, 40))
    training = TrainingMusic(["b"], [Music.of("b", other).ids], "pieces", [])
    found = shared_with_training([Music.of("a", one)], [], training)
    assert [reading.generated[0].length for reading in found.readings] == [1, 4, 1]
    assert found.readings[1].generated[0].semitones == 20
    assert found.readings[0].reference == []


def test_a_corpus_of_performance_events_is_not_decoded(world, monkeypatch):
    monkeypatch.setattr("dsmr_mlx.evaluation.music.copies.Music", None)
    corpus = Corpus.load(world[0] / "corpus")
    training = read_training(world[0] / "corpus")
    for piece, ids in zip(corpus.pieces("train"), training.ids, strict=True):
        assert np.array_equal(ids, corpus.tokens(piece)[1:-1])
