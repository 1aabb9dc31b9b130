"""Convert a checkpoint of another program to a checkpoint folder, tensor by tensor.

source      the tensors of the file or folder              weights_source.py
family      the naming and conventions of the tensors      mapping.py, families/
config      the configuration of the converted model       exactness.py (horizons), heads.py, widening.py, deepening.py
steps       which tensors become which parameter           mapping.py
weights     cast or quantized, written one by one          safetensors_file.py
companions  licence and recommended settings, copied if the source is a checkpoint of this program; an export of one
            stores the licence
record      conversion.json: source, rules and verification
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import contains, sha256, write_atomically
from dsmr_mlx.convert import tokenizer_files
from dsmr_mlx.convert.deepening import with_copies, with_copy
from dsmr_mlx.convert.exactness import (
    DEFAULT_CONTEXT,
    Exactness,
    default_segment,
    exact_horizons,
    exact_tokens,
    spans,
    stated_context,
)
from dsmr_mlx.convert.families import FAMILIES, family_named
from dsmr_mlx.convert.fusing import FusedSource
from dsmr_mlx.convert.heads import average_kv_heads, with_kv_heads
from dsmr_mlx.convert.mapping import configure, find_family, load_map, plan
from dsmr_mlx.convert.rules import Configuration, Family, Step
from dsmr_mlx.convert.safetensors_file import write_safetensors
from dsmr_mlx.convert.weights_source import WeightsSource, open_source
from dsmr_mlx.convert.widening import widen_feed_forward, with_d_ff
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.base import BASE
from dsmr_mlx.model.checkpoint_folder import (
    COMPANIONS,
    LICENCE,
    check_replaceable,
    is_checkpoint_or_run,
    verify_checkpoint,
    write_checkpoint,
)
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.horizons import parse
from dsmr_mlx.model.quantization import is_quantized, quantize_arrays
from dsmr_mlx.tokenizers.aria.tokenizer import AriaTokenizer
from dsmr_mlx.tokenizers.aria.vocabulary import SIZES
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.ids import IdTokenizer
from dsmr_mlx.tokenizers.registry import load_tokenizer, make_tokenizer

RECORD = "conversion.json"
DTYPES = ("float32", "bfloat16", "float16")
BLOCK = 1 << 20  # elements checked at a time
PACKAGES = ("dsmr-mlx", "mlx", "numpy", "torch", "transformers", "x-transformers")


@dataclass(frozen=True)
class Conversion:
    """A planned conversion. Nothing is converted or written yet.

    source      the checkpoint to convert
    family      the family of its tensors
    prefix      the prefix of their names
    config      configuration of the converted model
    unchanged   the same before key/value heads are averaged, feed-forward layers widened, layers copied and weights
                quantized
    copies      numbers of the layers of `unchanged` that are followed by a copy
    steps       one per parameter of `unchanged`, in the order of the source files
    notes       assumptions to show to the user
    exactness   the number of tokens up to which the model equals the original
    dtype       dtype of the written floats
    tokenizer   tokenizer of the ids
    companions  files to copy, see `checkpoint_folder.COMPANIONS`
    options     the user's settings, patterns and map file, to be stored
    """

    source: WeightsSource
    family: Family
    prefix: str
    config: ModelConfig
    unchanged: ModelConfig
    copies: Sequence[int]
    steps: list[Step]
    notes: list[str]
    exactness: Exactness
    dtype: mx.Dtype
    tokenizer: Tokenizer
    companions: list[Path]
    options: dict[str, Any]

    @property
    def compared(self) -> str:
        """The weights that a verification, in float32, compares: as written, or before they change."""
        changes = []
        if self.config.n_kv_heads != self.unchanged.n_kv_heads:
            changes.append(f"averaged to {self.config.n_kv_heads} key/value heads")
        if self.config.d_ff != self.unchanged.d_ff:
            changes.append(f"widened to {self.config.d_ff:,} feed-forward units")
        if self.copies:
            changes.append(f"deepened to {self.config.n_layers} layers")
        stored = {self.source.dtypes[name] for step in self.steps for name in step.sources}
        rounded = stored != {self.dtype} or any(step.computes for step in self.steps)
        if self.dtype != mx.float32 and rounded:
            changes.append(f"cast to {_name(self.dtype)}")
        if self.config.quantization:
            changes.append(f"quantized to {self.config.quantization['bits']} bits")
        return f"the weights before they are {' and '.join(changes)}" if changes else "the weights as written"

    def float32_weights(self) -> Iterator[tuple[str, mx.array]]:
        """Yield the parameters of the model `unchanged` for a verification: float32, before they are cast.

        Raises `UserError` as `final_weights` does.
        """
        for step in self.steps:
            yield step.target, self._convert(step, mx.float32, self.unchanged)

    def final_weights(self) -> Iterator[tuple[str, mx.array]]:
        """Yield the parameters to write, evaluated, one by one.

        Raises `UserError`, which names the tensors, for values that are not finite or out of the range of `dtype`.
        """
        for step in self.steps:
            converted = self._convert(step, self.dtype, self.config)
            for target, array in with_copy(step.target, converted, self.copies):
                if self.config.quantization and is_quantized(target):
                    parts = quantize_arrays(target, array, self.config.quantization)
                else:
                    parts = {target: array}
                mx.eval(parts)
                yield from parts.items()
            del converted, array, parts
            mx.clear_cache()

    def _convert(self, step: Step, dtype: mx.Dtype, config: ModelConfig) -> mx.array:
        array = step.apply([self.source.read(name) for name in step.sources], self.unchanged)
        array = average_kv_heads(step.target, array, self.unchanged, config)
        array = widen_feed_forward(step.target, array, self.unchanged, config)
        array = mx.contiguous(array.astype(dtype))
        mx.eval(array)
        if not _is_finite(array):
            what = f"{self.source.path}: {', '.join(step.sources)}:"
            if all(_is_finite(self.source.read(name)) for name in step.sources):
                wider = "`dtype` bfloat16 or float32" if dtype == mx.float16 else "`dtype` float32"
                raise UserError(f"{what} has values out of the range of {_name(dtype)}, expected {wider}")
            raise UserError(f"{what} has values that are not finite")
        return array

    def layout(self) -> dict[str, tuple[mx.Dtype, tuple[int, ...]]]:
        """Return name → dtype and shape of the tensors of `final_weights`."""
        shapes = {name: (array.dtype, array.shape) for name, array in tree_flatten(DSMR(self.config).parameters())}
        return {name: (dtype if dtype == mx.uint32 else self.dtype, shape) for name, (dtype, shape) in shapes.items()}


def plan_conversion(
    path: str | Path,
    *,
    family: str | None = None,
    map_file: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    allow_unused: Sequence[str] = (),
    horizons: str | None = None,
    segment_length: int | None = None,
    dtype: str | None = None,
    quantization: Mapping[str, int] | None = None,
    kv_heads: int | None = None,
    d_ff: int | None = None,
    copy_layers: Sequence[int] = (),
    tokenizer: str | Path | None = None,
    weights: str | None = None,
    fuse: bool = False,
) -> Conversion:
    """Open a source and plan its conversion: every tensor is assigned to a parameter.

    path:           for `open_source`, or a checkpoint or run of this program (to cast, quantize or change horizons)
    family:         a name in `families`; default: detected from the tensors
    map_file:       a TOML file with rules, instead of a family
    settings:       fields of `ModelConfig` that the source lacks or that override it
    allow_unused:   patterns of names of tensors to leave out
    horizons:       a schedule; default: the horizons of the source, or those with which full attention is exact over
                    the context of the original, see `exactness`
    segment_length: tokens per segment; default: that of the source, or a quarter of the context, at most 512
    dtype:          float32, bfloat16 or float16; default: that of the embedding
    quantization:   {"bits": 4, 6 or 8, "group_size": 32, 64 or 128}
    kv_heads:       average key/value heads to this number, a warm start; default: those of the source
    d_ff:           widen the feed-forward layers to this number of units; the new ones have no effect before training
    copy_layers:    follow these layers by copies, which have the same horizons and no effect before training
    tokenizer:      a name or a folder as in `make_tokenizer`; default: that of the source
    weights:        key of the weights in a file of `torch.save` that holds several, such as "ema"
    fuse:           the source is a checkpoint with adapters, which are added to the weights of its base

    Raises `UserError` for invalid arguments and for unused, missing or misshapen tensors, which it lists.
    """
    source, folder = _open(Path(path), weights, fuse)
    chosen, prefix = find_family(source, _candidates(family, map_file), allow_unused)
    known = configure(chosen, prefix, source, settings)
    config, exactness = _with_horizons(source, known, horizons, segment_length)
    steps = plan(chosen, prefix, source, config, allow_unused)
    _check_floats(source, steps)
    unchanged, config = config, with_copies(with_d_ff(with_kv_heads(config, kv_heads), d_ff), copy_layers)
    return Conversion(
        source=source,
        family=chosen,
        prefix=prefix,
        config=_quantized(config, quantization),
        unchanged=unchanged,
        copies=copy_layers,
        steps=steps,
        notes=[*_left_out(source), *known.notes, *_assumed(exactness)],
        exactness=replace(exactness, averaged=kv_heads is not None),
        dtype=_dtype(dtype, source, steps),
        tokenizer=_tokenizer(tokenizer, source, folder, chosen, config.vocab_size),
        companions=[folder / name for name in COMPANIONS if (folder / name).is_file()] if folder else [],
        options=_options(settings, allow_unused, map_file),
    )


def write_conversion(
    conversion: Conversion,
    out: str | Path,
    *,
    verification: dict[str, Any] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the checkpoint folder `out`, completely or not at all. Return its path.

    verification: for the record, see `Verification.to_dict`
    force:        replace an existing checkpoint
    progress:     called with the number of written tensors and the total

    Raises `UserError` as `check_out` and `Conversion.final_weights` do.
    """
    # Resolved, because the current folder may be replaced.
    out = Path(out).resolve()
    layout = conversion.layout()

    def tensors() -> Iterator[tuple[str, mx.array]]:
        done = count(1)
        for name, array in conversion.final_weights():
            yield name, array
            del array  # free it before the next one is made
            if progress:
                progress(next(done), len(layout))

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(conversion.config.to_json(), encoding="utf-8")
        write_safetensors(folder / "model.safetensors", tensors(), layout)
        conversion.tokenizer.save(folder / "tokenizer")
        if conversion.source.licence is not None:
            write_atomically(folder / LICENCE, conversion.source.licence)
        for path in conversion.companions:
            shutil.copyfile(path, folder / path.name)
        record = json.dumps(make_record(conversion, verification), indent=2) + "\n"
        (folder / RECORD).write_text(record, encoding="utf-8")

    for path in (conversion.source.path, *conversion.source.files):
        check_out(path, out, force)
    write_checkpoint(out, write, replace=force)
    return out


