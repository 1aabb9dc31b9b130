"""The machine and its software."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx

from dsmr_mlx import __version__
from dsmr_mlx.common.blas import blas_is_slow
from dsmr_mlx.common.formatting import format_bytes
from dsmr_mlx.doctor.finding import Finding, Status

PACKAGES = ("mlx", "numpy", "mido", "miditok", "sentencepiece", "rich")
MIN_MLX = (0, 32, 2)


def check_machine() -> Finding:
    """The device, memory and power source."""
    info = mx.device_info()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    working_set = info.get("max_recommended_working_set_size")
    values = {
        "system": platform.platform(),
        "device": mx.default_device().type.name,
        "chip": info.get("device_name", platform.machine()),
        "cores": os.cpu_count(),
        "memory": memory,
        "working_set": working_set,
        "power": power_source(),
    }
    gpu = f", of which the GPU should use {format_bytes(working_set)}" if working_set else ""
    text = (
        f"{values['chip']}, {values['cores']} cores, {format_bytes(memory)} of memory{gpu}; computes on the "
        f"{values['device']}; {values['system']}"
    )
    if platform.system() == "Darwin" and not mx.metal.is_available():
        return Finding("", Status.WRONG, text, values, "MLX finds no Metal: use Python for arm64, not under Rosetta")
    if values["power"] == "battery":
        return Finding("", Status.NOTE, text, values, "on battery power a Mac may compute more slowly")
    return Finding("", Status.OK, text, values)


def power_source() -> str | None:
    """Where the power comes from, "mains" or "battery"; None if the system does not say."""
    if platform.system() == "Darwin":
        return "battery" if "Battery Power" in subprocess.check_output(["pmset", "-g", "batt"], text=True) else "mains"
    online = [path.read_text().strip() for path in Path("/sys/class/power_supply").glob("A*/online")]
    return ("mains" if "1" in online else "battery") if online else None


def check_versions() -> Finding:
    """The versions of Python and the packages that every installation has."""
    values = {"dsmr-mlx": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            values[name] = version(name)
        except PackageNotFoundError:
            values[name] = None
    text = ", ".join(f"{name} {found or 'missing'}" for name, found in values.items())
    if missing := [name for name, found in values.items() if found is None]:
        return Finding("", Status.WRONG, text, values, f"install {', '.join(missing)}: pip install --upgrade dsmr-mlx")
    if tuple(map(int, values["mlx"].split(".")[:3])) < MIN_MLX:
        wanted = ".".join(map(str, MIN_MLX))
        return Finding("", Status.WRONG, text, values, f"MLX before {wanted} has bugs: pip install --upgrade mlx")
    return Finding("", Status.OK, text, values)


def check_blas() -> Finding:
    """Whether matrix products on the CPU are fast."""
    slow = blas_is_slow()
    values = {"slow": slow, "preloaded": os.environ.get("LD_PRELOAD", "")}
    if slow:
        advice = "install OpenBLAS (libopenblas0-pthread on Debian and Ubuntu) and set LD_PRELOAD=libopenblas.so.0"
        return Finding("", Status.NOTE, "MLX uses its own BLAS, which is slow", values, advice)
    return Finding("", Status.OK, "Accelerate" if sys.platform == "darwin" else "a fast one is loaded", values)
