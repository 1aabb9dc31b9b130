"""MidiTok tokenizers: round trips, streams that obey their grammars, and robust decoding."""

import pickle

import numpy as np
import pytest
from support.bands import band, random_band
from support.midi_files import midi, note, pedal, tempo, track
from support.music import on_grid, random_notes
from support.reference_grammar import after, first_violation, may_follow
from support.vocabularies import with_rests

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.music.midi import read_notes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.event_grammar import beginning
from dsmr_mlx.tokenizers.miditok import vocabulary as miditok_vocabulary
from dsmr_mlx.tokenizers.registry import load_tokenizer, make_tokenizer
from dsmr_mlx.tokenizers.round_trip import round_trip

pytest.importorskip("miditok")

PIANO = ["REMI", "TSD", "MIDILike", "Structured", "PerTok"]
EVERY = [*((name, False) for name in PIANO), *((name, True) for name in (*PIANO, "BEAT"))]

# Seconds by which onsets and offsets may move; BEAT has steps of 1/8 s, PerTok rounds lengths to 1/16 s and more.
ONSET = {"BEAT": 0.0626, "PerTok": 0.0026}
OFFSET = {"BEAT": 0.19, "PerTok": 0.066}


def notes_for(name: str, programs: bool, seed: int, n: int = 50) -> Notes:
    """Notes on the grid of 10 ms, shorter than 1 s; of several instruments if the tokenizer encodes them."""
    if programs or name == "BEAT":
        return random_band(seed, n)
    return on_grid(random_notes(seed, n))


@pytest.fixture(scope="module")
def tokenizers():
    """Return a function that makes each tokenizer once."""
    made = {}

    def get(name, programs=False):
        if (name, programs) not in made:
            made[name, programs] = make_tokenizer(f"miditok:{name}", programs=programs)
        return made[name, programs]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(("name", "programs"), EVERY)
def test_notes_are_recovered(tokenizers, name, programs):
    """Every note with its pitch and program, onset and offset within half a step, velocity within 2 of 127."""
    tokenizer = tokenizers(name, programs)
    assert tokenizer.programs == (programs or name == "BEAT")
    for seed in range(3):
        notes = notes_for(name, programs, seed)
        ids = tokenizer.encode_notes(notes)
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert ids.dtype == tokenizer.dtype
        assert ids.max() < tokenizer.vocab_size
        result = round_trip(notes, tokenizer.decode(ids))
        if name != "BEAT":  # which merges two presses of a key in one step
            assert result.given == result.returned == result.matched
            assert result.velocity.max <= 2
        assert result.matched > 0.9 * result.given
        assert result.onset.max <= ONSET.get(name, 1e-9)
        assert result.offset.max <= OFFSET.get(name, 1e-9)


@pytest.mark.parametrize(("name", "programs"), EVERY)
def test_streams_obey_the_grammar_and_have_no_error_for_miditok(tokenizers, name, programs):
    tokenizer = tokenizers(name, programs)
    grammar, miditok = tokenizer.event_grammar(), tokenizer._vocabulary.miditok
    for seed in range(3):
        ids = tokenizer.encode_notes(notes_for(name, programs, seed))
        assert first_violation(grammar, ids[1:]) is None
        errors = miditok.tokens_errors(ids[1:-1].tolist() if miditok.one_token_stream else [ids[1:-1].tolist()])
        assert np.sum(errors) == 0
    never = [tokenizer.pad_id, tokenizer.bos_id]
    assert not grammar.allowed[:, never].any()
    assert grammar.ends.nonzero()[0].tolist() == [*never, tokenizer.eos_id] or grammar.ends[tokenizer.eos_id]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["REMI", "TSD", "MIDILike", "BEAT"])
def test_random_walks_in_the_grammar_are_music(tokenizers, name):
    """Random events among those that may follow decode to notes, without an error for MidiTok."""
    tokenizer, rng = tokenizers(name), np.random.default_rng(0)
    grammar = tokenizer.event_grammar()
    moment, events = beginning(grammar), []
    while len(events) < 400:
        may = [e for e in np.flatnonzero(grammar.allowed[moment.state]) if allowed(grammar, moment, e)]
        events.append(int(rng.choice(may)))
        moment = after(grammar, moment, events[-1])
    notes = tokenizer.decode(events)
    assert len(notes) > 20
    if grammar.held:
        errors = tokenizer._vocabulary.miditok.tokens_errors([events])
        assert np.sum(errors) * len(events) <= 128  # notes that still sound


def allowed(grammar, moment, event) -> bool:
    """Return whether an event may follow and does not end the piece."""
    return not grammar.ends[event] and may_follow(grammar, moment, event)


@pytest.mark.parametrize(("name", "programs"), EVERY)
def test_any_integers_are_decoded(tokenizers, name, programs):
    tokenizer, rng = tokenizers(name, programs), np.random.default_rng(1)
    for n in (0, 1, 7, 300):
        ids = rng.integers(0, tokenizer.vocab_size, n)
        notes = tokenizer.decode(ids)
        assert np.all(notes.offset > notes.onset)
        assert (notes.onset >= 0).all()
        assert ((notes.velocity >= 1) & (notes.velocity <= 127)).all()
    assert len(tokenizer.decode([-5, 10**9])) == 0
    assert tokenizer.encode_notes(Notes.empty()).tolist() == [tokenizer.bos_id, tokenizer.eos_id]