def check_out(source: str | Path, out: str | Path, force: bool) -> None:
    """Raise `UserError` if `out` is, contains or lies in the source, or exists and may not be replaced."""
    if contains(source, out) or contains(out, source):
        raise UserError(f"{out}: is, contains or lies in the source, expected another folder")
    check_replaceable(out, force)


def make_record(conversion: Conversion, verification: dict[str, Any] | None) -> dict[str, Any]:
    """Return the record of a conversion as JSON values, to be written beside the weights."""
    return {
        "source": str(conversion.source.path),
        "sha256": conversion.source.sha256(),
        "entry": conversion.source.entry,
        "family": conversion.family.name,
        "prefix": conversion.prefix,
        "map": [
            {"from": list(step.sources), "to": step.target, "transform": step.transform} for step in conversion.steps
        ],
        **conversion.options,
        "notes": conversion.notes,
        "exact_tokens": 0 if conversion.exactness.averaged else conversion.exactness.tokens,
        "context": conversion.exactness.context,
        "warm_start": conversion.exactness.warm_start,
        "dtype": _name(conversion.dtype),
        "quantization": conversion.config.quantization,
        "kv_heads": {"from": conversion.unchanged.n_kv_heads, "to": conversion.config.n_kv_heads},
        "d_ff": {"from": conversion.unchanged.d_ff, "to": conversion.config.d_ff},
        "copy_layers": list(conversion.copies),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "verification": verification and {"compared": conversion.compared} | verification,
    }


