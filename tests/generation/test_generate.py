"""Generation with small random models: cached equals uncached, memory is constant, any logits give valid music."""

import itertools
import math
import re

import mlx.core as mx
import numpy as np
import pytest
from support.dense_reference import dense_logits
from support.memory import active_memory
from support.music import random_notes
from support.performance_reference import first_violation
from support.stand_ins import PlainTokenizer, constant_model, tiny_model

from dsmr_mlx import generate
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation import grammar
from dsmr_mlx.generation.generate import Note, finish, generate_variations, make_limits
from dsmr_mlx.generation.grammar import ENDING_TOKENS, RELEASE_SECONDS, GrammarWalk, Limits
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.prompts import prompt_ids
from dsmr_mlx.generation.sampling import Sampling, lane_keys
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
    PerformanceTokenizer,
    encode_notes,
    performance_grammar,
)

TOKENIZER = PerformanceTokenizer()
G = performance_grammar()
GRAMMAR_BYTES = VOCAB_SIZE * 128 * (4 + 1 + 1) + 20_000  # its tables
GREEDY = Sampling(temperature=0)


@pytest.fixture
def _quick_endings(monkeypatch):
    """Keys that are down at a limit are released soon."""
    monkeypatch.setattr(grammar, "RELEASE_TOKENS", 4)


def first(n: int, stream) -> list[int]:
    return list(itertools.islice(stream, n))


def cut_prompt() -> np.ndarray:
    """Ids that stop while keys are down."""
    ids = encode_notes(random_notes(0, 60, waits=(1, 40), lengths=(5, 90), pitches=(40, 90), velocities=(1, 128)))[:175]
    held = np.array(GrammarWalk(TOKENIZER).begin(ids).sounding).sum()
    assert held >= 2
    return ids


def greedy_without_cache(model, prompt: np.ndarray, n: int) -> list[int]:
    """Arg-max over a dense forward pass from the first token on, at every step."""
    walk = GrammarWalk(TOKENIZER)
    ids = [BOS, *prompt.tolist()]
    for _ in range(n):
        music = walk.begin(np.array(ids))
        allowed = np.array(walk.allowed(music, walk.bounds(Limits(), music)))[0]
        logits = np.array(dense_logits(model, np.array([ids])))[0, -1]
        ids.append(int(np.where(allowed, logits, -np.inf).argmax()))
    return ids[1 + len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [np.empty(0, int), cut_prompt()], ids=["nothing", "prompt"])
def test_cached_greedy_equals_uncached_greedy(model, prompt):
    expected = greedy_without_cache(model, prompt, 70)
    assert first(70, generate(model, TOKENIZER, prompt=prompt, tokens=500, sampling=GREEDY)) == expected
    assert len(set(expected)) > 10, "not one token again and again"


@pytest.mark.slow
def test_the_same_seed_gives_the_same_music(model):
    def ids(seed, **options):
        return first(30, generate(model, TOKENIZER, prompt=cut_prompt(), tokens=99, seed=seed, **options))

    assert ids(3) == ids(3)
    assert ids(3) != ids(4)
    assert ids(3) == ids(3, sampling=Sampling())
    assert ids(3, sampling=GREEDY) == ids(4, sampling=GREEDY)


@pytest.mark.usefixtures("_quick_endings")
@pytest.mark.slow
def test_a_variation_depends_only_on_the_seed_and_its_index(model):
    options = {"prompt": cut_prompt(), "tokens": 30, "seed": 5}
    three = generate_variations(model, TOKENIZER, 3, **options).variations
    one = generate_variations(model, TOKENIZER, 1, **options).variations[0]
    streamed = np.array(list(generate(model, TOKENIZER, **options)))
    assert np.array_equal(one.ids, three[0].ids)
    walk, keys = GrammarWalk(TOKENIZER), lane_keys(5, 3)
    assert np.array_equal(finish(walk, streamed), one.ids)
    for i, variation in enumerate(three):
        player = Player(model, TOKENIZER)
        player.keys = keys[i : i + 1]
        player.read(options["prompt"])
        assert np.array_equal(finish(walk, np.concatenate(list(player.play(Limits(tokens=30))))), variation.ids)
        assert variation.notes == TOKENIZER.decode([*running(options["prompt"]), *variation.ids])
    assert len({tuple(variation.ids) for variation in three}) == 3


