"""Numbers, times and sizes as text: in the largest unit, with a sign, and never an exception."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmr_mlx.common.formatting import NARROW_SPACE, SUPERSCRIPTS, format_bytes, format_number, format_time


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (9.996e14, "10¹⁵"),
        (9.994e14, "999 T"),
        (999.5, "1 k"),
        (9.996e-4, "0.001"),
        (-3.2e-5, "−3.2 × 10⁻⁵"),
        (-1e-5, "−10⁻⁵"),
        (-2.5e6, "−2.5 M"),
        (-0.5, "−0.5"),
        (1.7e308, "1.7 × 10³⁰⁸"),
        (1.7976931348623157e308, "1.8 × 10³⁰⁸"),
    ],
)
def test_numbers_at_the_edges_of_a_unit(value, shown):
    assert format_number(value).replace(NARROW_SPACE, " ") == shown


RAISED = "".join(map(chr, SUPERSCRIPTS.values()))
READ_BACK = str.maketrans(RAISED + "−", "-0123456789-")
PREFIXES = {f"{NARROW_SPACE}{prefix}": f"e{power}" for prefix, power in (("k", 3), ("M", 6), ("G", 9), ("T", 12))}


@settings(max_examples=40, deadline=None)
@given(st.floats(-1e300, 1e300) | st.floats(-1e16, 1e16) | st.floats(-2, 2))
def test_numbers_have_three_digits(value):
    """Read back, a number is within half of its third digit."""
    shown = format_number(value)
    assert "-" not in shown
    for prefix, power in PREFIXES.items():
        shown = shown.replace(prefix, power)
    plain = re.sub(f"10(?=[{RAISED}])", "1e", shown).translate(READ_BACK).replace(" × 1e", "e")
    assert float(plain) == pytest.approx(value, rel=0.00501, abs=1e-320)


def test_times_before_the_start():
    shown = [format_time(seconds) for seconds in (-0.4, -0.6, -61, -3661)]
    assert shown == ["0:00", "−0:01", "−1:01", "−1:01:01"]
    assert [format_time(seconds, 1) for seconds in (-0.04, -0.5)] == ["0:00.0", "−0:00.5"]


def test_sizes_at_the_edges_of_a_unit():
    sizes = (0, 1023, 1023.6, 1024, 1048524, 1048525, 1048575, 2**20, 2**30 - 1, 2**30, 2**43, -2048)
    assert [format_bytes(size) for size in sizes] == [
        *("0 B", "1023 B", "1.0 KiB", "1.0 KiB", "1023.9 KiB", "1.0 MiB", "1.0 MiB", "1.0 MiB"),
        *("1.00 GiB", "1.00 GiB", "8192.00 GiB", "−2.0 KiB"),
    ]


@pytest.mark.parametrize("show", [format_number, format_time, format_bytes])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_a_dash(show, value):
    assert show(value) == "–"
