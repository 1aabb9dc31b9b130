"""The setting of the comparison: one model, one data order, and eight ways to spread a memory over the layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from dsmr_mlx.model.horizons import FAMILIES, parse
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.settings import build_config

REFERENCE, HEADLINE = "full", "two-scale"


@dataclass(frozen=True)
class Setting:
    """A preset, changes to it, and the schedules by name; the first schedule is the reference.

    cap: tokens that every layer of `full` and the long layers of the others carry
    long: number of long layers; short: tokens that the other layers carry
    tokens: tokens of a training run
    """

    preset: str
    settings: tuple[str, ...]
    cap: int
    long: int
    short: int
    tokens: int
    chosen: tuple[str, ...] = ()

    @classmethod
    def of(cls, size: str, settings: Sequence[str], chosen: Sequence[str], **changes: int | None) -> Self:
        """One of `SIZES`, with additional `key=value` settings and changed numbers."""
        base = SIZES[size]
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(base, settings=(*base.settings, *settings), chosen=tuple(chosen), **given)

    @property
    def specs(self) -> dict[str, str]:
        """The spec of each schedule.

        All but `full` and `none` share the budget of `two-scale`. In `interleaved` every third layer is long;
        `geometric` falls to a twentieth from the lowest layer to the highest.
        """
        layers = build_config(self.preset, settings=self.settings).n_layers
        two_scale = f"long={self.long}x{self.cap},short={self.short}"
        budget = parse(f"two-scale:{two_scale}", layers).budget
        named = {
            REFERENCE: f"full:{self.cap}",
            HEADLINE: f"two-scale:{two_scale}",
            "none": "none",
            "uniform": f"uniform:budget={budget}",
            "inverse-two-scale": f"inverse-two-scale:{two_scale}",
            "interleaved": f"interleaved:budget={budget},every={min(3, layers)}",
            "linear": f"linear:budget={budget}",
            "geometric": f"geometric:budget={budget},ratio={0.05 ** (1 / layers):.2f}",
        }
        if not self.chosen:
            return named
        # The family `full` needs a cap, the name does not.
        return {name: named[name] if name in named and name in FAMILIES else name for name in self.chosen}

    def config(self, spec: str, seed: int = 0) -> TrainConfig:
        """The training run of a schedule; only horizons and seed differ between runs."""
        return build_config(
            self.preset, settings=(*self.settings, f"horizons={spec}", f"seed={seed}"), max_tokens=self.tokens
        )


SIZES = {
    # One CPU core trains a few thousand tokens/s. With layers only 128 wide, attention over 1,024 tokens takes most of
    # a step and its memory, as it does in larger models with longer memories. With segments of 32 the horizons
    # determine the recurrent state; many lanes let a short run see many pieces.
    "cpu": Setting(
        preset="tiny",
        settings=(
            *("n_layers=6", "d_ff=352", "segment_length=32", "batch_size=16"),
            *("min_learning_rate=2e-4", "eval_tokens=120000"),
        ),
        cap=1024,
        long=1,
        short=64,
        tokens=500_000,
    ),
    # The preset unchanged.
    "small": Setting(preset="small", settings=(), cap=1024, long=2, short=128, tokens=10_000_000),
    # For a GPU or a Mac with 32 GB: about 40 M parameters, and the same proportions.
    "base": Setting(
        preset="base",
        settings=("segment_length=256", "eval_tokens=none"),
        cap=2048,
        long=3,
        short=128,
        tokens=100_000_000,
    ),
}
