"""Shared by `generate` with and without gaps: the number of files, their names and the options they store."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmr_mlx.cli import steering_options
from dsmr_mlx.cli.common import check_positive, name_of
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.options import PREFIX_OPTIONS

if TYPE_CHECKING:
    from dsmr_mlx.generation.sampling import Sampling
    from dsmr_mlx.generation.steering import Steering

GAP_OPTIONS = ("replace", "insert", "lead_to", "cut_into_gap")


def choose_name(a: argparse.Namespace, n: int) -> None:
    """Without --out, name the n files after the seed, and choose the first seed whose files do not exist yet.

    A saved state keeps its own seed.
    """
    from dsmr_mlx.cli.outputs import free_name

    if a.out is not None:
        return
    source, checkpoint = a.prompt or a.from_state, Path(name_of(a.checkpoint))
    name = (checkpoint if checkpoint.name not in ("", "..") else checkpoint.resolve()).name
    a.out, seed = free_name(Path(source).stem if source else name, n, a.seed)
    if a.from_state is None:
        a.seed = seed


def is_given(value: Any) -> bool:
    """Whether an option with this value was given: it is neither None nor False."""
    return value is not None and value is not False


def check_numbers(a: argparse.Namespace) -> int:
    """Return the number of files. Raises `UserError` for an invalid length or number of files or candidates."""
    n = 1 if a.n is None else a.n
    if n < 1:
        raise UserError(f"-n {n}: expected at least 1")
    check_positive(a, "seconds", "tokens")
    if a.best_of is not None and a.best_of < n:
        raise UserError(f"--best-of {a.best_of}: expected at least {n}, the number to keep (-n)")
    return n


def stored_options(
    a: argparse.Namespace, sampling: "Sampling", processors: "Sequence[Steering]", n: int
) -> dict[str, Any]:
    """Return the options to store in the files: `sampling` and `processors` replace those that they are made of."""
    from dsmr_mlx.generation.steering import to_dicts

    unstored = ("run", "with_options", "out", "force", "show", "checkpoint", "save_state", "no_recommended")
    unstored += (*steering_options.SAMPLING_OPTIONS, *steering_options.STEERING_OPTIONS)
    only_if_given = ("best_of", "from_state", "prompt_start", *PREFIX_OPTIONS, *GAP_OPTIONS)
    options = {
        k: v for k, v in vars(a).items() if k not in unstored and (k not in only_if_given or v not in (None, False))
    }
    options |= sampling.to_dict() | {"n": n, "continuation_only": bool(a.continuation_only)}
    if a.from_state is None:
        options["seed"] = a.seed or 0
    if processors:
        options["processors"] = to_dicts(processors)
    return options
