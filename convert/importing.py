"""A checkpoint of another program → a checkpoint folder, tensor by tensor.

source      what the file or folder holds            sources.py
family      whose names and conventions these are    mapping.py, families/
config      the model that runs it here, with a horizon for every layer
plan        which tensors become which parameter     mapping.py
weights     cast or quantized, written as they come  weights_file.py
beside      of a checkpoint of this program its licence and how it is best played: they hold for its copies, too
record      conversion.json: from what, by which rules, how far it was verified
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
from dsmr_mlx.common.files import holds, sha256
from dsmr_mlx.convert import tokenizer_files
from dsmr_mlx.convert.exactness import (
    CONTEXT,
    Exactness,
    exact_horizons,
    exact_tokens,
    spans,
    stated_context,
    usual_segment,
)
from dsmr_mlx.convert.families import FAMILIES, family_named
from dsmr_mlx.convert.mapping import configure, find, load_map, plan
from dsmr_mlx.convert.rules import Configuration, Family, Step
from dsmr_mlx.convert.sources import Source, open_source
from dsmr_mlx.convert.weights_file import write_safetensors
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.checkpoint_folder import COMPANIONS, check_room, is_ours, verify, write_folder
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.horizons import parse
from dsmr_mlx.model.quantization import is_quantized, quantize_arrays
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.ids import IdTokenizer
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.tokenizers.registry import load_tokenizer

RECORD = "conversion.json"
DTYPES = ("float32", "bfloat16", "float16")
BLOCK = 1 << 20  # numbers that are looked at together
PACKAGES = ("dsmr-mlx", "mlx", "numpy", "torch", "transformers", "x-transformers")


@dataclass(frozen=True)
class Conversion:
    """What a source becomes; nothing is read or written yet.

    family, prefix, notes   whose names these are, and what was assumed of them
    config                  of the model that runs it here
    steps                   the parameters in the order of the source's files
    exactness               how far the model computes what the original does
    dtype                   of the floats in the folder
    tokenizer               what the ids mean
    beside                  files that go with the weights, see `bundled.COMPANIONS`
    asked                   the settings, patterns and map file of the user, for the record
    """

    source: Source
    family: Family
    prefix: str
    config: ModelConfig
    steps: list[Step]
    notes: list[str]
    exactness: Exactness
    dtype: mx.Dtype
    tokenizer: Tokenizer
    beside: list[Path]
    asked: dict[str, Any]

    @property
    def exact_tokens(self) -> int | None:
        """Up to so many tokens of a piece the model computes what the original does; None: any number."""
        return self.exactness.tokens

    @property
    def compared(self) -> str:
        """Of which numbers a verification, which computes in float32, tells: those of the folder, or before a loss."""
        losses = []
        stored = {self.source.dtypes[name] for step in self.steps for name in step.sources}
        if self.dtype != mx.float32 and stored != {self.dtype}:
            losses.append(f"cast to {_name(self.dtype)}")
        if self.config.quantization:
            losses.append(f"quantized to {self.config.quantization['bits']} bits")
        return f"the weights before they are {' and '.join(losses)}" if losses else "the weights as they are written"

    def weights(self) -> Iterator[tuple[str, mx.array]]:
        """The parameters in float32, one by one, before they are cast or quantized: what a verification runs.

        Raises `UserError` as `stored` does.
        """
        for step in self.steps:
            yield step.target, self._made(step, mx.float32)

    def stored(self) -> Iterator[tuple[str, mx.array]]:
        """The parameters as the folder holds them, one by one, evaluated.

        Raises `UserError` that names the tensors for values that are not finite, or not in the folder's type.
        """
        for step in self.steps:
            array = self._made(step, self.dtype)
            if self.config.quantization and is_quantized(step.target):
                parts = quantize_arrays(step.target, array, self.config.quantization)
            else:
                parts = {step.target: array}
            mx.eval(parts)
            yield from parts.items()
            del array, parts
            mx.clear_cache()

    def _made(self, step: Step, dtype: mx.Dtype) -> mx.array:
        array = step.apply([self.source.read(name) for name in step.sources], self.config)
        array = mx.contiguous(array.astype(dtype))
        mx.eval(array)
        if not _is_finite(array):
            what = f"{self.source.path}: {', '.join(step.sources)}:"
            if all(_is_finite(self.source.read(name)) for name in step.sources):
                wider = "--dtype bfloat16 or float32" if dtype == mx.float16 else "--dtype float32"
                raise UserError(f"{what} has values beyond {_name(dtype)}, expected {wider}")
            raise UserError(f"{what} has values that are not finite, expected numbers")
        return array

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
                  attention exact over the original's context, see `exactness`
    dtype:        float32, bfloat16 or float16; left out, that of the embedding
    quantization: {"bits", "group_size"}
    tokenizer:    "performance", or a folder that has one (a corpus, a checkpoint); left out, the source's

    Raises `UserError` that names what is wrong with any of them, and lists unused, missing and misshapen tensors.
    """
    source, ours = _open(Path(path))
    chosen, prefix = find(source, _candidates(family, map_file), allow_unused)
    known = configure(chosen, prefix, source, settings)
    config, exactness = _with_horizons(source, known, horizons, segment_length)
    steps = plan(chosen, prefix, source, config, allow_unused)
    _refuse_other_than_floats(source, steps)
    if quantization is not None:
        config = replace(config, quantization=dict(quantization))
        DSMR(config)  # a group size that does not divide is refused before anything is written
    return Conversion(
        source=source,
        family=chosen,
        prefix=prefix,
        config=config,
        steps=steps,
        notes=[*known.notes, *_assumed(exactness)],
        exactness=exactness,
        dtype=_dtype(dtype, source, steps),
        tokenizer=_tokenizer(tokenizer, source, ours, chosen, config.vocab_size),
        beside=[ours / name for name in COMPANIONS if (ours / name).is_file()] if ours else [],
        asked=_asked(settings, allow_unused, map_file),
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

    `verification` goes into the record. Raises `UserError` as `check_out` and `Conversion.stored` do.
    """
    # Resolved, for the current folder may be what is replaced.
    out = Path(out).resolve()
    layout = conversion.layout()

    def tensors() -> Iterator[tuple[str, mx.array]]:
        done = count(1)
        for name, array in conversion.stored():
            yield name, array
            del array  # or it would stay in memory while the next one is made
            if progress:
                progress(next(done), len(layout))

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(conversion.config.to_json(), encoding="utf-8")
        write_safetensors(folder / "model.safetensors", tensors(), layout)
        conversion.tokenizer.save(folder / "tokenizer")
        for path in conversion.beside:
            shutil.copyfile(path, folder / path.name)
        record = json.dumps(make_record(conversion, verification), indent=2) + "\n"
        (folder / RECORD).write_text(record, encoding="utf-8")

    for path in (conversion.source.path, *conversion.source.files):
        check_out(path, out, force)
    write_folder(out, write)
    return out


def check_out(source: str | Path, out: str | Path, force: bool) -> None:
    """Raise `UserError` for an `out` that exists, unless it is a checkpoint and `force`, and for one that is the
    source, holds it, or lies in it, whose weights would be lost.
    """
    if holds(source, out) or holds(out, source):
        raise UserError(f"{out}: is the source, inside of it or around it, expected another folder")
    check_room(out, force)


def make_record(conversion: Conversion, verification: dict[str, Any] | None) -> dict[str, Any]:
    """Where a checkpoint came from: JSON values, written beside its weights."""
    return {
        "source": str(conversion.source.path),
        "sha256": conversion.source.sha256(),
        "entry": conversion.source.entry,
        "family": conversion.family.name,
        "prefix": conversion.prefix,
        "map": [
            {"from": list(step.sources), "to": step.target, "transform": step.transform} for step in conversion.steps
        ],
        **conversion.asked,
        "notes": conversion.notes,
        "exact_tokens": conversion.exact_tokens,
        "context": conversion.exactness.context,
        "warm_start": conversion.exactness.warm_start,
        "dtype": _name(conversion.dtype),
        "quantization": conversion.config.quantization,
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "verification": verification and {"compared": conversion.compared} | verification,
    }


def _open(path: Path) -> tuple[Source, Path | None]:
    """The source, and its folder where it is one of this program's checkpoints or runs."""
    if path.is_dir() and is_ours(path):
        folder = checkpoint.resolve(path)
        verify(folder)
        return open_source(folder), folder
    return open_source(path), None


def _candidates(name: str | None, map_file: str | Path | None) -> Sequence[Family]:
    """The families that a source may be of."""
    if name is not None and map_file is not None:
        raise UserError("--family and --map: expected one of them")
    if map_file is not None:
        return [load_map(map_file)]
    return FAMILIES if name is None else [family_named(name)]


def _asked(
    settings: Mapping[str, Any] | None, allow_unused: Sequence[str], map_file: str | Path | None
) -> dict[str, Any]:
    rules = None if map_file is None else {"path": str(map_file), "sha256": sha256(Path(map_file))}
    return {"settings": dict(settings or {}), "allow_unused": list(allow_unused), "map_file": rules}


def _with_horizons(
    source: Source, known: Configuration, horizons: str | None, segment_length: int | None
) -> tuple[ModelConfig, Exactness]:
    """The model with the horizons that are asked for, or the source's, or those that are exact over its context."""
    if segment_length is not None and segment_length < 1:
        raise UserError(f"--segment {segment_length}: expected at least 1")
    if known.fields.get("quantization") is not None:
        raise UserError(f"{source.path}: quantized, expected the weights that it was made from")
    model = ModelConfig.from_dict(known.fields, str(source.path))
    original = model if "horizons" in known.fields else None
    context = stated_context(known.fields, {} if original else source.config)
    seen = spans(context or CONTEXT, known.windows, model.n_layers)
    S = segment_length
    if S is None:
        S = model.segment_length if "segment_length" in known.fields else usual_segment(seen)
    if horizons is not None:
        chosen = list(parse(horizons, model.n_layers).horizons)
    else:
        chosen = original.horizons if original else exact_horizons(seen, S)
    config = replace(model, segment_length=S, horizons=chosen)
    assumed = context is None and original is None and horizons is None
    exact = exact_tokens(config, known.windows, original)
    return config, Exactness(exact, context, recurrent=original is not None, assumed=assumed)


def _assumed(exactness: Exactness) -> list[str]:
    if not exactness.assumed:
        return []
    return [f"the context of the original is not stated: {CONTEXT:,} tokens assumed; --horizons says otherwise"]


def _refuse_other_than_floats(source: Source, steps: Sequence[Step]) -> None:
    for name in (name for step in steps for name in step.sources):
        dtype = source.dtypes[name]
        if not mx.issubdtype(dtype, mx.floating):
            raise UserError(f"{source.path}: {name} is {_name(dtype)}, expected float weights")


def _dtype(name: str | None, source: Source, steps: Sequence[Step]) -> mx.Dtype:
    if name is not None:
        if name not in DTYPES:
            raise UserError(f"--dtype {name}: expected one of {', '.join(DTYPES)}")
        return getattr(mx, name)
    embed = next(step for step in steps if step.target == "embed.weight")
    return source.dtypes[embed.sources[0]]


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _is_finite(array: mx.array) -> bool:
    """Looked at in blocks, for the answers for single numbers take several times their memory."""
    flat = array.reshape(-1)
    return all(mx.isfinite(flat[i : i + BLOCK]).all().item() for i in range(0, flat.size, BLOCK))


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
        found = load_tokenizer(folder / "tokenizer")
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
