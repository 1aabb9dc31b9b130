"""Horizon schedules: exact sums, monotone shapes, canonical text, and reach against a simulation."""

import math
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.model import horizon_families
from dsmr_mlx.model.horizons import FAMILIES, HorizonSchedule, LayerRow, parse, resolve, table

# 6-layer examples; each text is already canonical.
EXAMPLES = {
    "two-scale:long=2x1024,short=128": (1024, 1024, 128, 128, 128, 128),
    "two-scale:budget=2560,long=2,ratio=8": (1024, 1024, 128, 128, 128, 128),
    "two-scale:budget=2560,long=2": (1024, 1024, 128, 128, 128, 128),
    "two-scale:budget=2600,long=2,granularity=10": (1040, 1040, 130, 130, 130, 130),
    "two-scale:budget=2688,long=2,ratio=8": (1088, 1088, 128, 128, 128, 128),
    "two-scale:budget=2624,long=2,ratio=8": (1088, 1024, 128, 128, 128, 128),
    "inverse-two-scale:long=2x1024,short=128": (128, 128, 128, 128, 1024, 1024),
    "inverse-two-scale:budget=2624,long=2": (128, 128, 128, 128, 1088, 1024),
    "uniform:512": (512,) * 6,
    "uniform:budget=2560": (448, 448, 448, 448, 384, 384),
    "uniform:budget=2560,granularity=1": (427, 427, 427, 427, 426, 426),
    "full:4096": (4096,) * 6,
    "whole:longest=104064": (104064,) * 6,
    "whole:32768,longest=104064": (32768,) * 6,
    "interleaved:long=1024,every=3,short=128": (1024, 128, 128, 1024, 128, 128),
    "interleaved:budget=2560,every=3": (1024, 128, 128, 1024, 128, 128),
    "binary:long=1024@0+3,short=128": (1024, 128, 128, 1024, 128, 128),
    "binary:budget=2560,long=@1+5,ratio=8": (128, 1024, 128, 128, 128, 1024),
    "linear:budget=2560": (704, 576, 512, 384, 256, 128),
    "linear:budget=2560,reverse": (128, 256, 384, 512, 576, 704),
    "geometric:budget=4032,ratio=0.5": (2048, 1024, 512, 256, 128, 64),
    "geometric:budget=4032,reverse": (64, 128, 256, 512, 1024, 2048),
    "custom:1024,512,256,128,0,7": (1024, 512, 256, 128, 0, 7),
    "none": (0,) * 6,
}

# Spec for 6 layers → part of its error message.
ERRORS = {
    "": "horizons '': unknown family, expected one of two-scale, ",
    "two_scale:long=2x8,short=1": "short=1': unknown family, expected one of two-scale, inverse-two-scale",
    "two-scale:lnog=2x8,short=1": "unknown option 'lnog', two-scale takes budget, long, short, ratio",
    "linear:budget=64,revers": "unknown option 'revers', linear takes budget, granularity, reverse",
    "uniform:horizons=8": "unknown option 'horizons'",
    "none:4": "unknown option '4', none takes nothing",
    "none:": "empty value or option",
    "custom:1,2,,3": "empty value or option",
    "uniform:8,8": "too many positional arguments, uniform takes horizon",
    "two-scale:long=2x8,short=1,short=1": "short is given twice",
    "linear:budget=64,reverse,reverse": "reverse is given twice",
    "two-scale:short=1": "missing a required argument: 'long'",
    "two-scale:long=2x8": "short missing, expected long horizon and short, or a budget",
    "two-scale:long=2,short=1": "long horizon missing",
    "interleaved:long=8,short=1": "missing a required argument: 'every'",
    "uniform": "horizon missing, expected horizon, or a budget",
    "linear": "missing a required argument: 'budget'",
    "full": "missing a required argument: 'cap'",
    "two-scale:budget=64,long=2x8": "long horizon is 8, expected no long horizon with a budget",
    "two-scale:budget=64,long=2,short=8": "short is 8, expected no short with a budget",
    "uniform:8,budget=64": "horizon is 8, expected no horizon with a budget",
    "two-scale:long=2x8,short=1,ratio=8": "ratio is 8, expected no ratio without a budget",
    "uniform:8,granularity=8": "granularity is 8, expected no granularity without a budget",
    "uniform:many": "horizon is 'many', expected an integer",
    "uniform:1.5": "horizon is '1.5', expected an integer",
    "uniform:horizon=": "horizon is '', expected an integer",
    "uniform:8,horizon=8": "too many positional arguments, uniform takes horizon, budget, granularity",
    "linear:budget": "budget is '', expected an integer",
    "geometric:budget=64,ratio=half": "ratio is 'half', expected a number",
    "geometric:budget=64,ratio=nan": "ratio is 'nan', expected a number",
    "geometric:budget=64,ratio=inf": "ratio is 'inf', expected a number",
    "two-scale:long=1024,short=x": "short is 'x', expected an integer",
    "two-scale:long=2x,short=1": "long is '2x', expected COUNTxHORIZON",
    "binary:long=8,short=1": "long is '8', expected HORIZON@LAYER+LAYER",
    "linear:budget=64,reverse=no": "reverse is 'no', expected no value",
    "uniform:-8": "horizon of layer 0 is -8, expected 0 to 16777216",
    "custom:1,2,3,4,5,-6": "horizon of layer 5 is -6, expected 0 to 16777216",
    "two-scale:long=2x8,short=-1": "short is -1 and long 8, expected 0 ≤ short ≤ long",
    "two-scale:long=2x1,short=8": "short is 8 and long 1, expected 0 ≤ short ≤ long",
    "two-scale:long=7x8,short=1": "number of long layers is 7, expected 1 to 6",
    "inverse-two-scale:long=0x8,short=1": "number of long layers is 0, expected 1 to 6",
    "interleaved:long=8,every=7,short=1": "every is 7, expected 1 to 6",
    "binary:long=8@0+6,short=1": "long layer is 6, expected 0 to 5",
    "binary:long=8@-1,short=1": "long layer is -1, expected 0 to 5",
    "binary:long=8@2+2,short=1": "long layers are 2+2, expected each layer once",
    "whole": "the longest piece of a corpus is unknown, expected `data`, the corpus, or longest=TOKENS",
    "whole:4096": "the longest piece of a corpus",
    "custom:1,2,3": "3 horizons found, expected 6",
    "1,2,3": "3 horizons found, expected 6",
    "custom": "0 horizons found, expected 6",
    "linear:budget=-64": "budget is -64, expected 0 or more",
    "linear:budget=100,granularity=64": "budget is 100, expected a multiple of the granularity 64",
    "linear:budget=64,granularity=0": "granularity is 0, expected 1 or more",
    "two-scale:budget=64,long=2,ratio=0.5": "ratio is 0.5, expected 1 or more",
    "geometric:budget=64,ratio=0": "ratio is 0, expected 0 < ratio ≤ 1",
    "geometric:budget=64,ratio=2": "ratio is 2, expected 0 < ratio ≤ 1",
}


