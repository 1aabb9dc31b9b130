"""Which BLAS MLX computes with on a CPU."""

import ctypes
from pathlib import Path

MAPS = Path("/proc/self/maps")
BROUGHT = "mlx_cpu.libs/libblas"  # Netlib's, in MLX's wheels for Linux


def is_slow() -> bool:
    """Whether MLX, which is imported, uses the reference BLAS of its wheels: nothing was preloaded in its place.

    False where that is not known.
    """
    try:
        loaded = MAPS.read_text()
    except OSError:  # not Linux
        return False
    return BROUGHT in loaded and not hasattr(ctypes.CDLL(None), "cblas_sgemm")
