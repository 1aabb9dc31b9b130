"""A player reads and plays in any order, and can be stopped anywhere without a trace."""

import itertools
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support.memory import active_memory
from support.players import FOREVER, REMEMBERING, TOKENIZER, LastIds, S, assert_knows, new_player, some_ids, take
from support.stand_ins import PlainTokenizer, constant_model, tiny_model

from dsmr_mlx import UserError
from dsmr_mlx.generation import grammar
from dsmr_mlx.generation.grammar import GrammarWalk, Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.performance import (
    BOS,
    EOS,
    NOTE_OFF,
    NOTE_ON,
    PAD,
    TIME_SHIFT,
    VELOCITY,
    VOCAB_SIZE,
    performance_grammar,
)

GRAMMAR = performance_grammar()


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 15), min_size=1, max_size=4), n=st.sampled_from([1, 3]), recipe=st.booleans())
def test_stopping_and_continuing_does_not_change_the_music(model, recipe_model, cuts, n, recipe):
    model = recipe_model if recipe else model
    whole = take(sum(cuts), new_player(model, some_ids(20), n=n))
    player = new_player(model, some_ids(20), n=n)
    parts = [take(cut, player) for cut in cuts]
    assert np.array_equal(np.concatenate(parts), whole)
    lanes = [[BOS, *some_ids(20), *whole[:, i]] for i in range(n)]
    assert_knows(player, np.array(lanes))


@pytest.mark.parametrize("n", [1, 3])
def test_an_open_iterator_continues_after_rewinding_to_the_beginning(model, n):
    player = new_player(model, n=n)
    stream = player.play(FOREVER)
    first = np.array([next(stream) for _ in range(5)])
    player.rewind(player.position)
    np.testing.assert_array_equal([next(stream) for _ in range(5)], first)
    player.rewind(player.position)
    player.read(some_ids(10))
    np.testing.assert_array_equal([next(stream) for _ in range(5)], take(5, new_player(model, some_ids(10), n=n)))


def test_an_open_iterator_continues_after_reading_and_rewinding(model):
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


def test_open_iterators_take_turns(model):
    """Each continues after the tokens of the other: together they are one stream."""
    whole, player = take(20, new_player(model)), new_player(model)
    one, other = player.play(FOREVER), player.play(FOREVER)
    turns = [one, other, other, one, one, one, other, one, other, other] * 2
    np.testing.assert_array_equal([next(stream) for stream in turns], whole)


@pytest.mark.slow
def test_reading_reports_progress_in_constant_memory():
    """The same peak for six times as many ids, with re-basings in both."""
    peaks, reported = [], []
    for length in (10_000, 60_000):
        ids = np.random.default_rng(0).integers(NOTE_ON, NOTE_OFF, length)
        player = Player(tiny_model(horizons=(64,), segment_length=512, d_model=16, d_ff=16), TOKENIZER, n=3)
        before = active_memory()
        mx.reset_peak_memory()
        player.read(ids, lambda done, total: reported.append((done, total)))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 1.1 * peaks[0] + 10_000
    assert reported[:3] == [(done, 10_001) for done in (9_216, 9_728, 10_001)]
    assert reported[-1] == (60_001, 60_001)
    assert player.state.batch_size == 1, "three lanes are one until they play"
    assert player.position == 60_001


@pytest.fixture(scope="module")
def remembering():
    """A model that remembers, and therefore reads, all music of these tests."""
    return tiny_model(horizons=(200, 200))


def test_an_interrupted_read_keeps_the_segments_it_finished(remembering):
    model = remembering
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


def test_a_prompt_is_read_into_one_state():
    """Although a part of it is passed over, and an interruption would leave the player as it was."""
    player = Player(tiny_model(horizons=(2000,), d_model=16, d_ff=16), TOKENIZER)
    mx.eval(player.state.arrays)
    ids, before = some_ids(6000), active_memory()
    mx.reset_peak_memory()
    player.read(ids)
    assert mx.get_peak_memory() - before < player.nbytes / 2