@st.composite
def budgeted(draw: st.DrawFn, families: str) -> tuple[str, int, int, int]:
    """(spec, n_layers, budget, granularity), sometimes with the default granularity."""
    n_layers = draw(st.integers(1, 16))
    unit = draw(st.sampled_from([1, 3, 32, 64]))
    budget = unit * draw(st.integers(0, 400))
    granularity = draw(st.sampled_from([unit, None]))
    count = draw(st.integers(1, n_layers))
    placed = draw(st.sets(st.integers(0, n_layers - 1), min_size=1))
    options = {
        "two-scale": f"long={count}",
        "inverse-two-scale": f"long={count}",
        "interleaved": f"every={count}",
        "binary": f"long=@{'+'.join(map(str, placed))}",
    }
    name = draw(st.sampled_from(families.split()))
    texts = [f"budget={budget}", *filter(None, [options.get(name)])]
    if name in options and draw(st.booleans()):
        texts.append(f"ratio={draw(st.floats(1, 100))}")
    if name == "geometric":
        texts.append(f"ratio={draw(st.floats(0.01, 1))}")
    if name in ("linear", "geometric") and draw(st.booleans()):
        texts.append("reverse")
    if granularity is not None:
        texts.append(f"granularity={granularity}")
    spec = f"{name}:{','.join(draw(st.permutations(texts)))}"
    return spec, n_layers, budget, granularity or math.gcd(budget, 64)


@st.composite
def explicit(draw: st.DrawFn) -> tuple[str, int]:
    """(spec, n_layers) with explicit horizons."""
    n_layers = draw(st.integers(1, 16))
    short, long = sorted(draw(st.tuples(st.integers(0, 9999), st.integers(0, 9999))))
    count = draw(st.integers(1, n_layers))
    placed = "+".join(map(str, draw(st.sets(st.integers(0, n_layers - 1), min_size=1))))
    listed = ",".join(map(str, draw(st.lists(st.integers(0, 9999), min_size=n_layers, max_size=n_layers))))
    forms = [
        f"two-scale:long={count}x{long},short={short}",
        f"inverse-two-scale: short = {short}, long = {count}x{long}",
        f"interleaved:long={long},every={count},short={short}",
        f"binary:short={short},long={long}@{placed}",
        f"uniform:{long}",
        f"full:{long}",
        f"custom:{listed}",
        listed,
        "none",
    ]
    return draw(st.sampled_from(forms)), n_layers


BUDGETED = "two-scale inverse-two-scale interleaved binary uniform linear geometric"
schedules = st.one_of(explicit(), budgeted(BUDGETED).map(lambda drawn: drawn[:2])).map(lambda s: parse(*s))


