"""A training configuration from presets, TOML files and the command line."""

import dataclasses
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsmr_mlx.common.config import parse_setting, setting_text
from dsmr_mlx.common.errors import UserError, did_you_mean
from dsmr_mlx.training.config import CHANGEABLE, KEPT, LIMITS, PRESETS, TrainConfig


def build_config(
    preset: str | None = None,
    toml: str | Path | None = None,
    settings: Iterable[str] = (),
    base: dict[str, Any] | None = None,
    begun: dict[str, Any] | None = None,
    **options: Any,
) -> TrainConfig:
    """A `TrainConfig` from, in rising precedence, `base`, a preset, a TOML file, `key=value` settings and options.

    A limit that is asked for takes the place of all limits in `base` and the preset. With an `init` the architecture
    and the horizons of that checkpoint take the place of those in `base` and the preset, or those of `begun`, the
    settings of a run that goes on. Raises `UserError` that names the source and the key for anything unknown or out
    of range, and for an `init` that cannot be.
    """
    values = dict(base or {})
    if preset is not None:
        if preset not in PRESETS:
            raise UserError(f"--preset {preset}: expected one of {', '.join(PRESETS)}")
        values |= PRESETS[preset]
    asked = read_toml(toml) if toml is not None else {}
    asked |= dict(parse_setting(setting, TrainConfig) for setting in settings) | options
    if not asked.keys().isdisjoint(LIMITS):
        values |= dict.fromkeys(LIMITS)  # who asks for 50 M tokens does not want a preset's steps to end the run
    if isinstance(init := asked.get("init"), str):
        start = begun or _initial_settings(init, asked)
        values |= {name: start[name] for name in (*KEPT, *CHANGEABLE, "horizons")}
    return TrainConfig.from_dict(values | asked)


def _initial_settings(init: str, asked: dict[str, Any]) -> dict[str, Any]:
    from dsmr_mlx.training.warm_start import initial_settings  # which needs MLX

    return initial_settings(init, asked)


def read_toml(path: str | Path) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror or error})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid TOML ({error})") from None
    known = [f.name for f in dataclasses.fields(TrainConfig)]
    if unknown := sorted(set(values) - set(known)):
        hint = did_you_mean(unknown[0], known) or f"; known are {', '.join(known)}"
        raise UserError(f"--config {path}: unknown key {', '.join(unknown)}{hint}")
    return values


def train_arguments(config: TrainConfig) -> list[str]:
    """The shortest options of `dsmr-mlx train` that give this configuration: a checkpoint, a preset, settings, limits.

    A checkpoint to start from is not read: what it fixes is left out, and what it does not fix is always given.
    """
    warm = config.init is not None
    given = (*CHANGEABLE, "horizons") if warm else ()
    left_out = (*KEPT, "init") if warm else ()

    def options(preset: str) -> list[str]:
        start = build_config(preset)
        names = [f.name for f in dataclasses.fields(TrainConfig) if f.name not in left_out]
        values = {name: getattr(config, name) for name in names}
        changed = {name: value for name, value in values.items() if name in given or value != getattr(start, name)}
        limits = {name: getattr(config, name) for name in LIMITS} if not changed.keys().isdisjoint(LIMITS) else {}
        limits = {name: value for name, value in limits.items() if value is not None}
        settings = {name: value for name, value in changed.items() if name not in LIMITS}
        for name in [name for name in ("n_kv_heads", "rope_dims") if name in settings]:  # these may follow from others
            fewer = {key: value for key, value in settings.items() if key != name}
            if build_config(preset, **fewer, **limits) == config:
                settings = fewer
        flags = [word for name, value in limits.items() for word in (f"--{name.replace('_', '-')}", f"{value}")]
        sets = [word for name, value in settings.items() for word in ("--set", f"{name}={setting_text(value)}")]
        return [*(("--init", config.init) if warm else ()), "--preset", preset, *flags, *sets]

    return min(map(options, PRESETS), key=len)
