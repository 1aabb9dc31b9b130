"""Check the JSON parts of a run's checkpoint before a run continues from them."""

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from dsmr_mlx.common.errors import UserError, shortened
from dsmr_mlx.common.files import read_regular
from dsmr_mlx.common.parsing import parse_json
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.model.config import Architecture
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.optimizer import in_cooldown
from dsmr_mlx.training.trainer import RunProgress

# A resumed run keeps the shapes of its weights and optimizer state, its lanes and its random draws.
FIXED_ON_RESUME = (
    *(f.name for f in fields(Architecture) if f.name != "dropout"),
    *("horizons", "seed", "batch_size", "accumulate", "dtype", "optimizer"),
    *("augment_transpose", "augment_stretch", "augment_velocity", "fill", "lora_rank", "lora_layers", "lora_alpha"),
)
MAX_COUNT = 2**53  # steps, tokens or pieces

Check = Callable[[Any], bool]


def parse_saved_run(content: bytes, path: Path) -> dict[str, Any]:
    """Return the values that `Run` has saved. Raises `UserError`, which names the file `path` and the invalid value."""
    try:
        values = parse_json(content)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}), expected the state of a run") from None
    _check(path, "", values, CHECKS)
    _check(path, "progress.", values["progress"], PROGRESS)
    _check(path, "lanes.", values["lanes"], {"drawn": _count, "lanes": lambda lanes: isinstance(lanes, list)})
    drawn = values["lanes"]["drawn"]
    for i, lane in enumerate(values["lanes"]["lanes"]):
        if lane is not None and not (_pair(lane) and lane[0] < drawn):
            raise UserError(
                f"{path}: lanes.lanes[{i}] is {shortened(lane)}, expected a piece before {drawn} and a token"
            )
    return values


def saved_progress(checkpoint: Path) -> RunProgress:
    """Return the progress of a run at a checkpoint. Raises `UserError` as `parse_saved_run` does."""
    path = checkpoint / "training.json"
    return RunProgress(**parse_saved_run(read_regular(path), path)["progress"])


def resume_point(latest: Path, config: TrainConfig) -> Path:
    """Return the newest checkpoint, or the one before its cool-down if that now begins later; it may be missing."""
    path = latest / "training.json"
    values = parse_saved_run(read_regular(path), path)
    before, done = values["before_cooldown"], RunProgress(**values["progress"]).done(config)
    if before is None or config.lr_schedule != "wsd" or in_cooldown(config, done):
        return latest
    return latest.parent / before


def parse_saved_config(content: bytes, path: Path) -> TrainConfig:
    """Return the configuration with which a checkpoint was saved. Raises `UserError`, which names the file `path`."""
    try:
        return TrainConfig.from_json(content.decode(), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def check_fixed(out: Path, saved: TrainConfig, config: TrainConfig) -> None:
    """Raise `UserError` if a setting that a resumed run keeps is not that with which the run in `out` was saved."""
    for name in FIXED_ON_RESUME:
        before, now = getattr(saved, name), getattr(config, name)
        if before != now:
            raise UserError(f"{name} = {now!r}: the run in {out} has {name} = {before!r}, which is fixed")


def check_corpus(out: Path, fingerprint: str, corpus: Corpus) -> None:
    """Raise `UserError` unless a corpus has the fingerprint of the one that the run in `out` is trained on."""
    if fingerprint != corpus.fingerprint:
        raise UserError(
            f"`data` {corpus.path}: fingerprint {corpus.fingerprint[:12]}, the run in {out} has {fingerprint[:12]}: "
            "not the same corpus"
        )


def check_checkpoint(out: Path, latest: Path, config: TrainConfig, corpus: Corpus) -> None:
    """Raise `UserError` if the run in `out` cannot resume from its checkpoint `latest` with `config` and `corpus`."""
    state, settings = latest / "training.json", latest / "training_config.json"
    check_fixed(out, parse_saved_config(read_regular(settings), settings), config)
    check_corpus(out, parse_saved_run(read_regular(state), state)["corpus"], corpus)


def _check(path: Path, where: str, values: Any, checks: dict[str, Check]) -> None:
    if not isinstance(values, dict) or values.keys() != checks.keys():
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{path}: {where or 'it '}has {shortened(found)}, expected {', '.join(sorted(checks))}")
    for name, valid in checks.items():
        if not valid(values[name]):
            raise UserError(f"{path}: {where}{name} is {shortened(values[name])}, expected the state of a run")


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= 1e300


def _text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _name(value: Any) -> bool:
    """Whether a value is the name of a checkpoint, which lies in the run."""
    return _text(value) and value not in ("", ".", "..") and Path(value).name == value


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_count, value))


def _or_none(valid: Check) -> Check:
    return lambda value: value is None or valid(value)


CHECKS: dict[str, Check] = {
    "progress": lambda value: isinstance(value, dict),
    "lanes": lambda value: isinstance(value, dict),
    "corpus": _text,
    "data": _text,
    "best": _or_none(_name),
    "best_loss": _or_none(_number),
    "validated_tokens": _or_none(_count),
    "last_validation": _count,
    "validations_since_best": _count,
    "skips_in_a_row": _count,
    "lines": _count,
    "before_cooldown": _or_none(_name),
}
PROGRESS: dict[str, Check] = {field.name: _count if field.type is int else _number for field in fields(RunProgress)}
PROGRESS["pending_loss"] = lambda value: type(value) in (int, float)  # not finite: the next step says so
