"""An original of each family with random weights, its configuration and its conversion."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from support.foreign_models import Aria, MemorySource, NanoGPT, converted, randomise

from dsmr_mlx import DSMR, ModelConfig
from dsmr_mlx.convert import reference
from dsmr_mlx.convert.families import FAMILIES, family_named
from dsmr_mlx.convert.mapping import find_family
from dsmr_mlx.convert.originals import original_of
from dsmr_mlx.convert.verification import random_tokens

V, T = 41, 37

SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": T}

NANOGPT = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": T, "bias": True, "vocab_size": V, "dropout": 0.0}

DSMR_CONFIG = ModelConfig(
    vocab_size=V, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40,
    segment_length=8, horizons=[9, 4],
)  # fmt: skip

LONG = replace(DSMR_CONFIG, horizons=[40, 40])


def transformers_model(name: str, **options):
    """Return a model of transformers and its config.json."""
    transformers = pytest.importorskip("transformers")
    model_class = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    options |= {"attn_implementation": "eager", "bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{name}Config")(**options)
    return model_class(config), {**config.to_dict(), "model_type": config.model_type}


def x_transformer(tie: bool = False, **options):
    """Return a model of x-transformers, and None for its configuration."""
    package = pytest.importorskip("x_transformers")
    layers = package.Decoder(dim=32, depth=2, verbose=False, **({"heads": 4, "attn_dim_head": 16} | options))
    return package.TransformerWrapper(num_tokens=V, max_seq_len=T, attn_layers=layers, tie_embedding=tie), None


def llama(kind: str = "Llama", **options):
    """Return a small Llama, Mistral, Qwen2 or Qwen3, and its config.json."""
    return transformers_model(kind, **SMALL, **options)


# case → function that returns the original and its configuration, options of the conversion
CASES = {
    "llama": (lambda: llama(num_key_value_heads=2), {}),
    "llama, tied, biases": (lambda: llama(tie_word_embeddings=True, attention_bias=True, head_dim=12), {}),
    "mistral, windows": (
        lambda: llama("Mistral", num_key_value_heads=2, sliding_window=9),
        {"horizon": 8, "segment_length": 1},
    ),
    "qwen2": (lambda: llama("Qwen2", num_key_value_heads=2), {}),
    "qwen3": (lambda: llama("Qwen3", num_key_value_heads=2, head_dim=12), {}),
    "gpt-neox": (lambda: transformers_model("GPTNeoX", **(SMALL | {"num_attention_heads": 2})), {}),
    "gpt2": (lambda: transformers_model("GPT2", **GPT2), {}),
    "nanogpt": (lambda: (NanoGPT(V, d=32, n_heads=4, n_layers=2, block_size=T, bias=True), NANOGPT), {}),
    "aria": (lambda: (Aria(V, d=128, n_heads=2, n_layers=2), None), {}),
    "x-transformers": (lambda: x_transformer(rotary_pos_emb=True, attn_kv_heads=2), {}),
    "x-transformers, GLU, RMS": (
        lambda: x_transformer(rotary_pos_emb=True, ff_glu=True, ff_swish=True, ff_no_bias=True, use_rmsnorm=True),
        {"activation": "silu"},
    ),
    "x-transformers, positions, one head": (
        lambda: x_transformer(heads=1, attn_project_out=True, ff_custom_activation=torch.nn.GELU("tanh")),
        {"n_heads": 1, "activation": "gelu_tanh"},
    ),
    "x-transformers, tied": (
        lambda: x_transformer(tie=True, rotary_pos_emb=True),
        {"families": [family_named("x-transformers")]},
    ),
    "x-transformers, plain gains": (lambda: x_transformer(rotary_pos_emb=True, norm_add_unit_offset=False), {}),
    "dsmr": (lambda: (reference.DSMR(LONG), asdict(LONG)), {}),
}


def prepared(case: str):
    """Return the program with random weights, the converted MLX model, and the rebuilt original."""
    make, options = CASES[case]
    program, stated = make()
    source = MemorySource(randomise(program).state_dict(), stated)
    model, _ = converted(source, **options)
    family, prefix = find_family(source, options.get("families", FAMILIES))
    return program, model, original_of(family, source, prefix, model.config)


def tokens_for(model: DSMR, length: int = T) -> np.ndarray:
    """Return random tokens `(2, length)`."""
    return random_tokens(model.config, length)


def llama_folder(folder, dtype=torch.float32):
    """Write a Hugging Face folder with a random Llama. Return the folder and the Llama."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    model, config = llama()
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in randomise(model).state_dict().items()}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype), "auto_map": {"AutoModel": "x.Y"}}))
    return folder, model.to(dtype).float()
