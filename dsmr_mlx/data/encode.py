"""Encode MIDI files into ids, in this process or in several."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice, takewhile
from multiprocessing import get_context, parent_process
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.signals import blocked
from dsmr_mlx.music.midi import CORPUS_LIMITS, read_bytes
from dsmr_mlx.music.repairs import describe_repairs
from dsmr_mlx.tokenizers.base import Tokenizer

CHUNK = 32  # files that a worker process receives at a time
SECONDS_PER_WORKER = 1.5  # minimum work of a process; starting one takes about half a second
BYTES_PER_FILE = 45_000  # of the files in `Tokenizer.files_per_second`: performances of some minutes

_stop: Event  # in a worker process: whether it is to stop


@dataclass(frozen=True)
class Encoded:
    """The tokens of a file, or the reason why it has none.

    ids: `(T,)` with BOS and EOS; None if the file cannot be used
    duration, notes: seconds and number of notes in the file
    duration_encoded, notes_encoded: the same after decoding its tokens
    reason: why `ids` is None
    repairs: faults of the file that were repaired, see `repairs.describe_repairs`
    """

    ids: np.ndarray | None
    duration: float = 0.0
    notes: int = 0
    duration_encoded: float = 0.0
    notes_encoded: int = 0
    reason: str = ""
    repairs: str = ""


def encode_files(paths: list[Path], tokenizer: Tokenizer, workers: int | None) -> Iterator[Encoded]:
    """Encode files in order; workers: number of processes; None: `choose_workers`.

    Raises `UserError` if a process dies. If `workers` is None and no process can start, as in a script without the
    `if __name__ == "__main__"` guard of `multiprocessing`, this process does the work.
    """
    chosen = choose_workers(paths, tokenizer) if workers is None else workers
    if chosen == 1:
        return (_encode(path, tokenizer) for path in paths)
    return _encode_in_pool(paths, tokenizer, chosen, required=workers is not None)


def choose_workers(paths: list[Path], tokenizer: Tokenizer) -> int:
    """Return the number of processes: one per core, or fewer if there is too little work to be worth their start."""
    size = sum(path.stat().st_size for path in paths if path.is_file())
    seconds = size / BYTES_PER_FILE / tokenizer.files_per_second
    return max(min(cores(), int(seconds / SECONDS_PER_WORKER)), 1)


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encode_in_pool(paths: list[Path], tokenizer: Tokenizer, workers: int, required: bool) -> Iterator[Encoded]:
    """Encode chunks of files in other processes. Few chunks are pending at a time, which bounds memory."""
    chunks = (paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK))
    pending: deque[Future[list[Encoded]]] = deque()
    context, started = get_context("spawn"), False
    # A terminal sends its signals to the processes that begin in these blocks, too, but they never receive them.
    with blocked():
        stop = context.Event()
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(stop,))

    def submit(n: int) -> None:
        with blocked():
            pending.extend(pool.submit(_encode_chunk, chunk, tokenizer) for chunk in islice(chunks, n))

    try:
        submit(2 * workers)
        while pending:
            encoded = pending.popleft().result()
            started = True
            yield from encoded
            submit(1)
    except BrokenExecutor as error:
        if required or started:
            raise UserError("`workers`: a process died while encoding MIDI files; try 1") from error
    finally:
        stop.set()  # a worker that is terminated while it sends a result makes the pool wait for the rest for ever
        pool.shutdown(wait=True, cancel_futures=True)
    if not started:
        yield from (_encode(path, tokenizer) for path in paths)


def _begin_worker(stop: Event) -> None:
    """Keep `stop`, for `_encode_chunk`. End this process when its parent ends: one that is killed cannot stop it."""
    global _stop
    _stop = stop

    def wait_for_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def _encode_chunk(paths: list[Path], tokenizer: Tokenizer) -> list[Encoded]:
    """In a worker: encode files, fewer of them if it is to stop."""
    return [_encode(path, tokenizer) for path in takewhile(lambda path: not _stop.is_set(), paths)]


def _encode(path: Path, tokenizer: Tokenizer) -> Encoded:
    """Return one file's tokens, or the reason why it has none."""
    try:
        # From bytes, so that the reason does not repeat the path.
        data = read_bytes(path, CORPUS_LIMITS)
        (notes, repairs), ids = tokenizer.read(data, CORPUS_LIMITS)
    except UserError as error:
        return Encoded(None, reason=str(error))
    count, duration_encoded = tokenizer.recovered(notes, ids)
    if not count:
        return Encoded(None, reason=f"{tokenizer.label} can represent none of its {len(notes):,} notes")
    return Encoded(ids, notes.duration, len(notes), duration_encoded, count, repairs=describe_repairs(repairs))
