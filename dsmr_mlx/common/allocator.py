"""Keep freed memory in the process on Linux."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's `mallopt`
LARGEST = 2**31 - 1  # bytes


def keep_freed_memory() -> None:
    """From now on, keep freed memory for the next array, in processes that use glibc.

    glibc returns large arrays to the system, which has to clear their pages again for the next one. On a CPU that can
    take as long as the arithmetic of a training step. The memory of the process stays as large as it has been.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # musl has none
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, LARGEST)
