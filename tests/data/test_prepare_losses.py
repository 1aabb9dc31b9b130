"""Notes that a vocabulary cannot represent are counted, and reported by `prepare`, `evaluate` and `compare`."""

import json

import pytest
from support.checkpoints import save
from support.midi_files import midi, note, track, tune, write_midi_files
from support.tiny import TOKENIZER

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.prepare import prepare
from dsmr_mlx.evaluation.comparison import compare
from dsmr_mlx.music.midi import midi_bytes, read_notes
from dsmr_mlx.music.notes import DRUMS, Notes
from dsmr_mlx.tokenizers.registry import make_tokenizer

pytest.importorskip("miditok")

OCTAVE = {"pitch_range": [60, 72]}
REST = midi(track(note(0, 100, 60), note(1_000, 100, 62), note(61_000, 100, 64)))  # 1 tick is 1 ms


def settings(folder, value=OCTAVE):
    path = folder / "settings.json"
    path.write_text(json.dumps(value))
    return path


def songs(folder, count=6):
    return write_midi_files(folder, {f"{i}.mid": tune(i, 40) for i in range(count)})


def inside(folder, source) -> int:
    """Number of notes of a file in `OCTAVE`."""
    pitch = read_notes(folder / source).pitch
    return int(((pitch >= 60) & (pitch <= 72)).sum())


def test_encoded_notes_are_counted_per_piece(tmp_path):
    """Counted after decoding, with subwords too; a vocabulary of all keys loses none."""
    folder, narrow = songs(tmp_path / "midi"), make_tokenizer("miditok:REMI", settings(tmp_path))
    for subwords in (None, f"bpe:{narrow.vocab_size + 20}"):
        report = prepare(folder, tmp_path / "out", tokenizer=narrow, subwords=subwords, force=True)
        pieces = Corpus.load(tmp_path / "out").pieces()
        assert [piece.notes_encoded for piece in pieces] == [inside(folder, piece.source) for piece in pieces]
        assert report.notes_encoded == sum(piece.notes_encoded for piece in pieces) < report.notes == 240
    for name in ("performance", "miditok:REMI"):
        report = prepare(folder, tmp_path / "out", tokenizer=make_tokenizer(name), force=True)
        assert (report.notes_encoded, report.out_of_time) == (240, 0)


def test_prepare_warns_of_lost_notes(run, tmp_path):
    """When the corpus is written, and when it is found up to date."""
    folder = songs(tmp_path / "midi")
    words = ("prepare", folder, "--out", "corpus", "--tokenizer", "miditok:REMI")
    lost = 240 - sum(inside(folder, f"{i}.mid") for i in range(6))
    for _ in range(2):
        shown = run(*words, "--tokenizer-config", settings(tmp_path))
        assert f"warning: miditok:REMI cannot encode {lost} of 240 notes\n" in shown.err
    assert "warning" not in run(*words, "--force").err


def test_count_recovered_by_pitch_and_program():
    onset = [0.0, 1.0, 2.0, 3.0]
    given = Notes(onset, [t + 0.5 for t in onset], [60, 60, 62, 64], [9] * 4, [0, 0, 0, DRUMS])
    assert given.count_common(given.shifted(50.0)) == 4
    assert given.count_common(given.take([0, 3])) == 2
    assert given.count_common(Notes(given.onset, given.offset, given.pitch, given.velocity, [0] * 4)) == 3
    assert given.count_common(Notes.empty()) == Notes.empty().count_common(given) == 0


def test_prepare_warns_of_changed_durations(run, tmp_path):
    """Structured has no pause longer than 20 s and shortens one of 60 s; REMI does not."""
    folder = write_midi_files(tmp_path / "midi", {"rest.mid": REST, "a.mid": tune(1), "b.mid": tune(2)})
    shown = run("prepare", folder, "--out", "a", "--tokenizer", "miditok:Structured")
    assert "warning: miditok:Structured changes the duration of 1 of 3 pieces by more than 1 s" in shown.err
    (piece,) = [piece for piece in Corpus.load("a").pieces() if not piece.keeps_time]
    assert (piece.source, piece.notes_encoded) == ("rest.mid", 3)
    assert piece.duration == pytest.approx(61.1)
    assert piece.duration_encoded == pytest.approx(21.1, abs=1.0)
    assert "warning" not in run("prepare", folder, "--out", "b", "--tokenizer", "miditok:REMI").err


def test_piece_without_encoded_notes_is_skipped(tmp_path):
    """With this reason, and not as a duplicate of another piece without tokens."""
    flute = make_tokenizer("miditok:REMI", settings(tmp_path, {"programs": [73], "use_programs": True}))
    played = read_notes(tune(9), programs=True)
    fluted = Notes(played.onset, played.offset, played.pitch, played.velocity, [73] * len(played))
    pianos = {"p1.mid": tune(1), "p2.mid": tune(2)}
    folder = write_midi_files(tmp_path / "midi", pianos | {"f.mid": midi_bytes(fluted)})
    report = prepare(folder, tmp_path / "out", tokenizer=flute)
    reason = "miditok:REMI can represent none of its 20 notes"
    assert {entry.source: entry.reason for entry in report.skipped} == dict.fromkeys(pianos, reason)
    assert (report.pieces, report.notes_encoded) == ({"train": 1}, 20)
    (folder / "f.mid").unlink()
    with pytest.raises(UserError, match=rf"none of 2 files can be used \(p1\.mid: {reason}"):
        prepare(folder, tmp_path / "none", tokenizer=flute)