def _open(path: Path, weights: str | None, fuse: bool) -> tuple[WeightsSource, Path | None]:
    """Return the source, and its folder if it is a checkpoint or run of this program."""
    if path.is_dir() and is_checkpoint_or_run(path):
        folder = checkpoint.resolve(path)
        verify_checkpoint(folder)
        adapters = (folder / BASE).is_file()
        if adapters and not fuse:
            raise UserError(f"{path}: holds adapters only; `fuse` adds them to the weights of their base")
        if adapters:
            return FusedSource(folder), folder
        if not fuse:
            return open_source(folder, weights), folder
    if fuse:
        raise UserError(f"`fuse` {path}: holds no adapters, expected a run with lora_rank or its checkpoint")
    return open_source(path, weights), None


def _candidates(name: str | None, map_file: str | Path | None) -> Sequence[Family]:
    """Return the families to try."""
    if name is not None and map_file is not None:
        raise UserError("`family` and `map_file`: expected only one")
    if map_file is not None:
        return [load_map(map_file)]
    return FAMILIES if name is None else [family_named(name)]


def _with_horizons(
    source: WeightsSource, known: Configuration, horizons: str | None, segment_length: int | None
) -> tuple[ModelConfig, Exactness]:
    """Return the model with the given horizons, else those of the source, else those exact over its context."""
    if segment_length is not None and segment_length < 1:
        raise UserError(f"`segment_length` {segment_length}: expected at least 1")
    if known.fields.get("quantization") is not None:
        raise UserError(f"{source.path}: quantized, expected the weights it was made from")
    model = ModelConfig.from_dict(known.fields, str(source.path))
    original = model if "horizons" in known.fields else None
    context = stated_context(known.fields, {} if original else source.config) or known.context
    seen = spans(context or DEFAULT_CONTEXT, known.windows, model.n_layers)
    S = segment_length
    if S is None:
        S = model.segment_length if "segment_length" in known.fields else default_segment(seen)
    if horizons is not None:
        chosen = list(parse(horizons, model.n_layers).horizons)
    else:
        chosen = original.horizons if original else exact_horizons(seen, S)
    config = replace(model, segment_length=S, horizons=chosen)
    assumed = context is None and original is None and horizons is None
    exact = exact_tokens(config, known.windows, original)
    return config, Exactness(exact, context, recurrent=original is not None, assumed=assumed)


