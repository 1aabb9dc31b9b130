"""Map the tensors of a checkpoint of another program to the parameters of a `DSMR`.

A conversion first finds family and prefix, then the configuration, then a plan that covers every stored tensor and
every parameter. Only then are tensors converted.

    family, prefix = find_family(source, FAMILIES)
    config = ModelConfig(**configure(family, prefix, source).fields, horizons=…)
    for step in plan(family, prefix, source, config):
        parameter = step.apply([source.read(name) for name in step.sources], config)
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import read_toml
from dsmr_mlx.common.limits import MAX_SIZES, MAX_TOKENS
from dsmr_mlx.convert.rules import BLOCK, Configuration, Family, Match, Rule, Step, name_in, plain_names
from dsmr_mlx.convert.transforms import TRANSFORMS, Shape
from dsmr_mlx.convert.weights_source import WeightsSource
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.model.lora import matrix_rows

LACKING = {  # parts that no family and no map can convert, and the tensors that show them
    "a mixture of experts": r"(^|\.)(experts\.\d+|block_sparse_moe)\.",
    "attention to an encoder": r"(^|\.)(encoder_attn|cross_?attn|cross_?attention|EncDecAttention)\.",
    "state-space layers": r"\.A_log$",
}
MAX_LISTED = 8  # names in a message
SIZES = ("vocab_size", "d_model", "d_ff", "n_heads", "n_kv_heads", "head_dim", "max_positions")


def find_family(
    source: WeightsSource, families: Sequence[Family], allow_unused: Sequence[str] = ()
) -> tuple[Family, str]:
    """Return the family that knows most tensors of a source, and the prefix of their names.

    Tensors that match `allow_unused` are skipped. A single family is accepted unless it has no match: `plan` reports
    what is missing. Raises `UserError` if no family fits, or several fit equally well.
    """
    names = {plain: stored for plain, stored in plain_names(source).items() if not _any(allow_unused, stored)}
    if not names:
        skipped = f"`allow_unused` {' '.join(allow_unused)} leaves out all {len(source.shapes)} tensors"
        raise UserError(f"{source.path}: {skipped if source.shapes else 'has no tensors'}, expected those of a model")
    matches = [Match(family, prefix, source) for family in families for prefix in _prefixes(family, names)]
    fitting = [m for m in matches if m.fits and (m.family.signature is None or m.family.signature(m))]
    if len(families) == 1:
        fitting = matches
    if not fitting:
        raise _nothing_fits(source, families, names, matches)
    most = max(len(match.known) for match in fitting)
    best = [match for match in fitting if len(match.known) == most]
    prefixes = sorted({match.prefix for match in best})
    if len(prefixes) > 1:
        raise UserError(
            f"{source.path}: several models, with the prefixes {', '.join(map(repr, prefixes))}, expected one; "
            f"`allow_unused` '{prefixes[-1]}*' leaves out the last"
        )
    if len(best) > 1:
        fit = ", ".join(f"{match.family.name} ({match.family.about})" for match in best)
        raise UserError(f"{source.path}: the weights fit {fit}; choose one with `family`")
    return best[0].family, best[0].prefix


def _prefixes(family: Family, names: Collection[str]) -> list[str]:
    """Return the prefixes of all names of embeddings."""
    before = [name.removesuffix(e) for name in names for e in _embeddings(family) if f".{name}".endswith(f".{e}")]
    in_body = [family.body and f".{prefix}".endswith(f".{family.body}") for prefix in before]
    cut = [p.removesuffix(family.body) if inside else p for p, inside in zip(before, in_body, strict=True)]
    return list(dict.fromkeys(cut))


def _embeddings(family: Family) -> list[str]:
    return [name for rule in family.rules if rule.target == "embed.weight" for name in rule.source]


def _nothing_fits(
    source: WeightsSource, families: Sequence[Family], names: Collection[str], matches: Sequence[Match]
) -> UserError:
    found = f"found {_listed(names, 4)}"
    if len(families) == 1:
        (family,) = families
        embedding = " or ".join(dict.fromkeys(_embeddings(family)))
        other = "another map" if family.original is None else "another family, or a map with `map_file`"
        return UserError(f"{source.path}: no embedding of {family.name} ({embedding}), {found}; expected {other}")
    known = ", ".join(family.name for family in families)
    kind = source.config.get("model_type")
    stated = f" (model_type {kind} in its {source.config_name})" if isinstance(kind, str) else ""
    for what, pattern in LACKING.items():
        if name := next((name for name in names if re.search(pattern, name)), None):
            return UserError(f"{source.path}: has {what} ({name}){stated}, which DSMR lacks, so it cannot be converted")
    message = f"{source.path}: unknown family{stated}, {found}; known are {known}"
    if matches:
        near = max(matches, key=lambda match: len(match.known)).family.name
        return UserError(f"{message}; `family` {near} lists what is missing for the nearest")
    return UserError(f"{message}; the same model with other names needs a map, `map_file`")


def configure(
    family: Family, prefix: str, source: WeightsSource, settings: Mapping[str, Any] | None = None
) -> Configuration:
    """Return the configuration of the original: settings override its configuration, which overrides the shapes.

    Raises `UserError` if a value is unknown (the message names the setting to pass) or unsupported by `DSMR`.
    """
    settings = dict(settings or {})
    match = Match(family, prefix, source)
    if not {"vocab_size", "d_model"} <= match.structure.keys():
        raise match.error(f"no embedding of {family.name}, expected a matrix {family.rules[0].source[0]}")
    stated = family.configure(match, settings)
    fields = match.structure | stated.fields | settings
    _check_sizes(match, fields, settings)
    if "tie_embeddings" not in stated.fields | settings:
        fields["tie_embeddings"] = "head.weight" not in match.steps or _is_tied(match)
    if fields["tie_embeddings"]:
        fields["head_bias"] = False
    if "n_layers" in settings and isinstance(fields.get("horizons"), list):
        fields["horizons"] = fields["horizons"][: fields["n_layers"]]
    return Configuration(fields, stated.notes, stated.windows[: fields["n_layers"]], stated.context)


def _check_sizes(match: Match, fields: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise `UserError` for sizes with which no model can be built to compare with the weights."""
    for name in ("n_layers", *SIZES):
        value = fields.get(name)
        if isinstance(value, int) and value > (most := MAX_SIZES.get(name, MAX_TOKENS)):
            raise match.error(
                f"{_assignment(name, fields, settings)} for {match.family.name}: expected at most {most:,}"
            )
    n_layers = fields["n_layers"]
    if not isinstance(n_layers, int) or n_layers < 1:
        raise match.error(f"{_assignment('n_layers', fields, settings)}: expected an integer of at least 1")
    absent = next((i for i in range(n_layers) if i not in match.layers), None)
    if absent is not None:
        rules = [rule for rule in match.family.rules if "{i}" in rule.target and rule.required]
        lacking = ", ".join(name_in(name, absent) for rule in rules[:2] for name in rule.source)
        raise match.error(
            f"{_assignment('n_layers', fields, settings)} for {match.family.name}: no tensors of layer {absent}, "
            f"expected {lacking} …"
        )


