"""Filters against NumPy in float64; draws against their expected probabilities."""

import math
import re

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.sampling import Sampling, filter_logits, keys_at, lane_keys, sample_tokens

MARGIN = 1e-4  # float32 may decide differently on tokens closer to a threshold


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def reference(logits: np.ndarray, s: Sampling) -> tuple[np.ndarray, float]:
    """The tokens of one row that each filter keeps, and the distance of the closest decision."""
    logits = logits.astype(np.float64) / s.temperature
    near = math.inf
    if s.top_k:
        ranked = sorted(logits, reverse=True)
        logits = np.where(logits >= ranked[min(s.top_k, len(ranked)) - 1], logits, -np.inf)
    if s.top_p < 1:
        p = probabilities(logits)
        total, least = 0.0, 0.0
        for value in sorted(p, reverse=True):
            if total >= s.top_p:
                break
            total, least = total + value, value
            near = min(near, abs(total - s.top_p))
        logits = np.where(p >= least * (1 - 1e-12), logits, -np.inf)
    if s.min_p:
        p = probabilities(logits)
        near = min(near, np.abs(p / p.max() - s.min_p).min())
        logits = np.where(p >= s.min_p * p.max(), logits, -np.inf)
    return logits > -np.inf, near


quarters = st.integers(-24, 24).map(lambda q: q / 4)  # few values, so that ties occur
settings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.25, 0.5, 1.0, 1.5, 4.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.02, 0.3, 0.55, 0.83, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.13, 0.4, 0.9]),
)


@given(st.lists(quarters | st.just(-math.inf), min_size=1, max_size=12), settings)
def test_filters_match_numpy(row, sampling):
    logits = np.array(row)
    assume(np.isfinite(logits).any())
    kept, near = reference(logits, sampling)
    assume(near > MARGIN)
    filtered = np.array(filter_logits(mx.array(np.stack([logits, logits[::-1]]).astype(np.float32)), sampling))
    assert np.array_equal(filtered[0] > -np.inf, kept)
    assert np.array_equal(filtered[1][::-1], filtered[0])
    expected = probabilities(np.where(kept, logits / sampling.temperature, -np.inf))
    np.testing.assert_allclose(probabilities(filtered[0].astype(np.float64)), expected, atol=1e-6)


def test_each_filter_alone():
    logits = mx.array(np.log([[0.4, 0.3, 0.2, 0.1]]).astype(np.float32))

    def kept(**options):
        return np.flatnonzero(np.array(filter_logits(logits, Sampling(**options)))[0] > -np.inf).tolist()

    assert kept() == kept(top_k=4) == kept(top_k=99) == kept(min_p=0.2) == kept(top_p=0.95) == [0, 1, 2, 3]
    assert kept(top_k=1) == kept(top_p=0.3) == kept(min_p=0.8) == [0]
    assert kept(top_k=2) == kept(top_p=0.6) == kept(min_p=0.7) == [0, 1]
    assert kept(top_p=0.85, top_k=2) == [0, 1]  # of the two that top-k leaves, the first has 0.57
    assert kept(top_p=0.55, top_k=2) == [0]


def test_the_filters_act_after_the_temperature():
    logits = mx.array(np.log([[0.6, 0.3, 0.1]]).astype(np.float32))
    flat = filter_logits(logits, Sampling(temperature=10.0, min_p=0.7))
    sharp = filter_logits(logits, Sampling(temperature=0.5, min_p=0.7))
    assert (np.array(flat) > -np.inf).sum() == 3
    assert (np.array(sharp) > -np.inf).sum() == 1


def test_ties_are_kept_together():
    logits = mx.array([[1.0, 2.0, 2.0, 2.0, 0.0]])
    for options in ({"top_k": 1}, {"top_p": 0.05}, {"min_p": 0.9}):
        kept = np.array(filter_logits(logits, Sampling(**options)))[0] > -np.inf
        assert kept.tolist() == [False, True, True, True, False], options


def test_draws_have_the_filtered_probabilities():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=30).astype(np.float32) * 2
    n = 40_000
    keys = mx.random.split(mx.random.key(5), n)
    for sampling in (Sampling(), Sampling(temperature=0.7, top_k=12, top_p=0.9), Sampling(min_p=0.1)):
        kept, _ = reference(logits, sampling)
        expected = n * probabilities(np.where(kept, logits.astype(float) / sampling.temperature, -np.inf))
        tokens = np.array(sample_tokens(mx.broadcast_to(mx.array(logits), (n, 30)), keys, sampling))
        found = np.bincount(tokens, minlength=30)
        assert not found[~kept].any()
        chi_square = ((found - expected)[kept] ** 2 / expected[kept]).sum()
        # A chi-square variable with k degrees of freedom exceeds k + 2√(k t) + 2 t with a probability below e^−t
        # (Laurent and Massart 2000, lemma 1); t = 20 makes that 2e-9.
        k, t = kept.sum() - 1, 20
        assert chi_square < k + 2 * math.sqrt(k * t) + 2 * t


def test_impossible_tokens_are_never_drawn():
    logits = np.full((500, 40), -np.inf, np.float32)
    logits[:, [7, 31]] = [-50.0, -60.0]
    tokens = sample_tokens(mx.array(logits), mx.random.split(mx.random.key(0), 500), Sampling(temperature=8.0))
    assert set(np.array(tokens).tolist()) == {7, 31}


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-12, 1e-4])
def test_temperature_zero_takes_the_most_likely_token(temperature):
    logits = mx.random.normal((64, 50), key=mx.random.key(1)) * 100
    tokens = sample_tokens(logits, lane_keys(0, 64), Sampling(temperature=temperature))
    assert tokens.dtype == mx.uint32
    assert np.array_equal(np.array(tokens), np.array(logits).argmax(axis=-1))


