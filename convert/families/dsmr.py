"""DSMR's own PyTorch checkpoints, as `reference` writes them: the names are those of the parameters."""

from collections.abc import Mapping
from typing import Any

from dsmr_mlx.convert.rules import TARGETS, Configuration, Family, Match, Rule
from dsmr_mlx.model.config import ModelConfig

NEEDED = ("embed.weight", "norm.weight", "layers.{i}.attention.qkv.weight", "layers.{i}.attention.out.weight")


def configure(match: Match, settings: Mapping[str, Any]) -> Configuration:
    """The configuration stored beside the weights; without it the settings are to make up for it."""
    stated = match.source.config
    if "vocab_size" in stated:
        S, n_layers = stated.get("segment_length", ModelConfig.segment_length), stated.get("n_layers")
        horizons = [S] * (n_layers if n_layers in range(len(match.layers)) else len(match.layers))
        return Configuration({"segment_length": S, "horizons": horizons} | stated)
    fields = {"norm": "layer"} if match.structure["norm_bias"] else {}
    return Configuration(
        fields | match.heads(settings),
        ["no configuration is stored with the weights: what --set does not give has its default"],
    )


FAMILIES = (
    Family(
        name="dsmr",
        about="this program's reference in PyTorch",
        rules=tuple(Rule(target, target, required=target in NEEDED) for target in TARGETS),
        configure=configure,
        original="dsmr",
    ),
)
