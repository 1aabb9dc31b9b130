"""x-transformers (lucidrains): `TransformerWrapper` around a pre-norm `Decoder`, for four ranges of versions.

Options that are not visible in the weights are assumed to have their defaults: GELU, no qk_norm, no l2norm_embed, no
rotary_interpolation_factor, no ALiBi, no attn_max_attend_past. Visible ones that a DSMR lacks are refused.
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
# Gains of norms are near 1, or near 0 if stored minus 1. A median between these bounds is ambiguous.
MAX_OFFSET_GAIN, MIN_PLAIN_GAIN = 0.7, 0.3


def rules(gain: str, last_gain: str, kinds: tuple[str, ...]) -> tuple[Rule, ...]:
    """Return the rules of a range of versions, with the transforms of the gains of norms, and their names."""
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
    """Return `Family.configure` for versions that rotate neighbouring pairs, or halves."""

    def configure_version(match: Match, settings: Mapping[str, Any]) -> Configuration:
        frequencies = match.shape(FREQUENCIES) or (0,)
        if len(frequencies) != 1:
            raise match.error(f"{match.names[FREQUENCIES]} is {frequencies}: expected a list of frequencies")
        rope_dims = 2 * frequencies[0]
        heads = match.heads(settings, head_dim=_head_dim(match, rope_dims))
        rms = match.shape("attn_layers.final_norm.g") is not None
        notes = [f"heads of {heads['head_dim']} assumed, the default of x-transformers; `n_heads`=… overrides it"]
        if not settings.keys().isdisjoint(("n_heads", "head_dim")):
            notes = []
        if rope_dims and not interleaved:
            notes.append("version 1.20 or later assumed: earlier ones also rotate the values and cannot be converted")
        if "activation" not in settings:
            notes.append("GELU assumed, the default of x-transformers; `activation`=silu for ff_swish")
        fields = {
            "norm": "rms" if rms else "layer",
            "norm_eps": 1e-12 if rms else 1e-5,  # only avoids division by 0
            "activation": "gelu",
            "rope_dims": rope_dims,
            "rope_theta": _theta(match, rope_dims),
            "rope_interleaved": interleaved,
        }
        return Configuration(heads | fields, notes)

    return configure_version


def _head_dim(match: Match, rope_dims: int) -> int | None:
    """Return the head dimension: 64 by default, of which at least 32 are rotated; None if it does not fit."""
    if rope_dims not in (0, HEAD_DIM // 2):
        return 2 * rope_dims
    queries = (match.shape("attn_layers.layers.0.1.to_q.weight") or (1,))[0]
    return HEAD_DIM if queries % HEAD_DIM == 0 else None


def _theta(match: Match, rope_dims: int) -> float:
    """Return the base of the stored frequencies, base^(-2 j / dims) for j = 0, 1, …"""
    if rope_dims <= 2:
        return 10_000.0
    stored = match.read(FREQUENCIES).astype(mx.float32)
    lowest = stored[-1].item()
    if 0 < lowest < math.inf:
        theta = lowest ** (-rope_dims / (rope_dims - 2))
        expected = theta ** (-mx.arange(0, rope_dims, 2) / rope_dims)
    if not 0 < lowest < math.inf or not mx.allclose(stored, expected, rtol=1e-2).item():
        raise match.error(f"{match.names[FREQUENCIES]}: expected powers of one base, as in RoPE")
    # Frequencies stored in 16 bits give the usual base only approximately.
    return 10_000.0 if abs(theta / 10_000 - 1) < 0.02 else float(f"{theta:.6g}")


def _gain(match: Match) -> float:
    """Return the median of the gains of all norms."""
    targets = [target for target in match.steps if target.endswith("norm.weight")]
    gains = mx.concatenate(
        [match.source.read(match.steps[t].sources[0]).astype(mx.float32).reshape(-1) for t in targets]
    )
    if gains.size == 0:
        return math.nan
    return mx.sort(gains)[gains.size // 2].item()


def _may_be_offset(match: Match) -> bool:
    return _gain(match) < MAX_OFFSET_GAIN


def _may_be_offset_and_tied(match: Match) -> bool:
    return "head.weight" not in match.steps and _may_be_offset(match)


def _may_rotate_pairs(match: Match) -> bool:
    return not _has_early_biases(match) and _gain(match) > MIN_PLAIN_GAIN


def _may_rotate_halves(match: Match) -> bool:
    """Return whether it has the biases of early versions, or RoPE and no gamma without the beta stored until 1.30."""
    if _has_early_biases(match):
        return True
    has_gamma = "attn_layers.final_norm.gamma" in match.names
    may_be_early = not has_gamma or "attn_layers.final_norm.beta" in match.names
    return FREQUENCIES in match.names and may_be_early and _gain(match) > MIN_PLAIN_GAIN


def _has_early_biases(match: Match) -> bool:
    """Return whether norms or head have biases, which 1.27 removed."""
    return not match.steps.keys().isdisjoint(("norm.bias", "head.bias"))


def version_family(
    name: str, about: str, gains: tuple[str, str], kinds: tuple[str, ...], interleaved: bool, signature: Callable
) -> Family:
    """Return the family of a range of versions."""
    return Family(
        name=name,
        about=about,
        rules=rules(*gains, kinds),
        configure=configure(interleaved),
        # `_theta` reads the RoPE frequencies; beta was a buffer of zeros.
        ignored=(FREQUENCIES, "attn_layers.*.beta"),
        signature=signature,
        original="x-transformers",
    )


# Names of gains: of LayerNorm, of RMSNorm, and of the LayerNorm of PyTorch, which was used until 1.31.0.
LATER, EARLIER = ("gamma", "g"), ("gamma", "g", "weight")

FAMILIES = (
    version_family(
        "x-transformers",
        "2.30.5 and later, which scale the logits of a tied head",
        ("add_one", "add_one_scale_if_tied"),
        LATER,
        True,
        _may_be_offset,
    ),
    version_family(
        "x-transformers-1.31", "1.31.1 to 2.30.4", ("add_one", "add_one"), LATER, True, _may_be_offset_and_tied
    ),
    version_family(
        "x-transformers-1.30",
        "1.30.1 to 1.31.0, or later with norm_add_unit_offset=False",
        ("identity", "identity"),
        EARLIER,
        True,
        _may_rotate_pairs,
    ),
    version_family(
        "x-transformers-1.20", "1.20 to 1.30.0", ("identity", "identity"), EARLIER, False, _may_rotate_halves
    ),
)
