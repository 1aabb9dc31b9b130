"""How fast music is played on, side by side with other ways to do it, and whether it stays so.

    python benchmarks/decode.py [--preset small | --checkpoint RUN] [--rounds 12] [--json FILE]
    python benchmarks/decode.py --endless 1000000

Each comparison has two sides, which play in turn, some tokens at a time, in one process, so that a machine that slows
down slows both. Ratios are taken round by round; the table has their medians and the range of the middle half.

The other sides: the same player elsewhere in a stream, or with one lane; the same weights in mlx-lm's Llama with its
`RotatingKVCache` (needs `pip install --no-deps mlx-lm`; left out without it), where every layer has one window, as long
as what DSMR sees on average with the same budget; and a cache that grows by concatenation, in a full stream of 8,192
tokens. All draw at temperature 1; the player walks its grammar besides.

`--endless N` streams N tokens through a tiny model, most of them read in whole segments, and prints along the way what
a played token costs, the memory held, and how far the logits are from those of a model that has heard nothing but what
is still audible.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from dsmr_mlx import checkpoint
from dsmr_mlx.config import ModelConfig
from dsmr_mlx.grammar import Limits
from dsmr_mlx.midi import Notes
from dsmr_mlx.model import DSMR
from dsmr_mlx.performance import encode_notes
from dsmr_mlx.player import Player
from dsmr_mlx.rotary import rotate
from dsmr_mlx.tokenizer import PerformanceTokenizer, Tokenizer
from dsmr_mlx.train_config import build_config

NEAR, FAR, GROWN = 1_000, 100_000, 8_192  # tokens

Steps = Iterator[object]


def music(tokens: int, seed: int = 0) -> np.ndarray:
    """Ids of random notes, as many as asked for: what a tokenizer makes of a real, if tuneless, performance."""
    rng = np.random.default_rng(seed)
    onset = np.cumsum(rng.integers(1, 25, tokens // 2)) / 100
    offset = onset + rng.integers(5, 120, tokens // 2) / 100
    notes = Notes.sorted(onset, offset, rng.integers(30, 95, tokens // 2), rng.integers(20, 110, tokens // 2))
    return encode_notes(notes)[:tokens].astype(np.int64)


def playing(model: DSMR, tokenizer: Tokenizer, position: int, compile: bool | None, n: int = 1) -> Player:
    player = Player(model, tokenizer, n=n, compile=compile)
    player.read(music(position))
    return player


def milliseconds(steps: Steps, tokens: int) -> float:
    """Per step, over so many of them."""
    started = time.perf_counter()
    for _ in islice(steps, tokens):
        pass
    return 1e3 * (time.perf_counter() - started) / tokens


def in_turn(sides: list[Steps], rounds: int, tokens: int, warmup: int = 2) -> list[list[float]]:
    """Milliseconds a step of each side, round by round."""
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(warmup + rounds):
        for side, measured in zip(sides, times, strict=True):
            spent = milliseconds(side, tokens)
            if turn >= warmup:
                measured.append(spent)
    return times


def row(name: str, other: str, times: list[list[float]], ratios: list[float], target: str, met: bool) -> dict:
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "comparison": name,
        "against": other,
        "ms": [statistics.median(side) for side in times],
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "target": target,
        "met": met,
    }


def compare_positions(model: DSMR, tokenizer: Tokenizer, a: argparse.Namespace) -> dict:
    sides = [playing(model, tokenizer, n, a.compile).play(Limits()) for n in (FAR, NEAR)]
    times = in_turn(sides, a.rounds, a.tokens)
    ratios = [far / near for far, near in zip(*times, strict=True)]
    met = statistics.median(ratios) <= 1.05
    return row(f"a token at position {FAR:,}", f"at {NEAR:,}", times, ratios, "time ≤ 1.05", met)


def compare_overhead(model: DSMR, tokenizer: Tokenizer, a: argparse.Namespace) -> dict:
    """What of a step is spent in Python and on building graphs: all that is not inside an evaluation."""
    evaluating = 0.0

    def timed(evaluate: Callable) -> Callable:
        def call(*arrays: object) -> None:
            nonlocal evaluating
            started = time.perf_counter()
            evaluate(*arrays)
            evaluating += time.perf_counter() - started

        return call

    steps = playing(model, tokenizer, NEAR, a.compile).play(Limits())
    milliseconds(steps, 2 * a.tokens)
    originals = mx.eval, mx.async_eval
    mx.eval, mx.async_eval = map(timed, originals)
    times: list[list[float]] = [[], []]
    try:
        for _ in range(a.rounds):
            before = evaluating
            times[1].append(milliseconds(steps, a.tokens))
            times[0].append(times[1][-1] - 1e3 * (evaluating - before) / a.tokens)
    finally:
        mx.eval, mx.async_eval = originals
    ratios = [outside / whole for outside, whole in zip(*times, strict=True)]
    met = statistics.median(ratios) <= 0.2
    return row("Python and graph building", "the whole step", times, ratios, "time ≤ 0.20", met)


def compare_variations(model: DSMR, tokenizer: Tokenizer, a: argparse.Namespace) -> dict:
    sides = [playing(model, tokenizer, NEAR, a.compile, n).play(Limits()) for n in (4, 1)]
    times = in_turn(sides, a.rounds, a.tokens)
    ratios = [4 * one / four for four, one in zip(*times, strict=True)]
    return row("4 variations", "1", times, ratios, "tokens/s ≥ 2", statistics.median(ratios) >= 2)


def compare_rotating(model: DSMR, tokenizer: Tokenizer, a: argparse.Namespace) -> dict | None:
    c = model.config
    like_llama = (c.norm, c.activation, c.gated, c.rope_dims, c.parallel_residual) == (
        "rms",
        "silu",
        True,
        c.head_dim,
        False,
    )
    plain = not (c.attention_bias or c.output_bias or c.feed_forward_bias or c.head_bias or c.quantization)
    if find_spec("mlx_lm") is None or not like_llama or not plain or c.max_positions or c.rope_scaling:
        return None
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import RotatingKVCache

    uniform = sum(c.horizons) // c.n_layers
    same = DSMR(ModelConfig.from_dict(c.to_dict() | {"horizons": [uniform] * c.n_layers}))
    same.update(model.parameters())
    ids = music(NEAR)
    caches = [RotatingKVCache(uniform + c.segment_length // 2) for _ in range(c.n_layers)]
    rotating = generate_step(
        mx.array(ids), as_llama(model), max_tokens=-1, sampler=mx.random.categorical, prompt_cache=caches
    )
    sides = [playing(same, tokenizer, NEAR, a.compile).play(Limits()), rotating]
    times = in_turn(sides, a.rounds, a.tokens)
    ratios = [theirs / ours for ours, theirs in zip(*times, strict=True)]
    met = statistics.median(ratios) >= 1.3
    return row(f"uniform:{uniform}", "mlx-lm, RotatingKVCache", times, ratios, "tokens/s ≥ 1.3", met)


def as_llama(model: DSMR):
    """The same weights as mlx-lm's Llama."""
    from mlx_lm.models.llama import Model, ModelArgs

    c = model.config
    arguments = ModelArgs(
        model_type="llama",
        hidden_size=c.d_model,
        num_hidden_layers=c.n_layers,
        intermediate_size=c.d_ff,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        rope_traditional=c.rope_interleaved,
        vocab_size=c.vocab_size,
        tie_word_embeddings=c.tie_embeddings,
    )
    weights = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    if not c.tie_embeddings:
        weights["lm_head.weight"] = model.head.weight
    heads = [c.n_heads * c.head_dim, (c.n_heads + c.n_kv_heads) * c.head_dim]
    for i, block in enumerate(model.layers):
        named = dict(zip("qkv", mx.split(block.attention.qkv.weight, heads), strict=True)) | {
            "o": block.attention.out.weight
        }
        gate, up = mx.split(block.feed_forward.gate_up.weight, 2)
        mlp = {"gate": gate, "up": up, "down": block.feed_forward.down.weight}
        layer = f"model.layers.{i}"
        weights |= {f"{layer}.self_attn.{name}_proj.weight": weight for name, weight in named.items()}
        weights |= {f"{layer}.mlp.{name}_proj.weight": weight for name, weight in mlp.items()}
        weights[f"{layer}.input_layernorm.weight"] = block.attention_norm.weight
        weights[f"{layer}.post_attention_layernorm.weight"] = block.feed_forward_norm.weight
    llama = Model(arguments)
    llama.load_weights(list(weights.items()), strict=True)
    mx.eval(llama.parameters())
    return llama


