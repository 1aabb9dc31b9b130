"""What the memory of a model is worth: its loss when its layers carry less of the past than they could.

The weights stay as they are, and every horizon M_l is capped to min(M_l, c): at each segment boundary the state is
truncated to its newest c tokens. With c = 0 every segment stands alone, with the longest horizon the model is itself.
Layers above the lowest carry keys that were computed under the same cap. All differences are paired, piece by piece.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.evaluation.estimates import Estimate, estimate
from dsmr_mlx.evaluation.losses import POSITION_EDGES, check_vocabulary, piece_losses, sample_pieces
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR

CURVE_TOKENS = 100_000  # of the pieces that a curve is measured on, unless told otherwise
SHORTEST_CAP, CAP_RATIO = 64, 4
MOST_GROUPS = 4

Horizons = tuple[int, ...]


@dataclass(frozen=True)
class PositionGain:
    """The predictions made after [start, end) tokens of a piece; end None: no limit. Else as in `Point`.

    step is None, too, where all that comes before was visible already.
    """

    start: int
    end: int | None
    tokens: int
    nats_per_token: float
    gain: Estimate
    step: Estimate | None


@dataclass(frozen=True)
class Point:
    """Predictions where layers carry at most `visible` tokens from before the segment.

    gain: how much lower the loss is than with none. step: how much lower than at the point before; None for the first.
    cost: how much higher than that of the model as it is.
    """

    visible: int
    nats_per_token: float
    gain: Estimate
    step: Estimate | None
    cost: Estimate
    by_position: list[PositionGain]


@dataclass(frozen=True)
class Curve:
    """Loss against visible history; the last point is the model as it is. Only `layers` are capped."""

    label: str
    layers: list[int]
    points: list[Point]


@dataclass(frozen=True)
class ContextCurves:
    """One curve for all layers together, then one for each group of layers alone, of the same `pieces`."""

    pieces: int
    tokens: int
    segment_length: int
    horizons: list[int]
    curves: list[Curve]

    def to_dict(self) -> dict[str, Any]:
        """JSON values but for NaN, an error over fewer than two pieces."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """A curve to be measured: the horizons of each of its points, and what is visible in them."""

    label: str
    layers: list[int]
    caps: list[int]
    horizons: list[Horizons]


def with_horizons(model: DSMR, horizons: Sequence[int]) -> DSMR:
    """The same model with other horizons M_l. The weights are shared, not copied; the given model does not change.

    Raises `UserError` for horizons that do not fit its layers.
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


def plan_curves(config: ModelConfig) -> list[Plan]:
    """All layers together, then each of the `layer_groups`, the others being as they are."""
    horizons = config.horizons
    groups = [("all layers", list(range(config.n_layers)))]
    groups += [(label(layers, horizons), layers) for layers in layer_groups(horizons)]
    plans = []
    for name, layers in groups:
        caps = history_caps(max(horizons[layer] for layer in layers))
        capped = [
            tuple(min(horizon, cap) if layer in layers else horizon for layer, horizon in enumerate(horizons))
            for cap in caps
        ]
        plans.append(Plan(name, layers, caps, capped))
    return plans


def history_caps(longest: int) -> list[int]:
    """0, 64, 256, 1,024, … and the longest horizon itself."""
    caps, cap = [0], SHORTEST_CAP
    while cap < longest:
        caps.append(cap)
        cap *= CAP_RATIO
    return [*caps, longest] if longest else caps


def layer_groups(horizons: Sequence[int]) -> list[list[int]]:
    """Layers of one horizon, longest first; of more than `MOST_GROUPS` horizons neighbours go together.

    If all are equal, the lower half and the upper half. Layers without memory are in no group.
    """
    carrying = [layer for layer, horizon in enumerate(horizons) if horizon]
    distinct = sorted({horizons[layer] for layer in carrying}, reverse=True)
    if len(distinct) == 1:
        half = (len(carrying) + 1) // 2
        return [carrying[:half], carrying[half:]] if len(carrying) > 1 else []
    parts = np.array_split(distinct, min(MOST_GROUPS, len(distinct))) if distinct else []
    return [[layer for layer in carrying if horizons[layer] in part] for part in parts]