@pytest.mark.parametrize("begun", [0, 10])
def test_an_interrupted_read_of_the_end_alone_changes_nothing(model, begun):
    """Before the end, the state is of no music at all."""
    player = new_player(model, some_ids(begun)) if begun else Player(model, TOKENIZER)
    before = {name: np.array(array) for name, array in player.arrays().items()}

    def interrupt(done, total):
        if done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        player.read(some_ids(300, seed=1), interrupt)
    for name, array in player.arrays().items():
        np.testing.assert_array_equal(np.array(array), before[name], err_msg=name)
    player.read(some_ids(300, seed=1))
    assert_knows(player, np.array([[BOS, *some_ids(begun), *some_ids(300, seed=1)]]))


def test_a_read_interrupted_within_a_segment_drops_that_segment(remembering, monkeypatch):
    """State and logits change together, even if Ctrl-C comes between them."""
    model = remembering
    player, ids, calls, logits = new_player(model, some_ids(10)), some_ids(60, seed=1), itertools.count(), model.logits

    def interrupted(hidden):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return logits(hidden)

    with monkeypatch.context() as patched:
        patched.setattr(model, "logits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            player.read(ids)
    read = player.position - 11
    assert read == 2 * S - 11
    assert_knows(player, np.array([[BOS, *some_ids(10), *ids[:read]]]))


@pytest.mark.parametrize("processors", [REMEMBERING, [LastIds()]], ids=["at once", "one by one"])
def test_reading_with_processors_leaves_no_graph(model, processors, tmp_path):
    """Lanes with different histories read the same ids, and no lazy graph of the processors' steps remains."""
    player = new_player(model, n=2, processors=processors)
    played = take(20, player)
    ids = some_ids(300)
    player.read(ids)
    assert_knows(player, np.array([[BOS, *lane, *ids] for lane in played.T]))
    mx.export_to_dot(
        str(tmp_path / "graph"),
        *(leaf for _, leaf in tree_flatten((player.decode_state, [heard for _, heard in player.history.snapshots]))),
    )
    assert len((tmp_path / "graph").read_text().splitlines()) < 200
    take(3, player)


def test_the_clock_starts_with_the_piece_and_new_music_after_the_prompt(model):
    player, ids = new_player(model, some_ids(30)), some_ids(20, seed=1)
    prompt = GRAMMAR.ticks[some_ids(30)].sum()
    assert player.ticks == (prompt,)
    assert player.decode_state.music.new_ticks.tolist() == [0]
    played = take(25, player)[:, 0]
    player.read(ids)
    new = GRAMMAR.ticks[played].sum() + GRAMMAR.ticks[ids].sum()
    assert player.ticks == (prompt + new,)
    assert player.decode_state.music.new_ticks.tolist() == [new]


def test_a_limit_may_count_from_an_earlier_clock(model):
    """Continuing with `since` ends as if the limit had been given from the start."""
    whole = [int(step[0]) for step in new_player(model, some_ids(30)).play(Limits(ticks=300))]
    player = new_player(model, some_ids(30))
    (begun,), first = player.ticks, []
    while player.ticks[0] - begun < 200:
        first += take(1, player)[:, 0].tolist()
    assert player.ticks[0] - begun > 200
    rest = [int(step[0]) for step in player.play(Limits(ticks=100, since=(begun + 200,)))]
    assert first + rest == whole
    assert player.ended == [True]


@pytest.mark.slow
def test_limits_count_from_each_play(model, monkeypatch):
    monkeypatch.setattr(grammar, "RELEASE_TOKENS", 4)  # keys that are down are released soon
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


def test_ended_lanes_yield_pad_and_are_reopened_by_reading():
    preferences = np.zeros(VOCAB_SIZE)
    preferences[EOS], preferences[NOTE_OFF:TIME_SHIFT] = 5, 5
    player = Player(constant_model(preferences), TOKENIZER, n=4, seed=1)
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


def test_later_reading_ignores_bos_and_eos(model):
    ids = some_ids(12, seed=2)
    bounded, plain = (new_player(model, some_ids(9)) for _ in range(2))
    bounded.read(np.array([BOS, *ids, EOS]))
    plain.read(ids)
    plain.read([])
    plain.read(Notes.empty())
    assert bounded.position == plain.position == 22
    np.testing.assert_array_equal(take(9, bounded), take(9, plain))


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
    with pytest.raises(UserError, match=r"`prompt`: \d+ tokens, the model has 40 learned positions"):
        player.read(some_ids(30))
    plain = Player(tiny_model(10, max_positions=20), PlainTokenizer())
    drawn = take(99, plain, Limits(tokens=15))
    assert list(plain.play()) == []
    assert drawn[-1] == 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, 393], "`prompt`: ids from 5 to 393, expected 0 to 392"),
        ([1.5], "`prompt`: an array of float64, expected Notes or integer ids"),
        ([*range(NOTE_ON, NOTE_OFF), VELOCITY], "`prompt`: nothing may follow its last id, 359"),
    ],
)
def test_an_invalid_read_changes_nothing(model, ids, message):
    player = new_player(model, some_ids(9))
    for one in (player, Player(model, TOKENIZER)):
        before = one.position
        with pytest.raises(UserError, match=message):
            one.read(ids)
        assert one.position == before
    assert_knows(player, np.array([[BOS, *some_ids(9)]]))


