"""PyTorch checkpoints of DSMR, written by `reference`. Tensors have the names of the parameters."""

from collections.abc import Mapping
from typing import Any

from dsmr_mlx.convert.rules import TARGETS, Configuration, Family, Match, Rule
from dsmr_mlx.model.config import ModelConfig

REQUIRED = ("embed.weight", "norm.weight", "layers.{i}.attention.qkv.weight", "layers.{i}.attention.out.weight")


def configure(match: Match, settings: Mapping[str, Any]) -> Configuration:
    """Return the configuration stored with the weights, else the one that follows from shapes and settings."""
    stated = match.source.config
    if "vocab_size" in stated:
        S, n_layers = stated.get("segment_length", ModelConfig.segment_length), stated.get("n_layers")
        horizons = [S] * (n_layers if n_layers in range(len(match.layers)) else len(match.layers))
        return Configuration({"segment_length": S, "horizons": horizons} | stated)
    fields = {"norm": "layer"} if match.structure["norm_bias"] else {}
    return Configuration(
        fields | match.heads(settings),
        ["no configuration is stored with the weights; defaults assumed for all but the settings"],
    )


FAMILIES = (
    Family(
        name="dsmr",
        about="of this program, or of its PyTorch reference",
        rules=tuple(Rule(target, target, required=target in REQUIRED) for target in TARGETS),
        configure=configure,
        original="dsmr",
    ),
)
