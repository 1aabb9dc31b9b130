"""Preparing a folder: every file is in the corpus or skipped with a reason; atomic and deterministic."""

import json
import os
import shutil
import unicodedata
from multiprocessing import active_children

import numpy as np
import pytest
from support.bands import random_band
from support.maestro import ROWS, csv_table, write_maestro
from support.midi_files import midi, note, track, tune, write_midi_files

from dsmr_mlx.cli.prepare import show_prepare_report
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.encode import encode_files
from dsmr_mlx.data.prepare import prepare
from dsmr_mlx.music.midi import midi_bytes, read_notes
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.tokenizers.registry import make_tokenizer


def plain(folder, count=10):
    return write_midi_files(folder, {f"{i % 3}/{i}.mid": tune(i) for i in range(count)})


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_plain_folder_is_split_by_file(tmp_path):
    folder = plain(tmp_path / "midi")
    (folder / "CAPITALS.MIDI").write_bytes(tune(50))
    write_midi_files(
        folder, {".hidden/x.mid": tune(51), "._0.mid": b"", "notes.txt": b"", "metadata.csv": b"a,b\n1,2\n"}
    )
    report = prepare(folder, tmp_path / "out", validation_fraction=0.2)
    corpus = Corpus.load(tmp_path / "out")
    assert report.pieces == {"train": 9, "validation": 2}
    assert [piece.source for piece in corpus.pieces()] == sorted(piece.source for piece in corpus.pieces())
    assert {piece.source for piece in corpus.pieces()} == {f"{i % 3}/{i}.mid" for i in range(10)} | {"CAPITALS.MIDI"}
    assert report.skipped == []


def test_names_of_a_mac_are_the_same_names(tmp_path):
    """A Mac may give "é" as "e" and an accent: splits, works, order and fingerprint do not change."""
    corpora = []
    for form in ("NFC", "NFD"):
        names = [unicodedata.normalize(form, f"{name}.mid") for name in ("étude", "f", "Dvořák", "ä", "Ö", "e")]
        folder = write_midi_files(tmp_path / form / "midi", {name: tune(i) for i, name in enumerate(names)})
        prepare(folder, tmp_path / form / "corpus", validation_fraction=0.4)
        corpora.append(Corpus.load(tmp_path / form / "corpus"))
    sources = [[(unicodedata.normalize("NFC", p.source), p.split) for p in corpus.pieces()] for corpus in corpora]
    assert [source for source, _ in sources[0]] == [source for source, _ in sources[1]]
    assert sources[0] == sources[1]


def test_a_table_finds_files_in_the_form_of_a_mac(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "2004/étude.midi") for form in ("NFC", "NFD"))
    rows = [*ROWS, ("X", "étude", "train", composed)]
    folder = write_maestro(tmp_path / "midi", rows=rows)
    (folder / composed).rename(folder / decomposed)
    assert prepare(folder, tmp_path / "out").skipped == []


def test_validation_fraction_zero(tmp_path):
    assert prepare(plain(tmp_path / "midi"), tmp_path / "out", validation_fraction=0).pieces == {"train": 10}


