"""`dsmr-mlx horizons`: what a schedule gives each layer."""

import argparse
from collections.abc import Sequence
from typing import Any

from dsmr_mlx.cli.common import add_command
from dsmr_mlx.cli.console import out, table
from dsmr_mlx.common.errors import UserError


def add(commands) -> None:
    p = add_command(
        commands,
        "horizons",
        run,
        "dsmr-mlx horizons two-scale:long=2x1024,short=128 --layers 6 --segment 128",
    )
    p.add_argument("spec", metavar="SPEC", help="such as two-scale:long=2x1024,short=128 or uniform:budget=2560")
    p.add_argument("--layers", type=int, required=True, metavar="L", help="of the model")
    p.add_argument("--segment", type=int, default=128, metavar="S", help="tokens in a segment (default 128)")
    p.add_argument("--kv-heads", type=int, default=4, metavar="H", help="key/value heads (default 4)")
    p.add_argument("--head-dim", type=int, default=64, metavar="D", help="default 64")
    p.add_argument("--bytes", type=int, default=2, choices=(1, 2, 4), help="per number (default 2: bf16)")


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx.model import horizons

    for name in ("segment", "kv_heads", "head_dim"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(a, name)}: expected at least 1")
    schedule = horizons.parse(a.spec, a.layers)
    rows = horizons.table(schedule, a.kv_heads, a.head_dim, a.segment, a.bytes)
    show_horizons(schedule.describe(a.kv_heads, a.head_dim, a.bytes), rows)


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
