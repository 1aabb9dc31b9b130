"""What a horizon schedule gives each layer."""

from collections.abc import Sequence
from typing import Any

from dsmr_mlx.console.base import out, table


def show_horizons(description: str, rows: Sequence[Any]) -> None:
    out.print(description)
    result = table("layer", "horizon", "bytes", "reach", "")
    result.columns[-1].justify = "left"
    longest = max((row.horizon for row in rows), default=0)
    for row in reversed(rows):
        bar = "█" * round(40 * row.horizon / longest) if longest else ""
        result.add_row(str(row.layer), f"{row.horizon:,}", f"{row.bytes:,}", f"{row.reach:,}", bar or "·")
    out.print(result)
    out.print("reach: how many tokens before the current segment the stack up to this layer can have heard of")
