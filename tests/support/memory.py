"""The memory that MLX holds, without what a garbage collector has left."""

import gc

import mlx.core as mx


def active_memory() -> int:
    """Return the bytes of all live arrays, without garbage and what MLX's thread is about to release."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()