def test_at_a_huge_temperature_all_tokens_are_equally_likely():
    tokens = sample_tokens(mx.array([[3.0, -900.0, 88.0]] * 300), lane_keys(0, 300), Sampling(temperature=1e30))
    # 300 draws without one of three: 3 · (2/3)^300 = 4e-53
    assert set(np.array(tokens).tolist()) == {0, 1, 2}


def test_a_lane_depends_only_on_the_seed_and_its_index():
    def stream(keys: mx.array, lane: int) -> list[int]:
        logits = mx.zeros((len(keys), 1000))
        tokens = []
        for time in range(8):
            now = keys_at(keys, mx.array(time, mx.uint32))
            tokens.append(sample_tokens(logits, now, Sampling())[lane].item())
        return tokens

    many = lane_keys(11, 5)
    assert many.shape == (5, 2)
    assert many.dtype == mx.uint32
    assert np.array_equal(np.array(lane_keys(11, 2)), np.array(many)[:2])
    streams = [stream(many, lane) for lane in range(5)]
    assert [stream(many[lane : lane + 1], 0) for lane in range(5)] == streams
    # two streams of 8 draws from 1,000 ids are equal with a probability of 1e-24
    assert len({tuple(tokens) for tokens in (*streams, *[stream(lane_keys(12, 5), lane) for lane in range(5)])}) == 10


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0.25, 0.9, 1.0, 2.5])), min_size=1, max_size=5),
    st.lists(st.floats(0, 60, width=32), min_size=1, max_size=8),
)
def test_a_temperature_schedule_is_interpolated(points, seconds):
    points = sorted(dict(points).items())
    found = Sampling(temperature=points).temperature_at(mx.array(seconds))
    np.testing.assert_allclose(np.array(found), np.interp(seconds, *zip(*points, strict=True)), atol=1e-5)


def test_each_lane_has_the_temperature_at_its_own_time():
    logits = mx.array(np.log([[0.6, 0.3, 0.1]] * 3).astype(np.float32))
    sampling = Sampling(temperature=[[0, 1.0], [10, 2.0]])
    found = np.array(filter_logits(logits, sampling, mx.array([0.0, 5.0, 99.0])))
    for row, temperature in zip(found, (1.0, 1.5, 2.0), strict=True):
        np.testing.assert_allclose(row, np.log([1, 0.5, 1 / 6]) / temperature, rtol=1e-5)


def test_a_schedule_survives_json():
    sampling = Sampling(temperature=[[0, 1], [30, 0.5]], top_p=0.9)
    assert sampling.temperature == ((0.0, 1.0), (30.0, 0.5))
    assert Sampling.from_json(sampling.to_json()) == sampling
    assert hash(sampling) == hash(Sampling(temperature=((0.0, 1.0), (30.0, 0.5)), top_p=0.9))


def test_a_schedule_may_fall_to_zero():
    logits = mx.random.normal((64, 50), key=mx.random.key(1))
    sampling = Sampling(temperature=[[0, 5.0], [10, 0.0]])
    at_last = sample_tokens(logits, lane_keys(0, 64), sampling, mx.full((64,), 10.0))
    assert np.array_equal(np.array(at_last), np.array(logits).argmax(axis=-1))
    at_first = sample_tokens(logits, lane_keys(0, 64), sampling, mx.zeros((64,)))
    assert (np.array(at_first) != np.array(logits).argmax(axis=-1)).sum() > 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: expected 0 or more"),
        ({"temperature": math.inf}, "temperature = inf: expected a finite number"),
        ({"temperature": math.nan}, "temperature = nan: expected a finite number"),
        ({"temperature": "hot"}, "temperature = 'hot': expected float"),
        ({"temperature": []}, "temperature = []: expected a number, or pairs (seconds, temperature) with rising"),
        ({"temperature": [1, 2]}, "temperature = [1, 2]: expected a number, or pairs (seconds, temperature)"),
        ({"temperature": [[0, 1], [0, 2]]}, "temperature = [[0, 1], [0, 2]]: expected a number, or pairs"),
        ({"temperature": [[-1, 1]]}, "temperature = [[-1, 1]]: expected a number, or pairs"),
        ({"temperature": [[0, math.nan]]}, "temperature = [[0, nan]]: expected a number, or pairs"),
        ({"temperature": [[0, 1], [5, -1]]}, "temperature = ((0.0, 1.0), (5.0, -1.0)): expected 0 or more"),
        ({"top_k": -1}, "top_k = -1: expected 0 or more"),
        ({"top_k": 2.5}, "top_k = 2.5: expected int"),
        ({"top_p": 0}, "top_p = 0.0: expected more than 0 and at most 1"),
        ({"top_p": 1.5}, "top_p = 1.5: expected more than 0 and at most 1"),
        ({"top_p": math.nan}, "top_p = nan: expected a finite number"),
        ({"min_p": 1}, "min_p = 1.0: expected at least 0 and below 1"),
        ({"min_p": -0.5}, "min_p = -0.5: expected at least 0 and below 1"),
    ],
)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Sampling(**options)


def test_a_negative_seed_is_refused():
    with pytest.raises(UserError, match="`seed` -1: expected an integer, 0 or more"):
        lane_keys(-1, 1)