def test_drums_of_all_keys_are_kept(tmp_path):
    """With `programs`, every vocabulary has a token for each of the 128 drum keys; a settings file may reduce them."""
    onset = [0.0, 0.5, 1.0, 1.5, 2.0]
    keys = [60, 0, 22, 91, 127]
    band = Notes(onset, [t + 0.25 for t in onset], keys, [64] * 5, [0, *[DRUMS] * 4])
    for name in ("REMI", "TSD", "MIDILike", "Structured", "PerTok", "BEAT"):
        tokenizer = make_tokenizer(f"miditok:{name}", programs=True)
        returned = tokenizer.decode(tokenizer.encode_notes(band))
        assert (name, returned.pitch[returned.program == DRUMS].tolist()) == (name, keys[1:])
    alone = settings(tmp_path, {"use_programs": True, "programs": [-1], "use_pitchdrum_tokens": True})
    drummer = make_tokenizer("miditok:REMI", alone)
    assert drummer.recovered(band, drummer.encode_notes(band))[0] == 4
    few = make_tokenizer("miditok:REMI", settings(tmp_path, {"drums_pitch_range": [27, 88]}), True)
    assert few.recovered(band, few.encode_notes(band))[0] == 1


def test_index_without_encoded_notes(tmp_path):
    prepare(songs(tmp_path / "midi", 3), tmp_path / "out", tokenizer=TOKENIZER)
    path = tmp_path / "out" / "corpus.json"
    index = json.loads(path.read_text())
    for piece in index["pieces"]:
        assert piece.pop("notes_encoded") == piece["notes"]
        piece.pop("duration_encoded")
    path.write_text(json.dumps(index))
    for piece in Corpus.load(tmp_path / "out").pieces():
        assert (piece.notes_encoded, piece.duration_encoded, piece.keeps_time) == (piece.notes, piece.duration, True)


def test_invalid_subword_size_is_refused_before_reading(tmp_path):
    folder, done = songs(tmp_path / "midi", 2), []
    with pytest.raises(UserError, match=r"`subwords` bpe:10: expected 395 to 1,048,576, because there are 390 events"):
        prepare(folder, tmp_path / "out", subwords="bpe:10", progress=lambda *n: done.append(n))
    assert done == []


@pytest.fixture(scope="module")
def narrow_and_wide(tmp_path_factory):
    """Checkpoints and corpora of the same songs, with a REMI of 13 keys and a REMI of all keys."""
    folder = tmp_path_factory.mktemp("keys")
    songs(folder / "midi")
    for seed, (name, config) in enumerate((("wide", None), ("narrow", settings(folder)))):
        tokenizer = make_tokenizer("miditok:REMI", config)
        prepare(folder / "midi", folder / f"{name}-corpus", tokenizer=tokenizer, validation_fraction=0.4)
        save(folder / name, tokenizer, seed)
    return folder


@pytest.mark.slow
def test_losses_of_a_lossy_vocabulary_come_with_a_note(run, narrow_and_wide):
    """In `compare` and `evaluate`; there is no note for a lossless vocabulary."""
    folder = narrow_and_wide
    pieces = Corpus.load(folder / "narrow-corpus").pieces("validation")
    counts = f"{sum(p.notes_encoded for p in pieces)} of {sum(p.notes for p in pieces)} notes"
    comparison = compare([folder / "wide", folder / "narrow"], [folder / "wide-corpus", folder / "narrow-corpus"])
    (remark,) = comparison.remarks
    assert f"narrow-corpus encodes {counts} (miditok:REMI): the others are not predicted" in remark
    assert comparison.rows[1].measured.evaluation.notes_encoded == sum(p.notes_encoded for p in pieces)
    shown = run("evaluate", folder / "narrow", "--data", folder / "narrow-corpus")
    assert f"note: the tokens encode {counts}; " in shown.err
    assert "note:" not in run("evaluate", folder / "wide", "--data", folder / "wide-corpus").err


@pytest.mark.slow
def test_vocabularies_of_one_label_are_distinguished(run, narrow_and_wide):
    folder = narrow_and_wide
    corpora = [folder / "wide-corpus", folder / "narrow-corpus"]
    comparison = compare([folder / "wide", folder / "narrow"], corpora)
    marks = [row.tokenizer.fingerprint[:8] for row in comparison.rows]
    assert comparison.tokenizers == [f"miditok:REMI {mark}" for mark in marks]
    shown = run("compare", folder / "wide", folder / "narrow", "--data", corpora[0], "--data", corpora[1]).out
    assert all(mark in shown for mark in marks)
    assert compare([folder / "wide"] * 2, corpora[:1]).tokenizers == ["miditok:REMI"] * 2
