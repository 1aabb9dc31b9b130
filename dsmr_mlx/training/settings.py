"""A training configuration from presets, TOML files and the command line."""

import dataclasses
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsmr_mlx.common.config import parse_setting, setting_text
from dsmr_mlx.common.errors import UserError, did_you_mean
from dsmr_mlx.common.files import read_toml as read_toml_file
from dsmr_mlx.training.config import FIXED_BY_WEIGHTS, FREE, LIMITS, LORA_RECIPE, PRESETS, TrainConfig


def build_config(
    preset: str | None = None,
    config: str | Path | None = None,
    settings: Iterable[str] = (),
    base: dict[str, Any] | None = None,
    resumed: dict[str, Any] | None = None,
    **options: Any,
) -> TrainConfig:
    """Return a `TrainConfig` from, in rising precedence, `base`, a preset, a TOML file, settings and options.

    config: the TOML file. settings: "key=value" each. A limit given there or in the options replaces all limits of
    `base` and the preset. With an `init`, the architecture and horizons of that checkpoint replace those of `base` and
    the preset; in a resumed run, whose settings are `resumed`, they are the run's own. With a `lora_rank`, the recipe
    for adapters replaces that of the preset.

    Raises `UserError`, naming the source and the key, for anything unknown or out of range, and for an invalid `init`.
    """
    values = dict(base or {})
    if preset is not None:
        if preset not in PRESETS:
            raise UserError(f"`preset` {preset}: expected one of {', '.join(PRESETS)}")
        values |= PRESETS[preset]
    given = read_toml(config) if config is not None else {}
    given |= dict(parse_setting(setting, TrainConfig) for setting in settings) | options
    if given.get("lora_rank") is not None and not base:
        values |= LORA_RECIPE
    if not given.keys().isdisjoint(LIMITS):
        values |= dict.fromkeys(LIMITS)  # a run of 50 M tokens must not be ended by the preset's number of steps
    if isinstance(init := given.get("init"), str):
        start = resumed or _initial_settings(init, given)
        values |= {name: start[name] for name in (*FIXED_BY_WEIGHTS, *FREE, "horizons")}
    return TrainConfig.from_dict(values | given)


def _initial_settings(init: str, given: dict[str, Any]) -> dict[str, Any]:
    from dsmr_mlx.training.warm_start import initial_settings  # needs MLX

    return initial_settings(init, given)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read the settings in a TOML file, in which "none" is None unless the setting is text, such as `horizons`.

    Raises `UserError` if it cannot be read or has unknown keys.
    """
    try:
        values = read_toml_file(path, "settings in TOML")
    except UserError as error:
        raise UserError(f"`config` {error}") from None
    known = [f.name for f in dataclasses.fields(TrainConfig)]
    if unknown := sorted(set(values) - set(known)):
        hint = did_you_mean(unknown[0], known) or f"; known are {', '.join(known)}"
        raise UserError(f"`config` {path}: unknown key {', '.join(unknown)}{hint}")
    hints = typing.get_type_hints(TrainConfig)
    return {key: None if value == "none" and hints[key] is not str else value for key, value in values.items()}


def train_arguments(config: TrainConfig) -> list[str]:
    """Return the shortest options of `dsmr-mlx train` that give this configuration.

    A checkpoint to start from is not read: settings that it fixes are left out, and those that it does not fix are
    always given.
    """
    warm = config.init is not None
    always = (*FREE, "horizons") if warm else ()
    left_out = (*FIXED_BY_WEIGHTS, "init") if warm else ()

    def options(preset: str) -> list[str]:
        start = build_config(preset)
        if config.lora_rank is not None:
            start = dataclasses.replace(start, **LORA_RECIPE)
        names = [f.name for f in dataclasses.fields(TrainConfig) if f.name not in left_out]
        values = {name: getattr(config, name) for name in names}
        changed = {name: value for name, value in values.items() if name in always or value != getattr(start, name)}
        limits = {name: getattr(config, name) for name in LIMITS} if not changed.keys().isdisjoint(LIMITS) else {}
        limits = {name: value for name, value in limits.items() if value is not None}
        settings = {name: value for name, value in changed.items() if name not in LIMITS}
        for name in [
            name for name in ("n_kv_heads", "rope_dims") if name in settings
        ]:  # their defaults depend on others
            fewer = {key: value for key, value in settings.items() if key != name}
            if build_config(preset, **fewer, **limits) == config:
                settings = fewer
        flags = [word for name, value in limits.items() for word in (f"--{name.replace('_', '-')}", f"{value}")]
        sets = [word for name, value in settings.items() for word in ("--set", f"{name}={setting_text(value)}")]
        return [*(("--init", config.init) if warm else ()), "--preset", preset, *flags, *sets]

    return min(map(options, PRESETS), key=len)
