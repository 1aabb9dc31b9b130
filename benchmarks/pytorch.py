"""The sides of a comparison that use PyTorch: the reference of `convert`, in a process without MLX models.

float32 or bfloat16, eager, on a CPU unless another device is given, with as many threads as MLX's BLAS. If OpenBLAS is
preloaded, PyTorch uses it for float32 products, too.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measuring import blas_threads, music, take

from dsmr_mlx.convert.reference import DSMR, State
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.training.config import TrainConfig

Weights = dict[str, np.ndarray]


def with_weights(model: DSMR, weights: Weights) -> DSMR:
    """Load weights into a model."""
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return model


def reference(config: ModelConfig, weights: Weights, dtype: str, device: str) -> DSMR:
    """The model, for use under `torch.inference_mode`."""
    torch.set_num_threads(blas_threads() or torch.get_num_threads())
    return with_weights(DSMR(config), weights).to(device, getattr(torch, dtype)).eval()


def read(model: DSMR, ids: np.ndarray, device: str) -> tuple[torch.Tensor, State]:
    """Read ids `(T,)` segment by segment. Returns the last logits `(1, V)` and the state."""
    state, S = model.new_state(), model.config.segment_length
    for chunk in torch.from_numpy(ids)[None].to(device).split(S, dim=1):
        hidden, layers = model.hidden(chunk, state.arrays, state.position)
        state = model.advanced(state, layers, chunk.shape[1])
    return model.logits(hidden[:, -1]), state


def logits_of(config: ModelConfig, weights: Weights, ids: np.ndarray, dtype: str, device: str) -> np.ndarray:
    """Logits `(T, V)` float32; the last four tokens are read one by one."""
    with torch.inference_mode():
        model, tokens = reference(config, weights, dtype, device), torch.from_numpy(ids)[None].to(device)
        logits, state = model(tokens[:, :-4])
        for i in range(4):
            more, state = model(tokens[:, len(ids) - 4 + i, None], state)
            logits = torch.cat([logits, more], dim=1)
        return logits[0].cpu().numpy()


def playing(
    config: ModelConfig, weights: Weights, dtype: str, device: str, position: int, tokens: int
) -> Callable[[], None]:
    """A turn samples some tokens, starting after `position` tokens."""
    torch.manual_seed(0)
    model = reference(config, weights, dtype, device)

    @torch.inference_mode()
    def steps():
        logits, state = read(model, music(position), device)
        while True:
            token = torch.multinomial(logits.softmax(-1), 1)  # (1, 1)
            logits, state = model(token, state)
            logits = logits[:, -1]
            yield token.item()

    return partial(take, steps(), tokens)


def reading(config: ModelConfig, weights: Weights, dtype: str, device: str, tokens: int) -> Callable[[], None]:
    """A turn reads `tokens` tokens."""
    model, ids = reference(config, weights, dtype, device), music(tokens)

    @torch.inference_mode()
    def read_all() -> None:
        read(model, ids, device)[0].cpu()

    return read_all


def training(config: TrainConfig, weights: Weights, device: str, corpus: str) -> Callable[[], float]:
    """A turn takes a training step as in `examples/train_pytorch.py` and returns its loss."""
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    from train_pytorch import Training

    torch.set_num_threads(blas_threads() or torch.get_num_threads())
    run = Training(config, Corpus.load(corpus), device)
    with_weights(run.model, weights)
    return run.train_step
