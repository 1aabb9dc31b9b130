"""Conversion of foreign checkpoints."""

from typing import Any

from dsmr_mlx.console.base import err, out, table
from dsmr_mlx.horizons import parse


def show_conversion(conversion: Any) -> None:
    """What a source is taken for, before it is converted."""
    c = conversion.config
    for note in conversion.notes:
        err.print(f"note: {note}")
    out.print(f"{conversion.source.path}: {conversion.family.name} ({conversion.family.about})")
    heads = f"{c.n_heads} heads of {c.head_dim}" + (f", {c.n_kv_heads} for keys" if c.n_kv_heads != c.n_heads else "")
    out.print(f"model: {c.n_layers} layers, d_model {c.d_model}, {heads}, vocabulary of {c.vocab_size:,}")
    horizons = parse(f"custom:{','.join(map(str, c.horizons))}", c.n_layers).describe(c.n_kv_heads, c.head_dim, 4)
    out.print(f"memory: {horizons}, segment {c.segment_length}")
    out.print(exactness(conversion.exactness, c.max_positions))


def exactness(e: Any, positions: int | None) -> str:
    """In words how far a converted model computes what the original does; `positions` are those that it has learned."""
    end = f"; a stream ends at {positions:,} tokens, where its table of positions does" if positions else ""
    if e.tokens is None:
        return f"exact: the horizons are the original's{end}"
    if not e.warm_start:
        return f"exact up to {e.tokens:,} tokens{end or '; beyond them it remembers what its horizons say'}"
    knows = f"the original knows {e.context:,}" if e.context else "the original's context is not known"
    if e.recurrent and e.context is None:
        knows = "the original reads any number with its own horizons"
    return f"a warm start: exact up to {e.tokens:,} tokens only, {knows}; train --init fine-tunes it{end}"


def show_verification(verification: Any, compared: str) -> None:
    """Differences of a converted model from its original; `compared` says which of its weights they are of."""
    rows = table("", "max absolute", "max relative")
    for what, absolute, relative in verification.rows:
        rows.add_row(what, f"{absolute:.2e}", f"{relative:.2e}")
    out.print(rows)
    verdict = "equal" if verification.passed else "NOT equal"
    tokens = " x ".join(map(str, verification.tokens))
    out.print(
        f"{verdict} to {verification.against} on {tokens} tokens, tolerance {verification.tolerance:.0e} relative; "
        f"the same likeliest token after {verification.agreement:.2%}; compared: {compared}"
    )
