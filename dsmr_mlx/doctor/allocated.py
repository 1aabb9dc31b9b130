"""The memory that MLX holds, without what earlier checks left behind."""

import gc

import mlx.core as mx


def allocated() -> int:
    """Return the bytes of all living arrays, and count the peak from here on.

    Trainers and players are parts of reference cycles, so that they live until garbage is collected.
    """
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()
