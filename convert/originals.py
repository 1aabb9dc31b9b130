"""Originals: the PyTorch models that the weights were made for, against which a conversion is verified.

An original is loaded with the stored tensors under their stored names, independently of the rules and transforms of the
conversion: otherwise a comparison would prove nothing. Needs torch and the package of the family.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.convert.rules import Family
from dsmr_mlx.convert.state_dict import OR_LOGITS, StateDict
from dsmr_mlx.convert.weights_source import WeightsSource
from dsmr_mlx.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    Run = Callable[[Tensor], tuple[list[Tensor], Tensor, Tensor | None]]


class Activations(NamedTuple):
    """Activations of a model for tokens `(B, T)`, all float32.

    hidden  `(B, T, d_model)` after each block
    logits  `(B, T, V)`
    normed  `(B, T, d_model)` after the final norm; None if the original splits norm and head differently
    """

    hidden: list[np.ndarray]
    logits: np.ndarray
    normed: np.ndarray | None = None


@dataclass(frozen=True)
class Original:
    """A PyTorch model in float32 and evaluation mode, with a name for the user. Call it with integers `(B, T)`."""

    name: str
    run: "Run"

    def __call__(self, tokens: np.ndarray) -> Activations:
        import torch

        with torch.no_grad():
            hidden, logits, normed = self.run(torch.from_numpy(np.asarray(tokens, np.int64)))
        return Activations([x.numpy() for x in hidden], logits.numpy(), None if normed is None else normed.numpy())


def original_of(family: Family, source: WeightsSource, prefix: str, config: ModelConfig) -> Original:
    """Rebuild the original of a source of this family, whose names begin with `prefix`.

    Its settings are those of the source. `config`, of the conversion, adds what a family never stores: heads of Aria
    and nanoGPT, the GELU of nanoGPT, and options of x-transformers that are not visible in the weights.

    Raises `UserError` if a package is missing, settings are missing, or the weights do not fit.
    """
    if family.original is None:
        raise UserError(f"the original of {family.name} is unknown, expected `logits_file` reference.npz")
    _import_package("torch", "'dsmr-mlx[convert]'")
    return ORIGINALS[family.original](family.name, StateDict(source, prefix), config)


def within(config: ModelConfig, length: int) -> ModelConfig:
    """Return a configuration with the same results for streams of `length` tokens, and only the memory they need.

    S is at most the length, and every M_l at most the tokens of the segments that the stream fills or begins.
    """
    S = min(config.segment_length, length)
    longest = S * (-(-length // S))  # rounded up to whole segments
    return replace(config, segment_length=S, horizons=[min(horizon, longest) for horizon in config.horizons])


def _import_package(name: str, requirement: str | None = None) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"verifying needs pip install {requirement or name}, {OR_LOGITS}") from None


def _recorded(
    blocks: Sequence["nn.Module"], norm: "nn.Module | None", logits_of: Callable[["Tensor"], "Tensor"]
) -> "Run":
    """Record the outputs of modules while `logits_of` runs; the outputs of several calls are joined over the tokens."""

    def run(tokens: "Tensor") -> tuple[list["Tensor"], "Tensor", "Tensor | None"]:
        import torch

        def append_to(parts: list) -> Callable:
            return lambda module, inputs, output: parts.append(output[0] if isinstance(output, tuple) else output)

        modules = [*blocks] if norm is None else [*blocks, norm]
        recorded: list[list[Tensor]] = [[] for _ in modules]
        hooks = [module.register_forward_hook(append_to(p)) for module, p in zip(modules, recorded, strict=True)]
        try:
            logits = logits_of(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        outputs = [torch.cat(parts, dim=1) for parts in recorded]
        return outputs[: len(blocks)], logits, None if norm is None else outputs[-1]

    return run


def _dsmr(family: str, weights: StateDict, config: ModelConfig) -> Original:
    """The reference with its stored horizons, which may differ from those of the conversion."""
    import torch

    from dsmr_mlx.convert import reference

    stated = weights.source.config
    own = ModelConfig.from_dict(stated, str(weights.source.path)) if "vocab_size" in stated else config
    model = reference.DSMR(own).eval()
    weights.load_into(model)

    def run(tokens: "Tensor") -> tuple[list["Tensor"], "Tensor", "Tensor | None"]:
        fitting = reference.DSMR(within(own, tokens.shape[1])).eval()
        fitting.load_state_dict(model.state_dict(), assign=True)
        return _recorded(fitting.layers, fitting.norm, lambda tokens: fitting(tokens)[0])(tokens)

    return Original(f"dsmr_mlx.convert.reference, torch {torch.__version__}", run)


class ModelClass(NamedTuple):
    """Classes of transformers for a model_type, the names of submodules, and the required keys of config.json."""

    config: str
    model: str
    body: str
    blocks: str = "layers"
    norm: str = "norm"
    sizes: tuple[str, ...] = ("hidden_size", "num_hidden_layers", "num_attention_heads")


TRANSFORMERS = {
    "llama": ModelClass("LlamaConfig", "LlamaForCausalLM", "model."),
    "mistral": ModelClass("MistralConfig", "MistralForCausalLM", "model."),
    "qwen2": ModelClass("Qwen2Config", "Qwen2ForCausalLM", "model."),
    "qwen3": ModelClass("Qwen3Config", "Qwen3ForCausalLM", "model."),
    "gpt_neox": ModelClass("GPTNeoXConfig", "GPTNeoXForCausalLM", "gpt_neox.", norm="final_layer_norm"),
    "gpt2": ModelClass("GPT2Config", "GPT2LMHeadModel", "transformer.", "h", "ln_f", ("n_embd", "n_layer", "n_head")),
}
HEADS = ("lm_head.weight", "embed_out.weight")  # the latter in GPT-NeoX before transformers 5


def _transformers(family: str, weights: StateDict, config: ModelConfig) -> Original:
    """A class of transformers by its model_type, configured by config.json. Code in the folder is never executed."""
    stated = weights.source.config
    if not stated:
        raise weights.error("no config.json", "it beside the weights")
    kind = stated.get("model_type", family.replace("-", "_"))
    if kind not in TRANSFORMERS:
        raise weights.error(f"model_type = {kind!r}", f"one of {', '.join(TRANSFORMERS)}")
    transformers, classes = _import_package("transformers"), TRANSFORMERS[kind]
    weights.remove_prefix(classes.body)
    # The defaults are the sizes of a large model.
    if missing := [name for name in classes.sizes if stated.get(name) is None]:
        raise weights.error(f"its {weights.source.config_name} lacks {', '.join(missing)}", "these entries")
    model = _load_model(transformers, classes, weights)
    base = model.get_submodule(classes.body.removesuffix("."))
    blocks, norm = (base.get_submodule(name) for name in (classes.blocks, classes.norm))
    run = _recorded(blocks, norm, lambda tokens: model(tokens, use_cache=False).logits)
    return Original(f"transformers {transformers.__version__} {classes.model}", run)


def _load_model(transformers: Any, classes: ModelClass, weights: StateDict) -> "nn.Module":
    """Return the model with the stored weights, float32. Raises `UserError` if transformers refuses its config."""
    import torch

    skipped = ("auto_map", "quantization_config", "dtype", "torch_dtype")
    stated = {name: value for name, value in weights.source.config.items() if name not in skipped}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))  # unused, and may be out of range
    stated |= ids | {"tie_word_embeddings": not any(name in weights for name in HEADS)}

    def build() -> "nn.Module":
        with _quiet(transformers):
            try:
                config_class, model_class = (getattr(transformers, name) for name in (classes.config, classes.model))
                config = config_class.from_dict(stated, attn_implementation="eager")
                if (layers := config.num_hidden_layers) > (found := weights.count(rf"{classes.blocks}\.(\d+)\.")):
                    raise ValueError(f"{layers} layers, the weights have {found}")
                return model_class(config).float().eval()
            except Exception as error:  # constructors raise any type for an invalid configuration
                reason = " ".join(str(error).split())
                raise weights.error(f"transformers refuses its {weights.source.config_name} ({reason})") from None

    with torch.device("meta"):  # check the sizes before memory is allocated
        empty = build()
    (head,) = (name for name in HEADS if name in empty.state_dict())
    weights.names = {head if name in HEADS else name: stored for name, stored in weights.names.items()}
    weights.check(empty, classes.body)
    model = build()
    weights.load_into(model, classes.body)
    return model


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Suppress the warnings of transformers."""
    log = transformers.utils.logging
    verbosity = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)