def growing(model: DSMR, tokens: int) -> Steps:
    """Decoding as it is done at first: every layer keeps all, and each step makes longer arrays."""
    c = model.config
    shape = (1, c.n_kv_heads, tokens, c.head_dim)
    caches = [[mx.random.normal(shape), mx.random.normal(shape)] for _ in model.layers]
    token, position = mx.array([[0]]), tokens
    mx.eval(caches)
    while True:
        x = model.embed(token)
        for block, cache in zip(model.layers, caches, strict=True):
            qkv = block.attention.qkv(block.attention_norm(x)).reshape(1, 1, -1, c.head_dim).swapaxes(1, 2)
            q, k, v = mx.split(qkv, [c.n_heads, c.n_heads + c.n_kv_heads], axis=1)
            q, k = rotate(q, c, position), rotate(k, c, position)
            cache[:] = (mx.concatenate([old, new], axis=2) for old, new in zip(cache, (k, v), strict=True))
            y = mx.fast.scaled_dot_product_attention(q, *cache, scale=c.head_dim**-0.5)
            attended = x + block.attention.out(y.swapaxes(1, 2).reshape(1, 1, -1))
            x = attended + block.feed_forward(block.feed_forward_norm(x if c.parallel_residual else attended))
        token = mx.random.categorical(model.logits(model.norm(x))[:, -1])[:, None]
        position += 1
        mx.eval(token, caches)
        yield token


