"""Base class of configurations, and settings as `key=value` text."""

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, Self

from dsmr_mlx.common.errors import SettingError, UserError, did_you_mean
from dsmr_mlx.common.files import read_json
from dsmr_mlx.common.limits import MAX_INTEGER, MAX_SIZES
from dsmr_mlx.common.parsing import parse_json, parse_toml


class Config:
    """Base class of configuration dataclasses. Converts to and from JSON; unknown keys and wrong types are errors."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as JSON values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return the fields as a JSON object, indented."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> Self:
        """Build a configuration. Raises `UserError`, which names `source`, for unknown, missing or invalid keys."""
        if not isinstance(values, dict):
            raise UserError(f"{source}: expected a table of settings, found {type(values).__name__}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise UserError(f"{source}: unknown key {', '.join(unknown)}; known are {', '.join(fields)}")
        required = {
            n
            for n, f in fields.items()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        if missing := sorted(required - set(values)):
            raise UserError(f"{source}: missing key {', '.join(missing)}")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    @classmethod
    def from_json(cls, text: str, source: str = "config") -> Self:
        """Parse a JSON object; see `from_dict`."""
        try:
            values = parse_json(text)
        except ValueError as error:
            raise UserError(f"{source}: not valid JSON ({error})") from None
        return cls.from_dict(values, source)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a JSON file. Raises `UserError`, which names the file, as `from_dict` does."""
        return cls.from_dict(read_json(path, "a configuration"), str(path))

    def check_types(self) -> None:
        """Raise `UserError` for the first field that does not match its annotation; 1 becomes a float, 1e6 an int."""
        hints = typing.get_type_hints(type(self))
        for name in (field.name for field in dataclasses.fields(self)):
            value, hint = getattr(self, name), hints[name]
            if isinstance(value, float) and value.is_integer() and _accepts(hint, int):
                value = int(value)
            if type(value) is int and abs(value) > MAX_INTEGER:
                raise SettingError(name, getattr(self, name), f"at most {MAX_INTEGER}")
            if type(value) is int and _accepts(hint, float):
                value = float(value)
            object.__setattr__(self, name, value)
            if isinstance(value, float) and not math.isfinite(value):
                raise SettingError(name, value, "a finite number")
            if not is_instance(value, hint):
                wanted = hint.__name__ if isinstance(hint, type) else str(hint)
                raise SettingError(name, value, wanted)
            if name in MAX_SIZES and isinstance(value, int) and value > MAX_SIZES[name]:
                raise SettingError(name, value, f"at most {MAX_SIZES[name]:,}")

    def require(self, name: str, condition: bool, expected: str) -> None:
        """Raise `UserError`, which names the field, its value and what is `expected`, if the condition is false."""
        if not condition:
            raise SettingError(name, getattr(self, name), expected)


def _accepts(hint: Any, kind: type) -> bool:
    return hint is kind or (isinstance(hint, types.UnionType) and kind in typing.get_args(hint))


def is_instance(value: Any, hint: Any) -> bool:
    """Return whether a value has a type, a union, or a `list` of items of a type. A bool is not an int."""
    if isinstance(hint, types.UnionType):
        return any(is_instance(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return isinstance(value, list) and all(is_instance(v, item) for v in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, hint)


def parse_setting(setting: str, config_class: type[Config]) -> tuple[str, Any]:
    """Parse `key=value`. The value is in TOML, but text needs no quotes and `none` is None.

    Raises `UserError` for any other form, or a key that is not a field of the configuration.
    """
    key, equals, text = setting.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not key:
        raise UserError(f"`settings` {setting}: expected key=value")
    hints = typing.get_type_hints(config_class)
    if key not in hints:
        hint = did_you_mean(key, hints) or f"; known are {', '.join(hints)}"
        raise UserError(f"`settings` {setting}: unknown key {key}{hint}")
    if hints[key] is str:
        return key, text.strip("\"'")
    if text.lower() == "none":
        return key, None
    try:
        return key, parse_toml(f"value = {text}")["value"]
    except ValueError:
        return key, text


def setting_text(value: Any) -> str:
    """Return a value as text that `parse_setting` reads."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        items = (f"{key} = {json.dumps(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    return value if isinstance(value, str) else repr(value)