@pytest.mark.usefixtures("compilation")
def test_compiled_steps_play_the_same_and_see_changed_weights(monkeypatch):
    """One graph serves all steps: traces do not grow with the tokens. Weights are its inputs, not constants."""
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


def test_a_failing_compiler_falls_back_to_eager(model, monkeypatch):
    def broken(function, inputs=None):
        def call(*arguments):
            raise RuntimeError("Failed to compile function")

        return call

    expected = take(20, new_player(model))
    monkeypatch.setattr(mx, "compile", broken)
    np.testing.assert_array_equal(take(20, new_player(model, compile=True)), expected)


def test_a_player_checks_its_arguments(model):
    with pytest.raises(UserError, match="`tokenizer` plain: 10 tokens, expected the 393 of the model"):
        Player(model, PlainTokenizer())
    with pytest.raises(UserError, match="`n` 0: expected at least 1"):
        Player(model, TOKENIZER, n=0)
    with pytest.raises(UserError, match="tokenizer plain: its tokens have no known duration"):
        Player(tiny_model(10), PlainTokenizer()).play(Limits(ticks=5))
    with pytest.raises(UserError, match=r"`held` \(\(200, 3\),\): expected pitches from 0 to 127"):
        Player(tiny_model(), TOKENIZER).play(Limits(ticks=10, held=((200, 3),)))
    with pytest.raises(UserError, match=r"`seed` 1.5: expected an integer, 0 or more"):
        Player(tiny_model(), TOKENIZER, seed=1.5)
    walk = GrammarWalk(TOKENIZER)
    assert walk.bounds(Limits(tokens=1), walk.begin([])).ends.ticks.item() == 2**31 - 1


def test_only_small_states_are_played_ahead_on_a_gpu(monkeypatch):
    """The slots that a running step reads are copied: of all lanes, at most `MAX_AHEAD` bytes."""
    model = tiny_model()
    assert not Player(model, TOKENIZER).ahead
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))
    slots = sum(array.nbytes for layer in model.new_state().layers for array in layer.values())
    for lanes in (1, 3):
        for limit in (lanes * slots, lanes * slots - 1):
            monkeypatch.setattr("dsmr_mlx.generation.player.MAX_AHEAD", limit)
            assert Player(model, TOKENIZER, n=lanes).ahead == (limit == lanes * slots)
            assert new_player(model).branch(lanes).ahead == (limit == lanes * slots)
    assert Player(model, TOKENIZER, n=3, ahead=True).ahead
