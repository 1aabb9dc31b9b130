"""Going on from any point equals reading the whole music from its beginning, wherever the states come from."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import save
from support.dense_reference import dense_logits
from support.music import random_notes
from support.studio_models import make_work, tiny_models

from dsmr_mlx.generation.gap_player import events_of, ids_of
from dsmr_mlx.generation.player import Player
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.studio import states as module
from dsmr_mlx.studio.models import Models
from dsmr_mlx.studio.prompt import prompt_at
from dsmr_mlx.studio.states import Interrupted, States, digest_of, matches, packed, unpacked
from dsmr_mlx.studio.store import Store
from dsmr_mlx.studio.takes import on_milliseconds
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer, decode_ids, performance_grammar

TOKENIZER, GRAMMAR = PerformanceTokenizer(), performance_grammar()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A tiny model with a short memory."""
    return tiny_models(tmp_path_factory.mktemp("models")).load(None)


@pytest.fixture(scope="module")
def remembering(tmp_path_factory):
    """A tiny model that remembers all music."""
    folder = tmp_path_factory.mktemp("models")
    save(folder / "whole", TOKENIZER, horizons="uniform:2000")
    return Models([str(folder / "whole")], folder).load(None)


@pytest.fixture(autouse=True)
def short_strides(monkeypatch):
    """Keep states often."""
    monkeypatch.setattr(module, "STRIDE", 20)
    monkeypatch.setattr(module, "STORED_STRIDE", 60)


def drawn(player: Player, n: int = 12) -> np.ndarray:
    """The next tokens."""
    return np.array([int(step[0]) for step in itertools.islice(player.branch(1, seed=7).play(), n)])


def fresh(loaded, ids: np.ndarray) -> Player:
    """A player that has read all ids from the beginning, at once."""
    player = Player(loaded.model, loaded.tokenizer)
    player.read(ids)
    return player


def assert_equal(player: Player, loaded, ids: np.ndarray) -> None:
    """Assert that a player has read exactly these ids."""
    assert player.position == len(ids)
    expected = np.array(dense_logits(loaded.model, ids[None]))[0, -1]
    np.testing.assert_allclose(np.array(player.logits)[0], expected, atol=2e-4, rtol=2e-4)
    assert np.array_equal(drawn(player), drawn(fresh(loaded, ids)))


@pytest.mark.parametrize("model", ["loaded", "remembering"])
def test_any_point_of_any_music_equals_reading_it_from_the_beginning(model, request, tmp_path):
    loaded = request.getfixturevalue(model)
    store, states = Store(tmp_path / "a.studio"), States()
    music = [on_milliseconds(random_notes(seed, 80)) for seed in range(3)]
    music.append(
        Notes.of([*music[0].rows[:40], *music[1].shifted(music[0].rows[39][0] + 2).rows])
    )  # shares a beginning
    rng = np.random.default_rng(0)
    for i in range(8):
        notes = music[rng.integers(len(music))]
        ids = prompt_at(TOKENIZER, notes, rng.uniform(0, notes.duration)).ids
        assert_equal(states.player_at(loaded, ids, store), loaded, ids)
        if i == 4:
            states = States()  # a new program: only what is stored is known
    assert bool(store.states(loaded.key)) == (model == "remembering")
    store.close()


def test_only_what_is_new_is_read(remembering, tmp_path):
    store, states = Store(tmp_path / "a.studio"), States()
    ids = prompt_at(TOKENIZER, random_notes(0, 100), 1e3).ids
    read = []
    states.player_at(remembering, ids, store, lambda done, total: read.append(total))
    assert read[-1] == len(ids)
    for cut, most in ((len(ids), 0), (len(ids) - 1, 20), (45, 20), (20, 0), (7, 7)):
        read.clear()
        states.player_at(remembering, ids[:cut], store, lambda done, total: read.append(total))
        assert (read[-1] if read else 0) <= most
    read.clear()
    States().player_at(remembering, ids, store, lambda done, total: read.append(total))
    assert 0 < read[-1] <= 60


def test_reading_can_be_interrupted(remembering):
    states, ids = States(), prompt_at(TOKENIZER, random_notes(0, 100), 1e3).ids

    def stop(done: int, total: int) -> None:
        if done > 50:
            raise Interrupted

    with pytest.raises(Interrupted):
        states.player_at(remembering, ids, None, stop)
    read = []
    player = states.player_at(remembering, ids, None, lambda done, total: read.append(total))
    assert_equal(player, remembering, ids)
    assert read[-1] < len(ids)  # nothing is read twice


def test_what_is_read_ahead_leaves_states_everywhere(loaded):
    states, ids, calls = States(), prompt_at(TOKENIZER, random_notes(0, 400), 1e3).ids, []
    states.player_at(loaded, ids, ahead=True)
    for cut in (len(ids) - 30, 300, 101):
        assert_equal(
            states.player_at(loaded, ids[:cut], None, lambda done, total: calls.append(total)), loaded, ids[:cut]
        )
    assert max(calls) <= 20