FREQUENCIES = "attn_layers.rotary_pos_emb.inv_freq"
POSITIONS = "pos_emb.emb.weight"
ROUNDED = 1e-2  # relative error of frequencies in bfloat16, twice: theirs, and that of a base read from them
VERSION_EXPECTED = "the version that trained it"


def _x_transformers(family: str, weights: StateDict, config: ModelConfig) -> Original:
    """A `TransformerWrapper` with the options that are visible in the weights, else those of the conversion."""
    package = _import_package("x_transformers.x_transformers", "x-transformers")
    version = f"x-transformers {metadata.version('x-transformers')}"
    if config.rope_dims and _rotates_neighbours(package) != config.rope_interleaved:
        raise weights.error(f"{version} rotates other pairs than {family}", VERSION_EXPECTED)
    try:
        layers = package.Decoder(**_decoder_options(package, family, weights, config))
        model = package.TransformerWrapper(attn_layers=layers, **_wrapper_options(package, family, weights))
    except (TypeError, AssertionError) as error:  # options that this version lacks
        raise weights.error(f"{version} has no such model ({error})", VERSION_EXPECTED) from None
    model = model.float().eval()
    weights.load_into(model)
    if FREQUENCIES in weights:
        _restore_frequencies(model.get_buffer(FREQUENCIES), config)
    residuals = [parts[2] for parts in model.attn_layers.layers[1::2]]
    # For a tied head, the conversion multiplies the gain of the norm by the scale of the logits.
    norm = model.attn_layers.final_norm if "to_logits.weight" in weights else None
    assumed = f"{family}, n_heads = {config.n_heads}, activation = {config.activation}"
    return Original(f"{version} (as {assumed})", _recorded(residuals, norm, model))


