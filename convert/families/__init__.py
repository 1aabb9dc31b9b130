"""The families of checkpoints that are known: one module each, with its `FAMILIES`."""

from importlib import import_module

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.convert.rules import Family

MODULES = ("dsmr", "aria", "llama", "x_transformers", "gpt_neox", "gpt2")

FAMILIES: tuple[Family, ...] = tuple(
    family for module in MODULES for family in import_module(f"{__name__}.{module}").FAMILIES
)


def family_named(name: str) -> Family:
    """Raises `UserError` with the names that are known."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise UserError(f"--family {name}: expected one of {', '.join(family.name for family in FAMILIES)}")
