"""A tokenizer without a grammar, tiny models, and models with constant logits."""

import mlx.core as mx
import numpy as np
from support.recipe import randomized

from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.performance import VOCAB_SIZE


class PlainTokenizer(Tokenizer):
    """Ten ids of unknown meaning; EOS is a lower id than BOS."""

    kind = "plain"
    version = 1
    tokens = ("EOS", "A", "B", "C", "D", "E", "F", "G", "BOS", "PAD")
    pad_id, bos_id, eos_id = 9, 8, 0

    def encode_notes(self, notes: Notes) -> np.ndarray:
        """BOS, an id per note, EOS."""
        return np.array([self.bos_id, *(1 + notes.pitch % 7), self.eos_id], self.dtype)

    def decode(self, ids) -> Notes:
        """A note for each id from 1 to 7."""
        n = sum(1 <= i <= 7 for i in np.ravel(ids))
        return Notes(np.arange(n), np.arange(n) + 0.5, np.full(n, 60), np.full(n, 64))


def tiny_model(vocab_size: int = VOCAB_SIZE, seed: int = 0, horizons: tuple[int, ...] = (32, 8), **options) -> DSMR:
    """A model of random weights, with embeddings large enough that the logits differ from token to token."""
    defaults = {"d_model": 32, "n_layers": len(horizons), "n_heads": 2, "head_dim": 16, "d_ff": 64}
    defaults |= {"segment_length": 16, "horizons": list(horizons)}
    mx.random.seed(seed)
    model = DSMR(ModelConfig(vocab_size=vocab_size, **(defaults | options)))
    model.embed.weight = model.embed.weight * 15
    randomized(model, seed)
    mx.eval(model.parameters())
    return model.eval()


def constant_model(preferences: np.ndarray, **options) -> DSMR:
    """A model whose logits are always `preferences` `(V,)`."""
    model = tiny_model(len(preferences), tie_embeddings=False, head_bias=True, **options)
    model.head.weight = mx.zeros_like(model.head.weight)
    model.head.bias = mx.array(preferences.astype(np.float32))
    return model