def running(prompt: np.ndarray) -> np.ndarray:
    """The last VELOCITY of a prompt."""
    return prompt[prompt >= VELOCITY][-1:]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_reading_a_prompt_does_not_depend_on_chunks(model, chunk):
    prompt, told = cut_prompt(), []
    whole, pieces = Player(model, TOKENIZER), Player(model, TOKENIZER)
    whole.read(prompt, lambda done, total: told.append((done, total)))
    for done in range(0, len(prompt), chunk):
        pieces.read(prompt[done : done + chunk])
    assert np.array_equal(first(50, pieces.play(Limits())), first(50, whole.play(Limits())))
    n = len(prompt) + 1
    assert told == [(min(done, n), n) for done in range(16, n + 16, 16)][-len(told) :]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [{"tokens": 90}, {"seconds": 4.0}, {"seconds": 2.5, "tokens": 400}])
def test_prompt_and_continuation_form_one_piece(model, limit):
    prompt = cut_prompt()
    report = generate_variations(model, TOKENIZER, 4, prompt=prompt, **limit)
    for variation in report.variations:
        whole = np.concatenate([[BOS], prompt, variation.ids])
        assert first_violation(whole) is None
        notes = TOKENIZER.decode(whole)
        assert len(notes) == ((whole >= NOTE_ON) & (whole < NOTE_OFF)).sum()
        begin = G.ticks[prompt].sum() / 100
        new = notes.onset >= begin
        own = variation.notes
        # Keys that the prompt holds belong to the prompt, and its velocity still applies.
        np.testing.assert_allclose(own.onset, notes.onset[new] - begin, atol=1e-9)
        np.testing.assert_allclose(own.offset, notes.offset[new] - begin, atol=1e-9)
        assert np.array_equal(own.pitch, notes.pitch[new])
        assert np.array_equal(own.velocity, notes.velocity[new])
    assert report.prompt_tokens == len(prompt) + 1
    assert report.state_bytes == model.new_state(4, rewindable=True).nbytes
    assert report.tokens >= sum(len(variation.ids) for variation in report.variations)
    assert report.tokens_per_second > 0


@pytest.mark.usefixtures("_quick_endings")
@pytest.mark.slow
def test_the_prompt_may_be_notes_or_ids_with_or_without_bos_and_eos(model):
    notes = random_notes(0, 20)
    ids = encode_notes(notes)
    prompts = [notes, ids, TOKENIZER.encode_notes(notes), ids.astype(np.int32), ids.tolist()]
    streams = [first(20, generate(model, TOKENIZER, prompt=prompt, tokens=99)) for prompt in prompts]
    assert all(stream == streams[0] for stream in streams)
    begin = list(generate(model, TOKENIZER, tokens=15))
    for nothing in ([], [BOS], [BOS, EOS], Notes.empty()):
        assert first(20, generate(model, TOKENIZER, prompt=nothing, tokens=15)) == begin[:20]
    assert all(type(i) is int for i in begin)
    assert begin[-1] == EOS
    assert PAD not in begin


@pytest.mark.usefixtures("_quick_endings")
@pytest.mark.slow
@pytest.mark.parametrize("prompt", [None, cut_prompt()], ids=["nothing", "prompt"])
def test_notes_are_yielded_when_they_are_released(model, prompt):
    options = {"prompt": prompt, "tokens": 80, "seed": 2}
    ids = list(generate(model, TOKENIZER, **options))
    streamed = list(generate(model, TOKENIZER, **options, as_notes=True))
    expected = TOKENIZER.decode([*running(prompt_ids(TOKENIZER, prompt)), *ids])
    assert len(streamed) == len(expected) > 20
    assert all(isinstance(note, Note) for note in streamed)
    assert [note.offset for note in streamed] == sorted(note.offset for note in streamed)
    onset, offset, pitch, velocity = zip(
        *sorted(streamed, key=lambda note: (round(note.onset, 4), note.pitch)), strict=True
    )
    np.testing.assert_allclose(onset, expected.onset, atol=1e-9)
    np.testing.assert_allclose(offset, expected.offset, atol=1e-9)
    assert np.array_equal(pitch, expected.pitch)
    assert np.array_equal(velocity, expected.velocity)


