"""Subwords: encoding without loss, deterministic learning, and damaged files that are refused."""

import hashlib
import json
import pickle
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bands import random_band
from support.music import random_notes
from support.reference_grammar import all_after, all_may_follow, tokens_that_may_follow

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.convert import tokenizer_files
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.event_grammar import beginning
from dsmr_mlx.tokenizers.ids import IdTokenizer
from dsmr_mlx.tokenizers.performance import FILL, PLAY, PerformanceTokenizer
from dsmr_mlx.tokenizers.registry import load_tokenizer, make_tokenizer
from dsmr_mlx.tokenizers.subwords import SubwordTokenizer, learn_subwords, parse_subwords
from dsmr_mlx.tokenizers.token_tables import token_tables

pytest.importorskip("sentencepiece")

BASE = PerformanceTokenizer()


def melody(seed: int, n: int = 200) -> np.ndarray:
    """Return a piece of n notes with few pitches, lengths and velocities: there is much to learn."""
    rng = np.random.default_rng(seed)
    onset = np.cumsum(rng.choice([0.1, 0.2, 0.4], n))
    notes = Notes(onset, onset + 0.1, rng.choice([60, 62, 64, 65, 67, 69, 71], n), rng.choice([50, 90], n))
    return BASE.encode_notes(notes)


MUSIC = [melody(seed) for seed in range(12)]
SIZE = 440


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def subwords(request) -> SubwordTokenizer:
    """Return subwords of both types, learned from `MUSIC`."""
    return learn_subwords(BASE, MUSIC, request.param, SIZE)


def test_tokens_are_single_events_and_learned_subwords(subwords):
    """PAD, BOS, EOS, UNKNOWN, all 388 events, FILL, PLAY, and longer subwords, with different names."""
    assert subwords.vocab_size == len(subwords.token_events) == len(set(subwords.tokens)) == SIZE
    assert subwords.token_events[:4] == ((0,), (1,), (2,), ())
    assert subwords.tokens[:4] == ("PAD", "BOS", "EOS", "UNKNOWN")
    single = {events[0] for events in subwords.token_events[4:] if len(events) == 1}
    assert single == set(range(3, 393))
    assert sum(len(events) > 1 for events in subwords.token_events) == SIZE - 394
    longest = max(range(SIZE), key=lambda i: len(subwords.token_events[i]))
    assert subwords.tokens[longest] == "+".join(BASE.tokens[event] for event in subwords.token_events[longest])


def test_encoding_is_lossless_and_shorter(subwords):
    """Also for music that was not learned from, with other pitches and pauses."""
    other = [BASE.encode_notes(random_notes(seed, 300)) for seed in range(5)]
    for events in (*MUSIC, melody(50), *other):
        ids = subwords.from_events(events)
        assert np.array_equal(subwords.to_events(ids), events)
        assert ids.dtype == subwords.dtype
    assert len(subwords.from_events(melody(50))) < 0.5 * len(melody(50))
    notes = random_notes(77, 100)
    ids, events = subwords.encode_notes(notes), BASE.encode_notes(notes)
    assert subwords.decode(ids) == BASE.decode(events)
    assert subwords.recovered(notes, ids) == BASE.recovered(notes, events) == (len(notes), BASE.decode(events).duration)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(3, 392), max_size=60))
def test_any_events_are_encoded_without_loss(events):
    """Musical or not, also events that do not occur in the music that was learned from."""
    subwords = learned()
    ids = subwords.from_events(np.array(events, int))
    assert subwords.to_events(ids).tolist() == [1, *events, 2]
    assert 3 not in ids


@cache
def learned() -> SubwordTokenizer:
    """Return BPE subwords, learned once."""
    return learn_subwords(BASE, MUSIC, "bpe", SIZE)


def test_the_same_music_gives_the_same_model(subwords):
    again = learn_subwords(BASE, [events.copy() for events in MUSIC], subwords.model_type, SIZE)
    assert again.fingerprint == subwords.fingerprint
    others = [
        learn_subwords(BASE, MUSIC, subwords.model_type, SIZE + 1),
        learn_subwords(BASE, MUSIC[1:], subwords.model_type, SIZE),
        learn_subwords(BASE, MUSIC, "unigram" if subwords.model_type == "bpe" else "bpe", SIZE),
    ]
    assert len({other.fingerprint for other in (subwords, *others)}) == 4


LEARN = """
import sys
sys.path[:0] = [sys.argv[1], f'{sys.argv[1]}/tokenizers']
from test_subwords import BASE, MUSIC, SIZE
from dsmr_mlx.tokenizers.subwords import learn_subwords
print(learn_subwords(BASE, MUSIC, sys.argv[2], SIZE).fingerprint)
"""


