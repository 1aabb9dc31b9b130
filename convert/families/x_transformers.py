"""lucidrains' x-transformers: `TransformerWrapper` around a `Decoder` with pre-norm, in four periods of its history.

What its options change without a trace in the weights is taken to be as it is by default: GELU, no qk_norm, no
l2norm_embed, no rotary_interpolation_factor, no ALiBi, no attn_max_attend_past. What leaves a trace is refused.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from dsmr_mlx.convert.rules import Configuration, Family, Match, Rule

ATTENTION = "attn_layers.layers.{2i}"
FEED_FORWARD = "attn_layers.layers.{2i+1}"
FREQUENCIES = "attn_layers.rotary_pos_emb.inv_freq"
HEAD_DIM = 64
# Gains of norms are near 1, or near 0 if they are stored minus 1. Between these two their median tells nothing.
SURELY_OFFSET, SURELY_PLAIN = 0.3, 0.7


def rules(gain: str, last_gain: str, kinds: tuple[str, ...]) -> tuple[Rule, ...]:
    """What differs between the periods: the transforms of the norms' gains, and the names of the gains."""
    norms = (
        (f"{ATTENTION}.0.0", "layers.{i}.attention_norm", gain),
        (f"{FEED_FORWARD}.0.0", "layers.{i}.feed_forward_norm", gain),
        ("attn_layers.final_norm", "norm", last_gain),
    )
    gains = [(f"{name}.{kind}", target, how) for kind in kinds for name, target, how in norms]
    qkv = tuple(f"{ATTENTION}.1.to_{name}.weight" for name in "qkv")
    down, feed_forward = f"{FEED_FORWARD}.1.ff.2", "layers.{i}.feed_forward"
    return (
        Rule("token_emb.emb.weight", "embed.weight"),
        Rule("pos_emb.emb.weight", "positions.weight", "scale_by_width", required=False),
        *(Rule(name, f"{target}.weight", how) for name, target, how in gains),
        *(Rule(f"{name}.bias", f"{target}.bias", required=False) for name, target, _ in norms if "weight" in kinds),
        Rule(qkv, "layers.{i}.attention.qkv.weight", "concatenate_untiled"),
        Rule(f"{ATTENTION}.1.to_out.weight", "layers.{i}.attention.out.weight", "untile_columns"),
        *(
            Rule(f"{FEED_FORWARD}.1.ff.0.{name}.{kind}", f"{feed_forward}.{target}.{kind}", how, required=False)
            for name, target, how in (("proj", "gate_up", "swap_halves"), ("0", "up", "identity"))
            for kind in ("weight", "bias")
        ),
        Rule(f"{down}.weight", f"{feed_forward}.down.weight"),
        Rule(f"{down}.bias", f"{feed_forward}.down.bias", required=False),
        # Gates have a bias even with ff_no_bias.
        Rule(f"{down}.weight", f"{feed_forward}.down.bias", "zero_bias", required=False),
        Rule("to_logits.weight", "head.weight", required=False),
        Rule("to_logits.bias", "head.bias", required=False),
    )


def configure(interleaved: bool) -> Callable[[Match, Mapping[str, Any]], Configuration]:
    """For versions that rotate neighbouring pairs, or halves."""

    def configure_period(match: Match, settings: Mapping[str, Any]) -> Configuration:
        frequencies = match.shape(FREQUENCIES) or (0,)
        if len(frequencies) != 1:
            raise match.error(f"{match.names[FREQUENCIES]} is {list(frequencies)}: expected a list of frequencies")
        rope_dims = 2 * frequencies[0]
        heads = match.heads(settings, head_dim=_head_dim(match, rope_dims))
        rms = match.shape("attn_layers.final_norm.g") is not None
        notes = [f"heads of {heads['head_dim']} assumed, x-transformers' default; --set n_heads=… otherwise"]
        if not settings.keys().isdisjoint(("n_heads", "head_dim")):
            notes = []
        if rope_dims and not interleaved:
            notes.append("1.20 or later assumed: versions before it rotate the values too, which cannot be converted")
        if "activation" not in settings:
            notes.append("GELU assumed, x-transformers' default; --set activation=silu for ff_swish")
        fields = {
            "norm": "rms" if rms else "layer",
            "norm_eps": 1e-12 if rms else 1e-5,  # the root mean square is only kept from being 0
            "activation": "gelu",
            "rope_dims": rope_dims,
            "rope_theta": _theta(match, rope_dims),
            "rope_interleaved": interleaved,
        }
        return Configuration(heads | fields, notes)

    return configure_period