def test_skipped_files_have_reasons(tmp_path):
    folder = write_maestro(tmp_path / "midi", rows=[*ROWS, ROWS[0], ("X", "gone", "train", "gone.midi")])
    (folder / "gone.midi").unlink()
    bad = [("X", "bad", "train", "bad.midi"), ("X", "out", "train", "../escape.midi")]
    copies = [("X", "same bytes", "train", "same.midi"), ("X", "same music", "train", "slow.midi")]
    (folder / "maestro-v3.0.0.csv").write_bytes(csv_table([*ROWS, ROWS[0], (*ROWS[0][:3], "gone.midi"), *bad, *copies]))
    write_midi_files(folder, {"bad.midi": b"bad", "same.midi": tune(1), "extra/e.mid": tune(60), "../escape.midi": b""})
    # Twice the resolution and twice the ticks: other bytes, the same music.
    events = [note(0, 400, 60), note(600, 200, 62)]
    (folder / "2004/a.midi").write_bytes(midi(track(*events), tpq=500))
    doubled = [note(0, 800, 60), note(1200, 400, 62)]
    (folder / "slow.midi").write_bytes(midi(track(*doubled), tpq=1000))
    report = prepare(folder, tmp_path / "out")
    reasons = {entry.source: entry.reason for entry in report.skipped}
    assert reasons.pop("bad.midi").startswith("not a readable MIDI file")
    assert reasons == {
        "2004/a.midi": "named twice in maestro-v3.0.0.csv",
        "gone.midi": "named in maestro-v3.0.0.csv, but there is no such file",
        "../escape.midi": "outside the folder",
        "same.midi": "same music as 2004/b.midi",
        "slow.midi": "same music as 2004/a.midi",
        "extra/e.mid": "not in maestro-v3.0.0.csv",
    }
    assert sum(report.pieces.values()) == 4
    assert Corpus.load(tmp_path / "out").skipped == report.skipped


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no MIDI file"),
        ({"a.txt": b""}, "no MIDI file"),
        ({"a.mid": b"", "b.mid": b"x"}, r"none of 2 files can be used \(a\.mid: not a readable.*; b\.mid: "),
        ({"maestro-v9.csv": csv_table([])}, "no rows, expected at least one"),
        ({"maestro-v9.csv": b"canonical_title,split\n"}, "columns canonical_composer, midi_filename are missing"),
        ({"maestro-v9.csv": csv_table([("B", "T", "dev", "a")])}, "row 1 has split 'dev', expected one of train"),
        ({"maestro-v9.csv": csv_table([("B", "T", "test", "")])}, "row 1 has an empty midi_filename"),
        ({"maestro-v1.csv": b"", "maestro-v2.csv": b""}, "expected one version of MAESTRO"),
        ({"maestro-v9.json": b"{"}, "not a table in MAESTRO's form"),
        ({"maestro-v9.json": b"[1]"}, "columns .* are missing|not a table"),
        ({"maestro-v9.csv": b"\xff\xfe\x00"}, "not a table in MAESTRO's form"),
    ],
)
def test_unusable_folders(tmp_path, files, reason):
    folder = write_midi_files(tmp_path / "midi", files)
    folder.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=reason) as caught:
        prepare(folder, tmp_path / "out")
    assert str(folder) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["midi"]


def test_invalid_options(tmp_path):
    folder = plain(tmp_path / "midi", 2)
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"`validation_fraction` .*: expected at least 0 and below 1"):
            prepare(folder, tmp_path / "out", validation_fraction=fraction)
    with pytest.raises(UserError, match="`workers` 0: expected at least 1"):
        prepare(folder, tmp_path / "out", workers=0)
    with pytest.raises(UserError, match="does not exist, expected a folder"):
        prepare(tmp_path / "missing", tmp_path / "out")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        prepare(folder / "0" / "0.mid", tmp_path / "out")
    for out in (folder, tmp_path):
        with pytest.raises(UserError, match="holds the MIDI files of"):
            prepare(folder, out, force=True)


