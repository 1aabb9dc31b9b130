"""What is shown of the music after a gap moves neither clock nor keys, and can be saved, branched and rewound."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support.music import random_notes
from support.players import REMEMBERING, S, take
from support.stand_ins import tiny_model
from support.vocabularies import vocabulary

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.gaps import show
from dsmr_mlx.generation.foresight import between_moments, shown_ids
from dsmr_mlx.generation.player import Player
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.performance import (
    FILL,
    NOTE_ON,
    PLAY,
    TIME_SHIFT,
    VELOCITY,
    PerformanceTokenizer,
    encode_notes,
    performance_grammar,
)

TOKENIZER = PerformanceTokenizer()


@pytest.fixture(scope="module")
def models() -> dict:
    """A tiny model that knows gaps, for each vocabulary that has FILL and PLAY."""
    names = ("performance", "performance bpe")
    return {name: knowing(vocabulary(name)) for name in names}


def knowing(tokenizer, **options):
    """A tiny model of random weights that counts as trained with gaps."""
    return tiny_model(tokenizer.vocab_size, fill=0.5, never_predicted=[tokenizer.fill_id, tokenizer.play_id], **options)


def complete_prefix(tokenizer, notes: Notes, n: int) -> np.ndarray:
    """Ids of about n events that end with a press or a release."""
    events = encode_notes(notes)[:n]
    n = int(np.flatnonzero(events < TIME_SHIFT)[-1]) + 1
    ids = tokenizer.from_events(events[:n])
    return ids[~np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id])].astype(np.int64)


def decoding_state(player: Player) -> dict[str, list]:
    """All that a choice depends on besides the logits."""
    return {place: np.array(leaf).tolist() for place, leaf in tree_flatten(player.decode_state)}


@pytest.mark.parametrize("name", ["performance", "performance bpe"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999), other=st.integers(0, 999), gap=st.floats(0.02, 70), data=st.data())
def test_what_is_shown_moves_neither_clock_nor_keys(models, name, seed, other, gap, data):
    tokenizer = vocabulary(name)
    player = Player(models[name], tokenizer, n=2, processors=REMEMBERING, seed=seed)
    prefix = complete_prefix(tokenizer, random_notes(seed, 30), data.draw(st.integers(3, 60)))
    player.read(prefix)
    if data.draw(st.booleans()):  # in the middle of playing, lanes are apart
        take(data.draw(st.integers(1, 30)), player)
    before = decoding_state(player), player.ticks, player.held, player.position
    following = random_notes(other, data.draw(st.integers(0, 20))).shifted(data.draw(st.floats(0, 3)))
    if not all(between_moments(player.walk.tables, moment) for moment in player.moments):
        with pytest.raises(UserError, match="expected a complete moment"):
            player.foresee(following, gap)
        assert (decoding_state(player), player.ticks, player.held, player.position) == before
        return
    shown = player.foresee(following, gap)
    assert (decoding_state(player), player.ticks, player.held) == before[:3]
    assert player.position == before[3] + shown
    if player.position < S:
        ids = np.array(player.recent)[:, -shown:]
        assert (ids[:, 0] == tokenizer.fill_id).all()
        assert (ids[:, -1] == tokenizer.play_id).all()


@given(seed=st.integers(0, 99), ticks=st.integers(1, 4000), pause=st.integers(0, 250))
@settings(max_examples=30, deadline=None)
def test_the_length_and_the_excerpt_can_be_told_apart(seed, ticks, pause):
    """The pauses after FILL are the length up to the first rest, which is never a whole second, and then a pause."""
    notes = random_notes(seed, 20).from_first_onset().shifted(pause / 100)
    ids = shown_ids(TOKENIZER, notes, ticks / 100, 64)
    assert (ids[0], ids[-1]) == (FILL, PLAY)
    waits = performance_grammar().ticks[ids[1:-1]]
    rest = int(np.flatnonzero(waits != 100)[0]) + 1
    length, excerpt = int(waits[:rest].sum()), ids[1 + rest : -1]
    early = ticks - length  # whole seconds are announced 10 ms early, and the rest follows 10 ms later
    assert early == (ticks % 100 == 0)
    begins = np.flatnonzero(excerpt >= VELOCITY)[0]
    assert int(performance_grammar().ticks[excerpt[:begins]].sum()) == pause + early
    assert len(excerpt) == 64


def test_the_model_reads_what_training_shows():
    """The ids are those of `data.gaps` for the same place, so that playing equals training."""
    piece = random_notes(5, 60)
    events = encode_notes(piece)
    grammar = performance_grammar()
    ticks = grammar.elapsed(events)
    place = next(i for i in range(40, 80) if events[i - 1] < TIME_SHIFT <= events[i] < VELOCITY)
    end = int(ticks[place - 1]) + 233
    player = Player(knowing(TOKENIZER, segment_length=512), TOKENIZER)
    player.read(events[:place])
    notes = TOKENIZER.decode(events)
    player.foresee(notes.take(notes.onset >= end / 100).shifted(-end / 100), 2.33, 70)
    expected = show(notes, end / 100, 233, 70)
    assert player.recent[0][-len(expected) :] == expected.tolist()


def test_a_player_that_was_shown_what_follows_can_be_saved_branched_and_rewound(tmp_path):
    model = knowing(TOKENIZER)
    following = random_notes(8, 3)

    def new_player() -> Player:
        player = Player(model, TOKENIZER, n=2, seed=4, processors=REMEMBERING)
        player.read(complete_prefix(TOKENIZER, random_notes(0, 30), 40))
        player.foresee(following, 3.0)
        return player

    expected = take(20, new_player())
    saved = new_player()
    saved.save(tmp_path / "a.safetensors")
    loaded = Player.load(tmp_path / "a.safetensors", model, TOKENIZER)
    assert np.array_equal(take(20, loaded), expected)
    copied = saved.copy()
    assert np.array_equal(take(20, copied), expected), "a copy draws the same"
    assert np.array_equal(take(20, saved), expected), "and leaves the original as it was"
    child = new_player().branch(3, seed=1)
    assert take(5, child).shape == (5, 3)

    rewound = new_player()
    take(8, rewound)
    rewound.rewind(8)
    assert np.array_equal(take(20, rewound), expected)

    # Back to before the model was shown anything: then it plays as if it never had been.
    unseen = Player(model, TOKENIZER, n=2, seed=4, processors=REMEMBERING)
    unseen.read(complete_prefix(TOKENIZER, random_notes(0, 30), 40))
    shown = unseen.copy()
    count = shown.foresee(Notes.empty(), 0.5)
    assert count < shown.rewindable
    before = take(10, shown)
    shown.rewind(10 + count)
    plain = take(10, unseen)
    assert np.array_equal(take(10, shown), plain)
    assert not np.array_equal(before, plain), "what is shown matters"


def test_a_saved_player_in_the_middle_of_a_passage_goes_on(tmp_path):
    model = knowing(TOKENIZER)
    player = Player(model, TOKENIZER, seed=4)
    player.read(complete_prefix(TOKENIZER, random_notes(0, 30), 40))
    player.foresee(random_notes(8, 3), 3.0)
    take(3, player)
    player.save(tmp_path / "a.safetensors")
    loaded = Player.load(tmp_path / "a.safetensors", model, TOKENIZER)
    loaded.rewind(2)
    player.rewind(2)
    assert loaded.ticks == player.ticks
    assert np.array_equal(take(15, loaded), take(15, player))


def test_the_beginning_of_a_piece_can_be_shown_what_follows():
    player = Player(knowing(TOKENIZER), TOKENIZER)
    player.foresee(random_notes(0, 20), 2.0)
    assert player.ticks == (0,)
    assert take(1, player)[0, 0] >= VELOCITY, "the piece begins with a velocity, as ever"


@pytest.mark.parametrize(
    ("fill", "ids", "gap", "message"),
    [
        (0.5, [VELOCITY, NOTE_ON + 60], 0.0, "`gap` 0: expected more than 0 and at most 3,600 seconds"),
        (0.5, [VELOCITY, NOTE_ON + 60], float("nan"), "`gap` nan: expected more than 0"),
        (0.5, [VELOCITY, NOTE_ON + 60], 3601.0, "`gap` 3601: expected more than 0"),
        (0.5, [VELOCITY, NOTE_ON + 60, TIME_SHIFT], 1.0, "expected a complete moment"),
        (0.5, [VELOCITY], 1.0, "expected a complete moment"),
        (0.0, [VELOCITY, NOTE_ON + 60], 1.0, "`model`: it does not read what follows a gap"),
    ],
)
def test_wrong_calls_are_refused_and_change_nothing(fill, ids, gap, message):
    player = Player(tiny_model(fill=fill), TOKENIZER)
    player.read(np.array(ids))
    position = player.position
    with pytest.raises(UserError) as error:
        player.foresee(Notes.empty(), gap)
    assert message in str(error.value)
    assert player.position == position


def test_other_vocabularies_are_refused():
    tokenizer = vocabulary("REMI")
    with pytest.raises(UserError, match="its vocabulary miditok:REMI has no FILL and PLAY"):
        Player(tiny_model(tokenizer.vocab_size), tokenizer).foresee(Notes.empty(), 1.0)
