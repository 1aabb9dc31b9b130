"""The original of a conversion: the PyTorch program that the weights were made for, to compare the MLX model with.

It is filled with the stored tensors under their stored names. Rules and transforms of the conversion have no part in
it, else a comparison would prove nothing. Needs torch, and the package of the family.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.convert.rules import Family, Tensors
from dsmr_mlx.convert.stored import OTHERWISE, Stored
from dsmr_mlx.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    Run = Callable[[Tensor], tuple[list[Tensor], Tensor, Tensor | None]]


class Activations(NamedTuple):
    """What a model computes for tokens `[B, T]`, all float32.

    hidden  `[B, T, d_model]` after each block
    logits  `[B, T, V]`
    normed  `[B, T, d_model]` after the final norm; None where original and conversion share the work differently
    """

    hidden: list[np.ndarray]
    logits: np.ndarray
    normed: np.ndarray | None = None


@dataclass(frozen=True)
class Original:
    """A PyTorch model in float32 and evaluation mode, called with integer tokens `[B, T]`; `name` is for the user."""

    name: str
    run: "Run"

    def __call__(self, tokens: np.ndarray) -> Activations:
        import torch

        with torch.no_grad():
            hidden, logits, normed = self.run(torch.from_numpy(np.asarray(tokens, np.int64)))
        return Activations([x.numpy() for x in hidden], logits.numpy(), None if normed is None else normed.numpy())


def original_of(family: Family, source: Tensors, prefix: str, config: ModelConfig) -> Original:
    """The original of a source of this family, whose names begin with `prefix`.

    Its settings are those that the source states. `config`, that of the conversion, makes up for what a family never
    states: Aria's and nanoGPT's heads, nanoGPT's GELU, and what x-transformers' options change without a trace in the
    weights. Raises `UserError` if a package is missing, the settings are not stated, or the weights do not fit.
    """
    if family.original is None:
        raise UserError(f"--verify: the original of {family.name} is not known, expected --verify reference.npz")
    _package("torch", "'dsmr-mlx[convert]'")
    return ORIGINALS[family.original](family.name, Stored(source, prefix), config)


def within(config: ModelConfig, length: int) -> ModelConfig:
    """The same computation for streams that end after `length` tokens, in memory that no longer horizon makes larger.

    S is cut to the length, and every M_l to the segments that come before the last token's.
    """
    S = min(config.segment_length, length)
    return replace(
        config, segment_length=S, horizons=[min(horizon, S * (-(-length // S))) for horizon in config.horizons]
    )


def _package(name: str, requirement: str | None = None) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"--verify: expected pip install {requirement or name}, {OTHERWISE}") from None


def _watched(
    blocks: Sequence["nn.Module"], norm: "nn.Module | None", logits_of: Callable[["Tensor"], "Tensor"]
) -> "Run":
    """What modules put out while `logits_of` runs; what they put out in several calls is joined over the tokens."""

    def run(tokens: "Tensor") -> tuple[list["Tensor"], "Tensor", "Tensor | None"]:
        import torch

        def keep_in(seen: list) -> Callable:
            return lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)

        watched = [*blocks] if norm is None else [*blocks, norm]
        seen: list[list[Tensor]] = [[] for _ in watched]
        hooks = [module.register_forward_hook(keep_in(parts)) for module, parts in zip(watched, seen, strict=True)]
        try:
            logits = logits_of(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        outputs = [torch.cat(parts, dim=1) for parts in seen]
        return outputs[: len(blocks)], logits, None if norm is None else outputs[-1]

    return run


def _dsmr(family: str, stored: Stored, config: ModelConfig) -> Original:
    """With its own horizons, which need not be those of the conversion."""
    import torch

    from dsmr_mlx.convert import reference

    stated = stored.source.config
    own = ModelConfig.from_dict(stated, str(stored.source.path)) if "vocab_size" in stated else config
    model = reference.DSMR(own).eval()
    stored.fill(model)

    def logits_of(tokens: "Tensor") -> "Tensor":
        model.config = within(own, tokens.shape[1])
        return model(tokens)[0]

    run = _watched(model.layers, model.norm, logits_of)
    return Original(f"dsmr_mlx.convert.reference, torch {torch.__version__}", run)


class Kept(NamedTuple):
    """The names of transformers' classes for a model_type, and where the model keeps its parts."""

    config: str
    model: str
    body: str
    blocks: str = "layers"
    norm: str = "norm"
    sizes: tuple[str, ...] = ("hidden_size", "num_hidden_layers", "num_attention_heads")