@pytest.mark.usefixtures("_quick_endings")
@pytest.mark.slow
def test_ten_times_the_horizon_in_constant_memory():
    """The state is most of the memory used here, so a second copy of it would show."""
    model = tiny_model(horizons=(24, 8), n_heads=32, head_dim=64, segment_length=2)
    state = model.new_state(1, rewindable=True)
    one, slots = state.nbytes, state.layers[0]["keys"].nbytes
    before = active_memory()
    stream = generate(model, TOKENIZER, tokens=10 * 24 + 8, seed=1)
    active, peak = [], []
    for i, _ in enumerate(stream):
        if i > 3:  # the first steps turn the prompt's state into the lanes' state
            active.append(mx.get_active_memory() - before)
            peak.append(mx.get_peak_memory() - before)
        mx.reset_peak_memory()
    assert len(active) > 10 * 24
    assert max(active) - min(active) < 0.02 * one
    assert max(active) < 1.1 * one + GRAMMAR_BYTES
    assert max(peak) - max(active) < slots, "a step or the end of a segment copies the keys of a layer"


@pytest.mark.usefixtures("_quick_endings")
def test_variations_do_not_hold_a_second_state():
    model = tiny_model(horizons=(96, 32), n_heads=8, head_dim=64)
    one = model.new_state(1, rewindable=True).nbytes
    before = active_memory()
    active = []
    generate_variations(model, TOKENIZER, 2, tokens=40, progress=lambda *_: active.append(mx.get_active_memory()))
    assert max(active[3:]) - before < 2.2 * one + GRAMMAR_BYTES


@pytest.mark.usefixtures("_quick_endings")
def test_progress_is_reported(model):
    told = []
    report = generate_variations(model, TOKENIZER, 2, seconds=3, progress=lambda *now: told.append(now))
    assert [tokens for tokens, _ in told] == list(range(1, len(told) + 1))
    music = [seconds for _, seconds in told]
    assert music == sorted(music)
    assert music[-1] >= min(G.ticks[variation.ids].sum() for variation in report.variations) / 100


KINDS = {"on": (NOTE_ON, NOTE_OFF), "off": (NOTE_OFF, TIME_SHIFT), "velocity": (VELOCITY, VOCAB_SIZE)}
KINDS |= {"tick": (TIME_SHIFT, TIME_SHIFT + 1), "second": (VELOCITY - 1, VELOCITY), "end": (EOS, EOS + 1)}


@pytest.mark.usefixtures("_quick_endings")
@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds", [*itertools.permutations(KINDS, 1), ("tick", "on"), ("second", "on"), ("tick", "off")]
)
def test_any_preference_gives_music_that_ends(kinds):
    preferences = np.zeros(VOCAB_SIZE)
    for rank, kind in enumerate(kinds):
        preferences[slice(*KINDS[kind])] = 30 - 10 * rank
    model = constant_model(preferences)
    for prompt, limit, sampling in (
        ([], {"tokens": 20}, Sampling()),
        (cut_prompt().tolist(), {"seconds": 1.0, "tokens": 40}, Sampling()),
        (cut_prompt().tolist(), {"tokens": 10}, GREEDY),
    ):
        (variation,) = generate_variations(model, TOKENIZER, prompt=prompt, sampling=sampling, **limit).variations
        assert len(variation.ids) <= limit["tokens"] + grammar.RELEASE_TOKENS + 129
        assert G.ticks[variation.ids].sum() <= 100 * limit.get("seconds", 1e9) + 100 * RELEASE_SECONDS
        whole = [BOS, *prompt, *variation.ids]
        assert first_violation(whole) is None
        assert not np.array(GrammarWalk(TOKENIZER).begin(whole).sounding).any()


@pytest.mark.usefixtures("_quick_endings")
@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_the_length_in_seconds_is_kept(model, seconds):
    for variation in generate_variations(model, TOKENIZER, 6, seconds=seconds).variations:
        assert variation.notes.duration <= seconds + RELEASE_SECONDS
    for as_notes in (False, True):
        assert list(generate(model, TOKENIZER, seconds=seconds, as_notes=as_notes))


@pytest.mark.usefixtures("_quick_endings")
@pytest.mark.slow
def test_the_model_ends_only_if_may_end():
    preferences = np.zeros(VOCAB_SIZE)
    preferences[EOS], preferences[slice(*KINDS["off"])] = 30, 20
    model = constant_model(preferences)
    ended = list(generate(model, TOKENIZER, tokens=50, may_end=True))
    assert first_violation(ended) is None
    assert len(ended) < 20
    assert list(generate(model, TOKENIZER)) == ended, "without limits the model decides"
    assert list(generate(model, TOKENIZER, seconds=60.0, may_end=True)) == ended
    assert len(list(generate(model, TOKENIZER, tokens=50))) > 50


