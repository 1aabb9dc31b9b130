"""Choose the device on which MLX computes."""

import os

import mlx.core as mx

from dsmr_mlx.common.errors import UserError

VARIABLE = "DSMR_DEVICE"


def on_gpu() -> bool:
    """Return whether MLX computes on a GPU by default."""
    return mx.default_device().type == mx.DeviceType.gpu


def choose_device() -> None:
    """Set MLX's default device from the environment variable `DSMR_DEVICE`, cpu or gpu; unset: no change.

    Raises `UserError` for another name, or if MLX has no GPU.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return
    if name not in ("cpu", "gpu"):
        raise UserError(f"{VARIABLE} {name}: expected cpu or gpu")
    if name == "gpu" and not (mx.metal.is_available() or mx.cuda.is_available()):
        raise UserError(f"{VARIABLE} gpu: MLX has no GPU here")
    mx.set_default_device(getattr(mx, name))
