"""The value of a model's memory: its loss when layers carry less of the past than their horizons allow.

The weights stay the same, and every horizon M_l is capped to min(M_l, c): at each segment boundary the state is
truncated to its newest c tokens. With c = 0 segments are independent, with the longest horizon the model is unchanged.
Canon layers keep the inputs of the 3 tokens before the segment under every cap.
Layers above the lowest carry keys that were computed under the same cap. All differences are paired, piece by piece.
"""

import copy
import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.evaluation.estimates import Estimate, Result, estimate, sums_within
from dsmr_mlx.evaluation.losses import (
    POSITION_RANGES,
    Progress,
    check_vocabulary,
    offset_progress,
    piece_losses,
    sample_pieces,
)
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR

CURVE_TOKENS = 100_000  # default size of the sample of pieces
MIN_CAP, CAP_RATIO = 64, 4  # caps are 0, 64, 256, …
MAX_GROUPS = 4  # of layers, each with a curve

Horizons = tuple[int, ...]


@dataclass(frozen=True)
class PositionGain:
    """The predictions made after [start, end) tokens of a piece; `end` None: no limit. Other fields as in `Point`.

    step: None also if the point before already saw the whole past.
    """

    start: int
    end: int | None
    tokens: int
    nats_per_token: float
    gain: Estimate
    step: Estimate | None


@dataclass(frozen=True)
class Point:
    """The predictions if layers carry at most `visible` tokens from before the segment.

    gain: reduction of the loss from no visible tokens; step: reduction from the point before, None for the first point;
    cost: increase of the loss over the unchanged model.
    """

    visible: int
    nats_per_token: float
    gain: Estimate
    step: Estimate | None
    cost: Estimate
    by_position: list[PositionGain]


@dataclass(frozen=True)
class Curve:
    """Loss against visible history with `layers` capped; the last point is the unchanged model."""

    label: str
    layers: list[int]
    points: list[Point]


@dataclass(frozen=True)
class ContextCurves(Result):
    """One curve for all layers together, then one for each group of layers, all on the same pieces."""

    pieces: int
    tokens: int
    segment_length: int
    horizons: list[int]
    curves: list[Curve]


@dataclass(frozen=True)
class CurvePlan:
    """A curve to compute: the cap and the resulting horizons of each point."""

    label: str
    layers: list[int]
    caps: list[int]
    horizons: list[Horizons]


def with_horizons(model: DSMR, horizons: Sequence[int]) -> DSMR:
    """Return the model with other horizons M_l. The weights are shared, not copied; `model` does not change.

    Raises `UserError` if the horizons do not fit its layers.
    """
    other = copy.copy(model)
    other.config = dataclasses.replace(model.config, horizons=list(horizons))
    other.layers = []
    for block, horizon in zip(model.layers, other.config.horizons, strict=True):
        block = copy.copy(block)
        block.attention = copy.copy(block.attention)
        block.attention.config, block.attention.horizon = other.config, horizon
        other.layers.append(block)
    return other


def plan_curves(config: ModelConfig) -> list[CurvePlan]:
    """Plan a curve for all layers together, then one for each of the `layer_groups`, other layers unchanged."""
    horizons = config.horizons
    groups = [("all layers", list(range(config.n_layers)))]
    groups += [(group_label(layers, horizons), layers) for layers in layer_groups(horizons)]
    plans = []
    for name, layers in groups:
        caps = history_caps(max(horizons[layer] for layer in layers))
        capped = [
            tuple(min(horizon, cap) if layer in layers else horizon for layer, horizon in enumerate(horizons))
            for cap in caps
        ]
        plans.append(CurvePlan(name, layers, caps, capped))
    return plans


def history_caps(max_horizon: int) -> list[int]:
    """Return the caps 0, 64, 256, 1,024, … below `max_horizon`, and `max_horizon`."""
    caps, cap = [0], MIN_CAP
    while cap < max_horizon:
        caps.append(cap)
        cap *= CAP_RATIO
    return [*caps, max_horizon] if max_horizon else caps


def layer_groups(horizons: Sequence[int]) -> list[list[int]]:
    """Group layers by horizon, longest first, and merge neighbouring horizons into at most `MAX_GROUPS` groups.

    If all horizons are equal, the groups are the lower and the upper half. Layers without memory are in no group.
    """
    carrying = [layer for layer, horizon in enumerate(horizons) if horizon]
    distinct = sorted({horizons[layer] for layer in carrying}, reverse=True)
    if len(distinct) == 1:
        half = (len(carrying) + 1) // 2
        return [carrying[:half], carrying[half:]] if len(carrying) > 1 else []
    parts = np.array_split(distinct, min(MAX_GROUPS, len(distinct))) if distinct else []
    return [[layer for layer in carrying if horizons[layer] in part] for part in parts]


