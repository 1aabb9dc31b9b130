"""The curves of a report: thinned and smoothed lines, ticks and numbers."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from support.svg import tick_labels

from dsmr_mlx.common.formatting import format_number
from dsmr_mlx.training.report_curves import MAX_POINTS, Line, line_chart, smoothed, thinned


@pytest.mark.parametrize("n", [1, 2, 599, 600, 601, 5000])
def test_thinned_lines_keep_ends_and_extremes(n):
    rng = np.random.default_rng(n)
    x, y = np.sort(rng.random(n)), rng.normal(size=n)
    kept = thinned(x, y)
    assert len(kept) <= MAX_POINTS
    assert (kept[0], kept[-1]) == (0, n - 1)
    assert (y[kept].min(), y[kept].max()) == (y.min(), y.max())
    assert (np.diff(kept) > 0).all()
    if n <= MAX_POINTS:
        np.testing.assert_array_equal(kept, np.arange(n))


def test_points_with_equal_x_are_thinned_too():
    assert len(thinned(np.ones(5000), np.arange(5000.0))) <= MAX_POINTS


@pytest.mark.parametrize("reach", [0, 1, 5])
def test_smoothing_is_a_mean_over_neighbours(reach):
    y = np.random.default_rng(reach).normal(size=37)
    reaches = [min(i // 4, reach) for i in range(len(y))]
    expected = [np.mean(y[i - r : i + r + 1]) for i, r in enumerate(reaches)]
    np.testing.assert_allclose(smoothed(y, reach), expected, atol=1e-12)
    assert smoothed(y, reach)[-1] == pytest.approx(y[-reach - 1 :].mean())


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        *((0, 1, False), (1.7, 7.1, False), (-3, 400, False), (0, 1e12, False), (2.0, 2.0001, False)),
        *((1e-3, 1e3, True), (1.9, 2.3, True), (1, 1e90, True), (4, 50, True)),
    ],
)
def test_ticks_are_few_and_distinct(low, high, log):
    line = Line("a", "train", np.arange(1.0, 3.0), np.array([low, high], float))
    svg = ET.fromstring(line_chart([line], "x", "y", "title", log=("y",) if log else ()))
    labels = [label for label in tick_labels(svg, "end") if label != "x"]
    assert 2 <= len(labels) <= 8
    assert len(set(labels)) == len(labels)
    assert all(len(label) <= 8 for label in labels)


def test_ticks_are_round():
    def labels(high: float) -> str:
        line = Line("a", "train", np.array([1.0, high]), np.array([1.0, 2.0]))
        svg = ET.fromstring(line_chart([line], "x", "y", "title"))
        return " ".join(label.replace("\u202f", "") for label in tick_labels(svg, "middle"))

    assert labels(2.38e6) == "0 500k 1M 1.5M 2M"
    assert labels(13_900) == "0 2.5k 5k 7.5k 10k 12.5k"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((0, "0"), (912.4, "912"), (999.6, "1 k"), (2.5e6, "2.5 M"), (4.1e8, "410 M"), (0.018, "0.018")),
        *((2e-5, "2 × 10⁻⁵"), (1e-4, "10⁻⁴"), (3.217e20, "3.22 × 10²⁰"), (-4200, "−4.2 k"), (float("nan"), "–")),
    ],
)
def test_numbers_have_three_digits_and_a_prefix(value, shown):
    assert format_number(value).replace("\u202f", " ") == shown
