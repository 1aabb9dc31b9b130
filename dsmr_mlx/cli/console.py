"""The two consoles, tables, counts, progress bars, and a hint for a slow BLAS."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from dsmr_mlx.common.blas import blas_is_slow
from dsmr_mlx.common.formatting import format_bytes, one_line

MAX_COLUMNS = 10_000  # paths are never cut
SECONDS_BETWEEN_LINES = 10.0  # of progress in a log file


class Screen(Console):
    """A console that shows all text literally, also untrusted text from files.

    Each text is shown as one line, see `one_line`. A closed pipe raises an error for `main` instead of exiting.
    """

    def render_str(self, text: str, **options) -> Text:
        """Return a text, as one line."""
        return super().render_str(one_line(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments of tables, texts and bars, with their line ends."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable() or segment.text == "\n":
                yield segment
            else:
                yield Segment("\n".join(map(one_line, segment.text.split("\n"))), segment.style)

    def on_broken_pipe(self) -> None:
        """Raise the `BrokenPipeError`."""
        raise  # re-raises the `BrokenPipeError` that Rich is handling


# No markup: a file name may be "[b] :warning:.mid".
out = Screen(width=MAX_COLUMNS, highlight=False, soft_wrap=True, markup=False, emoji=False)
err = Screen(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def table(*columns: str) -> Table:
    """Return an empty table. The first column is text, the others are numbers."""
    result = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i == 0 else "right")
    return result


def count(n: int, noun: str) -> str:
    """Format a number of things: `1 file`, `2,000 files`."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def show_file(path: Path) -> None:
    """Show the path and the size of a written file."""
    out.print(f"{path}: {format_bytes(path.stat().st_size)}")


def hint_blas() -> None:
    """Print how to make MLX faster if its BLAS is slow; in a terminal only."""
    if err.is_terminal and blas_is_slow():
        err.print(
            "hint: MLX's own BLAS is slow; OpenBLAS is about 30 times faster: install it (libopenblas0-pthread on "
            "Debian and Ubuntu) and set LD_PRELOAD=libopenblas.so.0"
        )


@contextmanager
def progress(title: str, unit: str, quiet: bool = False) -> Iterator[Callable[[float, float], None]]:
    """Show a progress bar, updated with (done, total); in a log file, a line every few seconds."""
    if quiet:
        yield lambda done, total: None
    elif err.is_terminal:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[count]}"))
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