def test_same_input_again_does_nothing(tmp_path):
    folder = plain(tmp_path / "midi")
    first = prepare(folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    dates = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    os.utime(folder / "0" / "0.mid")
    again = prepare(folder, tmp_path / "out")
    assert again.up_to_date
    assert not first.up_to_date
    assert (again.pieces, again.tokens, again.notes) == (first.pieces, first.tokens, first.notes)
    assert contents(tmp_path / "out") == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == dates


def test_other_input_needs_force(tmp_path):
    folder = plain(tmp_path / "midi")
    prepare(folder, tmp_path / "out")
    old = contents(tmp_path / "out")
    (folder / "0" / "0.mid").write_bytes(tune(99))
    with pytest.raises(
        UserError, match=r"corpus of other input or options \(fingerprint \w{12}, expected \w{12}\); `force`"
    ):
        prepare(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == old
    assert not prepare(folder, tmp_path / "out", force=True).up_to_date
    assert contents(tmp_path / "out") != old
    assert prepare(folder, tmp_path / "out").up_to_date
    for options in ({"seed": 1}, {"validation_fraction": 0.3}):
        with pytest.raises(UserError, match="`force`"):
            prepare(folder, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["midi", "out"]


def test_only_a_corpus_is_replaced(tmp_path):
    folder = plain(tmp_path / "midi", 2)
    (tmp_path / "file").write_bytes(b"precious")
    write_midi_files(tmp_path / "photos", {"a.jpg": b"precious"})
    for name in ("file", "photos"):
        for force in (False, True):
            with pytest.raises(UserError, match="exists and is not a corpus"):
                prepare(folder, tmp_path / name, force=force)
    assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"precious"
    (tmp_path / "empty").mkdir()
    assert prepare(folder, tmp_path / "empty").tokens > 0


def test_a_corpus_with_something_else_in_its_folder_is_not_replaced(tmp_path):
    folder = plain(tmp_path / "midi", 2)
    prepare(folder, tmp_path / "out")
    run = tmp_path / "out" / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes(b"precious")
    with pytest.raises(UserError, match="out: holds run, which `force` would delete, expected only a corpus"):
        prepare(folder, tmp_path / "out", seed=1, force=True)
    assert (run / "metrics.jsonl").read_bytes() == b"precious"
    shutil.rmtree(run)
    (tmp_path / "out" / ".DS_Store").write_bytes(b"")
    prepare(folder, tmp_path / "out", seed=1, force=True)


@pytest.mark.parametrize("damage", ["missing", "another byte"])
def test_damaged_corpus_can_be_replaced_by_force(tmp_path, damage):
    folder = plain(tmp_path / "midi", 2)
    prepare(folder, tmp_path / "out")
    tokens = tmp_path / "out" / "tokens.npy"
    if damage == "missing":
        tokens.unlink()
    else:
        tokens.write_bytes(tokens.read_bytes()[:-2] + b"zz")
    with pytest.raises(UserError, match=r"tokens\.npy: (cannot be read|.* has sha256) .*`force`"):
        prepare(folder, tmp_path / "out")
    prepare(folder, tmp_path / "out", force=True)
    Corpus.load(tmp_path / "out").verify()


def test_corpus_inside_the_folder_is_not_input(tmp_path):
    folder = plain(tmp_path / "midi")
    prepare(folder, folder / "corpus")
    assert prepare(folder, folder / "corpus").up_to_date
    prepare(folder, folder / "corpus", force=True)
    assert prepare(folder, folder / "corpus").up_to_date


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_prepare_leaves_the_old_corpus_or_nothing(tmp_path, error):
    folder = plain(tmp_path / "midi")

    def interrupt(done, total):
        if done == 5:
            raise error

    with pytest.raises(error):
        prepare(folder, tmp_path / "out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["midi"]
    prepare(folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(error):
        prepare(folder, tmp_path / "out", force=True, seed=1, progress=interrupt)
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["midi", "out"]


def test_full_disk_is_a_user_error(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"out: cannot be written \(No space left on device\)"):
        prepare(plain(tmp_path / "midi", 2), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["midi"]


@pytest.mark.slow
def test_result_depends_only_on_the_input(tmp_path):
    folder = plain(tmp_path / "midi", 70)
    (folder / "0" / "0.mid").write_bytes(b"bad")
    calls = []
    prepare(folder, tmp_path / "one", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, 70) for i in range(70)]
    prepare(folder, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    moved = tmp_path / "moved"
    for path in sorted(folder.rglob("*.mid"), reverse=True):
        (moved / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, moved / path.relative_to(folder))
    prepare(moved, tmp_path / "three")
    assert Corpus.load(tmp_path / "three").fingerprint == Corpus.load(tmp_path / "one").fingerprint


class Fatal(PerformanceTokenizer):
    """Kills the encoding process, as the system does when memory runs out."""

    def encode_notes(self, notes):
        os._exit(1)


def test_workers_that_are_stopped_end_by_themselves(tmp_path):
    """One that is terminated while it sends a result makes the command wait for the rest of it for ever."""
    folder = write_midi_files(tmp_path / "midi", {f"{i}.mid": tune(i, 500) for i in range(4)})
    encoded = encode_files(sorted(folder.iterdir()) * 100, PerformanceTokenizer(), 2)
    assert next(encoded).notes == 500
    workers = active_children()
    encoded.close()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert active_children() == []


def test_dead_worker_is_an_error(tmp_path):
    with pytest.raises(UserError, match="a process died"):
        prepare(plain(tmp_path / "midi", 3), tmp_path / "out", tokenizer=Fatal(), workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["midi"]


def test_links_are_followed_once_and_all_midi_suffixes_are_found(tmp_path):
    files = {f"{i}{suffix}": tune(i) for i, suffix in enumerate((".mid", ".MIDI", ".kar", ".rmi"))}
    write_midi_files(tmp_path / "elsewhere", {"linked.mid": tune(9)})
    write_midi_files(tmp_path / "midi", files)
    (tmp_path / "midi" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "midi")
    prepare(tmp_path / "midi", tmp_path / "corpus")
    assert {piece.source for piece in Corpus.load(tmp_path / "corpus").pieces()} == {*files, "link/linked.mid"}


def bands(folder, count=10):
    """Music of several instruments with drums; some files have one track per instrument."""
    return write_midi_files(folder, {f"{i}.mid": midi_bytes(random_band(i, 60)) for i in range(count)})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["miditok:REMI", "miditok:MIDILike"])
def test_several_instruments_in_any_vocabulary(tmp_path, name):
    """Notes and seconds are those of the music for any tokens; the corpus stores the tokenizer."""
    pytest.importorskip("miditok")
    folder, tokenizer = bands(tmp_path / "midi"), make_tokenizer(name, programs=True)
    report = prepare(folder, tmp_path / "out", tokenizer=tokenizer)
    assert (report.pieces, report.skipped) == ({"train": 9, "validation": 1}, [])
    corpus = Corpus.load(tmp_path / "out")
    assert corpus.tokenizer.fingerprint == tokenizer.fingerprint
    for piece in corpus.pieces():
        notes = read_notes(folder / piece.source, programs=True)
        assert (piece.notes, piece.duration, piece.events) == (len(notes), notes.duration, piece.length)
        assert corpus.tokenizer.decode(corpus.tokens(piece)).programs == notes.programs
    assert prepare(folder, tmp_path / "out", tokenizer=make_tokenizer(name, programs=True)).up_to_date
    with pytest.raises(UserError, match=r"fingerprint [0-9a-f]{12}, expected [0-9a-f]{12}"):
        prepare(folder, tmp_path / "out", tokenizer=PerformanceTokenizer())


def test_a_corpus_with_other_programs_is_another_corpus(tmp_path):
    """Although Aria's vocabulary, and so its fingerprint, is the same."""
    folder = bands(tmp_path / "midi", 3)
    piano, band = (make_tokenizer("aria", programs=programs) for programs in (False, True))
    for here, other, message in ((piano, band, "without programs, expected with"), (band, piano, "with programs, exp")):
        assert not prepare(folder, tmp_path / "out", tokenizer=here, force=True).up_to_date
        assert prepare(folder, tmp_path / "out", tokenizer=here).up_to_date
        with pytest.raises(UserError, match=rf"out: a corpus of other input or options \({message}.*`force` replaces"):
            prepare(folder, tmp_path / "out", tokenizer=other)
        assert Corpus.load(tmp_path / "out").tokenizer.programs == here.programs


@pytest.mark.slow
def test_workers_encode_with_miditok(tmp_path):
    pytest.importorskip("miditok")
    folder, tokenizer = bands(tmp_path / "midi", 8), make_tokenizer("miditok:TSD")
    prepare(folder, tmp_path / "one", tokenizer=tokenizer, workers=1)
    prepare(folder, tmp_path / "two", tokenizer=tokenizer, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


class ShortPieces(PerformanceTokenizer):
    """A vocabulary that cannot encode pieces of more than 2000 s."""

    def encode_notes(self, notes):
        if notes.duration > 2000:
            raise UserError(f"a note after {notes.onset.max():.0f} s, expected none after 2000 s")
        return super().encode_notes(notes)


def test_pieces_refused_by_the_tokenizer_are_skipped(tmp_path):
    long = midi(track(note(0, 100, 60), note(2_100_000, 100, 60)))
    folder = write_midi_files(tmp_path / "midi", {"a.mid": tune(1), "b.mid": tune(2), "long.mid": long})
    report = prepare(folder, tmp_path / "out", tokenizer=ShortPieces())
    ((source, reason),) = [(entry.source, entry.reason) for entry in report.skipped]
    assert (source, reason) == ("long.mid", "a note after 2100 s, expected none after 2000 s")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["performance", "miditok:TSD"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_subwords_are_learned_from_training_pieces(tmp_path, name, kind):
    """Nothing is lost, events are counted, and validation pieces do not affect the subwords."""
    tokenizer = make_tokenizer(name)
    folder, size = plain(tmp_path / "midi", 20), tokenizer.vocab_size + 3
    learned_from = []
    options = {"tokenizer": tokenizer, "subwords": f"{kind}:{size}"}
    report = prepare(folder, tmp_path / "out", learning=learned_from.append, **options)
    prepare(folder, tmp_path / "events", tokenizer=tokenizer)
    corpus, events = Corpus.load(tmp_path / "out"), Corpus.load(tmp_path / "events")
    assert corpus.vocab_size == size
    assert (report.tokens, report.events) == (corpus.n_tokens, events.n_tokens)
    assert learned_from == [sum(piece.length for piece in events.pieces("train"))]
    for piece, of_events in zip(corpus.pieces(), events.pieces(), strict=True):
        assert np.array_equal(corpus.tokenizer.to_events(corpus.tokens(piece)), events.tokens(of_events))
        assert piece.events == of_events.length >= piece.length
        assert (piece.source, piece.split, piece.notes) == (of_events.source, of_events.split, of_events.notes)
    assert prepare(folder, tmp_path / "out", **options).up_to_date
    with pytest.raises(UserError, match="`force` replaces it"):
        prepare(folder, tmp_path / "out", tokenizer=tokenizer)
    for i, piece in enumerate(events.pieces("validation")):
        (folder / piece.source).write_bytes(tune(1000 + i))
    prepare(folder, tmp_path / "other", **options)
    assert Corpus.load(tmp_path / "other").tokenizer.fingerprint == corpus.tokenizer.fingerprint
    again = prepare(folder, tmp_path / "again", tokenizer=make_tokenizer(str(tmp_path / "out")))
    assert again.tokens == Corpus.load(tmp_path / "other").n_tokens


@pytest.mark.parametrize("subwords", [None, "bpe:450"])
def test_the_working_folder_can_become_a_corpus(tmp_path, monkeypatch, subwords):
    folder = plain(tmp_path / "midi", 4)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    report = prepare(folder, ".", subwords=subwords)
    monkeypatch.chdir(tmp_path / "out")  # a new folder at this path
    assert (str(report.out), report.up_to_date, report.pieces) == (".", False, {"train": 3, "validation": 1})
    assert prepare(folder, ".", subwords=subwords).up_to_date
    assert sorted(path.name for path in tmp_path.iterdir()) == ["midi", "out"]


def test_failed_subword_learning_leaves_nothing(tmp_path):
    folder = plain(tmp_path / "midi", 4)
    with pytest.raises(UserError, match="expected bpe:SIZE or unigram:SIZE"):
        prepare(folder, tmp_path / "out", subwords="foo")
    with pytest.raises(UserError, match=r"`subwords` unigram:4000: expected at most \d+"):
        prepare(folder, tmp_path / "out", subwords="unigram:4000")
    only_test = write_maestro(tmp_path / "maestro", rows=[("B", "T", "test", "a.midi")])
    with pytest.raises(UserError, match="no piece for training, expected some to learn subwords from"):
        prepare(only_test, tmp_path / "out", subwords="bpe:2000")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maestro", "midi"]


def test_index_without_events(tmp_path):
    prepare(plain(tmp_path / "midi", 3), tmp_path / "out")
    path = tmp_path / "out" / "corpus.json"
    index = json.loads(path.read_text())
    for piece in index["pieces"]:
        assert piece.pop("events") == piece["length"]
    path.write_text(json.dumps(index))
    assert all(piece.events == piece.length for piece in Corpus.load(tmp_path / "out").pieces())


@pytest.mark.parametrize(
    "table",
    ["Komponist;Titel\nDvořák;x\n".encode("iso8859-2"), b"\xff\xfe\0", b"", b"a,b\n" * 9, b"composer,title\n\xff"],
)
def test_a_table_of_another_program_is_ignored(tmp_path, table):
    folder = plain(tmp_path / "midi", 3)
    (folder / "metadata.csv").write_bytes(table)
    assert sum(prepare(folder, tmp_path / "out").pieces.values()) == 3


def test_a_damaged_table_with_our_columns_is_refused(tmp_path):
    folder = plain(tmp_path / "midi", 3)
    (folder / "metadata.csv").write_bytes(b"composer,title,midi_performance\nDvo\xf8\xe1k,x,0.mid\n")
    with pytest.raises(UserError, match=r"metadata\.csv: not a table in MAESTRO's form"):
        prepare(folder, tmp_path / "out")


def test_names_that_no_file_can_have_are_skipped(tmp_path):
    folder = plain(tmp_path / "midi", 3)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.mid"))] + [
        "a" * 300 + ".mid",
        "b\0.mid",
        "c/" * 3000 + ".mid",
    ]
    rows = "".join(f"{i},title,{name}\n" for i, name in enumerate(names))
    (folder / "metadata.csv").write_text(f"composer,title,midi_performance\n{rows}")
    report = prepare(folder, tmp_path / "out")
    assert sum(report.pieces.values()) == 3
    assert len([entry for entry in report.skipped if "no such file" in entry.reason]) == 3


def test_a_corpus_without_validation_says_so(tmp_path, capsys):
    for fraction, says in ((0, True), (0.2, False)):
        report = prepare(plain(tmp_path / "midi"), tmp_path / f"{fraction}", validation_fraction=fraction)
        show_prepare_report(report)
        assert ("note: no piece is for validation" in capsys.readouterr().err) is says
