"""The machine and its software."""

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import mlx.core as mx

from dsmr_mlx import __version__
from dsmr_mlx.common.blas import blas_is_slow
from dsmr_mlx.common.formatting import format_bytes
from dsmr_mlx.doctor.finding import MIDI_PACKAGES, Finding, Status

CUDA_BUILDS = {"mlx-cuda-12": "[cuda12]", "mlx-cuda-13": "[cuda13]"}  # package → extra of MLX
VARIABLES = ("DSMR_DEVICE", "METAL_", "MLX_")  # that change what is computed, or how fast


def check_machine() -> Finding:
    """The device, memory and power source."""
    info = mx.device_info()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    working_set = info.get("max_recommended_working_set_size") or info.get("total_memory")  # of Metal, of CUDA
    values = {
        "system": platform.platform(),
        "device": mx.default_device().type.name,
        "chip": info.get("device_name", platform.machine()),
        "cores": os.cpu_count(),
        "memory": memory,
        "working_set": working_set,
        "power": power_source(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)},
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
    """The versions of Python and of the packages that the program requires."""
    wanted = requirements()
    wanted["mlx"] = with_build(wanted["mlx"])
    found = {"dsmr-mlx": __version__, "python": platform.python_version()}
    found |= {name: installed(name) for name in wanted}
    text = ", ".join(f"{name} {number or 'missing'}" for name, number in found.items())
    missing = [name for name in wanted if found[name] is None]
    other = [name for name in wanted if found[name] is not None and not fits(found[name], wanted[name])]
    advice = " ".join(["pip install", *(f"'{name}{wanted[name]}'" for name in [*missing, *other])])
    if other or not MIDI_PACKAGES.issuperset(missing):
        return Finding("", Status.WRONG, text, found, f"install other versions: {advice}")
    if missing:
        return Finding("", Status.ABSENT, text, found, f"for MIDI files and live playing: {advice}")
    return Finding("", Status.OK, text, found)


def requirements() -> dict[str, str]:
    """The packages that the program always requires on this system: name → bounds, such as `[cpu]<0.33,>=0.32.2`."""
    found = {}
    for line in requires("dsmr-mlx") or []:
        requirement, _, marker = line.partition(";")
        if "extra" not in marker and ("sys_platform" not in marker or sys.platform in marker):
            name, bounds = re.match(r"([\w.-]+)(.*)", requirement.strip()).groups()
            found[name] = bounds.strip()
    return found


def with_build(bounds: str) -> str:
    """The bounds of MLX with the extra of its CUDA build if that is installed; the CPU build would replace it."""
    extra = next((extra for package, extra in CUDA_BUILDS.items() if installed(package)), "[cpu]")
    return bounds.replace("[cpu]", extra)


def installed(name: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def fits(number: str, bounds: str) -> bool:
    """Whether a version is within bounds such as `<0.33,>=0.32.2`; one before a final release is below it."""
    release, final = parts_of(number)
    for relation, bound in re.findall(r"(>=|<)\s*([\d.]+)", bounds):
        limit = parts_of(bound)[0]
        if release >= limit if relation == "<" else (release, final) < (limit, True):
            return False
    return True


def parts_of(number: str) -> tuple[tuple[int, ...], bool]:
    """The numbers of a version without zeros at the end, and whether it is no alpha, beta, candidate or snapshot."""
    release, rest = re.match(r"((?:\d+\.?)*)(.*)", number).groups()
    numbers = [int(part) for part in release.split(".") if part]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers), not re.match(r"[._-]?(a|b|c|rc|dev|alpha|beta|pre)", rest)


def check_blas() -> Finding:
    """Whether matrix products on the CPU are fast."""
    slow = blas_is_slow()
    values = {"slow": slow, "preloaded": os.environ.get("LD_PRELOAD", "")}
    if slow:
        advice = "install OpenBLAS (libopenblas0-pthread on Debian and Ubuntu) and set LD_PRELOAD=libopenblas.so.0"
        return Finding("", Status.NOTE, "MLX uses its own BLAS, which is slow", values, advice)
    return Finding("", Status.OK, "Accelerate" if sys.platform == "darwin" else "a fast one is loaded", values)
