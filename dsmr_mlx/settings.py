"""Settings as text: `key=value` on the command line, the fields of a configuration by name."""

import json
import tomllib
import typing
from typing import Any

from dsmr_mlx.config import Config
from dsmr_mlx.errors import UserError
from dsmr_mlx.suggestions import meant


def parse_setting(setting: str, config_class: type[Config]) -> tuple[str, Any]:
    """`key=value` with the value in TOML; text needs no quotes, and `none` stands for no value.

    Raises `UserError` for what is not of this form, and for a key that the configuration does not have.
    """
    key, equals, text = setting.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not key:
        raise UserError(f"--set {setting}: expected key=value")
    hints = typing.get_type_hints(config_class)
    if key not in hints:
        hint = meant(key, hints) or f"; known are {', '.join(hints)}"
        raise UserError(f"--set {setting}: unknown key {key}{hint}")
    if hints[key] is str:
        return key, text.strip("\"'")
    if text.lower() == "none":
        return key, None
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text


def setting_text(value: Any) -> str:
    """A value as `--set key=value` reads it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        items = (f"{key} = {json.dumps(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    return value if isinstance(value, str) else repr(value)
