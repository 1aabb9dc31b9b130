"""A hand-built model that copies: it predicts the token that followed the last occurrence of the current token."""

import mlx.core as mx
import numpy as np

from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR

E = 48  # size of a token's embedding
TURN = 16  # rotary dimensions, of heads of TURN + E
SHARPNESS, MATCH, CERTAINTY = 60.0, 40.0, 1.0  # logits of the two attentions, scale of the predictions


def induction_model(vocab_size: int, horizons: tuple[int, int], segment_length: int) -> DSMR:
    """Build two layers of one head each (Elhage et al. 2021, induction heads).

    The residual stream is [token | previous token | next token | 1]. The lower layer copies the previous token, by
    rotary positions alone; the upper one finds a position whose previous token is the current token, and copies the
    token there.
    """
    d, D = 3 * E + 1, TURN + E
    config = ModelConfig(
        vocab_size=vocab_size, d_model=d, n_layers=2, n_heads=1, head_dim=D, d_ff=1, segment_length=segment_length,
        horizons=list(horizons), rope_dims=TURN, tie_embeddings=False,
    )  # fmt: skip
    model = DSMR(config)
    rng = np.random.default_rng(0)
    token = rng.standard_normal((vocab_size, E))
    token /= np.linalg.norm(token, axis=1, keepdims=True)
    embed = np.zeros((vocab_size, d))
    embed[:, :E], embed[:, -1] = token, 1
    here, before, coming = (slice(i * E, (i + 1) * E) for i in range(3))

    lower = model.layers[0].attention
    norm = np.sqrt(2 / d)  # of [token | 0 | 0 | 1]
    qkv = np.zeros((3 * D, d))
    angle = 10_000.0 ** (-np.arange(TURN // 2) / (TURN // 2))
    strength = np.sqrt(SHARPNESS * np.sqrt(D) / (TURN // 2)) * norm
    qkv[: TURN // 2, -1], qkv[TURN // 2 : TURN, -1] = strength * np.cos(angle), -strength * np.sin(angle)
    qkv[D : D + TURN // 2, -1] = strength
    qkv[2 * D + TURN : 3 * D, here] = norm * np.eye(E)
    out = np.zeros((d, D))
    out[before, TURN:] = np.eye(E)
    lower.qkv.weight, lower.out.weight = mx.array(qkv.astype(np.float32)), mx.array(out.astype(np.float32))

    upper = model.layers[1].attention
    norm = np.sqrt(3 / d)  # of [token | token | 0 | 1]
    qkv = np.zeros((3 * D, d))
    strength = np.sqrt(MATCH * np.sqrt(D)) * norm
    qkv[TURN:D, here] = qkv[D + TURN : 2 * D, before] = strength * np.eye(E)
    qkv[2 * D + TURN : 3 * D, here] = norm * np.eye(E)
    out = np.zeros((d, D))
    out[coming, TURN:] = np.eye(E)
    upper.qkv.weight, upper.out.weight = mx.array(qkv.astype(np.float32)), mx.array(out.astype(np.float32))

    head = np.zeros((vocab_size, d))
    head[:, coming] = CERTAINTY * token
    model.embed.weight, model.head.weight = mx.array(embed.astype(np.float32)), mx.array(head.astype(np.float32))
    for block in model.layers:
        block.feed_forward.down.weight = mx.zeros_like(block.feed_forward.down.weight)
    mx.eval(model.parameters())
    return model
