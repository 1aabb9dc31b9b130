"""The counts of the roofline equal other ways to count, and it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlx.utils import tree_flatten

from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from roofline_counts import Count, decode_counts, parameters, train_counts, weights_of  # noqa: E402

CONFIG = ModelConfig(
    vocab_size=23, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=20, segment_length=8,
    horizons=[24, 8, 0],
)  # fmt: skip
MATRICES = ("qkv", "attention output", "feed-forward, up", "feed-forward, down", "head")


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False}, {"gated": False}])
def test_counted_weights_are_those_of_the_model(options):
    config = ModelConfig.from_dict(CONFIG.to_dict() | options)
    matrices = [array.size for _, array in tree_flatten(DSMR(config).parameters()) if array.ndim == 2]
    assert parameters(config) == sum(matrices)


def test_products_take_six_flops_per_weight_and_token():
    """2 forward, 4 backward."""
    counts = train_counts(CONFIG, lanes=5, itemsize=4)
    assert sum(counts[name].flops for name in MATRICES) == 6 * parameters(CONFIG) * 5 * CONFIG.segment_length


def test_attention_is_counted_pair_by_pair():
    """Four products over all that a query can reach, two over the segment, of 2 D FLOPs for each pair and head."""
    pairs = 0
    for horizon in CONFIG.horizons:
        for _ in range(CONFIG.segment_length):
            pairs += 4 * (horizon + CONFIG.segment_length) + 2 * CONFIG.segment_length
    flops = train_counts(CONFIG, lanes=5, itemsize=4)["attention products"].flops
    assert flops == 2 * CONFIG.head_dim * CONFIG.n_heads * 5 * pairs


def test_decoding_reads_every_weight_and_every_slot_once():
    model = DSMR(CONFIG)
    state = model.new_state(2)
    stored = [4 * rows * columns * n for rows, columns, n in weights_of(CONFIG).values()]
    counts = decode_counts(CONFIG, 2, stored, itemsize=4)
    assert sum(counts[name].bytes for name in MATRICES) == 4 * parameters(CONFIG)
    assert sum(counts[name].flops for name in MATRICES) == 2 * 2 * parameters(CONFIG)
    assert counts["attention"].bytes == state.nbytes


def test_the_bound_is_that_of_the_slower_resource():
    assert Count(flops=6, bytes=4).bound(3, 4) == 2
    assert Count(flops=6, bytes=12).bound(3, 4) == 3


@pytest.mark.slow
def test_it_runs_and_adds_up(tmp_path):
    """The rows are the step: what is not a part is unexplained. Medians add up but roughly."""
    settings = ("d_model=16", "n_layers=2", "n_heads=2", "head_dim=8", "d_ff=24", "segment_length=8", "batch_size=2")
    words = [f"--set={setting}" for setting in (*settings, "horizons=two-scale:long=1x16,short=8")]
    out, picture = tmp_path / "result.json", tmp_path / "picture.png"
    files = ["--json", out, "--plot", picture]
    program = [sys.executable, ROOT / "benchmarks/roofline.py", "--preset", "tiny", "--rounds", "2"]
    done = subprocess.run([*program, "--large", "64", "8192", *words, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert picture.stat().st_size > 1000
    for name in ("training", "decoding"):
        step = result[name]
        names = [row["part"] for row in step["rows"]]
        assert {*MATRICES, "memory", "graphs in Python", "unexplained"} <= set(names)
        assert step["flops"] > 0
        assert step["milliseconds"]["median"] > 0
        assert name in done.stdout
