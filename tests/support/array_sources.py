"""In-memory sources with random weights, to test maps and plans without torch or files."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from dsmr_mlx import ModelConfig
from dsmr_mlx.convert.families import FAMILIES
from dsmr_mlx.convert.mapping import configure, find_family, plan

V, D_MODEL, D_FF = 11, 8, 12

# Two layers, four heads of two for queries, two for keys and values.
CONFIG = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D_MODEL,
    "intermediate_size": D_FF,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Arrays:
    """A source in memory that records the names of the tensors read."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], config: dict | None = None, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.path = Path("weights.pt")
        self.config = config or {}
        self.config_name = "config.json"
        self.shapes = dict(shapes)
        self.values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        self.names_read: list[str] = []

    def read(self, name: str) -> mx.array:
        """Return a tensor and record its name."""
        self.names_read.append(name)
        return mx.array(self.values[name])


def llama_shapes(prefix: str = "", n_layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Return the tensor shapes of a Llama model."""
    layer = {
        "self_attn.q_proj": (8, D_MODEL),
        "self_attn.k_proj": (4, D_MODEL),
        "self_attn.v_proj": (4, D_MODEL),
        "self_attn.o_proj": (D_MODEL, 8),
        "mlp.gate_proj": (D_FF, D_MODEL),
        "mlp.up_proj": (D_FF, D_MODEL),
        "mlp.down_proj": (D_MODEL, D_FF),
        "input_layernorm": (D_MODEL,),
        "post_attention_layernorm": (D_MODEL,),
    }
    shapes = {"model.embed_tokens.weight": (V, D_MODEL)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(n_layers) for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (D_MODEL,), "lm_head.weight": (V, D_MODEL)}
    return {prefix + name: shape for name, shape in shapes.items()}


def gpt2_shapes(qkv: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Return the tensor shapes of a GPT-2 model with this shape of its fused projection."""
    d = D_MODEL
    layer = {"attn.c_attn": qkv, "attn.c_proj": (d, d), "mlp.c_fc": (d, d), "mlp.c_proj": (d, d)}
    layer |= {"ln_1": (d,), "ln_2": (d,)}
    shapes = {"transformer.wte.weight": (V, d), "transformer.wpe.weight": (16, d), "transformer.ln_f.weight": (d,)}
    shapes |= {f"transformer.h.0.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"lm_head.weight": (V, d)}


def x_transformers(norm: str, gain: float, head: bool = True, rotary: bool = True, **more: tuple[int, ...]) -> Arrays:
    """Return a source in the format of x-transformers; norm: name of the norms' weight, gain: its mean."""
    d, layers = D_MODEL, "attn_layers.layers"
    shapes = {f"{layers}.0.1.to_{n}.weight": (64, d) for n in "qkv"} | {f"{layers}.0.1.to_out.weight": (d, 64)}
    shapes |= {"token_emb.emb.weight": (V, d), f"{layers}.1.1.ff.0.0.weight": (D_FF, d)}
    shapes |= {f"{layers}.1.1.ff.2.weight": (d, D_FF)} | ({"to_logits.weight": (V, d)} if head else {})
    norms = [f"{n}.{norm}" for n in (f"{layers}.0.0.0", f"{layers}.1.0.0", "attn_layers.final_norm")]
    shapes |= dict.fromkeys(norms, (d,)) | {f"attn_layers.{n.replace('_x_', '.')}": s for n, s in more.items()}
    source = Arrays(shapes | ({"attn_layers.rotary_pos_emb.inv_freq": (16,)} if rotary else {}))
    source.values["attn_layers.rotary_pos_emb.inv_freq"] = 10_000 ** (-np.arange(16, dtype=np.float32) / 16)
    source.values |= {name: gain + 0.1 * source.values[name] for name in norms}
    return source


def planned(source: Arrays, allow_unused=(), families=FAMILIES, **options):
    """Return the configuration and the conversion plan of a source."""
    family, prefix = find_family(source, families, allow_unused)
    config = ModelConfig.from_dict(configure(family, prefix, source, options).fields)
    return config, plan(family, prefix, source, config, allow_unused)