@pytest.mark.usefixtures("_quick_endings")
@pytest.mark.slow
def test_lanes_end_independently():
    preferences = np.zeros(VOCAB_SIZE)
    preferences[EOS], preferences[slice(*KINDS["off"])] = 4, 4
    model = constant_model(preferences)
    report = generate_variations(model, TOKENIZER, 5, tokens=120, may_end=True)
    lengths = [len(variation.ids) for variation in report.variations]
    assert len(set(lengths)) > 2
    assert all(first_violation(variation.ids) is None for variation in report.variations if len(variation.ids) < 120)
    assert report.tokens >= sum(lengths)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "table"),
    [*((np.empty(0, int), table) for table in (16, 60, 110)), *((cut_prompt(), table) for table in (60, 190, 230))],
    ids=["nothing-16", "nothing-60", "nothing-110", "prompt-60", "prompt-190", "prompt-230"],
)
def test_learned_positions_end_the_music_with_keys_released(prompt, table):
    """For every size of the table, either the prompt is refused or the music fits and ends properly."""
    model = tiny_model(max_positions=table, rope_dims=0, horizons=(16, 8))
    held = int(np.array(GrammarWalk(TOKENIZER).begin(prompt).sounding).sum())
    if len(prompt) + held + ENDING_TOKENS > table:
        message = rf"`prompt`: {1 + len(prompt)} tokens, expected at most .* {table} learned"
        with pytest.raises(UserError, match=message):
            generate(model, TOKENIZER, prompt=prompt)
        return
    for limit in ({}, {"tokens": 10_000}, {"seconds": 1e5, "tokens": 5}):
        report = generate_variations(model, TOKENIZER, 2, prompt=prompt, seed=4, **limit)
        for variation in report.variations:
            assert first_violation([BOS, *prompt, *variation.ids]) is None
            assert len(prompt) + len(variation.ids) <= table
        if limit.get("tokens") == 10_000:
            longest = max(len(variation.ids) for variation in report.variations)
            assert table - len(prompt) - longest < 20, "what there is of the table is used"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds", [("velocity", "on", "tick"), ("on", "velocity", "tick"), ("second", "on"), ("tick", "velocity", "on")]
)
@pytest.mark.parametrize("table", [16, 41, 42, 43, 100])
def test_any_preference_ends_with_the_learned_positions(kinds, table):
    preferences = np.zeros(VOCAB_SIZE)
    for rank, kind in enumerate(kinds):
        preferences[slice(*KINDS[kind])] = 30 - 10 * rank
    model = constant_model(preferences, max_positions=table)
    ids = list(generate(model, TOKENIZER, tokens=10_000))
    assert first_violation(ids) is None
    assert len(ids) <= table


def test_a_prompt_may_leave_just_enough_positions_to_release_its_keys():
    prompt = cut_prompt()
    held = int(np.array(GrammarWalk(TOKENIZER).begin(prompt).sounding).sum())
    least = 1 + len(prompt) + held + ENDING_TOKENS - 1  # the last token drawn needs no position
    ids = list(generate(tiny_model(max_positions=least, rope_dims=0), TOKENIZER, prompt=prompt, tokens=10_000))
    assert first_violation([BOS, *prompt, *ids]) is None
    message = f"`prompt`: 176 tokens, expected at most 175: the model has {least - 1} learned positions (max_positions)"
    with pytest.raises(UserError, match=re.escape(message)):
        generate_variations(tiny_model(max_positions=least - 1, rope_dims=0), TOKENIZER, prompt=prompt)


def test_learned_positions_end_a_stream_without_a_grammar():
    tokenizer, model = PlainTokenizer(), tiny_model(vocab_size=10, max_positions=40)
    ids = list(generate(model, tokenizer, tokens=1000))
    assert ids[-1] == tokenizer.eos_id
    assert 30 < len(ids) <= 40