def _restore_frequencies(stored: "Tensor", config: ModelConfig) -> None:
    """Undo the rounding of RoPE frequencies `(rope_dims / 2,)` to 16 bits, if those of the conversion round to them.

    A program that is cast to 16 bits after its training also casts these, and they would turn far positions wrongly.
    """
    import torch

    exact = config.rope_theta ** (-torch.arange(0, config.rope_dims, 2, dtype=torch.float64) / config.rope_dims)
    rounded = any(torch.equal(stored, stored.to(dtype)) for dtype in (torch.bfloat16, torch.float16))
    if rounded and stored.shape == exact.shape and torch.allclose(stored.double(), exact, rtol=ROUNDED, atol=0):
        stored.copy_(exact)


def _decoder_options(package: Any, family: str, weights: StateDict, config: ModelConfig) -> dict[str, Any]:
    attention, feed_forward = (f"attn_layers.layers.{i}.1" for i in (0, 1))
    dim, inner = weights.shape(f"{feed_forward}.ff.2.weight")
    kv_heads = weights.shape(f"{attention}.to_k.weight")[0] // config.head_dim
    options = {
        "dim": dim,
        "depth": weights.count(r"attn_layers\.layers\.(\d+)\.") // 2,
        "heads": config.n_heads,
        "attn_dim_head": config.head_dim,
        "ff_mult": (inner + 0.5) / dim,  # x-transformers truncates ff_mult * dim to an integer
        "ff_glu": f"{feed_forward}.ff.0.proj.weight" in weights,
        "ff_no_bias": f"{feed_forward}.ff.2.bias" not in weights,
        "ff_swish": config.activation == "silu",
        "use_rmsnorm": "attn_layers.final_norm.g" in weights,
        "rotary_pos_emb": FREQUENCIES in weights,
    }
    if kv_heads != config.n_heads:
        options["attn_kv_heads"] = kv_heads
    if config.n_heads == 1 and _takes(package.Attention, "project_out"):
        options["attn_project_out"] = True
    if config.activation not in ("gelu", "silu"):
        options["ff_custom_activation"] = _activation(config)
    if FREQUENCIES in weights:
        options["rotary_emb_dim"] = 2 * weights.shape(FREQUENCIES)[0]
        options |= {"disable_abs_pos_emb": False} if POSITIONS in weights else {}
    if config.rope_scaling is not None:
        options["rotary_interpolation_factor"] = config.rope_scaling["factor"]
    has_offset = family in ("x-transformers", "x-transformers-1.31")
    if _takes(package.AttentionLayers, "norm_add_unit_offset"):
        options["norm_add_unit_offset"] = has_offset
    elif has_offset:
        raise weights.error("the installed x-transformers does not store gains of norms minus 1", VERSION_EXPECTED)
    return options | ({"verbose": False} if _takes(package.AttentionLayers, "verbose") else {})


def _wrapper_options(package: Any, family: str, weights: StateDict) -> dict[str, Any]:
    from torch import nn

    n_tokens, dim = weights.shape("token_emb.emb.weight")
    has_positions, scaled = POSITIONS in weights, family == "x-transformers"
    options = {
        "num_tokens": n_tokens,
        "max_seq_len": weights.shape(POSITIONS)[0] if has_positions else 1,
        "use_abs_pos_emb": has_positions,
        "tie_embedding": "to_logits.weight" not in weights,
    }
    if "to_logits.bias" in weights and _takes(package.TransformerWrapper, "to_logits"):
        options["to_logits"] = nn.Linear(dim, n_tokens)
    if options["tie_embedding"] and _takes(package.TransformerWrapper, "tie_embedding_scale"):
        options["tie_embedding_scale"] = dim**-0.5 if scaled else 1.0
    elif options["tie_embedding"] and scaled:
        raise weights.error("the installed x-transformers does not scale the logits of a tied head", VERSION_EXPECTED)
    return options