TRANSFORMERS = {
    "llama": Kept("LlamaConfig", "LlamaForCausalLM", "model."),
    "mistral": Kept("MistralConfig", "MistralForCausalLM", "model."),
    "qwen2": Kept("Qwen2Config", "Qwen2ForCausalLM", "model."),
    "gpt_neox": Kept("GPTNeoXConfig", "GPTNeoXForCausalLM", "gpt_neox.", norm="final_layer_norm"),
    "gpt2": Kept("GPT2Config", "GPT2LMHeadModel", "transformer.", "h", "ln_f", ("n_embd", "n_layer", "n_head")),
}
HEADS = ("lm_head.weight", "embed_out.weight")  # GPT-NeoX's since transformers 5, and before


def _transformers(family: str, stored: Stored, config: ModelConfig) -> Original:
    """A class of transformers by its model_type, with what config.json states; code of the folder is never run."""
    path, stated = stored.source.path, stored.source.config
    if not stated:
        raise UserError(f"{path}: --verify: no config.json, expected it beside the weights, {OTHERWISE}")
    kind = stated.get("model_type", family.replace("-", "_"))
    if kind not in TRANSFORMERS:
        raise UserError(f"{path}: model_type = {kind!r}: expected one of {', '.join(TRANSFORMERS)}, {OTHERWISE}")
    transformers, kept = _package("transformers"), TRANSFORMERS[kind]
    stored.leave_out(kept.body)
    # What is not stated has the sizes of a large model.
    if missing := [name for name in kept.sizes if stated.get(name) is None]:
        where = f"{path}: --verify: its {stored.source.config_name}"
        raise UserError(f"{where} does not say {', '.join(missing)}, expected them there, {OTHERWISE}")
    model = _filled(transformers, kept, stored)
    base = model.get_submodule(kept.body.removesuffix("."))
    blocks, norm = (base.get_submodule(name) for name in (kept.blocks, kept.norm))
    run = _watched(blocks, norm, lambda tokens: model(tokens, use_cache=False).logits)
    return Original(f"transformers {transformers.__version__} {kept.model}", run)


def _filled(transformers: Any, kept: Kept, stored: Stored) -> "nn.Module":
    """The model with the stored weights, float32. Raises `UserError` for what transformers refuses."""
    import torch

    left_out = ("auto_map", "quantization_config", "dtype", "torch_dtype")
    stated = {name: value for name, value in stored.source.config.items() if name not in left_out}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))  # they play no part, and may be out of range
    stated |= ids | {"tie_word_embeddings": not any(name in stored for name in HEADS)}

    def build() -> "nn.Module":
        with _quiet(transformers):
            try:
                config_class, model_class = (getattr(transformers, name) for name in (kept.config, kept.model))
                config = config_class.from_dict(stated, attn_implementation="eager")
                if (layers := config.num_hidden_layers) > (there := stored.count(rf"{kept.blocks}\.(\d+)\.")):
                    raise ValueError(f"{layers} layers, the weights have {there}")
                return model_class(config).float().eval()
            except Exception as error:  # its checks and constructors raise all kinds for a bad configuration
                reason = " ".join(str(error).split())
                refused = f"transformers refuses its {stored.source.config_name} ({reason})"
                raise stored.error(refused) from None

    with torch.device("meta"):  # before memory is taken for what may be of other sizes than the weights
        empty = build()
    (head,) = (name for name in HEADS if name in empty.state_dict())
    stored.names = {head if name in HEADS else name: there for name, there in stored.names.items()}
    stored.check(empty, kept.body)
    model = build()
    stored.fill(model, kept.body)
    return model


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' warnings."""
    log = transformers.utils.logging
    verbosity = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)


FREQUENCIES = "attn_layers.rotary_pos_emb.inv_freq"
POSITIONS = "pos_emb.emb.weight"
THE_VERSION = "the version that trained it"