def compare_growing(model: DSMR, tokenizer: Tokenizer, a: argparse.Namespace) -> dict:
    sides = [playing(model, tokenizer, GROWN, a.compile).play(Limits()), growing(model, GROWN)]
    times = in_turn(sides, a.rounds, max(a.tokens // 4, 1))
    ratios = [theirs / ours for ours, theirs in zip(*times, strict=True)]
    met = statistics.median(ratios) >= 3
    return row(f"a token at {GROWN:,}", "a cache that grows by concatenation", times, ratios, "tokens/s ≥ 3", met)


def memory_of_a_step(model: DSMR, tokenizer: Tokenizer, a: argparse.Namespace) -> dict:
    """What a step takes besides the state, at most: slots that are not written in place would be seen."""
    player = playing(model, tokenizer, NEAR, a.compile)
    steps, extra = player.play(Limits()), []
    milliseconds(steps, 10)
    for _ in range(2 * model.config.segment_length):
        mx.synchronize()
        active = mx.get_active_memory()
        mx.reset_peak_memory()
        next(steps)
        mx.synchronize()
        extra.append(mx.get_peak_memory() - active)
    return {
        "state_bytes": player.nbytes,
        "median_extra_bytes": statistics.median(extra),
        "most_extra_bytes": max(extra),
    }


def endless(total: int, compile: bool | None) -> None:
    """Print a table of a stream of `total` tokens; see the head of this file."""
    mx.random.seed(0)
    config = ModelConfig(
        vocab_size=391, d_model=32, n_layers=2, n_heads=2, head_dim=16, d_ff=64, segment_length=64, horizons=[128, 64]
    )
    model = DSMR(config).eval()
    model.embed.weight = model.embed.weight * 15
    player = Player(model, PerformanceTokenizer(), compile=compile)
    audible = sum(config.horizons) + config.segment_length
    phrase, heard = music(8 * config.segment_length), []
    table = Table(box=None, title=f"{total:,} tokens, horizons {config.horizons}, segments of {config.segment_length}")
    for column in ("tokens", "read, µs a token", "played, µs a token", "memory held", "state", "logit error"):
        table.add_column(column, justify="right")
    console = Console(width=110)
    player.read([])
    marks = [total * i // 10 for i in range(1, 11)]
    for mark in marks:
        started, begun = time.perf_counter(), player.position
        while player.position < mark - 400:
            player.read(phrase)
        reading = 1e6 * (time.perf_counter() - started) / max(player.position - begun, 1)
        heard = phrase.tolist()
        steps = player.play(Limits())
        started = time.perf_counter()
        heard += [int(step[0]) for step in islice(steps, 400)]
        played = 1e6 * (time.perf_counter() - started) / 400
        within = (player.position - 1) % config.segment_length + 1
        tail = np.array(heard[-(audible - config.segment_length + within) :])
        fresh, _ = model(mx.array(tail[None]))
        error = mx.abs(fresh[0, -1] - player.logits[0]).max().item()
        mx.clear_cache()
        held = mx.get_active_memory()
        table.add_row(
            f"{player.position:,}", f"{reading:.1f}", f"{played:.0f}", f"{held:,}", f"{player.nbytes:,}", f"{error:.1e}"
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--preset", default="small", help="random weights of this size (default small)")
    source.add_argument("--checkpoint", metavar="RUN", help="a checkpoint or a run instead")
    parser.add_argument("--rounds", type=int, default=12, metavar="N", help="turns of each side (default 12)")
    parser.add_argument("--tokens", type=int, default=40, metavar="N", help="tokens in a turn (default 40)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: as the player chooses")
    parser.add_argument("--endless", type=int, metavar="N", help="stream N tokens through a tiny model instead")
    parser.add_argument("--json", metavar="FILE", help="write everything there too")
    a = parser.parse_args()
    if a.endless:
        endless(a.endless, a.compile)
        return
    if a.checkpoint:
        model, tokenizer = checkpoint.load(a.checkpoint)
    else:
        mx.random.seed(0)
        tokenizer = PerformanceTokenizer()
        model = DSMR(build_config(a.preset).model_config(tokenizer.vocab_size)).eval()
        model.embed.weight = model.embed.weight * 15  # predictions that differ, as those of a trained model do
    comparisons = (compare_positions, compare_overhead, compare_variations, compare_rotating, compare_growing)
    rows = [made for compare in comparisons if (made := compare(model, tokenizer, a)) is not None]
    result = {"rows": rows, "memory": memory_of_a_step(model, tokenizer, a)}
    if a.json:
        Path(a.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(result, a)


def show(result: dict, a: argparse.Namespace) -> None:
    device = f"{mx.default_device().type.name}, {os.cpu_count()} cores"
    table = Table(box=None, title=f"{a.checkpoint or 'preset ' + a.preset}, {a.rounds} rounds, {device}")
    for column in ("", "ms a step", "against", "ms a step", "ratio", "middle half", "target", ""):
        table.add_column(column, justify="right" if column in ("ms a step", "ratio", "middle half") else "left")
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        ours, theirs = (f"{ms:.2f}" for ms in row["ms"])
        met = "met" if row["met"] else "missed"
        spread = f"{low:.2f} – {high:.2f}"
        table.add_row(
            row["comparison"], ours, row["against"], theirs, f"{row['ratio']:.2f}", spread, row["target"], met
        )
    console = Console(width=150)
    console.print(table)
    memory = result["memory"]
    console.print(
        f"a state of {memory['state_bytes']:,} bytes; for a moment a step takes {memory['median_extra_bytes']:,.0f} "
        f"bytes more, and where a segment ends {memory['most_extra_bytes']:,}"
    )


if __name__ == "__main__":
    main()