@pytest.mark.slow
def test_another_process_learns_the_same(subwords):
    command = [sys.executable, "-c", LEARN, str(Path(__file__).parents[1]), subwords.model_type]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == subwords.fingerprint


def test_saved_and_pickled_it_is_equal(subwords, tmp_path):
    subwords.save(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["subwords.json", "subwords.model", "tokenizer.json"]
    for other in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(subwords)), make_tokenizer(str(tmp_path))):
        assert other.fingerprint == subwords.fingerprint
        assert other.token_events == subwords.token_events
        assert np.array_equal(other.from_events(MUSIC[0]), subwords.from_events(MUSIC[0]))


def test_it_can_be_packed_into_a_file_of_weights(subwords, tmp_path):
    subwords.save(tmp_path)
    other = tokenizer_files.unpack(tokenizer_files.pack(tmp_path), "model.pt")
    assert other.fingerprint == subwords.fingerprint
    assert np.array_equal(other.from_events(MUSIC[0]), subwords.from_events(MUSIC[0]))


def test_any_integers_are_decoded(subwords):
    rng = np.random.default_rng(0)
    ids = np.concatenate([[-1, SIZE, 10**9], rng.integers(0, SIZE, 400)])
    events = [event for i in ids if 0 <= i < SIZE for event in subwords.token_events[i]]
    assert subwords.to_events(ids).tolist() == events
    assert subwords.decode(ids) == BASE.decode(events)
    assert len(subwords.decode([])) == 0


def test_first_seconds_are_cut_between_events_and_encoded_again(subwords):
    events = MUSIC[3]
    first = subwords.first_seconds(subwords.from_events(events), 5.0)
    expected = BASE.first_seconds(events, 5.0)
    assert np.array_equal(subwords.to_events(first)[:-1], expected)
    assert subwords.seconds(first) == BASE.seconds(expected) <= 5.0
    prompt = subwords.prompt(first)
    assert (prompt[0], subwords.to_events(prompt[1:]).tolist()) == (1, expected[1:].tolist())


def test_a_token_may_come_if_all_its_events_may(subwords):
    """At 50 moments of a piece, for every id of the vocabulary; PAD, BOS and UNKNOWN never may."""
    grammar, tables = subwords.event_grammar(), token_tables(subwords)
    moment = beginning(grammar)
    for i in subwords.from_events(MUSIC[1])[1:51]:
        found = tokens_that_may_follow(tables, moment)
        assert found.tolist() == [all_may_follow(grammar, moment, events) for events in subwords.token_events]
        assert found[i]
        assert not found[[0, 1, 3]].any()
        moment = all_after(grammar, moment, subwords.token_events[i])


def test_subwords_of_miditok_events(tmp_path):
    pytest.importorskip("miditok")
    base = make_tokenizer("miditok:TSD", programs=True)
    music = [base.encode_notes(random_band(seed, 200)) for seed in range(8)]
    subwords = learn_subwords(base, music, "bpe", base.vocab_size + 100)
    subwords.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    notes = random_band(99)
    ids = loaded.encode_notes(notes)
    assert np.array_equal(loaded.to_events(ids), base.encode_notes(notes))
    assert loaded.programs
    assert loaded.decode(ids) == base.decode(base.encode_notes(notes))
    assert loaded.label == f"miditok:TSD bpe:{base.vocab_size + 100}"


# Refusals


LONG = "bpe:" + "1" * 5000  # more digits than `int` converts


@pytest.mark.parametrize("text", ["", "bpe", "bpe:", "bpe:x", "bpe:-1", "wordpiece:2000", "BPE:2000", "bpe:1e3", LONG])
def test_invalid_subwords_are_refused(text):
    with pytest.raises(UserError, match=f"`subwords` {text}: expected bpe:SIZE or unigram:SIZE"):
        parse_subwords(text)
    assert parse_subwords("unigram:4000") == ("unigram", 4000)


@pytest.mark.parametrize(
    ("base", "size", "reason"),
    [
        (BASE, 394, "expected 395 to 1,048,576, because there are 390 events"),
        (BASE, 1 << 21, "expected 395 to"),
        (BASE, 100_000, "expected at most [0-9]+, because the music has no more subwords"),
        (IdTokenizer(9, "aria"), 100, "tokenizer 'ids' has no events to join"),
        (learned, 600, "tokenizer 'subwords' has no events to join, or has joined them already"),
        (IdTokenizer(70_000, "aria"), 80_000, "has no events"),
    ],
)
def test_invalid_sizes_and_bases_are_refused(base, size, reason):
    base = base() if callable(base) else base
    with pytest.raises(UserError, match=reason):
        learn_subwords(base, MUSIC, "unigram", size)


