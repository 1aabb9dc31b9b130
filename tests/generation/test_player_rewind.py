"""A player can be rewound and branched anywhere, and is then as if it had never gone further."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.players import REMEMBERING, TOKENIZER, LastIds, S, assert_knows, new_player, some_ids, take
from support.stand_ins import PlainTokenizer, tiny_model

from dsmr_mlx import UserError
from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.sampling import Sampling
from dsmr_mlx.generation.steering import EndWithin, MaxPolyphony
from dsmr_mlx.model import state
from dsmr_mlx.tokenizers.performance import BOS


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    data=st.data(),
    n=st.sampled_from([1, 2]),
    processors=st.sampled_from([REMEMBERING, [*REMEMBERING, LastIds()]]),
    recipe=st.booleans(),
)
def test_reading_playing_and_rewinding_in_any_order(model, recipe_model, data, n, processors, recipe):
    """In any order, the player is as if it had read only the music that was kept."""
    model = recipe_model if recipe else model
    player = new_player(model, n=n, processors=processors)
    kept, reads = np.full((n, 1), BOS), itertools.count()
    for _ in range(data.draw(st.integers(2, 6))):
        what, k = data.draw(st.sampled_from(["read", "play", "back"])), data.draw(st.integers(1, 25))
        if what != "back" and not kept.size:
            kept = np.full((n, 1), BOS)
        if what == "read":
            new = np.tile(some_ids(k, seed=next(reads)), (n, 1))
            player.read(new[0])
        elif what == "play":
            new = take(k, player).T
        else:
            k = min(k, player.rewindable)
            player.rewind(k)
            new, kept = kept[:, :0], kept[:, : kept.shape[1] - k]
        kept = np.concatenate([kept, new], axis=1)
    if kept.size:
        assert_knows(player, kept)
    else:
        assert (player.position, player.logits, player.held) == (0, None, [[]] * n)


def processors() -> list:
    return [*REMEMBERING, EndWithin(5, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3, 9, 20])
def test_rewinding_into_the_prompt_gives_a_shorter_prompt(model, k):
    """Also for the clock: new music begins where the rest of the prompt ends."""
    ids, sampling = some_ids(60), Sampling(temperature=((0, 0.5), (3, 2.0)))
    options = {"processors": processors(), "sampling": sampling}
    player, shorter = (new_player(model, some, **options) for some in (ids, ids[:-k]))
    player.rewind(k)
    assert player.decode_state.music.new_ticks.tolist() == [0]
    assert_knows(player, np.array([[BOS, *ids[:-k]]]))
    np.testing.assert_array_equal(take(20, player), take(20, shorter))


@pytest.mark.slow
def test_processors_are_rewound_with_the_music(model):
    """Rewinding by a few tokens again and again, across segments and into the prompt, gives the same music."""
    options = {"processors": processors(), "n": 2}
    whole = take(50, new_player(model, some_ids(9), **options))
    player, at, rng = new_player(model, some_ids(9), **options), 0, np.random.default_rng(0)
    for _ in range(15):
        played = take(int(min(rng.integers(0, 15), 50 - at)), player)
        np.testing.assert_array_equal(played, whole[at : at + len(played)])
        at += len(played)
        k = int(min(rng.integers(0, 20), player.rewindable, at))
        player.rewind(k)
        at -= k


@pytest.mark.slow
def test_branches_share_the_past_and_differ_in_the_future(model):
    player = new_player(model, some_ids(20))
    played = take(20, player)[:, 0]
    futures = [take(40, player.branch(3, seed)) for seed in (0, 0, 1)]
    assert np.array_equal(futures[0], futures[1])
    lanes = {tuple(lane) for future in (futures[0], futures[2]) for lane in future.T}
    own = take(40, player)[:, 0]
    assert len({*lanes, tuple(own)}) == 7
    assert np.array_equal(own, take(60, new_player(model, some_ids(20)))[20:, 0]), "branches do not change the player"
    player.rewind(10)
    branch = player.branch(2)
    branch.rewind(5)
    assert_knows(branch, np.array([[BOS, *some_ids(20), *played, *own[:25]]] * 2))


def test_a_branch_of_one_of_several_lanes(model):
    player = new_player(model, n=3)
    played = take(30, player)
    for lane in range(3):
        branch = player.branch(2, lane=lane)
        assert branch.held == [player.held[lane]] * 2
        branch.rewind(4)
        assert_knows(branch, np.array([[BOS, *played[:-4, lane]]] * 2))
    with pytest.raises(UserError, match="`lane` 3: expected 0 to 2"):
        player.branch(2, lane=3)
    with pytest.raises(UserError, match="`n` 0: expected at least 1"):
        player.branch(0)
    before = new_player(model, n=3)
    assert np.array_equal(take(5, before.branch(2, lane=2)), take(5, before.branch(2, lane=2)))
    assert not np.array_equal(take(9, before.branch(1, lane=1)), take(9, before.branch(1, lane=2)))


@pytest.mark.slow
@pytest.mark.parametrize("played", [1, 15, 16, 33, 48])
def test_rewinding_is_bitwise_and_reaches_a_segment_back(model, played):
    whole = take(played + 10, new_player(model, n=2))
    as_played = new_player(model, n=2)
    take(played, as_played)
    for k in {1, min(played, S), played}:
        player = as_played.copy()
        assert player.rewindable >= min(played + 1, S)
        k = min(k, player.rewindable)
        player.rewind(k)
        np.testing.assert_array_equal(take(k + 10, player), whole[played - k :])


def test_rewinding_too_far_is_refused(model):
    player = new_player(model)
    take(70, player)
    most = player.rewindable
    assert S <= most < 2 * S
    for k in (most + 1, -1):
        with pytest.raises(UserError, match=rf"`k` {k}: expected 0 to {most}, the tokens that the player keeps"):
            player.rewind(k)
    before = player.held
    player.rewind(0)
    assert (player.held, player.position) == (before, 71)
    player.rewind(most)
    assert player.rewindable == 0


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3])
def test_rewinding_to_the_very_beginning(model, n, tmp_path):
    """Lanes are one again there and split when they play; also those of branches and saved players."""
    options = {"n": n, "processors": [MaxPolyphony(4), *REMEMBERING]}
    player = new_player(model, **options)
    first = take(9, player)
    player.rewind(10)
    assert (player.position, player.logits, player.held) == (0, None, [[]] * n)
    player.save(tmp_path / "a")
    branches = [player.branch(2, lane=lane) for lane in range(n)]
    np.testing.assert_array_equal(take(9, player), first)
    np.testing.assert_array_equal(take(9, Player.load(tmp_path / "a", model, TOKENIZER)), first)
    for branch in branches:
        lanes = take(9, branch)
        assert_knows(branch, np.array([[BOS, *lane] for lane in lanes.T]))
    player.rewind(10)
    player.read(some_ids(20))
    np.testing.assert_array_equal(take(9, player), take(9, new_player(model, some_ids(20), **options)))


def test_rewinding_across_a_rebasing_plays_the_same(monkeypatch):
    monkeypatch.setattr(state, "rebase_interval", lambda config: 64)
    model = tiny_model(horizons=(24, 8))
    player = Player(model, TOKENIZER, sampling=Sampling(temperature=0))
    played = take(70, player)
    assert player.state.rebased.tolist() == [64]
    player.rewind(20)
    np.testing.assert_array_equal(take(20, player), played[-20:])


def test_rewinding_what_was_read_across_a_rebasing(monkeypatch):
    """The rotary positions of the segment that is played again are those before it."""
    monkeypatch.setattr(state, "rebase_interval", lambda config: 64)
    model, ids, more = tiny_model(horizons=(24, 8)), some_ids(52), some_ids(14, seed=1)
    player = new_player(model, ids, processors=())
    played = take(2, player)[:, 0]
    player.read(more)
    assert player.state.rebased.tolist() == [64]
    player.rewind(10)
    same = new_player(model, [*ids, *played, *more[:4]], processors=())
    np.testing.assert_allclose(np.array(player.logits), np.array(same.logits), atol=1e-4)
    assert player.position == same.position


def test_rewinding_with_bos_equal_to_eos(model):
    """In a vocabulary whose BOS is its EOS, the id begins a prompt and ends a stream, also when it is replayed."""

    class OneBound(PlainTokenizer):
        bos_id = 0

    player = Player(tiny_model(10), OneBound(), seed=2)
    drawn = take(12, player)
    player.rewind(11)
    np.testing.assert_array_equal(take(11, player), drawn[1:])
    assert (drawn != 0).all()


def test_the_last_learned_position_can_be_rewound():
    class WithoutEnd(PlainTokenizer):
        eos_id = None

    player = Player(tiny_model(10, max_positions=20), WithoutEnd())
    played = take(99, player, Limits(tokens=1000))
    assert (len(played), player.position, player.logits) == (20, 21, None)
    player.rewind(5)
    np.testing.assert_array_equal(take(99, player, Limits(tokens=1000)), played[-5:])