def test_music_before_too_many_undecodable_tokens_is_kept(tokenizers, monkeypatch):
    tokenizer = tokenizers("TSD")
    vocabulary, notes, bad = tokenizer._vocabulary, notes_for("TSD", False, 0, 8), tokenizer.vocab_size
    decode, events = vocabulary._decode, tokenizer.encode_notes(notes).astype(np.int64)
    monkeypatch.setattr(miditok_vocabulary, "MAX_REPAIRS", 2)
    monkeypatch.setattr(vocabulary, "_decode", lambda ids: ids[ids.index(bad)] / 0 if bad in ids else decode(ids))
    for n in (2, 3):
        found = vocabulary.decode(np.concatenate([events, [bad] * n, events]))
        assert len(found) == (16 if n == 2 else 8)


@pytest.mark.parametrize("name", ["REMI", "MIDILike", "PerTok"])
def test_the_tempo_of_a_file_is_ignored_and_its_pedal_is_applied(tokenizers, name):
    """The same performance written at 120 quarters a minute and at 60 with half the ticks gives the same ids."""
    tokenizer = tokenizers(name)
    events = [note(0, 300, 60), note(500, 250, 64), note(1000, 100, 67), [(900, pedal(127)), (1800, pedal(0))]]
    slow = [note(0, 150, 60), note(250, 125, 64), note(500, 50, 67), [(450, pedal(127)), (900, pedal(0))]]
    ids = tokenizer.encode(midi(track(*events)))
    assert np.array_equal(ids, tokenizer.encode(midi(track((0, tempo(1_000_000)), *slow))))
    assert abs(tokenizer.decode(ids).offset.max() - 1.8) < 0.07
    late = [(tick + 5000, message) for part in events for tick, message in part]
    assert np.array_equal(ids, tokenizer.encode(midi(track(late))))


def test_keys_down_at_the_end_are_released_there(tokenizers):
    for programs in (False, True):
        tokenizer = tokenizers("MIDILike", programs)
        notes = notes_for("MIDILike", programs, 5)
        ids = tokenizer.encode_notes(notes)
        is_off = [token.startswith(("NoteOff", "DrumOff")) for token in tokenizer.tokens]
        last_on = max(i for i, token in enumerate(ids) if tokenizer.tokens[token].startswith(("NoteOn", "DrumOn")))
        held = tokenizer.decode([i for k, i in enumerate(ids) if k <= last_on + 1 or not is_off[i]])
        assert len(held) == len(notes)


@pytest.mark.parametrize(("name", "programs"), [("REMI", False), ("MIDILike", True)])
def test_saved_pickled_or_made_again_it_is_equal(tokenizers, tmp_path, name, programs):
    tokenizer, notes = tokenizers(name, programs), notes_for(name, programs, 7)
    tokenizer.save(tmp_path)
    ids = tokenizer.encode_notes(notes)
    for other in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint
        assert other.tokens == tokenizer.tokens
        assert np.array_equal(other.encode_notes(notes), ids)
        assert other.decode(ids) == tokenizer.decode(ids)
    again = make_tokenizer(f"miditok:{name}", programs=programs)
    assert again.fingerprint == tokenizer.fingerprint
    assert len({t.fingerprint for t in (tokenizer, tokenizers("TSD"), tokenizers("TSD", True))}) == 3


def test_first_seconds_of_a_piece(tokenizers):
    """All notes that begin in the first 2 s, and no others."""
    for name in ("REMI", "TSD", "MIDILike"):
        tokenizer, notes = tokenizers(name), notes_for(name, False, 3)
        ids = tokenizer.encode_notes(notes)
        first = tokenizer.first_seconds(ids, 2.0)
        left = tokenizer.decode(first)
        assert len(left) == (notes.onset <= 2.0).sum()
        assert np.array_equal(ids[: len(first)], first)
        assert tokenizer.seconds(first) <= 2.0 < tokenizer.seconds(ids)
        prompt = tokenizer.prompt(first)
        assert prompt[0] == tokenizer.bos_id
        assert tokenizer.eos_id not in prompt
    with pytest.raises(UserError, match="tokenizer miditok:TSD: its tokens have no known duration"):
        with_rests("TSD").first_seconds(np.array([1]), 2.0)
    assert with_rests("TSD").seconds(np.array([1])) is None


def test_files_are_read_with_the_instruments_of_the_vocabulary(tokenizers):
    one, several = tokenizers("TSD"), tokenizers("TSD", True)
    assert one.decode(one.encode(band())).program is None
    assert several.decode(several.encode(band())).programs == [0, 33, 128]
    assert np.array_equal(one.encode(band()), one.encode_notes(read_notes(band(), programs=True)))


@pytest.mark.slow
@pytest.mark.asap
@pytest.mark.parametrize("name", [*PIANO, "BEAT"])
def test_performances_are_recovered(tokenizers, asap_dir, name):
    """Three performances: every note, near its time, and streams that obey the grammar."""
    tokenizer = tokenizers(name)
    files = sorted(asap_dir.glob("Bach/Fugue/bwv_8[5-9]*/*.mid"))[::12][:3]
    for path in files:
        notes = read_notes(path, programs=tokenizer.programs)
        ids = tokenizer.encode_notes(notes)
        result = round_trip(notes, tokenizer.decode(ids))
        assert result.matched >= (0.9 if name == "BEAT" else 0.995) * result.given
        assert result.onset.mean <= {"BEAT": 0.04, "Structured": 0.3}.get(name, 0.003)
        assert first_violation(tokenizer.event_grammar(), ids[1:]) is None
