"""Augmentation: changes note by note, draws, and resumed streams."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.music import random_notes
from support.performance_reference import first_violation
from support.stand_ins import PlainTokenizer
from support.vocabularies import NAMES, music_for, vocabulary

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.augmentation import ANNOUNCED, Augmentation, Draw, announce_end, augment, draw
from dsmr_mlx.data.lanes import Lanes
from dsmr_mlx.music.midi import read_notes
from dsmr_mlx.music.notes import DRUMS, Notes
from dsmr_mlx.tokenizers.aria.tokenizer import AriaTokenizer
from dsmr_mlx.tokenizers.aria.vocabulary import ENDING
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.tokenizers.registry import make_tokenizer

TOKENIZER = PerformanceTokenizer()
PAPER = Augmentation(transpose=3, stretch=0.05)
HALF_TICK = 0.005 + 1e-9


def build(events) -> Notes:
    return Notes.sorted(*zip(*[(on, on + length, pitch, v) for on, length, pitch, v in events], strict=True))


# few pitches close in time, so that onsets in adjacent ticks are common
pieces = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 30), st.integers(0, 3000)).map(lambda tick: tick / 100),
        st.one_of(st.just(0.01), st.floats(0, 5)),
        st.one_of(st.integers(60, 62), st.integers(21, 108), st.integers(0, 127)),
        st.integers(1, 127),
    ),
    min_size=1,
    max_size=40,
).map(lambda events: TOKENIZER.encode_notes(build(events)))
augmentations = st.builds(
    Augmentation,
    transpose=st.integers(0, 127),
    stretch=st.floats(0, 0.4) | st.just(0.05),
    velocity=st.integers(0, 126),
)
places = st.tuples(st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 10_000))  # seed, epoch, piece


def drawn(augmentation: Augmentation, ids: np.ndarray, place) -> Draw:
    pitch = TOKENIZER.decode(ids).pitch
    return draw(augmentation, *place, int(pitch.min()), int(pitch.max()))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(pieces, augmentations, places)
def test_every_note_is_changed_as_drawn(ids, augmentation, place):
    """The result holds exactly the changed notes, within half a tick and half a velocity step."""
    change = drawn(augmentation, ids, place)
    result = augment(TOKENIZER, ids, augmentation, *place)
    before, after = TOKENIZER.decode(ids), TOKENIZER.decode(result)
    assert result.dtype == ids.dtype
    assert (result[0], result[-1]) == (TOKENIZER.bos_id, TOKENIZER.eos_id)
    assert first_violation(result) is None

    onset, offset = before.onset * change.factor, before.offset * change.factor
    pitch = before.pitch.astype(int) + change.semitones
    loudness = np.clip(before.velocity.astype(int) + change.velocity, 1, 127)
    for on, key in zip(onset, pitch, strict=True):
        assert (np.abs(after.onset[after.pitch == key] - on) <= HALF_TICK).any()
    for on, off, key, velocity in zip(after.onset, after.offset, after.pitch, after.velocity, strict=True):
        near = (pitch == key) & (np.abs(onset - on) <= HALF_TICK)
        assert (np.abs(loudness[near] - velocity) <= 2).any()
        pressed_again = np.isclose(after.onset[after.pitch == key], off).any()
        shortest = off - on < 0.0101
        assert (np.abs(offset[near] - off) <= HALF_TICK).any() or pressed_again or shortest


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(pieces, augmentations, places)
def test_only_onsets_in_adjacent_ticks_can_merge(ids, augmentation, place):
    factor = drawn(augmentation, ids, place).factor
    before, after = TOKENIZER.decode(ids), TOKENIZER.decode(augment(TOKENIZER, ids, augmentation, *place))
    onsets = {(pitch, round(on * 100)) for pitch, on in zip(before.pitch.tolist(), before.onset, strict=True)}
    adjacent = sum((pitch, tick + 1) in onsets for pitch, tick in onsets)
    lost = len(before) - len(after)
    assert 0 <= lost <= (adjacent if factor < 1 else 0)


def test_of_two_merged_onsets_the_later_note_stays():
    trill = build([(0.0, 1, 40, 64), (1.0, 0.01, 60, 30), (1.01, 0.5, 60, 90)])
    change = Draw(factor=0.95)  # ticks 100 and 101 become 95 and 95.95, which is 96
    assert len(TOKENIZER.decode(TOKENIZER.encode_notes(change.apply(trill)))) == 3
    trill = build([(0.0, 1, 40, 64), (0.1, 0.01, 60, 30), (0.11, 0.5, 60, 90)])  # 9.5 and 10.45: both 10
    after = TOKENIZER.decode(TOKENIZER.encode_notes(change.apply(trill)))
    assert after.pitch.tolist() == [40, 60]
    assert after.velocity[1] == 90
    assert (after.onset[1], after.offset[1]) == (0.1, 0.58)  # 61 · 0.95 = 57.95


def test_apply_to_a_known_piece():
    notes = build([(0, 1.0, 60, 62), (2.0, 1.0, 64, 122)])
    changed = Draw(semitones=-3, factor=1.25, velocity=8).apply(notes)
    assert changed == Notes([0, 2.5], [1.25, 3.75], [57, 61], [70, 127])
    assert Draw(velocity=-100).apply(notes).velocity.tolist() == [1, 22]
    late = Notes(notes.onset + 4, notes.offset + 4, notes.pitch, notes.velocity)
    assert Draw(factor=0.5).apply(late) == Notes([4, 5], [4.5, 5.5], [60, 64], [62, 122])
    assert len(Draw(1, 1.05, 1).apply(Notes.empty())) == 0


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(pieces)
def test_identity_returns_the_same_ids(ids):
    notes = TOKENIZER.decode(ids)
    assert Draw().apply(notes) == notes
    assert np.array_equal(TOKENIZER.encode_notes(Draw().apply(notes)), ids)
    assert augment(TOKENIZER, ids, Augmentation(), 0, 0, 0) is ids


def test_draw_without_change_returns_the_same_ids():
    """Of 3 equally likely transpositions, 0 does not occur in 40 epochs with probability (2/3)^40 < 1e-7."""
    ids = TOKENIZER.encode_notes(random_notes(0, 20))
    unchanged = 0
    for epoch in range(40):
        same = draw(Augmentation(transpose=1), 0, epoch, 0, 40, 79) == Draw()
        assert (augment(TOKENIZER, ids, Augmentation(transpose=1), 0, epoch, 0) is ids) == same
        unchanged += same
    assert 0 < unchanged < 40


def test_piece_without_notes():
    ids = TOKENIZER.encode_notes(Notes.empty())
    assert augment(TOKENIZER, ids, PAPER, 0, 0, 0) is ids


@pytest.mark.parametrize("pitch", [0, 20, 21, 60, 108, 109, 127])
def test_piece_of_one_note(pitch):
    ids = TOKENIZER.encode_notes(Notes([0], [0.01], [pitch], [1]))
    strongest = Augmentation(transpose=127, stretch=0.4, velocity=126)
    for epoch in range(50):
        result = augment(TOKENIZER, ids, strongest, 0, epoch, 0)
        assert first_violation(result) is None
        assert len(TOKENIZER.decode(result)) == 1


def test_piece_over_all_pitches_is_never_transposed():
    ids = TOKENIZER.encode_notes(Notes([0, 0, 1], [1, 1, 2], [0, 127, 60], [64, 64, 64]))
    for epoch in range(50):
        assert augment(TOKENIZER, ids, Augmentation(transpose=6), 0, epoch, 0) is ids


def test_another_tokenizer():
    """Its ids are pitches modulo 7; every id decodes to middle C."""
    tokenizer = PlainTokenizer()
    ids = np.array([tokenizer.bos_id, 3, 5, tokenizer.eos_id], tokenizer.dtype)
    for epoch in range(20):
        semitones = draw(PAPER, 0, epoch, 0, 60, 60).semitones
        result = augment(tokenizer, ids, PAPER, 0, epoch, 0)
        expected = 1 + (60 + semitones) % 7
        assert result is ids or result.tolist() == [tokenizer.bos_id, expected, expected, tokenizer.eos_id]
        assert result.dtype == tokenizer.dtype


@settings(max_examples=300, deadline=None)
@given(augmentations, places, st.integers(0, 127), st.integers(0, 127))
def test_draws_stay_in_bounds(augmentation, place, a, b):
    low, high = min(a, b), max(a, b)
    change = draw(augmentation, *place, low, high)
    assert abs(change.semitones) <= augmentation.transpose
    assert change.factor in augmentation.factors
    assert abs(change.velocity) <= augmentation.velocity
    bottom, top = (21, 108) if low >= 21 and high <= 108 else (0, 127)
    assert bottom <= low + change.semitones <= high + change.semitones <= top


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (40, 80, {-3, -2, -1, 0, 1, 2, 3}),
        (21, 108, {0}),
        (22, 108, {-1, 0}),
        (20, 108, {-3, -2, -1, 0, 1, 2, 3}),  # the piece leaves the piano itself
        (2, 126, {-2, -1, 0, 1}),
        (0, 127, {0}),
    ],
)
def test_every_lossless_transposition_is_drawn(low, high, expected):
    """One of at most 7 does not occur in 300 draws with probability 7 · (6/7)^300 < 1e-18."""
    assert {draw(PAPER, 0, 0, piece, low, high).semitones for piece in range(300)} == expected


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["seed", "epoch", "piece"])
def test_draws_are_uniform_and_independent(axis):
    """All 128 counts lie within 6 σ; by chance one lies outside with probability below 1e-5."""
    augmentation, n = Augmentation(transpose=3, stretch=0.05, velocity=3), 7000
    place = {"seed": 1, "epoch": 2, "piece": 3}
    draws = [draw(augmentation, **(place | {axis: i}), low=40, high=80) for i in range(n)]
    parts = [d.semitones for d in draws], [d.factor for d in draws], [d.velocity for d in draws]
    joint = (
        list(zip(parts[0], parts[1], strict=True)),
        list(zip(parts[0], parts[2], strict=True)),
        list(zip(parts[1][1:], parts[1][:-1], strict=True)),  # consecutive draws
    )
    for values, cells in zip((*parts, *joint), (7, 5, 7, 35, 49, 25), strict=True):
        found, counts = np.unique(np.array(values), axis=0, return_counts=True)
        assert len(found) == cells
        assert np.abs(counts - len(values) / cells).max() < 6 * np.sqrt(n / cells * (1 - 1 / cells))


def test_parts_have_separate_random_bits():
    alone = [draw(PAPER, 0, 0, piece, 40, 80) for piece in range(50)]
    more = [draw(Augmentation(transpose=3, stretch=0.05, velocity=9), 0, 0, piece, 40, 80) for piece in range(50)]
    assert [(d.semitones, d.factor) for d in alone] == [(d.semitones, d.factor) for d in more]


def test_draws_differ_between_seed_epoch_and_piece():
    """As plain entropy, [a, b] would equal [a, b, 0] and the integer a + 2^32 b."""
    places = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0), (2**32, 0, 0), (1 + 2**32, 0, 0), (0, 2, 0), (0, 0, 2)]
    fine = Augmentation(transpose=40, stretch=0.3, velocity=126)
    assert len({draw(fine, *place, 61, 67) for place in places}) == len(places)


def test_known_draws():
    """These must never change, or a run resumed with a newer version would read other tokens."""
    draws = [draw(Augmentation(transpose=3, stretch=0.05, velocity=8), 7, 1, i, 40, 80) for i in range(3)]
    assert draws == [Draw(-3, 1.025, 3), Draw(-3, 1.025, 2), Draw(1, 1.05, -6)]


@settings(max_examples=100, deadline=None)
@given(pieces, augmentations, places)
def test_augment_is_a_pure_function(ids, augmentation, place):
    copy = ids.copy()
    ids.flags.writeable = False  # as in a corpus
    np.random.seed(len(ids))  # noqa: NPY002 - NumPy's global state must not matter
    first = augment(TOKENIZER, ids, augmentation, *place)
    np.random.random()  # noqa: NPY002
    assert np.array_equal(augment(TOKENIZER, copy, augmentation, *place), first)
    assert np.array_equal(ids, copy)


def test_epochs_and_seeds_differ():
    """Of 35 versions of a piece, 12 epochs show fewer than 4 with probability below 1e-6."""
    ids = TOKENIZER.encode_notes(random_notes(1, 200))
    for places in ([(0, epoch, 0) for epoch in range(12)], [(seed, 0, 0) for seed in range(12)]):
        assert len({augment(TOKENIZER, ids, PAPER, *place).tobytes() for place in places}) >= 4


def test_transpositions_stay_in_the_range_of_the_vocabulary(tmp_path):
    settings = tmp_path / "settings.json"
    settings.write_text('{"pitch_range": [48, 85]}')
    tokenizer = make_tokenizer("miditok:TSD", settings)
    notes = random_notes(2, 60)
    ids = tokenizer.encode_notes(replace(notes, pitch=50 + notes.pitch % 34))
    changed = [augment(tokenizer, ids, Augmentation(transpose=12), 0, epoch, 0) for epoch in range(20)]
    assert {len(tokenizer.decode(version)) for version in changed} == {len(tokenizer.decode(ids))}
    assert len({version.tobytes() for version in changed}) > 1


@pytest.mark.parametrize("name", NAMES)
def test_every_vocabulary_is_augmented(name):
    tokenizer = vocabulary(name)
    ids = tokenizer.encode_notes(music_for(name, 3))
    versions = [augment(tokenizer, ids, PAPER, 0, epoch, 0) for epoch in range(5)]
    assert len({version.tobytes() for version in versions}) > 1


def test_drums_alone_are_not_transposed(tmp_path):
    """In a vocabulary that cannot represent all pitches."""
    settings = tmp_path / "settings.json"
    settings.write_text('{"pitch_range": [40, 100], "drums_pitch_range": [40, 88]}')
    tokenizer = make_tokenizer("miditok:TSD", settings, programs=True)
    notes = random_notes(2, 60)
    drums = replace(notes, pitch=40 + notes.pitch % 40, program=np.full(len(notes), DRUMS))
    ids = tokenizer.encode_notes(drums)
    for epoch in range(5):
        changed = tokenizer.decode(augment(tokenizer, ids, PAPER, 0, epoch, 0))
        assert sorted(changed.pitch.tolist()) == sorted(tokenizer.decode(ids).pitch.tolist())


def test_ends_are_announced_at_random_places():
    """Differently in each epoch, the same again for a resumed stream; other vocabularies announce nothing."""
    tokenizer = AriaTokenizer()
    notes = random_notes(0, 200)
    piece = tokenizer.encode_notes(notes)
    epochs = [announce_end(tokenizer, piece, 5, epoch, 0) for epoch in range(40)]
    places = [int(np.flatnonzero(ids == ENDING)[0]) for ids in epochs]
    assert len(set(places)) > 5
    assert all(ANNOUNCED[0] <= len(piece) - 1 - place <= ANNOUNCED[-1] + 3 for place in places)
    assert np.array_equal(announce_end(tokenizer, piece, 5, 7, 0), epochs[7])
    plain = PerformanceTokenizer().encode_notes(notes)
    assert announce_end(PerformanceTokenizer(), plain, 5, 0, 0) is plain


def test_resumed_stream_reads_the_same_tokens():
    corpus = [TOKENIZER.encode_notes(random_notes(i, 12 + 5 * i)) for i in range(5)]
    lanes = [
        Lanes(lambda epoch, i: augment(TOKENIZER, corpus[i], PAPER, 3, epoch, i), 5, 3, 16, seed=3) for _ in range(2)
    ]
    for _ in range(17):
        next(lanes[0])
    lanes[1].seek(lanes[0].cursor())
    for _ in range(40):
        a, b = next(lanes[0]), next(lanes[1])
        assert np.array_equal(a.inputs, b.inputs)
        assert np.array_equal(a.targets, b.targets)


@pytest.mark.asap
def test_no_note_of_asap_is_lost(asap_dir):
    """ASAP has no onsets of one pitch in adjacent ticks, so stretching merges none."""
    strong = Augmentation(transpose=6, stretch=0.05, velocity=10)
    changes = set()
    for i, path in enumerate(sorted(asap_dir.rglob("*.mid"))[::20]):
        notes = read_notes(path)
        ids = TOKENIZER.encode_notes(notes)
        change = drawn(strong, ids, (0, 0, i))
        result = augment(TOKENIZER, ids, strong, 0, 0, i)
        assert first_violation(result) is None, path
        after = TOKENIZER.decode(result)
        assert len(after) == len(notes), path
        expected = np.bincount(notes.pitch.astype(int) + change.semitones, minlength=128)
        assert np.array_equal(np.bincount(after.pitch, minlength=128), expected), path
        assert np.abs(after.onset - np.sort(notes.onset) * change.factor).max() <= 0.005 * (1 + 1.05) + 1e-9, path
        changes.add(change)
    assert len(changes) >= 20


def test_factors_of_the_paper():
    assert PAPER.factors == (0.95, 0.975, 1.0, 1.025, 1.05)
    assert set(Augmentation().factors) == {1.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"transpose": -1}, "transpose = -1: expected 0 to 127 semitones"),
        ({"transpose": 128}, "transpose = 128: expected 0 to 127 semitones"),
        ({"transpose": 1.5}, "transpose = 1.5: expected int"),
        ({"transpose": True}, "transpose = True: expected int"),
        ({"stretch": -0.05}, "stretch = -0.05: expected 0 to 0.4"),
        ({"stretch": 5}, "stretch = 5.0: expected 0 to 0.4"),
        ({"stretch": float("nan")}, "stretch = nan: expected a finite number"),
        ({"stretch": "a little"}, "stretch = 'a little': expected float"),
        ({"velocity": 127}, "velocity = 127: expected 0 to 126"),
        ({"tempo": 0.05}, "unknown key tempo; known are transpose, stretch, velocity"),
    ],
)
def test_invalid_settings(values, message):
    with pytest.raises(UserError, match="augmentation: ") as error:
        Augmentation.from_dict(values, "augmentation")
    assert str(error.value) == f"augmentation: {message}"


def test_json_round_trip():
    assert Augmentation.from_json(PAPER.to_json()) == PAPER
    assert Augmentation.from_dict({"stretch": 0}) == Augmentation()


def test_imports_neither_mlx_nor_symusic():
    code = "import sys, dsmr_mlx.data.augmentation; print({m.split('.')[0] for m in sys.modules} & {'mlx', 'symusic'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
