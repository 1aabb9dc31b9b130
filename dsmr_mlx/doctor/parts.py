"""What is optional: it is found, or absent, which is not wrong."""

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.doctor.finding import Finding, Status
from dsmr_mlx.music.audio import NO_PROGRAM, find_soundfont

BROWSERS = (
    *("chromium", "chromium-browser", "google-chrome", "firefox", "open"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
EXTRAS = {"torch": "torch", "matplotlib": "plot", "rtmidi": "live", "starlette": "studio"}  # module → extra


def check_midi_ports() -> Finding:
    """The MIDI ports of the computer."""
    from dsmr_mlx.live.ports import port_names

    try:
        inputs, outputs = port_names()
    except UserError as error:
        return Finding("", Status.ABSENT, unnamed(error))
    values = {"inputs": inputs, "outputs": outputs}
    if not inputs and not outputs:
        return Finding("", Status.ABSENT, "none is connected", values)
    return Finding("", Status.OK, f"in: {', '.join(inputs) or 'none'}; out: {', '.join(outputs) or 'none'}", values)


def check_fluidsynth() -> Finding:
    """The program that renders audio."""
    program = shutil.which("fluidsynth")
    if program is None:
        return Finding("", Status.ABSENT, NO_PROGRAM)
    try:
        shown = subprocess.check_output([program, "--version"], stderr=subprocess.STDOUT, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        advice = "install it again: `brew reinstall fluid-synth`, or `apt install --reinstall fluidsynth`"
        return Finding("", Status.WRONG, f"{program} does not run ({error})", advice=advice)
    return Finding("", Status.OK, next(iter(shown.strip().splitlines()), program), {"program": program})


def check_soundfont() -> Finding:
    """The sound of the audio files."""
    try:
        path = find_soundfont(None)
    except UserError as error:
        return Finding("", Status.ABSENT, unnamed(error))
    return Finding("", Status.OK, str(path), {"path": str(path)})


def check_browser() -> Finding:
    """A browser for the pages."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        return Finding("", Status.ABSENT, "none was found")
    return Finding("", Status.OK, found, {"program": found})


def check_extras() -> Finding:
    """The packages of the extras."""
    names = {"rtmidi": "python-rtmidi"}
    found = {
        module: version(names.get(module, module)) if importlib.util.find_spec(module) else None for module in EXTRAS
    }
    text = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    absent = [f"{name} (pip install 'dsmr-mlx[{EXTRAS[name]}]')" for name, number in found.items() if not number]
    if absent:
        text = "; ".join(filter(None, (text, f"not installed: {', '.join(absent)}")))
    return Finding("", Status.ABSENT if absent else Status.OK, text, found)


def unnamed(error: UserError) -> str:
    """The message without the part before the first colon, which says what the check is called."""
    return str(error).partition(": ")[2] or str(error)


CHECKS: dict[str, Callable[[], Finding]] = {
    "MIDI ports": check_midi_ports,
    "FluidSynth": check_fluidsynth,
    "SoundFont": check_soundfont,
    "browser": check_browser,
    "extras": check_extras,
}