def _x_transformers(family: str, stored: Stored, config: ModelConfig) -> Original:
    """A `TransformerWrapper` with the options that show in the weights, and for the others those of the conversion."""
    package = _package("x_transformers.x_transformers", "x-transformers")
    version = f"x-transformers {metadata.version('x-transformers')}"
    if config.rope_dims and _rotates_neighbours(package) != config.rope_interleaved:
        raise stored.error(f"{version} rotates other pairs than {family}", THE_VERSION)
    try:
        layers = package.Decoder(**_decoder_options(package, family, stored, config))
        model = package.TransformerWrapper(attn_layers=layers, **_wrapper_options(package, family, stored))
    except (TypeError, AssertionError) as error:  # for options that this version has not
        raise stored.error(f"{version} has no such model ({error})", THE_VERSION) from None
    model = model.float().eval()
    stored.fill(model)
    residuals = [parts[2] for parts in model.attn_layers.layers[1::2]]
    # In a tied model the conversion puts the scale of the logits into the gain of the norm.
    norm = model.attn_layers.final_norm if "to_logits.weight" in stored else None
    assumed = f"{family}, n_heads = {config.n_heads}, activation = {config.activation}"
    return Original(f"{version} (taken for {assumed})", _watched(residuals, norm, model))


def _decoder_options(package: Any, family: str, stored: Stored, config: ModelConfig) -> dict[str, Any]:
    attention, feed_forward = (f"attn_layers.layers.{i}.1" for i in (0, 1))
    dim, inner = stored.shape(f"{feed_forward}.ff.2.weight")
    kv_heads = stored.shape(f"{attention}.to_k.weight")[0] // config.head_dim
    options = {
        "dim": dim,
        "depth": stored.count(r"attn_layers\.layers\.(\d+)\.") // 2,
        "heads": config.n_heads,
        "attn_dim_head": config.head_dim,
        "ff_mult": (inner + 0.5) / dim,  # the product with the width is cut to an integer
        "ff_glu": f"{feed_forward}.ff.0.proj.weight" in stored,
        "ff_no_bias": f"{feed_forward}.ff.2.bias" not in stored,
        "ff_swish": config.activation == "silu",
        "use_rmsnorm": "attn_layers.final_norm.g" in stored,
        "rotary_pos_emb": FREQUENCIES in stored,
    }
    if kv_heads != config.n_heads:
        options["attn_kv_heads"] = kv_heads
    if config.n_heads == 1 and _takes(package.Attention, "project_out"):
        options["attn_project_out"] = True
    if config.activation not in ("gelu", "silu"):
        options["ff_custom_activation"] = _activation(config)
    if FREQUENCIES in stored:
        options["rotary_emb_dim"] = 2 * stored.shape(FREQUENCIES)[0]
        options |= {"disable_abs_pos_emb": False} if POSITIONS in stored else {}
    if config.rope_scaling is not None:
        options["rotary_interpolation_factor"] = config.rope_scaling["factor"]
    has_offset = family in ("x-transformers", "x-transformers-1.31")
    if _takes(package.AttentionLayers, "norm_add_unit_offset"):
        options["norm_add_unit_offset"] = has_offset
    elif has_offset:
        raise stored.error("the installed x-transformers does not store the gains of norms minus 1", THE_VERSION)
    return options | ({"verbose": False} if _takes(package.AttentionLayers, "verbose") else {})


def _wrapper_options(package: Any, family: str, stored: Stored) -> dict[str, Any]:
    from torch import nn

    n_tokens, dim = stored.shape("token_emb.emb.weight")
    has_positions, scaled = POSITIONS in stored, family == "x-transformers"
    options = {
        "num_tokens": n_tokens,
        "max_seq_len": stored.shape(POSITIONS)[0] if has_positions else 1,
        "use_abs_pos_emb": has_positions,
        "tie_embedding": "to_logits.weight" not in stored,
    }
    if "to_logits.bias" in stored and _takes(package.TransformerWrapper, "to_logits"):
        options["to_logits"] = nn.Linear(dim, n_tokens)
    if options["tie_embedding"] and _takes(package.TransformerWrapper, "tie_embedding_scale"):
        options["tie_embedding_scale"] = dim**-0.5 if scaled else 1.0
    elif options["tie_embedding"] and scaled:
        raise stored.error("the installed x-transformers does not scale the logits of a tied head", THE_VERSION)
    return options


def _takes(module_class: type, option: str) -> bool:
    return option in inspect.signature(module_class.__init__).parameters


def _activation(config: ModelConfig) -> "nn.Module":
    from torch import nn

    return {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU()}[config.activation]


def _rotates_neighbours(package: Any) -> bool:
    """Versions up to 1.30.0 rotate the halves of a head, (x0, x1, x2, x3) → (-x2, -x3, x0, x1)."""
    import torch

    return package.rotate_half(torch.arange(4.0))[0].item() == -1


