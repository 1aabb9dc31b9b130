"""The optimizers of `dsmr-mlx train` in PyTorch: AdamW for all weights, or Muon for the matrices of the blocks."""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from dsmr_mlx.convert.reference import DSMR
from dsmr_mlx.training.config import TrainConfig

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic polynomial (Jordan et al. 2024)
STEPS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices `(N, a, b)`, a ≤ b, with all singular values near 1, by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum (Jordan et al. 2024), scaled to the size of AdamW's updates (Liu et al. 2025).

    weights: each with the row counts of the matrices stacked in it, which are orthogonalized separately. dtype: of the
    orthogonalization.
    """

    def __init__(self, weights: list[tuple[Tensor, list[int]]], lr: float, weight_decay: float, dtype: torch.dtype):
        super().__init__([weight for weight, _ in weights], {"lr": lr, "weight_decay": weight_decay})
        self.rows = [rows for _, rows in weights]
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Update all weights from their gradients."""
        (group,) = self.param_groups
        rate, decay = group["lr"], group["weight_decay"]
        by_shape = defaultdict(list)  # (parts of weights, their directions), as wide matrices
        for weight, rows in zip(group["params"], self.rows, strict=True):
            state = self.state[weight]
            momentum = state.setdefault("momentum", torch.zeros_like(weight))
            momentum.lerp_(weight.grad, 1 - MOMENTUM)
            direction = weight.grad.lerp(momentum, MOMENTUM)  # Nesterov
            weight.mul_(1 - rate * decay)
            for part, along in zip(weight.split(rows), direction.split(rows), strict=True):
                wide = (part, along) if part.shape[0] <= part.shape[1] else (part.mT, along.mT)
                by_shape[wide[0].shape].append(wide)
        for shape, pairs in by_shape.items():
            updates = orthogonalize(torch.stack([along for _, along in pairs]).to(self.dtype))
            for (part, _), update in zip(pairs, updates, strict=True):
                part.add_(update, alpha=-0.2 * max(shape) ** 0.5 * rate)


def matrices_of_blocks(model: DSMR) -> Iterator[tuple[str, list[int]]]:
    """Yield the names of the matrices in the blocks, each with the rows of the matrices that are fused in it."""
    c = model.config
    heads = [n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)]
    rows = {"qkv": heads, "out": [c.d_model], "gate_up": [c.d_ff] * 2, "up": [c.d_ff], "down": [c.d_model]}
    for name, _ in model.named_parameters():
        if name.startswith("layers.") and name.endswith(".weight") and (kind := name.split(".")[-2]) in rows:
            yield name, rows[kind]


class Optimizer:
    """AdamW alone, or Muon and AdamW, with the settings of a run; both rates are multiplied by one factor."""

    def __init__(self, model: DSMR, config: TrainConfig):
        weights, betas = dict(model.named_parameters()), (config.beta1, config.beta2)

        def adamw(names: list[str], rate: float, decay: float) -> torch.optim.Optimizer:
            chosen = [weights[name] for name in names]
            return torch.optim.AdamW(chosen, lr=rate, betas=betas, weight_decay=decay, fused=True)

        if config.optimizer == "muon":
            matrices = dict(matrices_of_blocks(model))
            dtype = getattr(torch, config.dtype)
            parts = [(weights[name], rows) for name, rows in matrices.items()]
            self.parts = [
                Muon(parts, config.learning_rate, config.weight_decay, dtype),
                adamw([name for name in weights if name not in matrices], config.adamw_learning_rate, 0.0),
            ]
        else:
            decayed = [name for name in weights if weights[name].ndim >= 2 and "canon" not in name]
            others = [name for name in weights if name not in decayed]
            self.parts = [
                adamw(decayed, config.learning_rate, config.weight_decay),
                adamw(others, config.learning_rate, 0.0),
            ]
        self.rates = [part.param_groups[0]["lr"] for part in self.parts]

    def step(self, factor: float) -> None:
        """Update all weights with the rates times a factor, and drop the gradients."""
        for part, rate in zip(self.parts, self.rates, strict=True):
            part.param_groups[0]["lr"] = rate * factor
            part.step()
            part.zero_grad()

    def state_dict(self) -> list[dict]:
        """Return what `load_state_dict` needs."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        """Restore a state; the rates stay those of the configuration."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
