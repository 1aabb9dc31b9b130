"""A checkpoint of another program → a checkpoint folder, tensor by tensor.

source      what the file or folder holds            sources.py
family      whose names and conventions these are    mapping.py, families/
config      the model that runs it here, with a horizon for every layer
plan        which tensors become which parameter     mapping.py
weights     cast or quantized, written as they come  weights_file.py
record      conversion.json: from what, by which rules, how far it was verified
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dsmr_mlx import checkpoint
from dsmr_mlx.config import ModelConfig
from dsmr_mlx.convert import tokenizer_files
from dsmr_mlx.convert.families import FAMILIES, family_named
from dsmr_mlx.convert.mapping import configure, find, load_map, plan
from dsmr_mlx.convert.rules import Configuration, Family, Step
from dsmr_mlx.convert.sources import Source, open_source
from dsmr_mlx.convert.weights_file import write_safetensors
from dsmr_mlx.errors import UserError
from dsmr_mlx.horizons import parse
from dsmr_mlx.id_tokenizer import IdTokenizer
from dsmr_mlx.model import DSMR
from dsmr_mlx.quantization import is_quantized, quantize_arrays
from dsmr_mlx.tokenizer import FILE, PerformanceTokenizer, Tokenizer, load_tokenizer

RECORD = "conversion.json"
DTYPES = ("float32", "bfloat16", "float16")
SEGMENT = 512  # tokens, where neither the source nor the user says
CONTEXT = 2048  # tokens that a model without a stated context is taken to know
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "block_size", "max_seq_len")
PACKAGES = ("dsmr-mlx", "mlx", "numpy", "torch", "transformers", "x-transformers")


@dataclass(frozen=True)
class Conversion:
    """What a source becomes; nothing is read or written yet.

    family, prefix, notes   whose names these are, and what was assumed of them
    config                  of the model that runs it here
    steps                   the parameters in the order of the source's files
    exact_tokens            up to so many tokens of a piece the model computes what the original does; None: any number
    context                 tokens that the original was made for, None if that is not known
    dtype                   of the floats in the folder
    tokenizer               what the ids mean
    """

    source: Source
    family: Family
    prefix: str
    config: ModelConfig
    steps: list[Step]
    notes: list[str]
    exact_tokens: int | None
    context: int | None
    dtype: mx.Dtype
    tokenizer: Tokenizer

    def weights(self) -> Iterator[tuple[str, mx.array]]:
        """The parameters in float32, one by one, before they are cast or quantized: what a verification runs."""
        for step in self.steps:
            array = step.apply([self.source.read(name) for name in step.sources], self.config)
            yield step.target, array.astype(mx.float32)

    def stored(self) -> Iterator[tuple[str, mx.array]]:
        """The parameters as the folder holds them, one by one, evaluated."""
        for step in self.steps:
            array = step.apply([self.source.read(name) for name in step.sources], self.config).astype(self.dtype)
            if self.config.quantization and is_quantized(step.target):
                parts = quantize_arrays(step.target, array, self.config.quantization)
            else:
                parts = {step.target: array}
            mx.eval(parts)
            yield from parts.items()
            del array, parts
            mx.clear_cache()

    def layout(self) -> dict[str, tuple[mx.Dtype, tuple[int, ...]]]:
        """Dtype and shape of what `stored` gives, by name."""
        shapes = {name: (array.dtype, array.shape) for name, array in tree_flatten(DSMR(self.config).parameters())}
        targets = [step.target for step in self.steps]
        parts = [
            [f"{target.removesuffix('weight')}{part}" for part in ("weight", "scales", "biases")]
            if self.config.quantization and is_quantized(target)
            else [target]
            for target in targets
        ]
        names = [name for of_one in parts for name in of_one]
        return {n: (dtype if (dtype := shapes[n][0]) == mx.uint32 else self.dtype, shapes[n][1]) for n in names}


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
    tokenizer: str | Path | None = None,
) -> Conversion:
    """Open a source and find for every tensor its place.

    path:         what `open_source` reads, or a checkpoint or run of this program (to cast, quantize, change horizons)
    family:       a name of `families`, `map_file` a TOML file with rules instead; neither: told from the tensors
    settings:     fields of `ModelConfig` that say otherwise than the source, or what it does not say
    allow_unused: patterns of names that may stay behind
    horizons:     a schedule, with segments of `segment_length`; left out, the source's own, or what makes full
                  attention exact over the original's context
    dtype:        float32, bfloat16 or float16; left out, that of the embedding
    quantization: {"bits", "group_size"}
    tokenizer:    "performance", or a folder that has one (a corpus, a checkpoint); left out, the source's

    Raises `UserError` that names what is wrong with any of them, and lists unused, missing and misshapen tensors.
    """
    source, tokenizer_folder = _open(Path(path))
    chosen, prefix = find(source, _candidates(family, map_file), allow_unused)
    known = configure(chosen, prefix, source, settings)
    config = _with_horizons(source, known, horizons, segment_length)
    config = replace(config, quantization=dict(quantization) if quantization else None)
    steps = plan(chosen, prefix, source, replace(config, quantization=None), allow_unused)
    if quantization:
        DSMR(config)  # a group size that does not divide is refused before anything is written
    return Conversion(
        source=source,
        family=chosen,
        prefix=prefix,
        config=config,
        steps=steps,
        notes=list(known.notes),
        exact_tokens=exact_tokens(config, source.config, known),
        context=_context(source, known),
        dtype=_dtype(dtype, source, steps),
        tokenizer=_tokenizer(tokenizer, source, tokenizer_folder, chosen, config.vocab_size),
    )


def write_conversion(
    conversion: Conversion,
    out: str | Path,
    *,
    verification: dict[str, Any] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the checkpoint folder `out`, whole or not at all; `progress(done, total)` counts parameters.

    `verification` goes into the record. Raises `UserError` if `out` exists, unless it is a checkpoint and `force`.
    """
    out = Path(out)
    layout = conversion.layout()

    def tensors() -> Iterator[tuple[str, mx.array]]:
        for done, (name, array) in enumerate(conversion.stored(), 1):
            yield name, array
            if progress:
                progress(done, len(layout))

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(conversion.config.to_json(), encoding="utf-8")
        write_safetensors(folder / "model.safetensors", tensors(), layout)
        conversion.tokenizer.save(folder / "tokenizer")
        record = json.dumps(make_record(conversion, verification), indent=2) + "\n"
        (folder / RECORD).write_text(record, encoding="utf-8")

    checkpoint.check_room(out, force)
    checkpoint.write_folder(out, write)
    return out


