"""Adapters on a frozen base: what is trained, stored, resumed and played."""

from pathlib import Path

import mlx.core as mx
import pytest
from support.tiny import TOKENIZER, tiny_config, write_corpus

from dsmr_mlx import DSMR, load
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.checkpoint import load_arrays
from dsmr_mlx.model.lora import is_adapter
from dsmr_mlx.training.run import train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus").path


def save_base(folder: Path, bits: int | None = None, **options) -> str:
    mx.random.seed(3)
    sizes = {"d_model": 32, "d_ff": 64, "head_dim": 16} if bits else {}
    config = tiny_config(**sizes, **options).model_config(TOKENIZER, bits and {"bits": bits, "group_size": 32})
    model = DSMR(config)
    checkpoint.save_model(folder, config, model.parameters(), TOKENIZER)
    return str(folder)


def test_only_adapters(tmp_path, corpus):
    init = save_base(tmp_path / "base")
    config = tiny_config(init=init, lora_rank=2, max_steps=4)
    train(config, corpus, tmp_path / "run")
    stored = load_arrays(tmp_path / "run" / "last" / "model.safetensors")
    assert all(map(is_adapter, stored))
    load(tmp_path / "run")
