"""Kernel launches per decoded token, which limit the speed of decoding on Metal, counted without a GPU.

    python benchmarks/launches.py [--models 'bundled;small'] [--peers] [--json FILE]

The compiled step is traced, not run, and the kernels of its primitives are counted as Metal launches them
(`mlx/backend/metal` and `mlx/backend/gpu` of MLX 0.32): none for what only changes shapes and strides, two for a slice
whose start is an array (one computes the offset), one per part for a concatenation, one for anything else. On a CPU
MLX decomposes normalization, rotary positions and attention into several primitives. On Metal each is one kernel, so
the trace replaces each of them with one primitive that MLX does not fuse. Not counted are copies of arrays that are
not contiguous, the second pass over long memories on large chips, and copies of slots that a running step still reads
(`Player(ahead=True)`).

"network" is the model's step; "choice" is everything from logits to the token and the decoding state after it: without
steering, and with the options that the bundled model recommends. `--peers` counts mlx-lm's Llama of the same width and
depth with rotating caches; it needs mlx-lm.
"""

import argparse
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from outputs import add_outputs, run_main, write_outputs
from rich.console import Console
from rich.table import Table

from dsmr_mlx.generation.grammar import GrammarWalk, Limits
from dsmr_mlx.generation.next_token import NextToken
from dsmr_mlx.generation.options import recommended
from dsmr_mlx.generation.sampling import Processor, Sampling, lane_keys
from dsmr_mlx.model import rotary
from dsmr_mlx.model.checkpoint import load_config_and_tokenizer
from dsmr_mlx.model.checkpoint_folder import resolve
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.tokenizers.registry import make_tokenizer
from dsmr_mlx.tokenizers.token_tables import NEVER
from dsmr_mlx.training.settings import build_config

# Primitives that launch nothing: they give the same memory another shape. A reshape copies if its input is not
# contiguous, which no array of a decoding step is.
VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "NumberOfElements", "Reshape"),
    *("CustomTransforms", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
}
KERNELS = {"DynamicSlice": 2, "DynamicSliceUpdate": 2}
NODE = re.compile(r'(\d+) \[label ="(\w+)", shape=rectangle')
EDGE = re.compile(r'^"\w+" -> (\d+)$', re.MULTILINE)
ARIA = {  # its medium model, 2026's vocabulary
    **{"d_model": 1536, "n_layers": 16, "n_heads": 24, "head_dim": 64, "d_ff": 6144, "norm": "layer"},
    **{"norm_bias": True, "tie_embeddings": False, "rope_theta": 500_000.0, "segment_length": 128},
    "horizons": [2048] * 4 + [512] * 12,
}
PARTS = {"canon": False, "value_residual": False, "embedding_skip": False}  # of the recipe, beside a plain Llama
WINDOW = 512  # tokens of mlx-lm's rotating caches


def launches(outputs: Any) -> Counter[str]:
    """The kernels in the graph of arrays that are not evaluated yet, by the name of the primitive."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *(array for _, array in tree_flatten(outputs)))
    inputs, counts = Counter(EDGE.findall(graph.getvalue())), Counter()
    for node, name in NODE.findall(graph.getvalue()):
        if name not in VIEWS:
            counts[name] += inputs[node] if name == "Concatenate" else KERNELS.get(name, 1)
    return counts


@contextmanager
def tracing() -> Iterator[None]:
    """Compile functions with a single primitive for each function that is one kernel on Metal."""

    def kernel(x: mx.array, *others: Any, **options: Any) -> mx.array:
        arrays = [a for a in (*others, *options.values()) if isinstance(a, mx.array)]
        return mx.depends([mx.cumsum(x, axis=-1)], arrays)[0] if arrays else mx.cumsum(x, axis=-1)

    names = ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")
    mx.enable_compile()
    on_metal = mock.patch.object(rotary, "on_gpu", return_value=True)
    try:
        with on_metal, mock.patch.multiple(mx.fast, **dict.fromkeys(names, kernel)):
            yield
    finally:
        if os.environ.get("MLX_DISABLE_COMPILE"):
            mx.disable_compile()


def hollow(tree: Any) -> Any:
    """Arrays of the same shapes that take no memory; only the shapes are used."""
    arrays = tree_map(lambda a: mx.broadcast_to(mx.array(0, a.dtype), a.shape), tree)
    mx.eval(arrays)
    return arrays


def network_launches(config: ModelConfig) -> Counter[str]:
    """The kernels of the model's step for one lane."""
    model = DSMR(config).eval()
    model.update(hollow(model.parameters()))
    state = model.new_state(1, rewindable=True).opened()
    arguments = mx.array([60]), hollow(state.layers), mx.array(state.filled, mx.int32), state.segment()
    mx.eval(arguments)
    with tracing():
        return launches(mx.compile(model.step, inputs=[model])(*arguments))


