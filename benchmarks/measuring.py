"""Shared by the benchmarks: random music and models, timing in turns, memory, and results with their origin."""

import ctypes
import datetime
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsmr_mlx.common.files import write_atomically
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.performance import encode_notes

if TYPE_CHECKING:
    from dsmr_mlx.model.config import ModelConfig
    from dsmr_mlx.model.dsmr import DSMR


def music(tokens: int, seed: int = 0) -> np.ndarray:
    """Ids of random notes, `(tokens,)` int64: the token statistics of a performance without the music."""
    rng = np.random.default_rng(seed)
    onset = np.cumsum(rng.integers(1, 25, tokens // 2)) / 100
    offset = onset + rng.integers(5, 120, tokens // 2) / 100
    notes = Notes.sorted(onset, offset, rng.integers(30, 95, tokens // 2), rng.integers(20, 110, tokens // 2))
    return encode_notes(notes)[:tokens].astype(np.int64)


def random_model(config: "ModelConfig", dtype: str = "float32") -> "DSMR":
    """A model with reproducible random weights whose predictions vary as a trained model's do."""
    import mlx.core as mx

    from dsmr_mlx.model.dsmr import DSMR

    mx.random.seed(0)
    model = DSMR(config).eval()
    model.embed.weight = model.embed.weight * 15
    model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())
    return model


def take(steps: Iterator[object], n: int) -> None:
    """Consume the next n items, or fewer if there are no more."""
    deque(islice(steps, n), maxlen=0)


def seconds(work: Callable[[], object]) -> float:
    """The wall time of a call. The call must evaluate what it computes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turn(
    sides: Sequence[Callable[[], object]], rounds: int, warmup: int = 2, limit: float = math.inf
) -> list[list[float]]:
    """Seconds of each side per round. The sides take turns, so a machine that slows down slows all of them.

    After `limit` seconds no further round starts; there is always at least one.
    """
    for _ in range(warmup):
        for side in sides:
            side()
    times: list[list[float]] = [[] for _ in sides]
    started = time.perf_counter()
    for turn in range(rounds):
        if turn and time.perf_counter() - started > limit:
            break
        for side, measured in zip(sides, times, strict=True):
            measured.append(seconds(side))
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, under the names used in the results."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"median": middle, "low": low, "high": high}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The `spread` of above / below, round by round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


class Worker:
    """A side of a comparison in its own process, so its memory is measured alone and it is idle while others run.

    build: a module-level function that builds the side in that process; `build(*arguments)` returns the function that a
    turn calls, whose result must be picklable. Raises `RuntimeError` with the traceback of an error in the process.
    """

    def __init__(self, build: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_work, args=(there, build, arguments), daemon=True)
        self._process.start()
        there.close()
        self._ask(None)

    def __call__(self) -> Any:
        """Take a turn."""
        return self._ask("turn")

    def memory(self) -> dict[str, int]:
        """Bytes used by the side so far, see `Memory.read`."""
        return self._ask("memory")

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def _ask(self, question: str | None) -> Any:
        if question:
            self._pipe.send(question)
        try:
            answer, failure = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a side ended unexpectedly, exit code {self._process.exitcode}") from None
        if failure:
            raise RuntimeError(failure)
        return answer


def _work(pipe: Connection, build: Callable[..., Callable[[], Any]], arguments: tuple) -> None:
    """Serve a `Worker` until its pipe is closed."""
    try:
        memory = Memory()
        side = build(*arguments)
        pipe.send((None, None))
        while True:
            question = pipe.recv()
            pipe.send((side() if question == "turn" else memory.read(), None))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception:
        pipe.send((None, traceback.format_exc()))


class Memory:
    """The memory that this process uses from now on."""

    def __init__(self) -> None:
        import mlx.core as mx

        mx.reset_peak_memory()
        self._resident = peak_resident()

    def read(self) -> dict[str, int]:
        """Bytes. held, peak: allocated by MLX now, and at most; resident: growth of the process's peak resident
        memory.
        """
        import mlx.core as mx

        return {
            "held": mx.get_active_memory(),
            "peak": mx.get_peak_memory(),
            "resident": peak_resident() - self._resident,
        }


def peak_resident() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage starts from the parent's peak
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) << 10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine() -> dict[str, Any]:
    """What figures depend on besides the code: processor or GPU, libraries, date."""
    import mlx.core as mx

    device = mx.default_device().type.name
    information = mx.device_info()
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "name": information.get("device_name", platform.processor()),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "blas": loaded_blas() if device == "cpu" else None,
        "blas_threads": blas_threads() if device == "cpu" else None,
    }


def blas_threads() -> int | None:
    """The number of threads of a preloaded OpenBLAS, None if unknown."""
    count = getattr(ctypes.CDLL(None), "openblas_get_num_threads", None)
    return count and count()


def loaded_blas() -> str | None:
    """The file name of a preloaded OpenBLAS, if any (Linux). NumPy's own has another name."""
    maps = Path("/proc/self/maps")
    names = re.findall(r"/(libopenblas[^/\n]*)$", maps.read_text(), re.MULTILINE) if maps.exists() else []
    return names[0] if names else None


def save(path: str | Path, result: dict[str, Any]) -> None:
    """Write `result` as JSON, preceded by the command, from the root of the repository, and the machine."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    document = {"command": command, "machine": machine()} | result
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(document, indent=2, allow_nan=False) + "\n")
