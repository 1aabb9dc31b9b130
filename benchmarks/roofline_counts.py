"""FLOPs and bytes of a step, counted from the configuration. No clock and no MLX.

FLOPs are those of the matrix products, 2 per multiply-add. Bytes are what kernels must read and write if each reads its
operands once and writes its result, and nothing stays in a cache in between. A product in training has three kernels:
output, gradient of the input, gradient of the weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dsmr_mlx.model.config import ModelConfig

FLOAT = 4  # bytes of a weight, of its gradient and of its optimizer state


@dataclass(frozen=True)
class Count:
    """FLOPs and bytes of a part of a step."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Count":
        return Count(self.flops * times, self.bytes * times)

    def bound(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The shortest possible time in seconds: that of the slower resource."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


NOTHING = Count()


def product(rows: int, inner: int, columns: int, itemsize: int, kernels: int = 1) -> Count:
    """`(rows, inner)` @ `(inner, columns)`; 3 `kernels` include the two gradients, which move as much."""
    moved = rows * inner + inner * columns + rows * columns
    return Count(2 * rows * inner * columns, moved * itemsize) * kernels


def weights_of(c: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """The weight matrices by name: (inputs, outputs, number of matrices)."""
    heads = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    return {
        "qkv": (c.d_model, heads, c.n_layers),
        "attention output": (c.n_heads * c.head_dim, c.d_model, c.n_layers),
        "feed-forward, up": (c.d_model, (2 if c.gated else 1) * c.d_ff, c.n_layers),
        "feed-forward, down": (c.d_ff, c.d_model, c.n_layers),
        "head": (c.d_model, c.vocab_size, 1),
    }


def parameters(c: ModelConfig) -> int:
    """The number of parameters of the weight matrices, with the embedding."""
    matrices = sum(rows * columns * n for rows, columns, n in weights_of(c).values())
    return matrices + (0 if c.tie_embeddings else c.vocab_size * c.d_model)


def train_counts(c: ModelConfig, lanes: int, itemsize: int) -> dict[str, Count]:
    """A training step on one segment of each lane with full memories; `itemsize`: bytes per computed value."""
    S, D, N = c.segment_length, c.head_dim, lanes * c.segment_length
    counts = {
        name: product(N, rows, columns, itemsize, kernels=3) * n for name, (rows, columns, n) in weights_of(c).items()
    }
    scores, passes, memory = NOTHING, NOTHING, NOTHING
    for M in c.horizons:
        slots, pairs = M + S, lanes * c.n_heads
        # Scores and output; then the gradients of the weights and of q, over all slots; those of k and v, over S.
        over_all, over_segment = product(S, D, slots, itemsize) * 4, product(S, S, D, itemsize) * 2
        scores += (over_all + over_segment) * pairs
        # Softmax reads and writes the scores; its gradient reads two such arrays and writes one.
        passes += Count(0, 5 * pairs * S * slots * itemsize)
        # New keys and values: written into the segment, copied out of it and into the ring.
        memory += Count(0, (2 + 4 * (M > 0)) * 2 * lanes * c.n_kv_heads * min(S, M or S) * D * itemsize)
    # The norm reads a gradient; AdamW reads it again, reads and writes the weight and two moments.
    optimizer = Count(0, 8 * FLOAT * parameters(c))
    others = {"attention products": scores, "softmax and masks": passes, "memory": memory, "optimizer": optimizer}
    return counts | others | {"elementwise": elementwise(c, N, itemsize)}


def elementwise(c: ModelConfig, tokens: int, itemsize: int) -> Count:
    """Norms, rotary positions, activations and residual sums, forward and backward: reads and writes of `(N, d)`."""
    rotated = (c.n_heads + c.n_kv_heads) * c.head_dim
    gate = (2 if c.gated else 1) * c.d_ff
    norms = 5 * c.d_model * (2 * c.n_layers + 1)  # read, write; read twice, write
    per_layer = 4 * rotated + (gate + c.d_ff) + (gate + c.d_ff + gate) + 2 * 3 * c.d_model
    return Count(0, tokens * itemsize * (norms + per_layer * c.n_layers))


def decode_counts(c: ModelConfig, lanes: int, weight_bytes: Sequence[int], itemsize: int) -> dict[str, Count]:
    """A token of each lane: every weight and every slot of every memory is read once.

    weight_bytes: stored bytes per kind of matrix, in the order of `weights_of`.
    """
    counts = {
        name: Count(2 * lanes * rows * columns * n, stored)
        for (name, (rows, columns, n)), stored in zip(weights_of(c).items(), weight_bytes, strict=True)
    }
    slots = sum(c.horizons) + c.n_layers * c.segment_length
    read = 2 * lanes * c.n_kv_heads * c.head_dim * itemsize
    counts["attention"] = Count(4 * lanes * c.n_heads * c.head_dim * slots, read * slots)
    counts["memory"] = Count(0, 2 * read * c.n_layers)
    return counts
