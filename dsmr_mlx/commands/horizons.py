"""`dsmr-mlx horizons`: what a schedule gives each layer."""

import argparse

from dsmr_mlx.commands.common import add_command
from dsmr_mlx.errors import UserError


def add(commands) -> None:
    p = add_command(
        commands,
        "horizons",
        run,
        "show what a horizon schedule gives each layer",
        "dsmr-mlx horizons two-scale:long=2x1024,short=128 --layers 6 --segment 128",
    )
    p.add_argument("spec", metavar="SPEC", help="such as two-scale:long=2x1024,short=128 or uniform:budget=2560")
    p.add_argument("--layers", type=int, required=True, metavar="L", help="of the model")
    p.add_argument("--segment", type=int, default=128, metavar="S", help="tokens in a segment (default 128)")
    p.add_argument("--kv-heads", type=int, default=4, metavar="H", help="key/value heads (default 4)")
    p.add_argument("--head-dim", type=int, default=64, metavar="D", help="default 64")
    p.add_argument("--bytes", type=int, default=2, choices=(1, 2, 4), help="per number (default 2: bf16)")


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx import console, horizons

    for name in ("segment", "kv_heads", "head_dim"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(a, name)}: expected at least 1")
    schedule = horizons.parse(a.spec, a.layers)
    rows = horizons.table(schedule, a.kv_heads, a.head_dim, a.segment, a.bytes)
    console.show_horizons(schedule.describe(a.kv_heads, a.head_dim, a.bytes), rows)
