"""Detect MLX's slow reference BLAS for the CPU."""

import ctypes
from pathlib import Path

MEMORY_MAP = Path("/proc/self/maps")  # Linux: the files that the process has loaded
WHEEL_BLAS = "mlx_cpu.libs/libblas"  # the reference BLAS of Netlib, in MLX's wheels for Linux


def blas_is_slow() -> bool:
    """Whether the imported MLX uses the reference BLAS of its wheels, with no other BLAS preloaded.

    False if unknown.
    """
    try:
        loaded = MEMORY_MAP.read_text()
    except OSError:  # not Linux
        return False
    return WHEEL_BLAS in loaded and not hasattr(ctypes.CDLL(None), "cblas_sgemm")