@pytest.mark.parametrize(("spec", "expected"), EXAMPLES.items())
def test_examples(spec: str, expected: tuple[int, ...]) -> None:
    assert parse(spec, 6) == HorizonSchedule(spec.partition(":")[0], expected, spec)


def test_examples_cover_every_family() -> None:
    assert {spec.partition(":")[0] for spec in EXAMPLES} == set(FAMILIES)


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        (" two-scale : short=0128 , long=2x1_024 ", "two-scale:long=2x1024,short=128"),
        ("geometric:reverse,ratio=0.50,budget=64", "geometric:budget=64,ratio=0.5,reverse"),
        ("two-scale:ratio=8.0,long=2,budget=640", "two-scale:budget=640,long=2,ratio=8"),
        ("binary:short=1,long=8@3+0", "binary:long=8@0+3,short=1"),
        ("6, 5,4,3,2,1", "custom:6,5,4,3,2,1"),
        ("custom:horizons=6,5,4,3,2,1", "custom:6,5,4,3,2,1"),
        ("uniform:horizon = 200_000", "uniform:200000"),
        ("full:cap=64", "full:64"),
        ("whole:longest=96,cap=64", "whole:64,longest=96"),
    ],
)
def test_canonical_text(spec: str, canonical: str) -> None:
    assert parse(spec, 6).spec == canonical


@given(schedules)
def test_text_round_trip(schedule: HorizonSchedule) -> None:
    assert parse(schedule.spec, len(schedule.horizons)) == schedule


@given(budgeted(BUDGETED))
def test_budget_is_spent_exactly_in_multiples_of_the_granularity(drawn: tuple[str, int, int, int]) -> None:
    spec, n_layers, budget, granularity = drawn
    schedule = parse(spec, n_layers)
    assert len(schedule.horizons) == n_layers
    assert schedule.budget == budget
    assert all(horizon >= 0 and horizon % granularity == 0 for horizon in schedule.horizons)


@given(budgeted("linear geometric"))
def test_monotone_families_stay_monotone(drawn: tuple[str, int, int, int]) -> None:
    spec, n_layers, _, _ = drawn
    horizons = parse(spec, n_layers).horizons
    assert list(horizons) == sorted(horizons, reverse="reverse" not in spec)


@given(budgeted("two-scale inverse-two-scale interleaved binary"))
def test_two_valued_budget(drawn: tuple[str, int, int, int]) -> None:
    """Short layers are equal; long ones are equal up to one granularity and not shorter than the short ones."""
    spec, n_layers, _, granularity = drawn
    horizons = parse(spec, n_layers).horizons
    options = dict(text.split("=") for text in spec.partition(":")[2].split(","))
    layers = {
        "two-scale": lambda: range(int(options["long"])),
        "inverse-two-scale": lambda: range(n_layers - int(options["long"]), n_layers),
        "interleaved": lambda: range(0, n_layers, int(options["every"])),
        "binary": lambda: [int(layer) for layer in options["long"][1:].split("+")],
    }[spec.partition(":")[0]]()
    long = [horizons[layer] for layer in layers]
    short = {horizon for layer, horizon in enumerate(horizons) if layer not in layers}
    assert max(long) - min(long) <= granularity
    assert len(short) <= 1
    assert min(long) >= max(short, default=0)
    # The short share is the largest one for which long : short is at least the given ratio.
    ratio, spent = Fraction(options.get("ratio", "8")), sum(horizons)
    for horizon in short:
        assert horizon * (len(long) * ratio + n_layers - len(long)) <= spent
        assert (horizon + granularity) * (len(long) * ratio + n_layers - len(long)) > spent


