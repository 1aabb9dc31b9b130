"""A player can be stopped, saved, branched and taken back anywhere, and plays on as if nothing had happened."""

import itertools
import os

import mlx.core as mx
import numpy as np
import pytest
from dense_reference import dense_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins import PlainTokenizer, stubborn_model, tiny_model

from dsmr_mlx import UserError, state
from dsmr_mlx.grammar import GrammarWalk, Limits
from dsmr_mlx.midi import Notes
from dsmr_mlx.performance import BOS, EOS, NOTE_OFF, NOTE_ON, PAD, TIME_SHIFT, VELOCITY, VOCAB_SIZE, encode_notes
from dsmr_mlx.player import Player
from dsmr_mlx.sampling import Sampling
from dsmr_mlx.tokenizer import PerformanceTokenizer

TOKENIZER = PerformanceTokenizer()
S = 16
FOREVER = Limits()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def some_ids(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    onset = np.cumsum(rng.integers(1, 40, n)) / 100
    notes = Notes.sorted(onset, onset + rng.integers(5, 90, n) / 100, rng.integers(40, 90, n), rng.integers(1, 128, n))
    return encode_notes(notes)[:n].astype(np.int64)


class Diary:
    """A processor that writes down what it is told: the last ids and how many; and has a mild opinion on what follows.

    Its state after any music must be that of a lane that has begun with this music.
    """

    def begin(self, tables, ids):
        last = np.full(6, -1)
        last[: len(ids[-6:])] = np.flip(ids[-6:])
        count = np.array([[len(ids)]])
        return {"last": mx.array(last[None], mx.int32), "count": mx.array(count, mx.int32)}

    def __call__(self, logits, played, state):
        likes = mx.arange(logits.shape[-1]) % 7 == (state["last"].sum(axis=-1) % 7)[:, None]
        return logits + 2.0 * likes * (state["count"] > 3)

    def advance(self, state, token, played):
        last = mx.concatenate([token[:, None].astype(mx.int32), state["last"][:, :-1]], axis=1)
        return {"last": last, "count": state["count"] + 1}


def take(n: int, player: Player, limits: Limits = FOREVER) -> np.ndarray:
    """The next n tokens of each lane, `[n, lanes]`."""
    steps = list(itertools.islice(player.play(limits), n))
    return np.array(steps) if steps else np.zeros((0, player.lanes), np.int64)


def new_player(model, ids=(), **options) -> Player:
    player = Player(model, TOKENIZER, **{"processors": [Diary()], "seed": 3} | options)
    player.read(np.array(ids, np.int64))
    return player


def assert_knows(player: Player, lanes: np.ndarray) -> None:
    """That the player has heard exactly these ids `[lanes, T]`: logits, keys, velocity, processors' states."""
    expected = np.array(dense_logits(player.model, lanes))[:, -1]
    logits = np.broadcast_to(np.array(player.logits), expected.shape)
    np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=2e-4)
    for i, ids in enumerate(lanes):
        begun, lane = player.choice.begin(ids), i if player.heard.lanes > 1 else 0
        for name in ("state", "sounding", "velocity"):
            actual, wanted = (np.array(getattr(heard.played, name)) for heard in (player.heard, begun))
            assert np.array_equal(actual[lane], wanted[0]), name
        if player.processors:
            for name, wanted in begun.steering[0].items():
                assert np.array_equal(np.array(player.heard.steering[0][name])[lane], np.array(wanted)[0]), name
        assert player.held[i] == np.flatnonzero(np.array(begun.played.sounding)[0]).tolist()
    assert player.position == lanes.shape[1]


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 20), min_size=1, max_size=6), n=st.sampled_from([1, 3]))
def test_stopped_anywhere_it_goes_on_as_if_it_had_not(model, cuts, n):
    whole = take(sum(cuts), new_player(model, some_ids(20), n=n))
    player = new_player(model, some_ids(20), n=n)
    parts = [take(cut, player) for cut in cuts]
    assert np.array_equal(np.concatenate(parts), whole)
    heard = [[BOS, *some_ids(20), *whole[:, i]] for i in range(n)]
    assert_knows(player, np.array(heard))