def _head_dim(match: Match, rope_dims: int) -> int | None:
    """By default 64, of which half is rotated, or 32 if that is more; None if this cannot be."""
    if rope_dims not in (0, HEAD_DIM // 2):
        return 2 * rope_dims
    queries = (match.shape("attn_layers.layers.0.1.to_q.weight") or (1,))[0]
    return HEAD_DIM if queries % HEAD_DIM == 0 else None


def _theta(match: Match, rope_dims: int) -> float:
    """The base of the stored frequencies, base^(-2 j / dims) for j = 0, 1, …"""
    if rope_dims <= 2:
        return 10_000.0
    stored = match.read(FREQUENCIES).astype(mx.float32)
    lowest = stored[-1].item()
    if 0 < lowest < math.inf:
        theta = lowest ** (-rope_dims / (rope_dims - 2))
        expected = theta ** (-mx.arange(0, rope_dims, 2) / rope_dims)
    if not 0 < lowest < math.inf or not mx.allclose(stored, expected, rtol=1e-2).item():
        raise match.error(f"{match.names[FREQUENCIES]}: expected powers of one base, as RoPE has them")
    # Frequencies stored in 16 bits do not give the usual base exactly.
    return 10_000.0 if abs(theta / 10_000 - 1) < 0.02 else float(f"{theta:.6g}")


def _gain(match: Match) -> float:
    """The median of all norms' gains."""
    targets = [target for target in match.steps if target.endswith("norm.weight")]
    stored = [match.source.read(match.steps[t].sources[0]).astype(mx.float32).reshape(-1) for t in targets]
    gains = mx.concatenate(stored)
    if gains.size == 0:
        return math.nan
    return mx.sort(gains)[gains.size // 2].item()


def _may_be_offset(match: Match) -> bool:
    return _gain(match) < SURELY_PLAIN


def _may_be_offset_and_tied(match: Match) -> bool:
    return "head.weight" not in match.steps and _may_be_offset(match)


def _may_rotate_pairs(match: Match) -> bool:
    return not _has_early_biases(match) and _gain(match) > SURELY_OFFSET


def _may_rotate_halves(match: Match) -> bool:
    """Whether it has the biases of early versions, or rotates and has no gamma without the beta stored until 1.30."""
    if _has_early_biases(match):
        return True
    has_gamma = "attn_layers.final_norm.gamma" in match.names
    may_be_early = not has_gamma or "attn_layers.final_norm.beta" in match.names
    return FREQUENCIES in match.names and may_be_early and _gain(match) > SURELY_OFFSET


def _has_early_biases(match: Match) -> bool:
    """Of norms and head, which were dropped with 1.27."""
    return not match.steps.keys().isdisjoint(("norm.bias", "head.bias"))


def period(
    name: str, about: str, gains: tuple[str, str], kinds: tuple[str, ...], interleaved: bool, signature: Callable
) -> Family:
    """The family of the versions that `about` names."""
    return Family(
        name=name,
        about=about,
        rules=rules(*gains, kinds),
        configure=configure(interleaved),
        # The frequencies of RoPE are read for the configuration; beta was a buffer of zeros.
        ignored=(FREQUENCIES, "attn_layers.*.beta"),
        signature=signature,
        original="x-transformers",
    )


# Names of the norms' gains: of LayerNorm, of RMSNorm, and of PyTorch's own LayerNorm, which was used until 1.31.0.
LATER, EARLIER = ("gamma", "g"), ("gamma", "g", "weight")

FAMILIES = (
    period(
        "x-transformers",
        "2.30.5 and later, where the logits of a tied head are scaled",
        ("add_one", "add_one_scale_if_tied"),
        LATER,
        True,
        _may_be_offset,
    ),
    period("x-transformers-1.31", "1.31.1 to 2.30.4", ("add_one", "add_one"), LATER, True, _may_be_offset_and_tied),
    period(
        "x-transformers-1.30",
        "1.30.1 to 1.31.0, or later with norm_add_unit_offset=False",
        ("identity", "identity"),
        EARLIER,
        True,
        _may_rotate_pairs,
    ),
    period("x-transformers-1.20", "1.20 to 1.30.0", ("identity", "identity"), EARLIER, False, _may_rotate_halves),
)
