"""`dsmr-mlx tokenize`, and the tokenizer options of `dsmr-mlx prepare`."""

import json

import numpy as np
import pytest
from support.bands import random_band
from support.midi_files import tune, write_midi_files

from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.music.midi import midi_bytes, read_notes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.tokenizers.registry import make_tokenizer
from dsmr_mlx.tokenizers.round_trip import match, report_tokens, round_trip


@pytest.fixture
def song(tmp_path):
    return write_midi_files(tmp_path, {"song.mid": tune(3, 40)}) / "song.mid"


def test_counts_losses_and_tokens_are_shown(run, song):
    done = run("tokenize", song, "--first", 4)
    assert done.code == 0
    ids = PerformanceTokenizer().encode(song)
    names = [PerformanceTokenizer.tokens[i] for i in ids]
    assert f"{len(ids):,} tokens, {len(ids) / 40:.2f} per note" in done.out
    assert "performance: 393 ids, fingerprint 119a270226fa" in done.out
    assert "round trip: 40 of 40 notes recovered, 0 added" in done.out
    assert f"{' '.join(names[:4])} …" in done.out
    (row,) = [line.split() for line in done.out.splitlines() if line.startswith("NOTE_ON")]
    assert row == ["NOTE_ON", "40", f"{4000 / len(ids):.1f}", "%"]
    assert "…" not in run("tokenize", song, "--first", 0).out


def test_json_has_everything(run, song):
    found = json.loads(run("tokenize", song, "--json").out)
    tokenizer, notes = PerformanceTokenizer(), read_notes(song)
    ids = tokenizer.encode_notes(notes)
    assert found["ids"] == ids.tolist()
    assert found["names"] == [tokenizer.tokens[i] for i in ids]
    assert (found["tokens"], found["events"], found["notes"]) == (len(ids), len(ids), 40)
    assert sum(found["types"].values()) == len(ids)
    assert found["fingerprint"] == tokenizer.fingerprint
    assert found["round_trip"]["onset"]["max"] <= 0.005001
    assert found["compression"] == 1
    assert found["file"] == str(song)


def test_other_tokenizers(run, song, tmp_path):
    pytest.importorskip("miditok")
    band = write_midi_files(tmp_path, {"band.mid": midi_bytes(random_band(1))}) / "band.mid"
    out = run("tokenize", band, "--tokenizer", "miditok:TSD", "--programs").out
    assert "round trip: 60 of 60 notes recovered" in out
    assert any(line.split()[:2] == ["Program", "60"] for line in out.splitlines())
    settings = write_midi_files(tmp_path, {"s.json": b'{"use_velocities": false}'}) / "s.json"
    out = run("tokenize", song, "--tokenizer", "miditok:TSD", "--tokenizer-config", settings).out
    assert "Velocity" not in out
    midi = write_midi_files(tmp_path / "midi", {f"{i}.mid": tune(i, 60) for i in range(8)})
    assert run("prepare", midi, "--out", "corpus", "--tokenizer", "miditok:TSD", "--subwords", "bpe:620").code == 0
    tokenizer = Corpus.load("corpus").tokenizer
    found = json.loads(run("tokenize", song, "--tokenizer", "corpus", "--json").out)
    assert (found["label"], found["vocab_size"]) == ("miditok:TSD bpe:620", 620)
    assert found["events"] == len(tokenizer.base.encode(song)) > found["tokens"] == len(tokenizer.encode(song))
    assert "events" in run("tokenize", song, "--tokenizer", "corpus").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenize", "none.mid"], "none.mid: cannot be read"),
        (["tokenize", "SONG", "--tokenizer", "foo"], "--tokenizer foo: expected performance, miditok:NAME"),
        (["tokenize", "SONG", "--tokenizer", "miditok:foo"], "--tokenizer miditok:foo: expected one of"),
        (["tokenize", "SONG", "--programs"], "--programs: needs the --tokenizer miditok:NAME or aria, not perf"),
        (["tokenize", "SONG", "--first", "-1"], "--first -1: expected 0 or more"),
        (["prepare", ".", "--out", "x", "--subwords", "foo"], "--subwords foo: expected bpe:SIZE"),
        (["prepare", ".", "--out", "x", "--tokenizer-config", "x"], "--tokenizer-config: needs a MidiTok --tokenizer"),
    ],
)
def test_invalid_arguments_are_a_one_line_error(run, song, arguments, message):
    done = run(*[song if argument == "SONG" else argument for argument in arguments])
    assert done.code == 2
    assert done.err.startswith(f"dsmr-mlx: error: {message}")
    assert done.err.count("\n") == 1


def test_learning_subwords_is_shown(run, tmp_path):
    midi = write_midi_files(tmp_path / "midi", {f"{i}.mid": tune(i, 60) for i in range(8)})
    done = run("prepare", midi, "--out", "corpus", "--subwords", "bpe:400")
    corpus = Corpus.load("corpus")
    events = {split: sum(p.events for p in corpus.pieces(split)) for split in corpus.splits}
    assert f"learning bpe:400 from {events['train']:,} events" in done.err
    total = sum(events.values())
    assert f"{total:,} events in {corpus.n_tokens:,} subwords, {total / corpus.n_tokens:.2f} each" in done.out


def test_notes_match_the_nearest_of_their_pitch_and_program():
    given = Notes([0, 1, 2, 3], [0.5, 1.5, 2.5, 3.5], [60, 60, 62, 64], [10, 20, 30, 40])
    returned = Notes([0.02, 1.4, 2.01, 3.1], [0.5, 3.0, 2.5, 3.4], [60, 60, 62, 65], [12, 20, 30, 40])
    before, after = match(given, returned)
    assert dict(zip(before.tolist(), after.tolist(), strict=True)) == {0: 0, 1: 1, 2: 2}
    result = round_trip(given, returned)
    assert (result.given, result.returned, result.matched) == (4, 4, 3)
    assert np.isclose(result.onset.max, 0.4)
    assert np.isclose(result.onset.mean, (0.02 + 0.4 + 0.01) / 3)
    assert result.velocity.max == 2
    drums = Notes(given.onset, given.offset, given.pitch, given.velocity, [128] * 4)
    assert round_trip(given, drums).matched == 0
    assert round_trip(given, Notes.empty()).onset is None
    assert round_trip(Notes.empty(), given).matched == 0


def test_matching_equals_a_search_of_all_pairs():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n, m = rng.integers(1, 12, 2)
        a, b = np.sort(rng.random(n)), np.sort(rng.random(m))
        given = Notes(a, a + 1, np.full(n, 60), np.full(n, 9))
        returned = Notes(b, b + 1, np.full(m, 60), np.full(m, 9))
        distance = np.abs(a[:, None] - b)
        expected = {i: int(distance[i].argmin()) for i in range(n) if distance[:, distance[i].argmin()].argmin() == i}
        before, after = match(given, returned)
        assert dict(zip(before.tolist(), after.tolist(), strict=True)) == expected


def test_a_report_without_notes():
    report = report_tokens(PerformanceTokenizer(), Notes.empty(), np.array([1, 2]))
    assert (report.ids, report.notes, report.round_trip.matched) == ([1, 2], 0, 0)
    assert make_tokenizer("performance").label == report.label