@given(st.integers(0, 200), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_apportion_by_largest_remainder_with_ties_to_the_lower_index(total: int, weights: list[int]) -> None:
    shares = horizon_families._apportion(total, weights)
    quotas = [Fraction(total * weight, sum(weights)) for weight in weights]
    raised = [share > math.floor(quota) for share, quota in zip(shares, quotas, strict=True)]
    assert sum(shares) == total
    assert all(share - math.floor(quota) in (0, 1) for share, quota in zip(shares, quotas, strict=True))
    ranked = sorted((-(quota % 1), layer) for layer, quota in enumerate(quotas))
    assert [raised[layer] for _, layer in ranked] == sorted(raised, reverse=True)


def visible(t: int, horizon: int, segment_length: int) -> range:
    """As `DSMR` defines it: max(0, s − M_l) … t with s = S·⌊t/S⌋."""
    return range(max(0, segment_length * (t // segment_length) - horizon), t + 1)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 5), st.data())
def test_reach_equals_simulation_of_the_visibility_rule(
    horizons: list[int], segment_length: int, data: st.DataObject
) -> None:
    schedule = parse(",".join(map(str, horizons)), len(horizons))
    start = segment_length * (sum(horizons) + len(horizons) + 1)  # no layer reaches the piece's first token
    token = start + data.draw(st.integers(0, segment_length - 1))
    for layer, reach in enumerate(schedule.reach(segment_length)):
        positions = {token}
        for horizon in horizons[layer::-1]:
            positions = {key for t in positions for key in visible(t, horizon, segment_length)}
        assert start - min(positions) == reach


@given(schedules, st.sampled_from([None, 1, 8]), st.sampled_from([1, 2, 4, 8]))
def test_describe_never_fails(schedule: HorizonSchedule, heads: int | None, itemsize: int) -> None:
    text = schedule.describe(heads, 64, itemsize)
    assert text.startswith(f"{schedule.family}: ")
    assert f"budget {schedule.budget} tokens" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("spec", "heads", "itemsize", "expected"),
    [
        (
            "two-scale:long=2x1024,short=128",
            (8, 64),
            2,
            "two-scale: 2 × 1024 + 4 × 128, budget 2560 tokens, 5.0 MiB at bf16, 58 % below full",
        ),
        ("full:4096", (None, None), 2, "full: 6 × 4096, budget 24576 tokens"),
        ("uniform:512", (8, 64), 4, "uniform: 6 × 512, budget 3072 tokens, 12.0 MiB at float32"),
        ("uniform:1", (1, 8), 1, "uniform: 6 × 1, budget 6 tokens, 96 B at int8"),
        ("none", (8, 64), 2, "none: 6 × 0, budget 0 tokens, 0 B at bf16, each segment stands alone"),
    ],
)
def test_describe(spec: str, heads: tuple[int | None, int | None], itemsize: int, expected: str) -> None:
    assert parse(spec, 6).describe(*heads, itemsize) == expected


def test_describe_shortens_long_stacks() -> None:
    alternating = parse("interleaved:long=1024,every=2,short=128", 8)
    assert alternating.describe().startswith("interleaved: 4 × 1024 + 4 × 128, budget 4608 tokens")
    falling = parse("linear:budget=2304", 8)
    assert falling.describe().startswith("linear: 8 layers of 64 to 512, budget 2304 tokens")


def test_state_bytes() -> None:
    schedule = parse("two-scale:long=2x1024,short=128", 6)
    assert schedule.state_bytes(8, 64) == 5 * 2**20
    assert schedule.state_bytes(8, 64, segment_length=512, batch_size=3, itemsize=4) == (
        2 * (2560 + 6 * 512) * 8 * 64 * 4 * 3
    )


def test_table_lists_layers_lowest_first_and_sums_to_the_budget() -> None:
    schedule = parse("two-scale:long=1x20,short=4", 3)
    rows = table(schedule, n_kv_heads=2, head_dim=8, segment_length=16, itemsize=4)
    assert rows == [LayerRow(0, 20, 2560, 20), LayerRow(1, 4, 512, 36), LayerRow(2, 4, 512, 52)]
    assert sum(row.bytes for row in rows) == schedule.state_bytes(2, 8, itemsize=4)


def test_families_as_functions() -> None:
    assert horizon_families.two_scale(3, long=(1, 8), short=2) == (8, 2, 2)
    assert horizon_families.two_scale(3, budget=640, long=horizon_families.Counted(1)) == (512, 64, 64)
    assert horizon_families.custom(2, 5, 3) == (5, 3)
    with pytest.raises(UserError, match="n_layers is 0, expected 1 to 1024"):
        horizon_families.uniform(0, 8)


@pytest.mark.parametrize(("spec", "message"), ERRORS.items())
def test_errors_quote_the_spec(spec: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse(spec, 6)
    assert str(raised.value).startswith(f"horizons {spec!r}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("spec", EXAMPLES)
def test_no_family_accepts_zero_layers(spec: str) -> None:
    with pytest.raises(UserError, match="n_layers is 0, expected 1 to 1024"):
        parse(spec, 0)


@pytest.mark.parametrize(
    ("spec", "resolved"),
    [
        ("whole", "whole:longest=104064"),
        ("whole:4096", "whole:4096,longest=104064"),
        ("whole:longest=512", "whole:longest=512"),
        ("full:4096", "full:4096"),
    ],
)
def test_whole_is_resolved_to_whole_segments(spec: str, resolved: str) -> None:
    assert resolve(spec, 103_985, 128) == resolved


def test_segment_length_below_one() -> None:
    with pytest.raises(UserError, match="segment_length is 0, expected 1 or more"):
        parse("none", 2).reach(0)


def test_imports_neither_mlx_nor_numpy() -> None:
    code = "import sys, dsmr_mlx.model.horizons; print({m.split('.')[0] for m in sys.modules} & {'mlx', 'numpy'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
