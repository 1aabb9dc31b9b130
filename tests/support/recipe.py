"""The architecture settings that are off by default, and weights with which each of them matters."""

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dsmr_mlx.model.dsmr import DSMR

RECIPE = {
    "qk_norm": True,
    "value_residual": True,
    "embedding_skip": True,
    "canon": True,
    "logit_softcap": 4.0,
    "zero_init": True,
}
EQUAL_AT_FIRST = ("q_norm.weight", "k_norm.weight", "value_shares", "skip", "_canon.weight")


def randomized(model: DSMR, seed: int = 0) -> DSMR:
    """Change the weights that are equal in all new models, in place, so that every term matters."""
    rng = np.random.default_rng(seed)
    weights = []
    for name, weight in tree_flatten(model.parameters()):
        if name.endswith(EQUAL_AT_FIRST):
            weights.append((name, weight + mx.array(rng.normal(0, 0.3, weight.shape), weight.dtype)))
        elif model.config.zero_init and name.endswith(("out.weight", "down.weight")):
            scale = weight.shape[1] ** -0.5 / (2 * model.config.n_layers)
            weights.append((name, mx.array(rng.normal(0, scale, weight.shape), weight.dtype)))
    return model.load_weights(weights, strict=False)
