"""Run Python code in other processes."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def cpu_seconds() -> float:
    """Processor time of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@contextmanager
def kept_signal_handlers() -> Iterator[None]:
    """Restore the handlers of the signals that programs handle."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def python(code: str, *arguments: object) -> str:
    """Run code in another process, in a folder without modules. Return its output."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(statement: str) -> set[str]:
    """Return the names of the modules that are loaded after a statement."""
    report = "import json, sys; print(); print(json.dumps(sorted(sys.modules)))"
    return set(json.loads(python(f"{statement}\n{report}").splitlines()[-1]))


def named(modules: set[str], *packages: str) -> set[str]:
    """Return the modules of these packages."""
    return {name for name in modules if name in packages or name.startswith(tuple(f"{p}." for p in packages))}
