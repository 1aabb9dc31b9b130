"""A saved and loaded player continues as the original would; other files are refused."""

import os

import mlx.core as mx
import numpy as np
import pytest
from support.players import TOKENIZER, LastIds, S, new_player, some_ids, take
from support.stand_ins import PlainTokenizer, tiny_model

from dsmr_mlx import UserError
from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.sampling import Sampling


@pytest.mark.slow
@pytest.mark.parametrize("played", [0, 1, 15, 16, 45])
@pytest.mark.parametrize(("n", "recipe"), [(1, False), (3, True)])
def test_a_loaded_player_continues_bitwise(model, recipe_model, tmp_path, played, n, recipe):
    model = recipe_model if recipe else model
    sampling = Sampling(temperature=0.9, top_p=0.95)
    player = new_player(model, some_ids(20), n=n, sampling=sampling)
    take(played, player)
    player.save(tmp_path / "a")
    loaded = Player.load(tmp_path / "a", model, TOKENIZER, processors=[LastIds()])
    assert (loaded.sampling, loaded.lanes, loaded.position) == (sampling, n, player.position)
    assert (loaded.held, loaded.rewindable) == (player.held, player.rewindable)
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    expected = take(20, player)
    np.testing.assert_array_equal(take(20, loaded), expected)
    again = Player.load(tmp_path / "a", model, TOKENIZER, processors=[LastIds()])
    back = min(again.rewindable, played)
    again.rewind(back)
    np.testing.assert_array_equal(take(back + 20, again)[back:], expected)


def test_saved_players_have_constant_size(model, tmp_path):
    player, sizes = new_player(model, n=2), set()
    for n in (3, 20, 50):
        take(n, player)
        player.save(tmp_path / "a")
        sizes.add((tmp_path / "a").stat().st_size)
        player.read(some_ids(40))
    assert len(sizes) == 1
    assert sizes.pop() < 1.5 * player.nbytes + 30_000


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dtype": mx.bfloat16}, {"max_positions": 90, "rope_dims": 0}])
def test_half_precision_and_learned_positions_can_be_saved(tmp_path, options):
    dtype = options.pop("dtype", mx.float32)
    model = tiny_model(**options)
    model.set_dtype(dtype)
    player = Player(model, TOKENIZER, n=2)
    take(40, player)
    player.save(tmp_path / "a")
    loaded = Player.load(tmp_path / "a", model, TOKENIZER)
    assert loaded.state.dtype == dtype
    np.testing.assert_array_equal(take(60, loaded), take(60, player))
    player.save(tmp_path / "a")
    np.testing.assert_array_equal(take(9, Player.load(tmp_path / "a", model, TOKENIZER)), take(9, player))


@pytest.mark.slow
@pytest.mark.parametrize("table", [2 * S - 1, 2 * S, 2 * S + 1, 3 * S])
@pytest.mark.parametrize("n", [1, 2])
def test_a_player_saved_at_the_end_of_learned_positions_can_rewind(tmp_path, table, n):
    """There the last token is not read, so the history has one more token than two segments."""
    model = tiny_model(10, max_positions=table, rope_dims=0, horizons=(S, S))
    player = Player(model, WithoutEnd(), n=n)
    played = take(99, player, Limits(tokens=1000))
    assert (player.position, player.logits) == (table + 1, None)
    player.save(tmp_path / "a")
    for _ in range(2):
        loaded = Player.load(tmp_path / "a", model, WithoutEnd())
        assert (loaded.position, loaded.logits, loaded.rewindable) == (table + 1, None, player.rewindable)
        loaded.rewind(loaded.rewindable)
        rest = take(99, loaded, Limits(tokens=1000))
        np.testing.assert_array_equal(rest, played[len(played) - len(rest) :])


class WithoutEnd(PlainTokenizer):
    eos_id = None


def test_the_requested_pause_time_is_saved(model, tmp_path):
    player = new_player(model, n=2, processors=[])
    take(20, player)
    for ticks in (None, (250, 0)):
        player.save(tmp_path / "a", ticks)
        loaded = Player.load(tmp_path / "a", model, TOKENIZER)
        assert (loaded.pause_ticks, player.pause_ticks) == (ticks, None)
        assert loaded.branch(3, lane=1).pause_ticks == (ticks and (0, 0, 0))


def test_ahead_is_chosen_on_load(model, tmp_path):
    player = Player(model, TOKENIZER)
    take(5, player)
    player.save(tmp_path / "a")
    expected = take(9, player)
    for ahead in (False, True):
        loaded = Player.load(tmp_path / "a", model, TOKENIZER, ahead=ahead)
        assert loaded.ahead is ahead
        np.testing.assert_array_equal(take(9, loaded), expected)


def test_built_in_processors_are_restored(model, tmp_path):
    from dsmr_mlx.generation.steering import LoopPenalty, MaxPolyphony

    processors = [LoopPenalty(penalty=2.0, max_cycle=8), MaxPolyphony(3)]
    player = new_player(model, some_ids(20), processors=processors)
    take(30, player)
    player.save(tmp_path / "a")
    loaded = Player.load(tmp_path / "a", model, TOKENIZER)
    assert loaded.processors == processors
    np.testing.assert_array_equal(take(30, loaded), take(30, player))


def test_a_mismatch_names_both_sides(model, tmp_path):
    path = tmp_path / "a.safetensors"
    player = new_player(model)
    take(3, player)
    player.save(path)

    def load(model=model, tokenizer=TOKENIZER, **options):
        return Player.load(path, model, tokenizer, **{"processors": [LastIds()]} | options)

    with pytest.raises(UserError, match=r"a.safetensors: saved with horizons = \[32, 8\], the model has \[32, 9\]"):
        load(tiny_model(horizons=(32, 9)))
    with pytest.raises(UserError, match=r"a.safetensors: saved with the weights \w{16}, the model's are \w{16}"):
        load(tiny_model(seed=1))
    plain = PlainTokenizer()
    message = f"saved with the vocabulary {TOKENIZER.fingerprint}, the checkpoint's is {plain.fingerprint}"
    with pytest.raises(UserError, match=message):
        load(tiny_model(10), plain)
    with pytest.raises(UserError, match=r"processors LastIds are not in the file, expected processors=\[…\]"):
        load(processors=None)
    with pytest.raises(UserError, match="saved with 1 processors, expected as many, found 0"):
        load(processors=[])


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "bit", "metadata", "weights"])
def test_a_damaged_file_is_named(model, tmp_path, damage):
    path = tmp_path / "a.safetensors"
    player = Player(model, TOKENIZER)
    take(3, player)
    player.save(path)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "weights":
        mx.save_safetensors(str(path), {"weight": mx.zeros(3)})
    else:
        changed = {
            "empty": b"",
            "cut": content[:-100],
            "metadata": content.replace(b'temperature\\": 1', b'temperature\\": 2'),
        }
        middle = len(content) // 2
        changed["bit"] = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        assert changed[damage] != content
        path.write_bytes(changed[damage])
    with pytest.raises(
        UserError, match=r"a.safetensors: (cannot be read|truncated|damaged, sha256|format None, expected)"
    ):
        Player.load(path, model, TOKENIZER)


def test_saving_is_atomic(model, tmp_path, monkeypatch):
    path = tmp_path / "a"
    player = Player(model, TOKENIZER)
    take(3, player)
    player.save(path)
    before = path.read_bytes()
    take(3, player)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a: cannot be written \(No space left on device\)"):
        player.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