def group_label(layers: Sequence[int], horizons: Sequence[int]) -> str:
    """Return the label of a group of layers with their horizons, such as `layers 0–1 (1,024)`."""
    found = [horizons[layer] for layer in layers]
    low, high = min(found), max(found)
    reach = f"{high:,}" if low == high else f"{low:,}–{high:,}"
    return f"{layer_names(layers)} ({reach})"


def layer_names(layers: Sequence[int]) -> str:
    """Name layers given in ascending order, such as `layer 3`, `layers 0–1` or `layers 0–2, 5`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    ranges = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
    return f"layer{'s' * (len(layers) > 1)} {ranges}"


def distinct_horizons(plans: Sequence[CurvePlan]) -> list[Horizons]:
    """Return the distinct horizons to evaluate, those of the unchanged model first."""
    return list(dict.fromkeys(horizons for plan in plans for horizons in reversed(plan.horizons)))


def context_curves(
    model: DSMR,
    corpus: Corpus,
    split: str = "validation",
    *,
    batch_size: int = 8,
    max_tokens: int | None = CURVE_TOKENS,
    progress: Progress | None = None,
) -> ContextCurves:
    """Return loss against visible history on a fixed sample of about `max_tokens` tokens; None: the whole split.

    The sample is evaluated once for each of `distinct_horizons(plan_curves(model.config))`. `progress(done, total)`
    counts tokens. Raises `UserError` as `losses.evaluate` does.
    """
    check_vocabulary(model, corpus)
    pieces = sample_pieces(corpus.pieces(split), max_tokens)
    ids = [corpus.tokens(piece) for piece in pieces]
    plans = plan_curves(model.config)
    evaluations = distinct_horizons(plans)
    tokens, sums = sum(len(piece) - 1 for piece in ids), {}
    for i, horizons in enumerate(evaluations):
        update = offset_progress(progress, i * tokens, len(evaluations) * tokens)
        losses = piece_losses(with_horizons(model, horizons), ids, batch_size, update)
        sums[horizons], counts = sums_by_position(losses)
    works = [piece.work for piece in pieces]
    curves = [curve(plan, [sums[horizons] for horizons in plan.horizons], counts, works) for plan in plans]
    return ContextCurves(len(pieces), tokens, model.config.segment_length, list(model.config.horizons), curves)


def sums_by_position(losses: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of losses `(P, 1 + R)` float64 and the numbers of tokens `(P, 1 + R)` int64 of P pieces.

    Column 0 is the whole piece, the others are the R `POSITION_RANGES`.
    """
    columns = [sums_within(losses, *limits) for limits in ((0, None), *POSITION_RANGES)]
    sums, counts = (np.stack(part, axis=1) for part in zip(*columns, strict=True))
    return sums, counts


def curve(plan: CurvePlan, sums: Sequence[np.ndarray], counts: np.ndarray, works: Sequence[Hashable]) -> Curve:
    """Return a curve from the sums `(P, 1 + R)` for each cap and the counts `(P, 1 + R)`, see `sums_by_position`.

    works: of the P pieces
    """
    points = [
        Point(
            visible=cap,
            nats_per_token=estimate(now[:, 0], counts[:, 0], works).nats,
            gain=estimate((sums[0] - now)[:, 0], counts[:, 0], works),
            step=estimate((sums[i - 1] - now)[:, 0], counts[:, 0], works) if i else None,
            cost=estimate((now - sums[-1])[:, 0], counts[:, 0], works),
            by_position=gains_by_position(plan, i, sums, counts, works),
        )
        for i, (cap, now) in enumerate(zip(plan.caps, sums, strict=True))
    ]
    return Curve(plan.label, plan.layers, points)


def gains_by_position(
    plan: CurvePlan, i: int, sums: Sequence[np.ndarray], counts: np.ndarray, works: Sequence[Hashable]
) -> list[PositionGain]:
    """Return point i of a curve for each range of positions that has tokens; arrays as in `curve`."""
    rows = []
    for column, (start, end) in enumerate(POSITION_RANGES, 1):
        tokens = counts[:, column]
        if not tokens.any():
            continue
        sees_more = i and (end is None or end > plan.caps[i - 1])
        rows.append(
            PositionGain(
                start,
                end,
                tokens=int(tokens.sum()),
                nats_per_token=estimate(sums[i][:, column], tokens, works).nats,
                gain=estimate((sums[0] - sums[i])[:, column], tokens, works),
                step=estimate((sums[i - 1] - sums[i])[:, column], tokens, works) if sees_more else None,
            )
        )
    return rows