def label(layers: Sequence[int], horizons: Sequence[int]) -> str:
    """`layers 0–1 (1,024)`: the layers of a group and their horizons."""
    found = [horizons[layer] for layer in layers]
    low, high = min(found), max(found)
    reach = f"{high:,}" if low == high else f"{low:,}–{high:,}"
    return f"{layer_names(layers)} ({reach})"


def layer_names(layers: Sequence[int]) -> str:
    """`layer 3`, `layers 0–1` or `layers 0–2, 5`, of rising numbers."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    named = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
    return f"layer{'s' * (len(layers) > 1)} {named}"


def evaluations_of(plans: Sequence[Plan]) -> list[Horizons]:
    """The different horizons to be measured, each once, those of the model itself first."""
    return list(dict.fromkeys(horizons for plan in plans for horizons in reversed(plan.horizons)))


def context_curves(
    model: DSMR,
    corpus: Corpus,
    split: str = "validation",
    *,
    batch_size: int = 8,
    max_tokens: int | None = CURVE_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> ContextCurves:
    """Loss against visible history on a fixed sample of pieces of about `max_tokens`; None: all of the split.

    One evaluation of the sample for each of `evaluations_of(plan_curves(model.config))`. `progress(done, total)` is
    called with numbers of tokens. Raises `UserError` as `losses.evaluate` does.
    """
    check_vocabulary(model, corpus)
    pieces = sample_pieces(corpus.pieces(split), max_tokens)
    ids = [corpus.tokens(piece) for piece in pieces]
    plans = plan_curves(model.config)
    evaluations = evaluations_of(plans)
    tokens, sums = sum(len(piece) - 1 for piece in ids), {}
    for i, horizons in enumerate(evaluations):

        def step(done: int, total: int, before: int = i * tokens) -> None:
            if progress:
                progress(before + done, len(evaluations) * tokens)

        losses = piece_losses(with_horizons(model, horizons), ids, batch_size, step)
        sums[horizons], counts = sums_by_position(losses)
    curves = [curve(plan, [sums[horizons] for horizons in plan.horizons], counts) for plan in plans]
    return ContextCurves(len(pieces), tokens, model.config.segment_length, list(model.config.horizons), curves)


def sums_by_position(losses: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of losses and numbers of tokens of each piece, `[P, 1 + R]` float64 and int64: in the first column of the
    whole piece, in the others of the R ranges of `POSITION_EDGES`.
    """
    ranges = [slice(None), *map(slice, POSITION_EDGES, (*POSITION_EDGES[1:], None))]
    sums = np.array([[nats[part].sum(dtype=np.float64) for part in ranges] for nats in losses])
    return sums, np.array([[len(nats[part]) for part in ranges] for nats in losses])


def curve(plan: Plan, sums: Sequence[np.ndarray], counts: np.ndarray) -> Curve:
    """The points of a curve from the sums and counts `[P, 1 + R]` of `sums_by_position`, sums at each cap."""
    points = []
    for i, (cap, now) in enumerate(zip(plan.caps, sums, strict=True)):
        points.append(
            Point(
                visible=cap,
                nats_per_token=estimate(now[:, 0], counts[:, 0]).nats,
                gain=estimate((sums[0] - now)[:, 0], counts[:, 0]),
                step=estimate((sums[i - 1] - now)[:, 0], counts[:, 0]) if i else None,
                cost=estimate((now - sums[-1])[:, 0], counts[:, 0]),
                by_position=gains_by_position(plan, i, sums, counts),
            )
        )
    return Curve(plan.label, plan.layers, points)


def gains_by_position(plan: Plan, i: int, sums: Sequence[np.ndarray], counts: np.ndarray) -> list[PositionGain]:
    """Point i of a curve for each range of positions that has tokens; arrays as in `curve`."""
    rows = []
    for column, (start, end) in enumerate(zip(POSITION_EDGES, (*POSITION_EDGES[1:], None), strict=True), 1):
        tokens = counts[:, column]
        if not tokens.any():
            continue
        more_to_see = i and (end is None or end > plan.caps[i - 1])
        rows.append(
            PositionGain(
                start,
                end,
                tokens=int(tokens.sum()),
                nats_per_token=estimate(sums[i][:, column], tokens).nats,
                gain=estimate((sums[0] - sums[i])[:, column], tokens),
                step=estimate((sums[i - 1] - sums[i])[:, column], tokens) if more_to_see else None,
            )
        )
    return rows