@settings(max_examples=8, deadline=None)
@given(data=st.data(), n=st.sampled_from([1, 2]))
def test_reading_playing_and_going_back_in_any_order(model, data, n):
    """Whatever the order, the player knows what it would know if it had read just the music that was kept."""
    player = new_player(model, n=n)
    kept, reads = np.full((n, 1), BOS), itertools.count()
    for _ in range(data.draw(st.integers(2, 7))):
        what, k = data.draw(st.sampled_from(["read", "play", "back"])), data.draw(st.integers(1, 40))
        if what == "read":
            new = np.tile(some_ids(k, seed=next(reads)), (n, 1))
            player.read(new[0])
        elif what == "play":
            new = take(k, player).T
        else:
            k = min(k, player.rewindable, kept.shape[1] - 1)
            player.rewind(k)
            new, kept = kept[:, :0], kept[:, : kept.shape[1] - k]
        kept = np.concatenate([kept, new], axis=1)
    assert_knows(player, kept)


def test_an_open_iterator_goes_on_after_what_was_read_or_taken_back(model):
    player, ids = new_player(model), some_ids(30, seed=5)
    stream = player.play(FOREVER)
    before = np.array([next(stream)[0] for _ in range(20)])
    player.read(ids)
    between = np.array([next(stream)[0] for _ in range(5)])
    player.rewind(9)
    after = np.array([next(stream)[0] for _ in range(6)])
    assert_knows(player, np.array([[BOS, *before, *ids[:26], *after]]))
    assert len(between) == 5
    same = new_player(model)
    take(20, same)
    same.read(ids[:26])
    np.testing.assert_array_equal(take(6, same)[:, 0], after)


def test_reading_is_told_and_needs_no_more_memory_for_more():
    """20 times as many ids: the same peak."""
    peaks, told = [], []
    for length in (3_000, 60_000):
        ids = np.random.default_rng(0).integers(NOTE_ON, NOTE_OFF, length)
        player = Player(tiny_model(horizons=(64,), segment_length=512, d_model=16, d_ff=16), TOKENIZER, n=3)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        player.read(ids, lambda done, total: told.append((done, total)))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 1.1 * peaks[0] + 10_000
    assert told[:6] == [(min(512 * i, 3001), 3001) for i in range(1, 7)]
    assert told[-1] == (60_001, 60_001)
    assert player.state.batch_size == 1, "three lanes are one until they play"
    assert player.position == 60_001


def test_an_interrupted_reading_is_heard_as_far_as_it_went(model):
    for begun in (0, 10):
        player, ids = new_player(model, some_ids(begun)) if begun else Player(model, TOKENIZER), some_ids(60, seed=1)

        def interrupt(done, total):
            if done > 30:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            player.read(ids, interrupt)
        read = player.position - 1 - begun
        assert 30 <= read < 60
        assert_knows(player, np.array([[BOS, *some_ids(begun), *ids[:read]]]))
        take(3, player)


@pytest.mark.parametrize("played", [0, 1, 15, 16, 33, 70])
@pytest.mark.parametrize("n", [1, 3])
def test_saved_and_loaded_it_goes_on_to_the_byte(model, tmp_path, played, n):
    sampling = Sampling(temperature=0.9, top_p=0.95)
    player = new_player(model, some_ids(20), n=n, sampling=sampling)
    take(played, player)
    player.save(tmp_path / "a")
    loaded = Player.load(tmp_path / "a", model, TOKENIZER, processors=[Diary()])
    assert (loaded.sampling, loaded.lanes, loaded.position) == (sampling, n, player.position)
    assert (loaded.held, loaded.rewindable) == (player.held, player.rewindable)
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    expected = take(25, player)
    np.testing.assert_array_equal(take(25, loaded), expected)
    again = Player.load(tmp_path / "a", model, TOKENIZER, processors=[Diary()])
    back = min(again.rewindable, played)
    again.rewind(back)
    np.testing.assert_array_equal(take(back + 25, again)[back:], expected)


