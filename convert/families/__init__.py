"""The supported families of checkpoints: one module each, with its `FAMILIES`."""

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.convert.families import aria, dsmr, gpt2, gpt_neox, llama, x_transformers
from dsmr_mlx.convert.rules import Family

FAMILIES: tuple[Family, ...] = (
    *dsmr.FAMILIES,
    *aria.FAMILIES,
    *llama.FAMILIES,
    *x_transformers.FAMILIES,
    *gpt_neox.FAMILIES,
    *gpt2.FAMILIES,
)


def family_named(name: str) -> Family:
    """Return a family. Raises `UserError`, which lists the families, for an unknown name."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise UserError(f"`family` {name}: expected one of {', '.join(family.name for family in FAMILIES)}")
