"""Constraints that are heard together leave what they would leave one after the other."""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmr_mlx.generation.verdicts import MAX_VERDICTS, MAX_WAIT, Verdict, judged, rows_of

B, V = 3, 9


def one_by_one(logits: np.ndarray, verdicts: list[Verdict]) -> np.ndarray:
    """The logits `(V,)` of one lane after each verdict in turn; a verdict that leaves nothing is skipped."""
    for fits, first, gain, pause, waits in verdicts:
        possible = left = logits > -np.inf
        for wanted in (first, fits):
            if wanted is not None and (left & wanted).any():
                left = left & wanted
        logits = logits if gain is None else logits + np.where(fits, gain, 0)
        after = np.where(left, logits, -np.inf)
        if pause is not None:
            lost, pauses = possible & ~left & (waits > 0), left & pause & (waits > 0)
            longest = pauses & (waits == waits[pauses].max(initial=0))
            if lost.any() and longest.any():
                share = np.logaddexp.reduce(logits[lost]) - np.log(longest.sum())
                after[longest] = np.logaddexp(after[longest], share)
        logits = after
    return logits


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(0, MAX_VERDICTS + 3), strict=st.floats(0.1, 0.9))
def test_verdicts_together_equal_verdicts_one_by_one(seed, n, strict):
    """Also more than fit at once, longer pauses than can be told apart, and bars after their end."""
    rng = np.random.default_rng(seed)
    logits = np.where(rng.random((B, V)) < 0.8, rng.normal(0, 3, (B, V)), -np.inf)
    logits[:, 0] = 0.0  # every lane has a token
    waits = rng.choice([-40, 0, 1, 2, 2, 3, 500, MAX_WAIT], (B, V))
    pause = (rng.random((B, V)) < 0.7) & (waits != 0)
    drawn = []
    for _ in range(n):
        fits, first = rng.random((B, V)) > strict, rng.random((B, V)) > 0.9
        gain = rng.random((B, V)) if rng.random() < 0.3 else None
        time = (pause, waits) if rng.random() < 0.6 else (None, None)
        drawn.append(Verdict(fits, first if rng.random() < 0.4 else None, gain, *time))
    as_arrays = [Verdict(*(None if a is None else mx.array(a) for a in verdict)) for verdict in drawn]
    found = np.array(judged(mx.array(logits.astype(np.float32)), as_arrays))
    for lane in range(B):
        of_lane = [Verdict(*(None if a is None else a[lane] for a in verdict)) for verdict in drawn]
        expected = one_by_one(logits[lane].astype(np.float64), of_lane)
        np.testing.assert_array_equal(found[lane] > -np.inf, expected > -np.inf)
        np.testing.assert_allclose(found[lane], expected, atol=1e-4)


def test_arrays_as_rows():
    arrays = [mx.random.normal((2, 5)) for _ in range(4)]
    np.testing.assert_array_equal(rows_of(*arrays), mx.stack(arrays))