def damage(path, content: bytes | None) -> None:
    """Replace the content of a file, or delete it if `content` is None."""
    path.unlink() if content is None else path.write_bytes(content)


@pytest.mark.parametrize("change", ["missing", "empty", "cut", "flipped", "other"])
def test_a_damaged_model_is_refused_with_both_hashes(tmp_path, change):
    learned().save(tmp_path)
    path = tmp_path / "subwords.model"
    model = path.read_bytes()
    expected = hashlib.sha256(model).hexdigest()
    other = learn_subwords(BASE, MUSIC, "bpe", 470)._model
    changed = {
        "missing": None, "empty": b"", "cut": model[:-100], "other": other,
        "flipped": model[:500] + bytes([model[500] ^ 1]) + model[501:],
    }[change]  # fmt: skip
    damage(path, changed)
    found = "" if changed is None else hashlib.sha256(changed).hexdigest()
    reason = "cannot be read" if changed is None else f"sha256 {found}, expected {expected}: damaged"
    with pytest.raises(UserError, match=rf"^{path}: {reason}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"subwords\.json: cannot be read"),
        (b"{", r"subwords\.json: not valid JSON"),
        (b"[]", r"subwords\.json: expected an object with token_events"),
        (b'{"token_events": [[999]]}', r"subwords\.json: expected events from 0 to 392"),
        (b'{"token_events": [[0], [1], [2], [], [3]]}', r"subwords\.json: expected PAD, BOS, EOS, UNKNOWN, and then"),
    ],
)
def test_damaged_token_events_are_refused(tmp_path, content, reason):
    learned().save(tmp_path)
    damage(tmp_path / "subwords.json", content)
    with pytest.raises(UserError, match=reason) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base": None}, "base: expected fingerprint, kind, parameters"),
        ({"extra": 1}, "expected base, model_type and sha256"),
        ({"base": {"kind": "performance", "parameters": {}, "fingerprint": "0"}}, "fingerprint 0, expected 119a2702"),
        ({"base": {"kind": "other", "parameters": {}, "fingerprint": "0"}}, "kind 'other', expected one of"),
    ],
)
def test_an_invalid_description_is_refused(tmp_path, change, reason):
    learned().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    description = json.loads(path.read_text())
    description["parameters"] |= change
    path.write_text(json.dumps(description))
    with pytest.raises(UserError, match=reason) as caught:
        load_tokenizer(tmp_path)
    assert str(path) in str(caught.value)


def test_subwords_of_an_earlier_vocabulary_are_refused_by_name(tmp_path):
    learned().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    description = json.loads(path.read_text())
    (first,) = BASE.earlier_versions
    description["parameters"]["base"]["fingerprint"] = first
    path.write_text(json.dumps(description))
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: version 1 of the performance vocabulary, expected"):
        load_tokenizer(tmp_path)


# FILL and PLAY


def test_fill_and_play_are_single_tokens_that_divide_the_music(subwords):
    """Parts before, between and after them are divided as if each were alone."""
    a, b, c = (BASE.without_shown(melody(seed, 60))[1:-1] for seed in (60, 61, 62))
    events = np.concatenate([[1], a, [FILL], b, [PLAY], c, [2]])
    ids = subwords.from_events(events)
    assert np.array_equal(subwords.to_events(ids), events)
    alone = [subwords.from_events(part)[1:-1] for part in (a, b, c)]
    fill, play = subwords.fill_id, subwords.play_id
    assert (subwords.tokens[fill], subwords.tokens[play]) == ("FILL", "PLAY")
    assert ids.tolist() == [1, *alone[0], fill, *alone[1], play, *alone[2], 2]
    music = subwords.without_shown(ids)
    assert music.tolist() == [1, *alone[0], *alone[2], 2]
    assert subwords.decode(ids) == subwords.decode(music) == BASE.decode(np.concatenate([a, c]))
    assert subwords.seconds(ids) == subwords.seconds(music)
    assert subwords.recovered(None, ids) == subwords.recovered(None, music)
    assert subwords.from_events(np.array([FILL, PLAY, PLAY])).tolist() == [1, fill, play, play, 2]
    others = [id for id, row in enumerate(subwords.token_events) if {FILL, PLAY} & set(row)]
    assert sorted(others) == sorted([fill, play])


def test_subwords_of_other_vocabularies_have_no_fill(tmp_path):
    pytest.importorskip("miditok")
    base = make_tokenizer("miditok:TSD")
    subwords = learn_subwords(base, [base.encode_notes(random_notes(0, 99))], "bpe", base.vocab_size + 10)
    assert base.fill_id is base.play_id is subwords.fill_id is subwords.play_id is None
    assert not subwords.shown_mask(np.arange(subwords.vocab_size)).any()