def _assignment(name: str, fields: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return a field with its value, in backquotes if it is a setting of the user."""
    return f"`{name}` = {fields[name]!r}" if name in settings else f"{name} = {fields[name]!r}"


def _is_tied(match: Match) -> bool:
    """Return whether the head is stored as a copy of the embedding."""
    head, embedding = (match.steps[f"{name}.weight"] for name in ("head", "embed"))
    if head.sources == embedding.sources:
        return True
    shapes = {match.source.shapes[step.sources[0]] for step in (head, embedding)}
    if "head.bias" in match.steps or head.transform != embedding.transform or len(shapes) > 1:
        return False
    return mx.array_equal(*(match.source.read(step.sources[0]) for step in (head, embedding))).item()


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return name → shape of the parameters of a model, not quantized. No memory is allocated."""
    model = DSMR(dataclasses.replace(config, quantization=None))
    return {name: array.shape for name, array in tree_flatten(model.parameters())}


def plan(
    family: Family, prefix: str, source: WeightsSource, config: ModelConfig, allow_unused: Sequence[str] = ()
) -> list[Step]:
    """Return one step for every parameter of a model, in the order of the tensors of the source.

    allow_unused: patterns (`*`) of stored names that may be left out

    Raises one `UserError` that lists parameters without a tensor, unused tensors, and tensors of the wrong shape.
    """
    match = Match(family, prefix, source)
    expected = parameter_shapes(config)
    steps = {target: step for target, step in match.steps.items() if target in expected}
    used = match.ignored | {name for step in steps.values() for name in step.sources}
    used |= {name for target, (_, present) in match.partial.items() if target in expected for name in present}
    if config.tie_embeddings and "head.weight" in match.steps and _is_tied(match):
        used |= set(match.steps["head.weight"].sources)
    unused = [name for name in source.shapes if name not in used and not _any(allow_unused, name)]
    required = [rule.target.replace("{i}", "0") for rule in family.rules if rule.required]
    missing = [_missing(match, t) for t in dict.fromkeys([*expected, *required]) if t not in match.steps]
    misshapen = [text for target in steps if (text := _misshapen(match, target, expected[target], config))]
    problems = {
        "parameters without a tensor": missing,
        "unused tensors": unused,
        "tensors of the wrong shape": misshapen,
    }
    if any(problems.values()):
        text = "; ".join(f"{len(found)} {what}: {_listed(found)}" for what, found in problems.items() if found)
        hint = "; `allow_unused` PATTERN leaves tensors out" if unused else ""
        if (stored := max(match.layers, default=-1) + 1) > config.n_layers:
            hint += f" (n_layers = {config.n_layers}, {stored} layers are stored)"
        raise UserError(f"{source.path}, as {family.name}: {text}{hint}")
    order = {name: i for i, name in enumerate(source.shapes)}
    return sorted(steps.values(), key=lambda step: min(order[name] for name in step.sources))


def _missing(match: Match, target: str) -> str:
    if target in match.partial:
        absent, _ = match.partial[target]
        return f"{target} (from {', '.join(match.prefix + name for name in absent)})"
    generic, layer = re.sub(r"^layers\.\d+\.", f"{BLOCK}.", target), re.search(r"\d+", target)
    rules = [rule for rule in match.family.rules if rule.target == generic]
    if not rules:
        return target
    i = int(layer[0]) if layer else 0
    return f"{target} (from {', '.join(match.prefix + name_in(name, i) for name in rules[0].source)})"


def _misshapen(match: Match, target: str, expected: Shape, config: ModelConfig) -> str | None:
    """Return the error in the shapes of the tensors of a step, or None."""
    step = match.steps[target]
    stored = [match.source.shapes[name] for name in step.sources]
    found = ", ".join(f"{name} {shape}" for name, shape in zip(step.sources, stored, strict=True))
    shape_of = TRANSFORMS[step.transform].shape
    try:
        result = shape_of(stored)
    except ValueError as error:
        return f"{target} from {found}: {error}, expected {expected}"
    if result != expected:
        return f"{target} from {found}, expected {expected}"
    layer = target.split(".")[-2]
    rows = [*matrix_rows(config, layer).values()] if layer in ("qkv", "gate_up") else []
    if len(stored) == len(rows) and [shape_of([shape])[0] for shape in stored] != rows:
        return f"{target} from {found}, expected {', '.join(map(str, rows))} rows"
    return None


def _any(patterns: Iterable[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _listed(items: Collection[str], limit: int = MAX_LISTED) -> str:
    shown, more = list(items)[:limit], len(items) - limit
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def load_map(path: str | Path) -> Family:
    """Return a family from a TOML file, see `examples/custom_map.toml`. Raises `UserError`, which names the file."""
    values = read_toml(path, "a map in TOML")
    _check_keys(path, values, {"config": dict, "rule": list, "ignored": list})
    fields, ignored = values.get("config", {}), values.get("ignored", [])
    _check_keys(f"{path}: config", fields, {f.name: object for f in dataclasses.fields(ModelConfig)})
    if not all(isinstance(pattern, str) for pattern in ignored):
        raise UserError(f"{path}: ignored = {ignored!r}: expected a list of names")
    rules = tuple(_rule(f"{path}: rule {i}", table) for i, table in enumerate(values.get("rule", []), 1))
    if not any(rule.target == "embed.weight" for rule in rules):
        raise UserError(f'{path}: expected a [[rule]] with to = "embed.weight"')

    def configure_custom(match: Match, settings: Mapping[str, Any]) -> Configuration:
        heads = match.heads(settings, fields.get("n_heads"), fields.get("head_dim"))
        known = heads | fields | {name: heads[name] for name in ("n_heads", "head_dim")}
        _check_values(path, match, known, settings)
        return Configuration(known)

    return Family(Path(path).name, "a map", rules, configure_custom, ignored=tuple(ignored))


def _check_values(path: str | Path, match: Match, known: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise `UserError`, which names the map, for its invalid values; settings of the user are checked elsewhere."""
    fields = match.structure | {name: value for name, value in known.items() if name not in settings}
    fields |= {name: known[name] for name in ("n_heads", "head_dim")}
    if isinstance(fields["n_layers"], int):
        fields["n_layers"] = min(fields["n_layers"], len(match.layers))  # `plan` reports missing layers
    fields["head_bias"] = fields["head_bias"] and not fields.setdefault("tie_embeddings", False)
    ModelConfig.from_dict(fields, str(path))


def _rule(where: str, table: Any) -> Rule:
    if not isinstance(table, dict):
        raise UserError(f"{where}: expected a table [[rule]], found {table!r}")
    _check_keys(where, table, {"from": str | list, "to": str, "transform": str, "required": bool})
    if missing := sorted({"from", "to"} - table.keys()):
        raise UserError(f"{where}: missing key {', '.join(missing)}")
    names = [table["from"]] if isinstance(table["from"], str) else table["from"]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: from = {names!r}: expected a name or a list of names")
    try:
        return Rule(tuple(names), table["to"], table.get("transform", "identity"), table.get("required", True))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_keys(where: str | Path, table: dict[str, Any], kinds: Mapping[str, Any]) -> None:
    if unknown := sorted(table.keys() - kinds.keys()):
        raise UserError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(kinds)}")
    for key, value in table.items():
        if not isinstance(value, kinds[key]):
            raise UserError(f"{where}: {key} = {value!r}: expected {getattr(kinds[key], '__name__', kinds[key])}")
