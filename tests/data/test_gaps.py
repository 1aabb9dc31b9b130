"""Gaps in pieces: what is shown, where it stands, and that the music stays as it is."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.performance_reference import first_violation
from support.stand_ins import PlainTokenizer

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.augmentation import Augmentation, augment
from dsmr_mlx.data.gaps import MIN_DISTANCE, excerpt, with_gaps
from dsmr_mlx.data.lanes import Lanes
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.performance import (
    BOS,
    EOS,
    FILL,
    NOTE_ON,
    OFF,
    ON,
    PLAY,
    TIME_SHIFT,
    VELOCITY,
    PerformanceTokenizer,
    decode_ids,
    encode_notes,
    performance_grammar,
)

TOKENIZER = PerformanceTokenizer()
places = st.tuples(st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 10_000))  # seed, epoch, piece


@cache
def piece(seed: int, n: int) -> np.ndarray:
    """Return the ids of a piece of n random notes; every other piece has long silences."""
    rng = np.random.default_rng(seed)
    onset = np.cumsum(rng.choice([0, 0.01, 0.1, 0.5, 3.7 if seed % 2 else 0.2], n))
    length, pitch = rng.choice([0.02, 0.3, 2.5], n), rng.integers(21, 109, n)
    return TOKENIZER.encode_notes(Notes.sorted(onset, onset + length, pitch, rng.integers(1, 128, n)))


pieces = st.builds(piece, st.integers(0, 5), st.sampled_from([1, 5, 30, 200, 1500, 4000]))


class Found(NamedTuple):
    """A gap as read from ids: its place in the piece, the ids of its length, and its excerpt."""

    place: int
    length: list[int]
    excerpt: list[int]

    @property
    def ticks(self) -> int:
        return sum(event - TIME_SHIFT + 1 for event in self.length)


def gaps_in(ids: np.ndarray) -> list[Found]:
    """Read the gaps. The length ends with the first TIME_SHIFT below a second, or before another event."""
    found, before = [], 0
    for fill, play in zip(np.flatnonzero(ids == FILL), np.flatnonzero(ids == PLAY), strict=True):
        shown, n = ids[fill + 1 : play].tolist(), 0
        while n < len(shown) and TIME_SHIFT <= shown[n] < VELOCITY and (n == 0 or shown[n - 1] == VELOCITY - 1):
            n += 1
        found.append(Found(int(fill) - before, shown[:n], shown[n:]))
        before += len(shown) + 2
    return found


def music_after(notes: Notes, start: int) -> Notes:
    """Return the notes that begin `start` ticks after the piece or later, with times from there."""
    later = notes.take(np.rint(notes.onset * 100) >= start)
    return later.shifted(-start / 100)


def rows(notes: Notes) -> list[tuple[int, ...]]:
    """Return onset, offset (ticks), pitch and velocity of each note."""
    columns = (np.rint(notes.onset * 100), np.rint(notes.offset * 100), notes.pitch, notes.velocity)
    return list(zip(*(column.astype(int).tolist() for column in columns), strict=True))


@settings(max_examples=60, deadline=None)
@given(pieces, places)
def test_the_music_stays_and_gaps_are_well_formed(ids, place):
    """The property of each part: place, length, excerpt, distance."""
    result = with_gaps(TOKENIZER, ids, 1.0, *place)
    assert result.dtype == ids.dtype
    assert np.array_equal(TOKENIZER.without_shown(result), ids)
    assert TOKENIZER.decode(result) == TOKENIZER.decode(ids)
    grammar, notes = performance_grammar(), TOKENIZER.decode(ids)
    ticks, found = np.cumsum(grammar.ticks[ids]), gaps_in(result)
    assert bool(found) == (ticks[-1] >= 200)  # a piece that is long enough has one
    free = 0
    for gap in found:
        assert grammar.next_state[0, ids[gap.place - 1]] in (ON, OFF)  # a complete moment
        assert TIME_SHIFT <= ids[gap.place] < VELOCITY
        start = int(ticks[gap.place - 1])
        end = start + gap.ticks
        assert 200 <= gap.ticks <= 3000
        full, rest = divmod(gap.ticks, 100)
        assert gap.length == [VELOCITY - 1] * full + [TIME_SHIFT + rest - 1] * (rest > 0)
        assert end <= ticks[-1]
        assert gap.place >= free
        free = int((ticks < end).sum()) + MIN_DISTANCE

        following, shown = music_after(notes, end), decode_ids(gap.excerpt)
        if not len(following):
            assert gap.excerpt == []
            continue
        assert rest > 0  # otherwise the length would run into a pause of the excerpt
        delay = round(following.onset[0] * 100)
        pause = [VELOCITY - 1] * (delay // 100) + [TIME_SHIFT + delay % 100 - 1] * (delay % 100 > 0)
        whole = [*pause, *encode_notes(following).tolist()]
        assert gap.excerpt == whole[: len(gap.excerpt)]  # canonical
        assert 64 <= len(gap.excerpt) <= 256 or gap.excerpt == whole
        assert first_violation(gap.excerpt[len(pause) :], complete=False) is None
        # The same notes with the same times; what the excerpt cuts off is still down at its end.
        cut = sum(event - TIME_SHIFT + 1 for event in gap.excerpt if TIME_SHIFT <= event < VELOCITY)
        expected = [(on, min(off, max(cut, on + 1)), *rest) for on, off, *rest in rows(following)]
        assert set(rows(shown)) <= set(expected)
        assert len(shown) == sum(NOTE_ON <= event < NOTE_ON + 128 for event in gap.excerpt)


def test_a_note_that_begins_before_is_not_in_the_excerpt():
    """A key that is down when the passage ends is not released in the excerpt; the velocity is repeated."""
    notes = Notes.sorted([0, 1, 2, 2.5], [4, 1.5, 2.2, 3], [60, 64, 67, 60], [64, 64, 64, 64])
    names = [TOKENIZER.tokens[i] for i in excerpt(notes, 1.25, 9)]
    assert names == ["TIME_SHIFT_75", "VELOCITY_15", "NOTE_ON_67", "TIME_SHIFT_20", "NOTE_OFF_67", "TIME_SHIFT_30",
                     "NOTE_ON_60", "TIME_SHIFT_50", "NOTE_OFF_60"]  # fmt: skip
    assert excerpt(notes, 1.25, 3).tolist() == [TOKENIZER.tokens.index(name) for name in names[:3]]
    assert [TOKENIZER.tokens[i] for i in excerpt(notes, 2.0, 2)] == ["VELOCITY_15", "NOTE_ON_67"]
    assert excerpt(notes, 2.51, 64).tolist() == excerpt(Notes.empty(), 0.0, 64).tolist() == []


def test_gaps_are_a_pure_function_of_seed_epoch_and_piece():
    ids = piece(0, 4000)
    streams = [
        with_gaps(TOKENIZER, ids, 1.0, *place).tolist()
        for place in ((3, 1, 2), (3, 1, 2), (4, 1, 2), (3, 0, 2), (3, 1, 3))
    ]
    assert streams[0] == streams[1]
    assert len(set(map(tuple, streams))) == 4
    again = "from test_gaps import *; print(with_gaps(TOKENIZER, piece(0, 4000), 1.0, 3, 1, 2).tolist())"
    path = [str(p) for p in (Path(__file__).parent, Path(__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {path}; {again}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == streams[0]


def test_the_share_of_pieces_with_gaps():
    """0 and 1 are exact; a larger share adds pieces to those of a smaller one; draws are spread."""
    ids = piece(2, 200)
    filled = {
        share: [(with_gaps(TOKENIZER, ids, share, 5, 0, i) == FILL).any() for i in range(600)]
        for share in (0.0, 0.3, 0.6, 1.0)
    }
    assert not any(filled[0.0])
    assert all(filled[1.0])
    assert not (np.array(filled[0.3]) & ~np.array(filled[0.6])).any()
    for share in (0.3, 0.6):  # six standard deviations of a mean of 600
        assert abs(np.mean(filled[share]) - share) < 6 * (share * (1 - share) / 600) ** 0.5
    assert with_gaps(TOKENIZER, ids, 0.0, 5, 0, 0) is ids


def test_lengths_and_numbers_vary():
    """One or several gaps; lengths over the whole range, excerpts of all sizes, some to the end of the piece."""
    ids = piece(4, 4000)
    ticks = np.cumsum(performance_grammar().ticks[ids])[-1]
    found = [gaps_in(with_gaps(TOKENIZER, ids, 1.0, 0, 0, i)) for i in range(60)]
    gaps = [gap for each in found for gap in each]
    assert {1, 2, 3} <= {len(each) for each in found}
    assert min(gap.ticks for gap in gaps) < 400
    assert max(gap.ticks for gap in gaps) > 2700
    assert min(len(gap.excerpt) for gap in gaps) < 80
    assert max(len(gap.excerpt) for gap in gaps) > 240
    short = [gaps_in(with_gaps(TOKENIZER, piece(0, 200), 1.0, 0, 0, i)) for i in range(40)]
    assert any(gap.excerpt == [] for each in short for gap in each)
    assert ticks > 100_000 / 2


@pytest.mark.parametrize("ids", [[BOS, EOS], [BOS, VELOCITY, NOTE_ON, TIME_SHIFT, NOTE_ON + 128, EOS]])
def test_pieces_that_are_too_short_have_none(ids):
    ids = np.array(ids, np.uint16)
    assert with_gaps(TOKENIZER, ids, 1.0, 0, 0, 0) is ids


def test_gaps_follow_augmentation_and_do_not_change_its_draws():
    ids, augmentation = piece(0, 1500), Augmentation(transpose=3, stretch=0.05, velocity=8)
    augmented = augment(TOKENIZER, ids, augmentation, 7, 1, 2)
    result = with_gaps(TOKENIZER, augmented, 1.0, 7, 1, 2)
    assert len(result) > len(augmented)
    assert np.array_equal(TOKENIZER.without_shown(result), augmented)


def test_other_vocabularies_are_refused():
    ids = np.array([8, 1, 2, 0])
    assert with_gaps(PlainTokenizer(), ids, 0.0, 0, 0, 0) is ids
    with pytest.raises(UserError, match=r"^fill = 0\.5: the vocabulary plain has no FILL and PLAY, expected 0$"):
        with_gaps(PlainTokenizer(), ids, 0.5, 0, 0, 0)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_subwords_have_the_gaps_of_their_events(model_type):
    pytest.importorskip("sentencepiece")
    from dsmr_mlx.tokenizers.subwords import learn_subwords

    subwords = learn_subwords(TOKENIZER, [piece(i, 200) for i in range(4)], model_type, 398)
    events = piece(2, 1500)
    ids = subwords.from_events(events)
    for i in range(5):
        result = with_gaps(subwords, ids, 1.0, 0, 0, i)
        expected = with_gaps(TOKENIZER, events, 1.0, 0, 0, i)
        assert result.dtype == ids.dtype
        assert np.array_equal(subwords.to_events(result), expected)
        assert (result == subwords.fill_id).sum() == (expected == FILL).sum() > 0
        assert np.array_equal(subwords.to_events(subwords.without_shown(result)), events)


@settings(max_examples=20, deadline=None)
@given(B=st.integers(1, 3), S=st.integers(1, 300), seed=st.integers(0, 99))
def test_what_is_shown_is_no_target_in_any_segment(B, S, seed):
    """The targets with weight, put together, are the pieces without BOS, whatever the segments."""
    corpus = [piece(i, 200) for i in range(3)]
    lanes = Lanes(
        lambda epoch, i: with_gaps(TOKENIZER, corpus[i], 1.0, seed, epoch, i),
        3,
        B,
        S,
        epochs=1,
        shown=TOKENIZER.shown_mask,
    )
    trained: dict[int, list[int]] = {}
    for batch in lanes:
        assert batch.weights.dtype == np.float32
        assert batch.n_tokens == batch.weights.sum()
        for b in range(B):
            targets = batch.targets[b, : batch.counts[b]]
            assert not batch.weights[b, batch.counts[b] :].any()
            trained.setdefault(int(batch.pieces[b]), []).extend(targets[batch.weights[b, : batch.counts[b]] > 0])
    trained.pop(-1, None)
    assert trained == {i: ids[1:].tolist() for i, ids in enumerate(corpus)}
