"""Match key strikes with releases."""

from typing import NamedTuple

import numpy as np


class Matching(NamedTuple):
    """Indices into the messages: strikes with their releases, strikes without one, releases without a strike."""

    strikes: np.ndarray
    releases: np.ndarray
    open_strikes: np.ndarray
    stray_releases: np.ndarray


def match_keys(key: np.ndarray, is_strike: np.ndarray) -> Matching:
    """Match the strikes and releases of each key, in order of time.

    key: `(N,)` integers; is_strike: `(N,)` bool, False for releases.

    Matching them like brackets shows which strikes have no release: the key was struck again before. The others are
    matched first in, first out, so that of two voices on one key the one that began first ends first.
    """
    order = np.argsort(key, kind="stable")
    strike, key = is_strike[order], key[order]
    n, none = len(order), order[:0]
    if strike[::2].all() and not strike[1::2].any() and np.array_equal(key[::2], key[1::2]):  # nearly all files
        return Matching(order[::2], order[1::2], none, none)
    height = np.cumsum(np.where(strike, 1, -1))
    begins = np.append(True, key[1:] != key[:-1])[:n]
    group = np.cumsum(begins) - 1
    first = np.flatnonzero(begins)
    height -= np.append(0, height[first[1:] - 1])[group] if n else 0  # counted for each key separately
    apart = 2 * n + 2  # keeps the minima of one key from those of another
    lowest_before = np.append(0, np.minimum.accumulate(height - apart * group))[:n]
    stray = ~strike & (height - apart * group < np.minimum(lowest_before, -apart * group))
    lowest_after = np.minimum.accumulate((height + apart * group)[::-1])[::-1]
    is_open = strike & (height + apart * group <= lowest_after)
    return Matching(order[strike & ~is_open], order[~strike & ~stray], order[strike & is_open], order[~strike & stray])
