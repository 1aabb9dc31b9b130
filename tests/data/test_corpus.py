"""A corpus on disk: round trip, crash safety, and errors for damaged files."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from support.midi_files import tune

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.corpus import Corpus, Skipped
from dsmr_mlx.data.corpus_writer import CorpusWriter
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer

TOKENIZER = PerformanceTokenizer()
PIECES = [TOKENIZER.encode(tune(seed, notes=5 + seed)) for seed in range(4)]
SPLITS = ["train", "validation", "train", "test"]


def write(out, pieces=PIECES, splits=SPLITS):
    with CorpusWriter(out, TOKENIZER) as writer:
        for i, (ids, split) in enumerate(zip(pieces, splits, strict=True)):
            writer.add(ids, source=f"{i}.mid", split=split, title=f"Étude {i}", duration=i + 0.5, notes=5 + i)
        writer.skip("bad.mid", "no pitched note")
        writer.commit({"folder": "/music"})
    return Corpus.load(out)


def test_write_and_load_round_trip(tmp_path):
    corpus = write(tmp_path / "deep" / "corpus")
    assert corpus.vocab_size == 393
    assert corpus.splits == ("train", "validation", "test")
    assert [piece.source for piece in corpus.pieces("train")] == ["0.mid", "2.mid"]
    assert [piece.title for piece in corpus.pieces()] == [f"Étude {i}" for i in range(4)]
    assert corpus.n_tokens == sum(map(len, PIECES))
    for piece, ids in zip(corpus.pieces(), PIECES, strict=True):
        found = corpus.tokens(piece)
        assert found.dtype == np.uint16
        assert type(found) is np.ndarray
        assert np.array_equal(found, ids)
        assert not found.flags.writeable
    assert corpus.skipped == [Skipped("bad.mid", "no pitched note")]
    assert corpus.origin == {"folder": "/music"}
    assert sorted(path.name for path in corpus.path.iterdir()) == ["corpus.json", "tokenizer", "tokens.npy"]
    assert np.array_equal(np.load(corpus.path / "tokens.npy"), np.concatenate(PIECES))
    corpus.verify()
    with pytest.raises(UserError, match="split 'dev', expected one of train, validation, test"):
        corpus.pieces("dev")
    trained = write(tmp_path / "trained", splits=["train"] * 4)
    with pytest.raises(UserError, match=r"trained: no validation pieces, expected `split` train$"):
        trained.pieces("validation")


def test_fingerprint_depends_on_the_content(tmp_path):
    first, again = write(tmp_path / "a"), write(tmp_path / "b")
    assert first.fingerprint == again.fingerprint
    others = [
        write(tmp_path / "c", splits=["train"] * 4),
        write(tmp_path / "d", pieces=PIECES[::-1]),
        write(tmp_path / "e", pieces=[*PIECES[:3], PIECES[3][:-1]]),
    ]
    assert len({corpus.fingerprint for corpus in (first, *others)}) == 4


def test_large_vocabulary_is_stored_in_four_bytes(tmp_path):
    class Large(PerformanceTokenizer):
        tokens = tuple(map(str, range(70_000)))

    with CorpusWriter(tmp_path / "corpus", Large()) as writer:
        writer.add(np.array([1, 69_999, 2], np.uint32), source="a", split="train", duration=1.0, notes=1)
        writer.commit({})
    assert np.load(tmp_path / "corpus" / "tokens.npy").tolist() == [1, 69_999, 2]
    assert np.load(tmp_path / "corpus" / "tokens.npy").dtype == np.uint32


def test_ids_that_do_not_fit_are_refused(tmp_path):
    with CorpusWriter(tmp_path / "corpus", TOKENIZER) as writer, pytest.raises(ValueError, match="do not fit uint16"):
        writer.add(np.array([1, 70_000, 2]), source="a", split="train", duration=1.0, notes=1)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_interrupted_write_leaves_nothing(tmp_path, error):
    def interrupted():
        with CorpusWriter(tmp_path / "corpus", TOKENIZER) as writer:
            writer.add(PIECES[0], source="a", split="train", duration=1.0, notes=1)
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", range(1, 7))
def test_failure_at_any_flush_leaves_one_complete_corpus(tmp_path, monkeypatch, call):
    old = write(tmp_path / "corpus").fingerprint
    new = write(tmp_path / "corpus", splits=["train"] * 4).fingerprint
    write(tmp_path / "corpus")
    calls = []
    fsync = os.fsync

    def fail_once(descriptor):
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "corpus", splits=["train"] * 4)
    # Flushes: tokens, tokenizer, index and two folders; the sixth comes when the new corpus is in place.
    assert Corpus.load(tmp_path / "corpus").fingerprint == (old if call < 6 else new)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_failed_rename_restores_the_old_corpus(tmp_path, monkeypatch):
    old = write(tmp_path / "corpus").fingerprint
    replace = os.replace

    def fail_for_new_folder(source, target):
        if str(source).endswith(".incomplete"):
            raise OSError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_for_new_folder)
    with pytest.raises(OSError, match="Permission denied"):
        write(tmp_path / "corpus", splits=["train"] * 4)
    assert Corpus.load(tmp_path / "corpus").fingerprint == old
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def change_index(**changes):
    def change(folder):
        path = folder / "corpus.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_piece(**changes):
    def change(folder):
        path = folder / "corpus.json"
        index = json.loads(path.read_text())
        index["pieces"][1] |= changes
        path.write_text(json.dumps(index))

    return change


def cut_tokens(folder):
    path = folder / "tokens.npy"
    path.write_bytes(path.read_bytes()[:-2])


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


HEADER = b"\x93NUMPY\x01\0" + (9000).to_bytes(2, "little") + b"[" * 9000
DAMAGE = {
    "no index": (lambda f: (f / "corpus.json").unlink(), r": a folder of another kind, expected a corpus: "),
    "no JSON": (lambda f: (f / "corpus.json").write_text("{"), r"corpus\.json: not valid JSON"),
    "a list": (lambda f: (f / "corpus.json").write_text("[]"), r"corpus\.json: a list, expected"),
    "format": (change_index(format=9), r"corpus\.json: format 9, expected 2"),
    "unknown key": (change_index(more=1), r"corpus\.json: keys .*'more'.*, expected"),
    "wrong type": (change_index(pieces={}), r"corpus\.json: pieces is a dict, expected list"),
    "wrong sum": (change_index(n_tokens=7), r"corpus\.json: n_tokens 7, expected \d+"),
    "piece key": (change_piece(more=1), r"pieces\[1\] has .*'more'.*, expected"),
    "piece type": (change_piece(offset="3"), r"pieces\[1\]\.offset is '3', expected"),
    "piece offset": (change_piece(offset=3), r"pieces\[1\] has offset 3 .*expected offset \d+"),
    "piece split": (change_piece(split="dev"), r"pieces\[1\] has split 'dev', expected one of"),
    "piece duration": (change_piece(duration=math.nan), r"pieces\[1\]\.duration is nan, expected"),
    "piece length": (change_piece(length=10**30), r"pieces\[1\]\.length is 10+, expected"),
    "piece flag": (change_piece(notes=True), r"pieces\[1\]\.notes is True, expected another type"),
    "long integer": (change_piece(notes=10**400), r"corpus\.json: not valid JSON \(an integer of 401 digits"),
    "nested": (lambda f: (f / "corpus.json").write_text("[" * 100_000), r"corpus\.json: not valid JSON"),
    "pipe for tokens": (lambda f: replace_by_pipe(f / "tokens.npy"), r"tokens\.npy: cannot be read \(a named pipe"),
    "pipe for the index": (lambda f: replace_by_pipe(f / "corpus.json"), r"corpus\.json: cannot be read \(a named pip"),
    "python for a header": (lambda f: (f / "tokens.npy").write_bytes(HEADER), r"npy: not a complete NumPy file"),
    "other tokenizer": (change_index(tokenizer="0" * 64), r"tokenizer: fingerprint 119a2.*expected 0{64}"),
    "no tokenizer": (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), r"tokenizer\.json: cannot be read"),
    "no tokens": (lambda f: (f / "tokens.npy").unlink(), r"tokens\.npy: cannot be read"),
    "cut tokens": (cut_tokens, r"tokens\.npy: not a complete NumPy file"),
    "empty tokens": (lambda f: (f / "tokens.npy").write_bytes(b""), r"tokens\.npy: not a complete NumPy file"),
    "few tokens": (lambda f: np.save(f / "tokens.npy", np.zeros(3, np.uint16)), r"npy: 3 tokens, expected \d+"),
    "wide tokens": (lambda f: np.save(f / "tokens.npy", np.zeros(3)), r"1-d float64, expected 1-d uint16"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_corpus(tmp_path, name):
    damage, reason = DAMAGE[name]
    write(tmp_path / "corpus")
    damage(tmp_path / "corpus")
    with pytest.raises(UserError, match=reason) as caught:
        Corpus.load(tmp_path / "corpus")
    assert str(tmp_path) in str(caught.value)


def test_verify_detects_changed_tokens(tmp_path):
    corpus = write(tmp_path / "corpus")
    path = corpus.path / "tokens.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"tokens\.npy: 3\.mid has sha256"):
        Corpus.load(corpus.path).verify()


@pytest.mark.parametrize("value", [393, 5000, 65535])
def test_ids_that_the_vocabulary_lacks_are_never_returned(tmp_path, value):
    ids = np.append(PIECES[0][:-1], value).astype(np.uint16)
    corpus = write(tmp_path / "corpus", pieces=[ids, *PIECES[1:]])  # with the right hash
    with pytest.raises(UserError, match=rf"tokens\.npy: 0\.mid has the id {value}, expected ids below 393"):
        corpus.tokens(corpus.pieces()[0])
    assert np.array_equal(corpus.tokens(corpus.pieces()[1]), PIECES[1])


def test_a_corpus_that_is_cut_or_replaced_while_it_is_read(tmp_path):
    corpus = write(tmp_path / "corpus")
    write(tmp_path / "corpus", splits=["train"] * 4, pieces=PIECES[::-1])
    for piece, ids in zip(corpus.pieces(), PIECES, strict=True):
        assert np.array_equal(corpus.tokens(piece), ids)
    again = Corpus.load(tmp_path / "corpus")
    os.truncate(tmp_path / "corpus" / "tokens.npy", 200)
    with pytest.raises(UserError, match=r"tokens\.npy: \d+ of \d+ bytes at token \d+: truncated while in use"):
        again.verify()


def test_reading_needs_only_numpy_and_the_standard_library():
    program = (
        "import sys; before = set(sys.modules); import numpy; numpy_too = set(sys.modules)\n"
        "import dsmr_mlx.data.corpus, dsmr_mlx.tokenizers.performance, dsmr_mlx.tokenizers.base, dsmr_mlx.music.midi\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - numpy_too}\n"
        "print(sorted(new - set(sys.stdlib_module_names) - {'dsmr_mlx', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