def choice_launches(
    tokenizer: Tokenizer, sampling: Sampling | None = None, processors: Sequence[Processor | Callable] = ()
) -> Counter[str]:
    """The kernels from the logits of one lane to its token and the decoding state after it; the time is limited."""
    walk = GrammarWalk(tokenizer)
    step = NextToken(walk, sampling or Sampling(), processors, compiled=False)
    state = step.begin(np.empty(0, np.int64))
    logits, keys, position = mx.zeros((1, tokenizer.vocab_size)), lane_keys(0, 1), mx.array(0, mx.uint32)
    limits = Limits(ticks=6000 if walk.grammar.has_clock else NEVER)
    arguments = logits, state, keys, position, walk.bounds(limits, state.music)
    mx.eval(arguments)
    with tracing():
        return launches(mx.compile(step._step)(*arguments))


def llama_launches(config: ModelConfig) -> Counter[str]:
    """The kernels of mlx-lm's step for one lane, with rotating caches that are full."""
    import llama

    network = llama.new_llama(config)
    network.update(hollow(network.parameters()))
    caches, c = llama.new_caches(network, WINDOW), config
    for cache in caches:
        for n in (WINDOW, 1, 1):  # a prompt, and tokens that are written in place
            cache.update_and_fetch(*(mx.zeros((1, c.n_kv_heads, n, c.head_dim)) for _ in "kv"))
        mx.eval(cache.state)
    tokens = mx.array([[60]])
    mx.eval(tokens)
    with tracing():
        return launches(network(tokens, cache=caches))


def models() -> dict[str, tuple[ModelConfig, Tokenizer]]:
    """The configurations that are counted, by name."""
    performance = PerformanceTokenizer()
    small = build_config("small").model_config(performance)
    plain = replace(small, **PARTS)
    aria = make_tokenizer("aria:2675")
    return {
        "bundled": load_config_and_tokenizer(resolve(None)),
        "small": (small, performance),
        **{f"small, only {name}": (replace(plain, **{name: True}), performance) for name in PARTS},
        "small, none of these": (plain, performance),
        "base": (build_config("base").model_config(performance), performance),
        "Aria": (ModelConfig(vocab_size=aria.vocab_size, **ARIA), aria),
    }


def count(name: str, peers: bool) -> dict[str, Any]:
    """A row of the table, with the kernels of each primitive."""
    config, tokenizer = models()[name]
    parts = {
        "network": network_launches(config),
        "choice": choice_launches(tokenizer),
        "steered": choice_launches(tokenizer, **recommended()),
    }
    if peers:
        parts["llama"] = llama_launches(config)
    totals = {part: sum(counts.values()) for part, counts in parts.items()}
    return {"model": name, **totals, "kernels": {part: dict(c.most_common()) for part, c in parts.items()}}


def show(rows: Sequence[dict], console: Console) -> None:
    """Print the table."""
    table = Table(box=None, title="kernel launches per decoded token")
    headings = ("", "network", "choice", "choice, steered", "total", "total, steered", "mlx-lm's network")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows:
        network, choice, steered = row["network"], row["choice"], row["steered"]
        sums = network, choice, steered, network + choice, network + steered, row.get("llama", "")
        table.add_row(row["model"], *map(str, sums))
    console.print(table)


def main() -> None:
    """Count, show, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(models())
    parser.add_argument("--models", metavar="NAME;NAME", help=f"some of: {'; '.join(names)} (default: all)")
    parser.add_argument("--peers", action="store_true", help="count mlx-lm's Llama, too")
    add_outputs(parser, plot=False)
    a = parser.parse_args()
    chosen = a.models.split(";") if a.models else names
    if unknown := set(chosen) - set(names):
        parser.error(f"{', '.join(sorted(unknown))}: expected {'; '.join(names)}")
    rows = [count(name, a.peers) for name in chosen]
    show(rows, Console(width=150))
    write_outputs(a, {"rows": rows})


if __name__ == "__main__":
    run_main(main)
