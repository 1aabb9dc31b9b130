"""What settings mean to a model: its recommended options, replaced by those that are set."""

from collections.abc import Mapping
from typing import Any

from dsmr_mlx.generation.options import SAMPLING_OPTIONS, STEERING_OPTIONS, make_processors, make_sampling
from dsmr_mlx.studio.messages import SETTINGS

NOTHING_SET: dict[str, Any] = dict.fromkeys(SETTINGS)
OPTIONS = (*SAMPLING_OPTIONS, *STEERING_OPTIONS)
RANGES = ("pitch_range", "velocity_range")
TRIED_SECONDS = 60.0  # of music, for which settings are checked


def playing_options(
    settings: Mapping[str, Any], recommended: Mapping[str, Any], seconds: float | None = None
) -> dict[str, Any]:
    """Return the `sampling` and the `processors` of a `Player`.

    seconds: of new music. A piece ends by itself only if `end_within` is set and the length is given. Raises
    `UserError` that names the setting.
    """
    options = {name: value for name, value in recommended.items() if name != "end_within"}
    for name in OPTIONS:
        value = settings.get(name)
        if value is not None:
            options[name] = "{}-{}".format(*value) if name in RANGES else value
    if seconds is None:
        options.pop("end_within", None)
    return {"sampling": make_sampling(options), "processors": make_processors(options, seconds)}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise `UserError` that names the setting if one has no meaning, such as a key that does not exist."""
    playing_options(settings, {}, TRIED_SECONDS)


def as_settings(recommended: Mapping[str, Any]) -> dict[str, Any]:
    """Return those recommended options that clients can set, in the form of settings."""
    known = SETTINGS.keys() & set(OPTIONS) - set(RANGES)
    shown = {name: value for name, value in recommended.items() if name in known}
    return {name: value for name, value in shown.items() if not isinstance(value, str) or name == "key"}


def chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are set."""
    return {name: value for name, value in settings.items() if value is not None}
