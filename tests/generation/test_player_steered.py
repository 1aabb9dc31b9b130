"""A player that goes on with other sampling and processors is a new one that has read the same music."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.players import REMEMBERING, TOKENIZER, LastIds, S, assert_knows, new_player, some_ids, take
from support.stand_ins import constant_model, tiny_model

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.sampling import Sampling
from dsmr_mlx.tokenizers.performance import BOS, EOS, NOTE_OFF, TIME_SHIFT, VOCAB_SIZE

OTHER = {"sampling": Sampling(temperature=0.8, top_p=0.9), "processors": [*REMEMBERING, LastIds()]}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def read_and_played(player: Player, prompt: np.ndarray, drawn: np.ndarray) -> list[np.ndarray]:
    """All ids of each lane."""
    begun = TOKENIZER.prompt(prompt)
    return [np.concatenate([begun, lane]) for lane in drawn.T]


@pytest.mark.parametrize(("prompt", "played"), [(0, 5), (3, 1), (S - 2, 3), (50, 40), (2 * S, S)])
def test_it_equals_a_new_player(model, prompt, played):
    ids = some_ids(prompt)
    player = new_player(model, ids, n=1, seed=5)
    (lane,) = read_and_played(player, ids, take(played, player))
    before = player.position
    steered = player.steered([lane], **OTHER)
    fresh = Player(model, TOKENIZER, seed=5, **OTHER)
    fresh.read(lane)
    assert_knows(steered, lane[None])
    assert np.array_equal(
        np.array(steered.decode_state.music.prompt_ticks), np.array(fresh.decode_state.music.prompt_ticks)
    )
    assert np.array_equal(take(60, steered), take(60, fresh))
    assert player.position == before  # the old one is as it was


def test_several_lanes_go_on_each_with_its_own_music(model):
    ids = some_ids(20)
    player = new_player(model, ids, n=3, seed=1)
    lanes = read_and_played(player, ids, take(25, player))
    steered = player.steered(lanes, **OTHER)
    assert_knows(steered, np.stack(lanes))
    played = take(30, steered)
    for i, lane in enumerate(lanes):
        fresh = Player(model, TOKENIZER, **OTHER)
        fresh.read(lane)
        fresh.keys = player.keys[i : i + 1]
        assert np.array_equal(take(30, fresh)[:, 0], played[:, i])


def test_it_can_be_rewound(model):
    ids = some_ids(40)
    player = new_player(model, ids, n=1, seed=2)
    (lane,) = read_and_played(player, ids, take(30, player))
    steered = player.steered([lane], **OTHER)
    steered.rewind(10)
    assert_knows(steered, lane[None, :-10])
    steered.read(lane[-10:])
    played = take(20, steered)
    fresh = Player(model, TOKENIZER, seed=2, **OTHER)
    fresh.read(lane[:-10])
    fresh.read(lane[-10:])
    assert np.array_equal(played, take(20, fresh))


def test_it_can_be_saved_and_branched(model, tmp_path):
    ids = some_ids(40)
    player = new_player(model, ids, n=1)
    steered = player.steered([TOKENIZER.prompt(ids)], processors=REMEMBERING)
    steered.save(tmp_path / "state.safetensors")
    loaded = Player.load(tmp_path / "state.safetensors", model, TOKENIZER)
    branch = steered.branch(2, seed=3)
    assert np.array_equal(take(30, loaded), take(30, steered.copy()))
    assert take(5, branch).shape == (5, 2)


def test_other_ids_are_refused(model):
    ids = some_ids(30)
    player = new_player(model, ids)
    right = TOKENIZER.prompt(ids)
    wrong = right.copy()
    wrong[-1] += 1
    for lanes in ([right[:-1]], [wrong], [right, right], []):
        with pytest.raises(UserError, match=r"^`ids`: not the 31 tokens that the player has read and played$"):
            player.steered(lanes)
    mx.eval(player.steered([right]).decode_state)


def test_lanes_that_have_ended_are_steered_and_rewound_each_for_itself():
    preferences = np.zeros(VOCAB_SIZE)
    preferences[EOS], preferences[NOTE_OFF:TIME_SHIFT] = 5, 5
    player = Player(constant_model(preferences), TOKENIZER, n=4, seed=2)
    drawn = take(S + 10, player, Limits(may_end=True))
    lanes = np.concatenate([np.full((1, 4), BOS), drawn]).T
    assert 0 < sum(player.ended) < 4
    steered = player.steered(list(lanes))
    steered.rewind(8)
    player.rewind(8)
    expected = player.steered(list(lanes[:, :-8]))
    for (name, found), (_, known) in zip(
        *map(tree_flatten, (steered.decode_state, expected.decode_state)), strict=True
    ):
        np.testing.assert_array_equal(np.array(found), np.array(known), err_msg=name)