def test_a_short_memory_reads_the_end_of_long_music_at_once(loaded):
    ids, calls = prompt_at(TOKENIZER, random_notes(0, 400), 1e3).ids, []
    player = States().player_at(loaded, ids, None, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (len(ids), len(ids))
    assert calls[0][0] > len(ids) / 2
    assert_equal(player, loaded, ids)


def test_memory_is_bounded(loaded):
    states = States(memory=0)
    for seed in range(3):
        ids = prompt_at(TOKENIZER, random_notes(seed, 60), 1e3).ids
        states.player_at(loaded, ids)
        assert len(states._players) == 1
    one = states.nbytes
    states = States(memory=5 * one)
    states.player_at(loaded, prompt_at(TOKENIZER, random_notes(1, 200), 1e3).ids)
    assert states.nbytes <= 5 * one


def test_reading_that_is_taken_up_again_evicts_nothing_newer(loaded):
    """It counts as used when it was begun, however often it is interrupted."""
    first, other, last = (prompt_at(TOKENIZER, random_notes(seed, 200), 1e3).ids for seed in range(3))
    states = States()
    states.player_at(loaded, other)
    states.memory = 3 * states.nbytes // len(states._players)
    begun = states.now()

    def stop(done: int, total: int) -> None:
        if done > 100:
            raise Interrupted

    with pytest.raises(Interrupted):
        states.player_at(loaded, first, None, stop, ahead=True, time=begun)
    states.player_at(loaded, last[:40], ahead=True)
    states.player_at(loaded, first, ahead=True, time=begun)
    kept = {digest for _, digest in states._players}
    assert {digest_of(last[:20]), digest_of(last[:40])} <= kept
    assert digest_of(first) in kept  # what was used before it has made room
    states.player_at(loaded, first[:20], time=begun)
    states.player_at(loaded, other[:20], ahead=True)
    assert digest_of(last[:40]) in {digest for _, digest in states._players}


def test_damaged_states_are_not_used(loaded, tmp_path):
    store = Store(tmp_path / "a.studio")
    ids = prompt_at(TOKENIZER, random_notes(0, 60), 1e3).ids
    player = fresh(loaded, ids)
    data = packed(player, loaded)
    assert unpacked(data, loaded, ids).position == len(ids)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for wrong in (b"", b"nothing", data[:-1], bytes(flipped)):
        assert unpacked(wrong, loaded, ids) is None
        store.save_state(loaded.key, digest_of(ids), len(ids), wrong)
        assert States().player_at(loaded, ids, store).position == len(ids)
        assert not any(n == len(ids) for n, _ in store.states(loaded.key))
    assert unpacked(data, loaded, ids + 1) is None  # another music
    store.close()


def test_states_of_other_models_are_not_used(tmp_path):
    work, _ = make_work(tmp_path, "tiny", "other")
    one, two = (work.load(name) for name in work.models.names[:2])
    assert one.key != two.key
    ids = prompt_at(TOKENIZER, random_notes(0, 60), 1e3).ids
    for loaded in (one, two, one):
        assert_equal(work.states.player_at(loaded, ids, work.session.store), loaded, ids)
    work.session.close()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=40), st.lists(st.tuples(st.integers(0, 45), st.booleans()), max_size=12))
def test_matches_are_all_beginnings(ids, known):
    ids = np.array(ids, np.int64)
    pairs = {(n, digest_of(ids[:n]) if right else digest_of(np.append(ids[:n], 9))) for n, right in known}
    right = {n for n, digest in pairs if 0 < n <= len(ids) and digest == digest_of(ids[:n])}
    assert matches(ids, pairs) == [digest_of(ids[:n]) for n in sorted(right, reverse=True)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1.1))
def test_a_prompt_has_all_that_happens_before_the_point(seed, share):
    notes = on_milliseconds(random_notes(seed, 20))
    at = round(share * notes.duration, 3)
    prompt = prompt_at(TOKENIZER, notes, at)
    before = notes.take(notes.onset < at)
    whole = ids_of(TOKENIZER, events_of(TOKENIZER, before))
    assert prompt.ids[0] == TOKENIZER.bos_id
    assert np.array_equal(prompt.ids[1:], whole[: len(prompt.ids) - 1])  # a beginning of the whole
    played = decode_ids(prompt.ids)
    assert len(played) == len(decode_ids(whole))  # no key is pressed later
    assert prompt.ticks == round(TOKENIZER.seconds(prompt.ids) * 100)
    assert prompt.ticks <= prompt.begin
    # The keys that are down afterwards are those of notes that sound on beyond the point.
    player_down = {p for p in range(128) if sounding(prompt.ids, p)}
    grid = decode_ids(whole)
    ends = {int(p): round(off * 100) for off, p in zip(grid.offset, grid.pitch, strict=True)}
    assert player_down == {p for p, end in ends.items() if end > prompt.begin}
    if len(before):
        assert abs(prompt.begin / 100 + prompt.start - at) <= 0.0201


def sounding(ids: np.ndarray, pitch: int) -> bool:
    """Whether a key is down after some ids."""
    moves = [int(i) for i in ids if GRAMMAR.press[i] == pitch or GRAMMAR.release[i] == pitch]
    return bool(moves) and GRAMMAR.press[moves[-1]] == pitch


def test_nothing_before_is_the_beginning_of_a_piece():
    for notes, at in ((Notes.empty(), 0.0), (Notes.of([(3.0, 4.0, 60, 60)]), 1.0)):
        prompt = prompt_at(TOKENIZER, notes, at)
        assert (prompt.ids.tolist(), prompt.start, prompt.ticks, prompt.begin) == ([TOKENIZER.bos_id], at, 0, 0)