def _takes(module_class: type, option: str) -> bool:
    return option in inspect.signature(module_class.__init__).parameters


def _activation(config: ModelConfig) -> "nn.Module":
    from torch import nn

    return {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU()}[config.activation]


def _rotates_neighbours(package: Any) -> bool:
    """Return whether RoPE rotates neighbours. Up to 1.30.0 it rotates halves, (x0, x1, x2, x3) → (-x2, -x3, x0, x1)."""
    import torch

    return package.rotate_half(torch.arange(4.0))[0].item() == -1


def _aria(family: str, weights: StateDict, config: ModelConfig) -> Original:
    """The forward pass of `aria/model.py` in EleutherAI/aria, which is not on PyPI."""
    import torch
    from torch import Tensor
    from torch.nn import functional as F

    stated = weights.source.config
    n_heads = stated.get("n_heads", stated.get("num_attention_heads", config.n_heads))
    weights.remove_prefix("model.")
    layers = [f"encode_layers.{i}" for i in range(weights.count(r"encode_layers\.(\d+)\."))]

    def rotated(x: Tensor) -> Tensor:
        """Apply RoPE to `(B, H, T, D)`; the halves of a head are the two coordinates."""
        T, D = x.shape[-2:]
        periods = 500_000.0 ** (torch.arange(0, D, 2, dtype=torch.float64) / D)
        angles = torch.arange(T, dtype=torch.float64)[:, None] / periods  # (T, D / 2)
        cosine, sine = angles.cos().float(), angles.sin().float()
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def block(x: Tensor, layer: str) -> Tensor:
        qkv = F.linear(norm(x, f"{layer}.norm1"), weights[f"{layer}.mixed_qkv.weight"])
        q, k, v = (_heads(part, n_heads) for part in qkv.chunk(3, dim=-1))
        x = x + F.linear(_attention(rotated(q), rotated(k), v), weights[f"{layer}.att_proj_linear.weight"])
        y = norm(x, f"{layer}.norm2")
        gate, up = (F.linear(y, weights[f"{layer}.ff_{name}_proj.weight"]) for name in ("gate", "up"))
        return x + F.linear(F.silu(gate) * up, weights[f"{layer}.ff_down_proj.weight"])

    def run(tokens: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        _, *hidden = accumulate(layers, block, initial=F.embedding(tokens, weights["tok_embeddings.weight"]))
        normed = norm(hidden[-1], "out_layer_norm")
        return hidden, F.linear(normed, weights["lm_head.weight"]), normed

    return Original(f"Aria in torch {torch.__version__}", run)


def _nanogpt(family: str, weights: StateDict, config: ModelConfig) -> Original:
    """The forward pass of `model.py` in karpathy/nanoGPT, which is not on PyPI."""
    import torch
    from torch import Tensor
    from torch.nn import functional as F

    n_heads = weights.source.config.get("n_head", config.n_heads)
    weights.remove_prefix("transformer.")
    layers = [f"h.{i}" for i in range(weights.count(r"h\.(\d+)\."))]
    activation = _activation(config)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights.optional(f"{name}.bias"), 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.optional(f"{name}.bias"))

    def block(x: Tensor, layer: str) -> Tensor:
        qkv = linear(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn")
        x = x + linear(_attention(*(_heads(part, n_heads) for part in qkv.chunk(3, dim=-1))), f"{layer}.attn.c_proj")
        return x + linear(activation(linear(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")), f"{layer}.mlp.c_proj")

    def run(tokens: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        embedded = F.embedding(tokens, weights["wte.weight"]) + weights["wpe.weight"][: tokens.shape[1]]
        _, *hidden = accumulate(layers, block, initial=embedded)
        normed = norm(hidden[-1], "ln_f")
        head = "lm_head.weight" if "lm_head.weight" in weights else "wte.weight"
        return hidden, F.linear(normed, weights[head]), normed

    return Original(f"nanoGPT in torch {torch.__version__}", run)


def _heads(x: "Tensor", n_heads: int) -> "Tensor":
    """Split `(B, T, H D)` into heads `(B, H, T, D)`."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def _attention(q: "Tensor", k: "Tensor", v: "Tensor") -> "Tensor":
    """Causal attention of `(B, H, T, D)`, returned as `(B, T, H D)`."""
    from torch.nn import functional as F

    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


ORIGINALS: dict[str, Callable[[str, StateDict, ModelConfig], Original]] = {
    "dsmr": _dsmr,
    "aria": _aria,
    "llama": _transformers,
    "gpt-neox": _transformers,
    "gpt2": _transformers,
    "nanogpt": _nanogpt,
    "x-transformers": _x_transformers,
}