def test_a_saved_player_has_always_the_same_size(model, tmp_path):
    player, sizes = new_player(model, n=2), set()
    for n in (3, 20, 90):
        take(n, player)
        player.save(tmp_path / "a")
        sizes.add((tmp_path / "a").stat().st_size)
        player.read(some_ids(40))
    assert len(sizes) == 1
    assert sizes.pop() < 1.5 * player.nbytes + 30_000


@pytest.mark.parametrize("options", [{"dtype": mx.bfloat16}, {"max_positions": 90, "rope_dims": 0}])
def test_half_precision_and_learned_positions_are_saved_too(tmp_path, options):
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


def test_processors_that_can_be_described_come_back_by_themselves(model, tmp_path):
    from dsmr_mlx.steering import LoopPenalty, MaxPolyphony

    processors = [LoopPenalty(penalty=2.0, longest=8), MaxPolyphony(3)]
    player = new_player(model, some_ids(20), processors=processors)
    take(30, player)
    player.save(tmp_path / "a")
    loaded = Player.load(tmp_path / "a", model, TOKENIZER)
    assert loaded.processors == processors
    np.testing.assert_array_equal(take(30, loaded), take(30, player))


def test_what_a_saved_player_does_not_fit_is_named(model, tmp_path):
    path = tmp_path / "a.safetensors"
    player = new_player(model)
    take(3, player)
    player.save(path)

    def load(model=model, tokenizer=TOKENIZER, **options):
        return Player.load(path, model, tokenizer, **{"processors": [Diary()]} | options)

    with pytest.raises(UserError, match=r"a.safetensors: saved with horizons = \[32, 8\], the model has \[32, 9\]"):
        load(tiny_model(horizons=(32, 9)))
    with pytest.raises(UserError, match=r"a.safetensors: saved with the weights \w{16}, the model's are \w{16}"):
        load(tiny_model(seed=1))
    plain = PlainTokenizer()
    message = f"saved with the vocabulary {TOKENIZER.fingerprint}, the checkpoint's is {plain.fingerprint}"
    with pytest.raises(UserError, match=message):
        load(tiny_model(10), plain)
    with pytest.raises(UserError, match=r"processors Diary are not in the file, expected processors=\[…\]"):
        load(processors=None)
    with pytest.raises(UserError, match="saved with 1 processors, expected as many, found 0"):
        load(processors=[])


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "bit", "metadata", "weights"])
def test_damaged_files_are_named(model, tmp_path, damage):
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
    with pytest.raises(UserError, match=r"a.safetensors: (cannot be read|damaged, sha256|format None, expected)"):
        Player.load(path, model, TOKENIZER)


def test_saving_is_all_or_nothing(model, tmp_path, monkeypatch):
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


def test_branches_have_one_past_and_futures_of_their_own(model):
    player = new_player(model, some_ids(20))
    played = take(20, player)[:, 0]
    futures = [take(40, player.branch(3, seed)) for seed in (0, 0, 1)]
    assert np.array_equal(futures[0], futures[1])
    lanes = {tuple(lane) for future in (futures[0], futures[2]) for lane in future.T}
    own = take(40, player)[:, 0]
    assert len({*lanes, tuple(own)}) == 7
    assert np.array_equal(own, take(60, new_player(model, some_ids(20)))[20:, 0]), "branches change nothing"
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
    with pytest.raises(UserError, match="lane = 3: expected 0 to 2"):
        player.branch(2, lane=3)
    with pytest.raises(UserError, match="n = 0: expected at least 1"):
        player.branch(0)
    before = new_player(model, n=3)
    assert np.array_equal(take(5, before.branch(2, lane=2)), take(5, before.branch(2, lane=2)))
    assert not np.array_equal(take(9, before.branch(1, lane=1)), take(9, before.branch(1, lane=2)))