def _options(
    settings: Mapping[str, Any] | None, allow_unused: Sequence[str], map_file: str | Path | None
) -> dict[str, Any]:
    """Return the user's settings, patterns and map file as JSON values, to be stored."""
    return {
        "settings": dict(settings or {}),
        "allow_unused": list(allow_unused),
        "map_file": map_file and {"path": str(map_file), "sha256": sha256(Path(map_file))},
    }


def _quantized(config: ModelConfig, quantization: Mapping[str, int] | None) -> ModelConfig:
    """Return the configuration with a quantization. Raises `UserError` for an invalid group size."""
    if quantization is None:
        return config
    config = replace(config, quantization=dict(quantization))
    DSMR(config)  # raises for an invalid group size
    return config


def _left_out(source: WeightsSource) -> list[str]:
    """Return a note about other weights in the file, such as averages, which are often better."""
    if not source.left_out:
        return []
    named, first = (
        ", ".join(f"{key} ({n:,} tensors)" for key, n in source.left_out.items()),
        next(iter(source.left_out)),
    )
    return [f"the weights are those of {source.entry}; left out: {named}; `weights` {first} takes those"]


def _assumed(exactness: Exactness) -> list[str]:
    if not exactness.assumed:
        return []
    return [f"context of the original not stated: {DEFAULT_CONTEXT:,} tokens assumed; `horizons` overrides it"]


def _check_floats(source: WeightsSource, steps: Sequence[Step]) -> None:
    for name in (name for step in steps for name in step.sources):
        dtype = source.dtypes[name]
        if not mx.issubdtype(dtype, mx.floating):
            raise UserError(f"{source.path}: {name} is {_name(dtype)}, expected float weights")


def _dtype(name: str | None, source: WeightsSource, steps: Sequence[Step]) -> mx.Dtype:
    if name is not None:
        if name not in DTYPES:
            raise UserError(f"`dtype` {name}: expected one of {', '.join(DTYPES)}")
        return getattr(mx, name)
    if source.floats is not None:
        return source.floats
    embed = next(step for step in steps if step.target == "embed.weight")
    return source.dtypes[embed.sources[0]]


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _is_finite(array: mx.array) -> bool:
    """Check in blocks, because `mx.isfinite` takes several times the memory of its input."""
    flat = array.reshape(-1)
    return all(mx.isfinite(flat[i : i + BLOCK]).all().item() for i in range(0, flat.size, BLOCK))


def _tokenizer(
    given: str | Path | None, source: WeightsSource, folder: Path | None, family: Family, vocab_size: int
) -> Tokenizer:
    """Return the given tokenizer, else that of the source or of its vocabulary's size, else plain ids."""
    names_aria = given == AriaTokenizer.kind or (given is None and family.tokenizer == AriaTokenizer.kind)
    if names_aria and vocab_size in SIZES:
        found = AriaTokenizer(vocab_size)
    elif given is not None:
        found = make_tokenizer(str(given))
    elif folder is not None:
        found = load_tokenizer(folder / "tokenizer")
    elif source.tokenizer is not None:
        found = tokenizer_files.unpack(source.tokenizer, source.path)
    else:
        found = _ids_only(source, family, vocab_size)
    if found.vocab_size != vocab_size:
        raise UserError(f"`tokenizer`: {found.kind} has {found.vocab_size} ids, expected {vocab_size} as in the model")
    return found


def _ids_only(source: WeightsSource, family: Family, vocab_size: int) -> Tokenizer:
    special = {}
    for name in ("pad", "bos", "eos"):
        value = source.config.get(f"{name}_token_id")
        in_range = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size
        special[f"{name}_id"] = value if in_range else None
    return IdTokenizer(vocab_size, family.tokenizer or family.name, **special)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
