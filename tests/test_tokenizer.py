"""The tokenizer's interface, and a saved tokenizer that is not what it was."""

import json
import pickle

import numpy as np
import pytest
from midi_files import tune

from dsmr_mlx.errors import UserError
from dsmr_mlx.midi import Notes, read_notes
from dsmr_mlx.performance import decode_ids, encode_notes
from dsmr_mlx.tokenizer import PerformanceTokenizer, load_tokenizer


def test_a_piece_has_its_bounds_and_returns():
    tokenizer = PerformanceTokenizer()
    notes = read_notes(tune())
    ids = tokenizer.encode(tune())
    assert ids.dtype == tokenizer.dtype == np.uint16
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert np.array_equal(ids[1:-1], encode_notes(notes))
    assert np.array_equal(tokenizer.encode_notes(notes), ids)
    assert tokenizer.decode(ids) == decode_ids(ids)
    assert np.array_equal(tokenizer.encode_notes(tokenizer.decode(ids)), ids)
    assert tokenizer.encode_notes(Notes.empty()).tolist() == [1, 2]
    assert tokenizer.tokens[ids[1]].startswith("VELOCITY_")
    assert tokenizer.vocab_size == tokenizer.grammar().allowed.shape[1] == 391


def test_a_bad_file_is_named(tmp_path):
    path = tmp_path / "bad.mid"
    path.write_bytes(b"no")
    with pytest.raises(UserError, match=r"bad\.mid: not a readable MIDI file"):
        PerformanceTokenizer().encode(path)


def test_the_fingerprint_is_that_of_this_vocabulary():
    # every checkpoint and corpus in the world refers to this value: to change it is to orphan them
    expected = "0fd0f17940791a81a16692e7e873d85abbd0a8e905f0742ab9778f61c84e3f1a"
    assert PerformanceTokenizer().fingerprint == expected
    assert pickle.loads(pickle.dumps(PerformanceTokenizer())).fingerprint == expected

    class Renamed(PerformanceTokenizer):
        tokens = (*PerformanceTokenizer.tokens[:-1], "OTHER")

    class Revised(PerformanceTokenizer):
        version = 2

    assert len({expected, Renamed().fingerprint, Revised().fingerprint}) == 3


def test_saved_and_loaded(tmp_path):
    PerformanceTokenizer().save(tmp_path / "a" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "a" / "tokenizer")
    assert isinstance(loaded, PerformanceTokenizer)
    assert [path.name for path in (tmp_path / "a" / "tokenizer").iterdir()] == ["tokenizer.json"]
    loaded.save(tmp_path / "a" / "tokenizer")


def test_missing_and_damaged(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(tmp_path)
    for text in ("", "{", "[]", "null", "{}", '{"kind": "performance"}', "\xff"):
        (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=r"tokenizer\.json: (not valid JSON|keys .* expected)"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fingerprint": "0" * 64}, "fingerprint 0{64}, expected 0fd0f179"),
        ({"kind": "other"}, "kind 'other', expected one of 'performance'"),
        ({"kind": ["performance"]}, r"kind \['performance'\], expected one of"),
        ({"parameters": {"bins": 64}}, r"parameters \{'bins': 64\} do not fit"),
        ({"parameters": None}, "parameters None do not fit"),
        ({"format": 2}, "format 2, expected 1"),
        ({"extra": 1}, "keys .*'extra'.* expected"),
    ],
)
def test_what_is_not_this_tokenizer_is_refused(tmp_path, change, reason):
    PerformanceTokenizer().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=reason) as caught:
        load_tokenizer(tmp_path)
    assert str(path) in str(caught.value)