def _aria(family: str, stored: Stored, config: ModelConfig) -> Original:
    """Its forward pass, as EleutherAI/aria has it in `aria/model.py`; there is no package of it to install."""
    import torch
    from torch import Tensor
    from torch.nn import functional as F

    stated = stored.source.config
    n_heads = stated.get("n_heads", stated.get("num_attention_heads", config.n_heads))
    stored.leave_out("model.")
    n_layers = stored.count(r"encode_layers\.(\d+)\.")

    def rotated(x: Tensor) -> Tensor:
        """`[B, H, T, D]`: the halves of a head are the two coordinates."""
        T, D = x.shape[-2:]
        periods = 500_000.0 ** (torch.arange(0, D, 2, dtype=torch.float64) / D)
        angles = torch.arange(T, dtype=torch.float64)[:, None] / periods  # (T, D / 2)
        cosine, sine = angles.cos().float(), angles.sin().float()
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], stored[f"{name}.weight"], stored[f"{name}.bias"], 1e-5)

    def block(x: Tensor, layer: str) -> Tensor:
        qkv = F.linear(norm(x, f"{layer}.norm1"), stored[f"{layer}.mixed_qkv.weight"])
        q, k, v = (_heads(part, n_heads) for part in qkv.chunk(3, dim=-1))
        x = x + F.linear(_attention(rotated(q), rotated(k), v), stored[f"{layer}.att_proj_linear.weight"])
        y = norm(x, f"{layer}.norm2")
        gate, up = (F.linear(y, stored[f"{layer}.ff_{name}_proj.weight"]) for name in ("gate", "up"))
        return x + F.linear(F.silu(gate) * up, stored[f"{layer}.ff_down_proj.weight"])

    def run(tokens: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        x, hidden = F.embedding(tokens, stored["tok_embeddings.weight"]), []
        for i in range(n_layers):
            x = block(x, f"encode_layers.{i}")
            hidden.append(x)
        normed = norm(x, "out_layer_norm")
        return hidden, F.linear(normed, stored["lm_head.weight"]), normed

    return Original(f"Aria written out in torch {torch.__version__}", run)


def _nanogpt(family: str, stored: Stored, config: ModelConfig) -> Original:
    """Its forward pass, as karpathy/nanoGPT has it in `model.py`; there is no package of it to install."""
    import torch
    from torch import Tensor
    from torch.nn import functional as F

    n_heads = stored.source.config.get("n_head", config.n_heads)
    stored.leave_out("transformer.")
    n_layers, activation = stored.count(r"h\.(\d+)\."), _activation(config)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], stored[f"{name}.weight"], stored.optional(f"{name}.bias"), 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, stored[f"{name}.weight"], stored.optional(f"{name}.bias"))

    def block(x: Tensor, layer: str) -> Tensor:
        qkv = linear(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn")
        x = x + linear(_attention(*(_heads(part, n_heads) for part in qkv.chunk(3, dim=-1))), f"{layer}.attn.c_proj")
        return x + linear(activation(linear(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")), f"{layer}.mlp.c_proj")

    def run(tokens: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        x, hidden = F.embedding(tokens, stored["wte.weight"]) + stored["wpe.weight"][: tokens.shape[1]], []
        for i in range(n_layers):
            x = block(x, f"h.{i}")
            hidden.append(x)
        normed = norm(x, "ln_f")
        head = "lm_head.weight" if "lm_head.weight" in stored else "wte.weight"
        return hidden, F.linear(normed, stored[head]), normed

    return Original(f"nanoGPT written out in torch {torch.__version__}", run)


def _heads(x: "Tensor", n_heads: int) -> "Tensor":
    """`[B, T, H D]` → `[B, H, T, D]`."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def _attention(q: "Tensor", k: "Tensor", v: "Tensor") -> "Tensor":
    """Causal, of `[B, H, T, D]` → `[B, T, H D]`."""
    from torch.nn import functional as F

    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


ORIGINALS: dict[str, Callable[[str, Stored, ModelConfig], Original]] = {
    "dsmr": _dsmr,
    "aria": _aria,
    "llama": _transformers,
    "gpt-neox": _transformers,
    "gpt2": _transformers,
    "nanogpt": _nanogpt,
    "x-transformers": _x_transformers,
}