@pytest.mark.parametrize("played", [1, 15, 16, 33, 64])
def test_rewinding_is_exact_and_reaches_a_segment_back(model, played):
    whole = take(played + 10, new_player(model, n=2))
    for k in {1, min(played, S), played}:
        player = new_player(model, n=2)
        take(played, player)
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
        with pytest.raises(
            UserError, match=rf"rewind\({k}\): expected at most {most} tokens, what the player still rem"
        ):
            player.rewind(k)
    before = player.held
    player.rewind(0)
    assert (player.held, player.position) == (before, 71)
    player.rewind(most)
    assert player.rewindable == 0


def test_rewinding_to_the_very_beginning(model):
    player = new_player(model)
    first = take(9, player)
    player.rewind(10)
    assert (player.position, player.logits, player.held) == (0, None, [[]])
    np.testing.assert_array_equal(take(9, player), first)


def test_rewinding_past_a_rebasing_plays_the_same(monkeypatch):
    monkeypatch.setattr(state, "rebase_interval", lambda config: 64)
    model = tiny_model(horizons=(24, 8))
    player = Player(model, TOKENIZER, sampling=Sampling(temperature=0))
    played = take(70, player)
    assert player.state.rebased.tolist() == [64]
    player.rewind(20)
    np.testing.assert_array_equal(take(20, player), played[-20:])


def test_limits_count_from_each_play(model):
    player = new_player(model, some_ids(30))
    ends = []
    for limits in (Limits(tokens=20), Limits(ticks=100)):
        played = np.concatenate(list(player.play(limits)))
        assert played[-1] == EOS
        assert not any(player.held)
        assert list(player.play(limits)) == [], "it has ended"
        ends.append(len(played))
        player.read(some_ids(10, seed=4))
    assert 20 <= ends[0] < 120
    endless = new_player(model, some_ids(30))
    both = np.concatenate([take(10, endless), *[p[None] for p in endless.play(Limits(tokens=10))]])
    once = np.array(list(new_player(model, some_ids(30)).play(Limits(tokens=20))))
    np.testing.assert_array_equal(both, once)


def test_lanes_that_have_ended_wait_and_wake_up_together():
    preferences = np.zeros(VOCAB_SIZE)
    preferences[EOS], preferences[NOTE_OFF:TIME_SHIFT] = 5, 5
    player = Player(stubborn_model(preferences), TOKENIZER, n=4, seed=1)
    lanes = np.array(list(player.play(Limits(may_end=True)))).T
    ends = [lane.tolist().index(EOS) for lane in lanes]
    assert len(set(ends)) > 1
    assert all((lane[end + 1 :] == PAD).all() for lane, end in zip(lanes, ends, strict=True))
    player.rewind(1)
    last = next(player.play(Limits(may_end=True)))
    assert np.array_equal(last, lanes[:, -1])
    player.read([VELOCITY, NOTE_ON + 60])
    assert player.held == [[60]] * 4
    assert (take(3, player) != PAD).all()


def test_later_reading_leaves_out_what_only_bounds_a_piece(model):
    ids = some_ids(12, seed=2)
    bounded, plain = (new_player(model, some_ids(9)) for _ in range(2))
    bounded.read(np.array([BOS, *ids, EOS]))
    plain.read(ids)
    plain.read([])
    plain.read(Notes.empty())
    assert bounded.position == plain.position == 22
    np.testing.assert_array_equal(take(9, bounded), take(9, plain))


def test_bounds_that_are_one_id_do_not_end_the_music(model):
    """A vocabulary whose BOS is its EOS: read it is a beginning, drawn it is an end, also when it is followed again."""

    class OneBound(PlainTokenizer):
        bos_id = 0

    player = Player(tiny_model(10), OneBound(), seed=2)
    drawn = take(12, player)
    player.rewind(11)
    np.testing.assert_array_equal(take(11, player), drawn[1:])
    assert (drawn != 0).all()


