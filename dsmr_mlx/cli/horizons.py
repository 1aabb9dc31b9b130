"""`dsmr-mlx horizons`: show the horizon, bytes and reach of each layer under a schedule."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsmr_mlx.cli.common import add_command, check_positive
from dsmr_mlx.cli.console import out, table

if TYPE_CHECKING:
    from dsmr_mlx.model.horizons import LayerRow


def add(commands) -> None:
    """Add the parser of the command."""
    p = add_command(
        commands,
        "horizons",
        run,
        "dsmr-mlx horizons two-scale:long=2x1024,short=128 --layers 6 --segment 128",
    )
    p.add_argument("spec", metavar="SPEC", help="such as two-scale:long=2x1024,short=128 or uniform:budget=2560")
    p.add_argument("--data", metavar="CORPUS", help="a corpus: `whole` is the length of its longest piece")
    p.add_argument("--layers", type=int, required=True, metavar="L", help="number of layers")
    p.add_argument("--segment", type=int, default=128, metavar="S", help="tokens per segment (default 128)")
    p.add_argument("--kv-heads", type=int, default=4, metavar="H", help="key/value heads (default 4)")
    p.add_argument("--head-dim", type=int, default=64, metavar="D", help="size of a head (default 64)")
    p.add_argument("--canon", type=int, metavar="D_MODEL", help="width of the model if it has Canon layers")
    p.add_argument("--bytes", type=int, default=2, choices=(1, 2, 4), help="bytes per number (default 2: bf16)")


def run(a: argparse.Namespace) -> None:
    """Show a schedule."""
    from dsmr_mlx.data.corpus import Corpus
    from dsmr_mlx.model import horizons

    check_positive(a, "segment", "kv_heads", "head_dim", "canon")
    canon_size = 2 * a.canon if a.canon else 0
    spec = a.spec
    if a.data is not None:
        spec = horizons.resolve(spec, max(piece.length for piece in Corpus.load(a.data).pieces()), a.segment)
    schedule = horizons.parse(spec, a.layers)
    rows = horizons.table(schedule, a.kv_heads, a.head_dim, a.segment, a.bytes, canon_size)
    show_horizons(schedule.describe(a.kv_heads, a.head_dim, a.bytes, canon_size), rows)


def show_horizons(description: str, rows: "Sequence[LayerRow]") -> None:
    """Show a row with a bar for each layer, the top layer first."""
    out.print(description)
    result = table("layer", "horizon", "bytes", "reach", "")
    result.columns[-1].justify = "left"
    longest = max((row.horizon for row in rows), default=0)
    for row in reversed(rows):
        bar = "█" * round(40 * row.horizon / longest) if longest else ""
        result.add_row(str(row.layer), f"{row.horizon:,}", f"{row.bytes:,}", f"{row.reach:,}", bar or "·")
    out.print(result)
    out.print("reach: how many tokens before the current segment can influence the stack up to this layer")
