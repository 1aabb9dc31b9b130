"""Overlaps, divergences and densities against values worked out by hand, and sets of known similarity."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.music import random_music

from dsmr_mlx.evaluation.music import distances as C
from dsmr_mlx.evaluation.music.features import DISTRIBUTIONS, FIGURES, features_of

NORMAL = NormalDist()
QUANTILES = np.array([NORMAL.inv_cdf((i + 0.5) / 2000) for i in range(2000)])


def test_overlap_and_divergence_of_histograms_by_hand():
    p, q = np.array([1.0, 1.0, 2.0]), np.array([30.0, 10.0, 0.0])
    assert C.overlap(p, q) == pytest.approx(0.5)
    assert C.overlap(p, 7 * p) == pytest.approx(1.0)
    assert C.overlap(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 0.0
    assert C.divergence(p, 7 * p) == pytest.approx(0.0)
    u = C.UNIFORM_WEIGHT
    a, b = ([(1 - u) * x + u / 3 for x in h] for h in ([0.25, 0.25, 0.5], [0.75, 0.25, 0.0]))
    assert C.divergence(p, q) == pytest.approx(sum(x * math.log(x / y) for x, y in zip(a, b, strict=True)))
    assert np.isnan(C.overlap(p, np.zeros(3)))
    assert np.isnan(C.divergence(np.zeros(3), p))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(0.1, 2))
def test_a_kernel_density_is_a_sum_of_gaussians(samples, bandwidth):
    """The binned density equals the exact one within 0.3 % of a kernel's height, and its area is 1."""
    step = bandwidth / C.STEPS_PER_BANDWIDTH
    low, n = -5 - 6 * bandwidth, int((10 + 12 * bandwidth) / step) + 2
    found = C.kernel_density(np.array(samples), bandwidth, low, step, n)
    grid = low + step * np.arange(n)
    height = 1 / (bandwidth * math.sqrt(2 * math.pi))
    exact = np.mean([height * np.exp(-0.5 * ((grid - s) / bandwidth) ** 2) for s in samples], axis=0)
    np.testing.assert_allclose(found, exact, atol=0.003 * height)
    assert found.sum() * step == pytest.approx(1.0, abs=1e-6)


def test_the_bandwidth_is_scotts():
    assert C.scott(np.array([1.0, 3.0])) == pytest.approx(math.sqrt(2) * 2**-0.2)
    assert C.scott(QUANTILES) == pytest.approx(2000**-0.2, rel=0.01)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 3.0])
def test_overlap_of_two_normal_densities_has_its_closed_form(shift):
    """Samples of N(0, 1) and N(d, 1), smoothed by h, are N(·, 1 + h²): OA = 2 Φ(−d / 2σ), KL = d² / 2σ²."""
    sigma = math.sqrt(1 + C.scott(QUANTILES) ** 2)
    area, divergence = C.density_overlap(QUANTILES, QUANTILES + shift)
    assert area == pytest.approx(2 * NORMAL.cdf(-shift / (2 * sigma)), abs=0.005)
    if shift <= 1:  # further apart the tails dominate, where the uniform distribution matters
        assert divergence == pytest.approx(shift**2 / (2 * sigma**2), rel=0.02, abs=1e-9)


def test_densities_of_equal_samples():
    same = np.full(5, 2.0)
    assert C.density_overlap(same, same) == (1.0, 0.0)
    area, divergence = C.density_overlap(same, same + 1)
    assert area < 1e-6
    assert 5 < divergence < 30
    assert 0 < C.density_overlap(np.zeros(6), np.array([0.0, 0.0, 0.0, 1.0]))[0] < 1


def test_too_few_distances_have_no_density():
    assert all(np.isnan(C.density_overlap(np.array([1.0, 2.0]), QUANTILES)))


def test_distances_are_euclidean():
    rng = np.random.default_rng(0)
    a, b = rng.random((4, 7)), rng.random((3, 7))
    expected = [[math.dist(x, y) for y in b] for x in a]
    np.testing.assert_allclose(C.distances(a, b), expected, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=20), st.integers(1, 12), st.integers(0, 99))
def test_held_out_pieces_share_no_origin_with_the_rest(origins, n, seed):
    """Each side has excerpts of as many works as possible, those held out as evenly as their numbers allow."""
    out, rest = C.hold_out(origins, n, np.random.default_rng(seed))
    works, held, others = (set(of) for of in (origins, [origins[i] for i in out], [origins[i] for i in rest]))
    assert len(held) == min(n, len(works) // 2)
    assert others == works - held
    assert len(set(out)) == len(out) == min(n, sum(origin in held for origin in origins))
    assert len(rest) == sum(origin in others for origin in origins)
    times = {work: sum(origins[i] == work for i in out) for work in held}
    assert all(times[work] >= min(max(times.values()) - 1, origins.count(work)) for work in held)


def set_of(seeds, **options) -> C.FeatureSet:
    """The features of random pieces with these seeds."""
    return C.FeatureSet([features_of(random_music(seed, **options)) for seed in seeds], [str(seed) for seed in seeds])


@pytest.fixture(scope="module")
def reference() -> C.FeatureSet:
    """Thirty random tonal pieces."""
    return set_of(range(30))


def test_a_set_compared_with_itself(reference):
    """All overlaps are 1 and all divergences 0; all features are compared."""
    found = C.compare_sets(reference, reference)
    assert [c.key for c in found] == [*(d.key for d in DISTRIBUTIONS), *FIGURES]
    for c in found:
        if c.key not in FIGURES:
            assert c.overlap == pytest.approx(1.0)
            assert c.kl == pytest.approx(0.0, abs=1e-12)
            assert 0.6 < c.real_overlap < 1
        assert c.generated == pytest.approx(c.reference, nan_ok=True)
        assert 0 <= c.oa <= 1
        assert c.distance_kl >= 0


@pytest.mark.slow
def test_music_of_the_same_kind_is_close_and_noise_is_not(reference):
    """Noise overlaps less in every feature in which it differs."""
    alike = {c.key: c for c in C.compare_sets(set_of(range(100, 130)), reference)}
    noise = {c.key: c for c in C.compare_sets(set_of(range(100, 130), tonal=False), reference)}
    for key in ("pitch", "interval", "ioi", "duration", "velocity", "polyphony", "density"):
        assert alike[key].overlap > 0.8
        assert alike[key].oa > 0.75
        assert noise[key].overlap < alike[key].overlap - 0.1
        assert noise[key].kl > alike[key].kl
    for key in ("pitch_range", "leap", "loudness_spread", "key_clarity", "similarity_near", "longest_note"):
        assert noise[key].oa < 0.6 < alike[key].oa
        assert noise[key].distance_kl > alike[key].distance_kl
    assert np.isnan(alike["leap"].overlap)


def test_comparing_is_deterministic(reference):
    few = set_of(range(200, 205))
    first, second = (C.compare_sets(few, reference, seed=3) for _ in range(2))
    assert all(str(a) == str(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_sets_have_fewer_figures(n, reference):
    """One file has overlaps and distances to the reference; a reference of one or two pieces has no OA."""
    found = {c.key: c for c in C.compare_sets(set_of(range(50, 50 + n)), reference)}
    assert all(np.isfinite([found["velocity"].overlap, found["velocity"].oa, found["velocity"].real_oa]))
    small = {c.key: c for c in C.compare_sets(reference, set_of(range(n)))}
    assert np.isfinite(small["velocity"].overlap)
    assert np.isnan(small["velocity"].oa) == (n < 3)
    assert np.isnan(small["velocity"].real_oa)