def make_record(conversion: Conversion, verification: dict[str, Any] | None) -> dict[str, Any]:
    """Where a checkpoint came from: JSON values, written beside its weights."""
    return {
        "source": str(conversion.source.path),
        "sha256": conversion.source.sha256(),
        "family": conversion.family.name,
        "prefix": conversion.prefix,
        "map": [
            {"from": list(step.sources), "to": step.target, "transform": step.transform} for step in conversion.steps
        ],
        "notes": conversion.notes,
        "exact_tokens": conversion.exact_tokens,
        "dtype": str(conversion.dtype).removeprefix("mlx.core."),
        "quantization": conversion.config.quantization,
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "verification": verification,
    }


def exact_tokens(config: ModelConfig, source_config: Mapping[str, Any], known: Configuration) -> int | None:
    """Up to how many tokens of a piece every layer sees all that the original's layer sees, and nothing else.

    A token of the segment that starts at s sees everything before it as long as s ≤ M_l. None where the source is a
    DSMR with the same horizons: then there is no end.
    """
    S = config.segment_length
    if source_config.get("horizons") == config.horizons and source_config.get("segment_length") == S:
        return None
    ends = [S * (horizon // S + 1) for horizon in config.horizons]
    ends += [window + 1 for window in known.windows if window is not None]
    if own := source_config.get("horizons"):
        theirs = source_config["segment_length"]
        ends += [theirs * (horizon // theirs + 1) for horizon in own]
    return min([*ends, config.max_positions or math.inf])


def _open(path: Path) -> tuple[Source, Path | None]:
    """The source, and the folder of its tokenizer where it is one of this program's checkpoints or runs."""
    ours = (f"tokenizer/{FILE}", "best", "last", "checkpoints")
    if path.is_dir() and any((path / name).exists() for name in ours):
        folder = checkpoint.resolve(path)
        checkpoint.verify(folder)
        return open_source(folder), folder / "tokenizer"
    return open_source(path), None


def _candidates(name: str | None, map_file: str | Path | None) -> Sequence[Family]:
    """The families that a source may be of."""
    if name is not None and map_file is not None:
        raise UserError("--family and --map: expected one of them")
    if map_file is not None:
        return [load_map(map_file)]
    return FAMILIES if name is None else [family_named(name)]


def _context(source: Source, known: Configuration) -> int | None:
    stated = (known.fields.get("max_positions"), *(source.config.get(name) for name in CONTEXT_NAMES))
    return next((n for n in stated if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


def _with_horizons(
    source: Source, known: Configuration, horizons: str | None, segment_length: int | None
) -> ModelConfig:
    """The model with the horizons that are asked for, or the source's, or those that are exact over its context."""
    fields = dict(known.fields)
    if fields.get("quantization") is not None:
        raise UserError(f"{source.path}: quantized, expected the weights that it was made from")
    own, context = fields.pop("horizons", None), _context(source, known) or CONTEXT
    S = segment_length or fields.get("segment_length") or min(SEGMENT, context)
    config = ModelConfig.from_dict(fields | {"segment_length": S}, str(source.path))
    if horizons is not None:
        own = list(parse(horizons, config.n_layers).horizons)
    elif own is None:
        windows = known.windows or [None] * config.n_layers
        own = [max(0, min(context, context if w is None else w + 1) - S) for w in windows]
    return replace(config, horizons=own)


def _dtype(name: str | None, source: Source, steps: Sequence[Step]) -> mx.Dtype:
    if name is not None:
        if name not in DTYPES:
            raise UserError(f"--dtype {name}: expected one of {', '.join(DTYPES)}")
        return getattr(mx, name)
    embed = next(step for step in steps if step.target == "embed.weight")
    return source.read(embed.sources[0]).dtype


def _tokenizer(
    named: str | Path | None, source: Source, folder: Path | None, family: Family, vocab_size: int
) -> Tokenizer:
    """What was asked for, else what the source brings, else ids without a meaning; its size is the model's."""
    if named == PerformanceTokenizer.kind:
        found = PerformanceTokenizer()
    elif named is not None:
        named = Path(named)
        inner = named / "tokenizer"
        found = load_tokenizer(inner if inner.is_dir() else named)
    elif folder is not None:
        found = load_tokenizer(folder)
    elif source.tokenizer is not None:
        found = tokenizer_files.unpack(source.tokenizer, source.path)
    else:
        found = _ids_only(source, family, vocab_size)
    if found.vocab_size != vocab_size:
        raise UserError(f"tokenizer: {found.kind} has {found.vocab_size} ids, the model {vocab_size}: expected as many")
    return found


def _ids_only(source: Source, family: Family, vocab_size: int) -> Tokenizer:
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
