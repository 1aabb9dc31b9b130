"""What all displays share: the two consoles, tables, units and progress."""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dsmr_mlx.cli import console as blas

WIDE = 10_000  # columns: a path is never cut
SECONDS_BETWEEN_LINES = 10.0  # of a log file, where no bar can move


class Screen(Console):
    """A console that leaves it to the program how to end where the reader of a pipe has gone."""

    def on_broken_pipe(self) -> None:
        raise  # the `BrokenPipeError` that Rich is handling


# No markup: a file may be called "[b] :warning:.mid".
out = Screen(width=WIDE, highlight=False, soft_wrap=True, markup=False, emoji=False)
err = Screen(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def table(*columns: str) -> Table:
    """A plain table; the first column is text, the others are numbers."""
    result = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i == 0 else "right")
    return result


def hint_blas() -> None:
    """How MLX would be faster on this machine, if that is known; of no use in a log."""
    if err.is_terminal and blas.is_slow():
        err.print(
            "hint: MLX's own BLAS is slow; with OpenBLAS (libopenblas0-pthread on Debian and Ubuntu) and "
            "LD_PRELOAD=libopenblas.so.0 this is several times faster"
        )


@contextmanager
def progress(title: str, unit: str, quiet: bool = False) -> Iterator[Callable[[float, float], None]]:
    """A bar to be told (done, total); lines now and then where standard error is no terminal."""
    if quiet:
        yield lambda done, total: None
    elif err.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
        with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bar:
            task = bar.add_task(title, total=None, count="")
            yield lambda done, total: bar.update(
                task, completed=done, total=total, count=f"{min(done, total):,.0f} of {total:,.0f} {unit}"
            )
    else:
        last = time.monotonic()

        def line(done: float, total: float) -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                err.print(f"{title}: {min(done, total):,.0f} of {total:,.0f} {unit}")

        yield line


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