def test_learned_positions_cut_a_stream_without_eos():
    class WithoutEnd(PlainTokenizer):
        eos_id = None

    tokenizer, model = WithoutEnd(), tiny_model(vocab_size=10, max_positions=40)
    assert len(list(generate(model, tokenizer, tokens=1000))) == 40, "the last one drawn is not read"
    assert len(list(generate(model, tokenizer, tokens=1000, prompt=[3] * 39))) == 1
    with pytest.raises(UserError, match="`prompt`: 41 tokens, expected at most 40: the model has 40 learned positions"):
        generate(model, tokenizer, tokens=1000, prompt=[3] * 40)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_p=0.9, top_k=5, min_p=0.1)])
def test_nan_logits_are_an_error(value, sampling):
    model = tiny_model()
    model.norm.weight = model.norm.weight * value
    with pytest.raises(UserError, match="`model`: its logits are NaN, expected finite weights"):
        generate_variations(model, TOKENIZER, 2, tokens=20, sampling=sampling)
    with pytest.raises(UserError, match="`model`: its logits are NaN"):
        list(generate(model, TOKENIZER, seconds=5, sampling=sampling))


@pytest.mark.usefixtures("_quick_endings")
@pytest.mark.slow
def test_enormous_logits_give_music():
    model = tiny_model()
    model.norm.weight = model.norm.weight * 1e30
    for sampling in (GREEDY, Sampling(), Sampling(temperature=1e-20, top_p=0.5), Sampling(temperature=1e35)):
        (variation,) = generate_variations(model, TOKENIZER, tokens=30, sampling=sampling).variations
        assert first_violation(variation.ids) is None


def test_a_tokenizer_without_grammar():
    tokenizer, model = PlainTokenizer(), tiny_model(vocab_size=10)
    report = generate_variations(model, tokenizer, 2, prompt=np.array([8, 3, 4]), tokens=30)
    for variation in report.variations:
        assert len(variation.ids) == 31
        assert variation.ids[-1] == tokenizer.eos_id
        assert np.isin(variation.ids[:-1], range(1, 8)).all()
        assert variation.notes == tokenizer.decode(variation.ids)
    with pytest.raises(UserError, match="`as_notes`: tokenizer plain: its ids cannot be decoded one by one"):
        generate(model, tokenizer, tokens=30, prompt=[3, 4], as_notes=True)
    ended = list(generate(model, tokenizer))
    assert ended.index(tokenizer.eos_id) == len(ended) - 1
    with pytest.raises(UserError, match="tokenizer plain: its tokens have no known duration, expected `tokens`"):
        generate(model, tokenizer, seconds=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, "`seconds` 0: expected more than 0 and at most 1,000,000"),
        ({"seconds": -1}, "`seconds` -1: expected more than 0"),
        ({"seconds": math.nan}, "`seconds` nan: expected more than 0"),
        ({"seconds": 1e9}, "`seconds` 1000000000.0: expected more than 0 and at most 1,000,000"),
        ({"tokens": 0}, "`tokens` 0: expected at least 1"),
        ({"seed": -3}, "`seed` -3: expected an integer, 0 or more"),
        ({"prompt": np.array([5, 393])}, "`prompt`: ids from 5 to 393, expected 0 to 392"),
        ({"prompt": [-1]}, "`prompt`: ids from -1 to -1, expected 0 to 392"),
        ({"prompt": [1.5]}, "`prompt`: an array of float64, expected Notes or integer ids"),
        ({"prompt": "song.mid"}, "`prompt`: an array of <U8, expected Notes or integer ids"),
        ({"prompt": [*range(NOTE_ON, NOTE_OFF), VELOCITY]}, "`prompt`: nothing may follow its last id, 359"),
    ],
)
def test_invalid_arguments_are_refused_at_once(model, options, message):
    for function in (generate, generate_variations):
        with pytest.raises(UserError, match=re.escape(message)):
            function(model, TOKENIZER, **options)


def test_lanes_and_vocabulary_are_checked(model):
    with pytest.raises(UserError, match="`n` 0: expected at least 1"):
        generate_variations(model, TOKENIZER, 0, tokens=5)
    with pytest.raises(UserError, match="`tokenizer` plain: 10 tokens, expected the 393 of the model"):
        generate(model, PlainTokenizer(), tokens=5)


def test_limits_may_exceed_any_counter(model):
    assert make_limits(TOKENIZER, None, 10**12, False).tokens == 2**31 - 1
    assert len(first(40, generate(model, TOKENIZER, tokens=10**12, seconds=1e6))) == 40