def test_learned_positions_end_reading_and_playing():
    model = tiny_model(max_positions=40, rope_dims=0)
    player = Player(model, TOKENIZER)
    played = [int(step[0]) for step in player.play(FOREVER)]
    assert played[-1] == EOS
    assert len(played) <= 40
    if player.logits is not None:
        player.rewind(3)
    else:
        assert list(player.play(FOREVER)) == []
    with pytest.raises(UserError, match=r"prompt: \d+ tokens, the model has 40 learned positions"):
        player.read(some_ids(30))
    plain = Player(tiny_model(10, max_positions=20), PlainTokenizer())
    drawn = take(99, plain, Limits(tokens=15))
    assert list(plain.play()) == []
    assert drawn[-1] == 0


def test_the_last_position_can_be_taken_back():
    class WithoutEnd(PlainTokenizer):
        eos_id = None

    player = Player(tiny_model(10, max_positions=20), WithoutEnd())
    played = take(99, player, Limits(tokens=1000))
    assert (len(played), player.position, player.logits) == (20, 21, None)
    player.rewind(5)
    np.testing.assert_array_equal(take(99, player, Limits(tokens=1000)), played[-5:])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, 391], "prompt: ids from 5 to 391, expected 0 to 390"),
        ([1.5], "prompt: an array of float64, expected Notes or integer ids"),
        ([*range(NOTE_ON, NOTE_OFF), VELOCITY], "prompt: nothing may follow its last id, 359"),
    ],
)
def test_what_cannot_be_read_changes_nothing(model, ids, message):
    player = new_player(model, some_ids(9))
    for one in (player, Player(model, TOKENIZER)):
        before = one.position
        with pytest.raises(UserError, match=message):
            one.read(ids)
        assert one.position == before
    assert_knows(player, np.array([[BOS, *some_ids(9)]]))


@pytest.fixture
def compilation():
    mx.enable_compile()
    yield
    if os.environ.get("MLX_DISABLE_COMPILE"):
        mx.disable_compile()


@pytest.mark.usefixtures("compilation")
def test_compiled_it_plays_the_same_and_follows_changed_weights(monkeypatch):
    """One graph for all steps: its traces do not grow with the tokens. Weights are inputs of it, not constants."""
    model, traces = tiny_model(d_model=16, d_ff=16), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: (traces.append(1), forward(*a, **k))[1])
    players = [Player(model, TOKENIZER, seed=4, compile=compile, ahead=compile) for compile in (False, True)]
    for _ in range(2):
        eager = take(40, players[0])
        traces.clear()
        np.testing.assert_array_equal(take(40, players[1]), eager)
        # the first forward pass reads BOS
        assert len(traces) <= 2
        model.layers[0].feed_forward.down.weight = model.layers[0].feed_forward.down.weight + 0.5


def test_a_compiler_that_fails_is_done_without(model, monkeypatch):
    def broken(function, inputs=None):
        def call(*arguments):
            raise RuntimeError("Failed to compile function")

        return call

    expected = take(20, new_player(model))
    monkeypatch.setattr(mx, "compile", broken)
    np.testing.assert_array_equal(take(20, new_player(model, compile=True)), expected)


def test_a_player_checks_what_it_is_given(model):
    with pytest.raises(UserError, match="tokenizer: 10 tokens, the model has 391"):
        Player(model, PlainTokenizer())
    with pytest.raises(UserError, match="n = 0: expected at least 1"):
        Player(model, TOKENIZER, n=0)
    with pytest.raises(UserError, match="tokenizer plain: its tokens have no known duration"):
        Player(tiny_model(10), PlainTokenizer()).play(Limits(ticks=5))
    walk = GrammarWalk(TOKENIZER)
    assert walk.bounds(Limits(), walk.begin([])).ticks.item() == 2**31 - 1
