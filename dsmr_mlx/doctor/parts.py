"""What is optional: it is found, or absent, which is not wrong."""

import importlib
import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.doctor.finding import Finding, Status
from dsmr_mlx.music.audio import NO_PROGRAM, NoSoundFont, find_fluidsynth, find_soundfont

BROWSERS = (
    *("chromium", "chromium-browser", "google-chrome", "firefox", "open"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
EXTRAS = {"torch": "convert", "matplotlib": "plot", "rtmidi": "live", "starlette": "studio"}  # module → extra
PACKAGES = {"rtmidi": "python-rtmidi"}  # whose names are not those of their modules
MAX_SECONDS = 20  # for FluidSynth to print its version


def check_midi_ports() -> Finding:
    """The MIDI ports of the computer."""
    from dsmr_mlx.live.ports import REPAIR, BrokenBackend, port_names  # needs mido

    try:
        inputs, outputs = port_names()
    except BrokenBackend as error:
        return Finding("", Status.WRONG, unnamed(error), advice=REPAIR)
    except UserError as error:
        return Finding("", Status.ABSENT, unnamed(error))
    values = {"inputs": inputs, "outputs": outputs}
    if not inputs and not outputs:
        return Finding("", Status.ABSENT, "none is connected", values)
    return Finding("", Status.OK, f"in: {', '.join(inputs) or 'none'}; out: {', '.join(outputs) or 'none'}", values)


def check_fluidsynth() -> Finding:
    """The program that renders audio."""
    program = find_fluidsynth()
    if program is None:
        return Finding("", Status.ABSENT, NO_PROGRAM)
    advice = "install it again: `brew reinstall fluid-synth`, or `apt install --reinstall fluidsynth`"
    try:
        shown = subprocess.check_output(
            [program, "--version"], stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, text=True, timeout=MAX_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("", Status.WRONG, f"{program} does not run ({error})", advice=advice)
    if not shown.strip():
        return Finding("", Status.WRONG, f"{program} prints no version", advice=advice)
    return Finding("", Status.OK, shown.strip().splitlines()[0], {"program": program})


def check_soundfont() -> Finding:
    """The sound of the audio files."""
    try:
        path = find_soundfont(None)
    except NoSoundFont as error:
        return Finding("", Status.ABSENT, unnamed(error))
    except UserError as error:
        advice = "remove that file, or set SOUNDFONT to the path of an .sf2 or .sf3 file"
        return Finding("", Status.WRONG, str(error), advice=advice)
    return Finding("", Status.OK, str(path), {"path": str(path)})


def check_browser() -> Finding:
    """A browser for the pages."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        return Finding("", Status.ABSENT, "none was found")
    return Finding("", Status.OK, found, {"program": found})


def check_extras() -> Finding:
    """The packages of the extras: installed, absent, or installed and broken."""
    found, absent, broken = {}, [], []
    for module, extra in EXTRAS.items():
        name = PACKAGES.get(module, module)
        if importlib.util.find_spec(module) is None:
            found[module] = None
            absent.append(f"{module} (pip install 'dsmr-mlx[{extra}]')")
            continue
        found[module] = version(name)
        try:
            importlib.import_module(module)
        except Exception as error:  # of a package for another processor, say; each package has its own
            broken.append((name, " ".join(f"{module} cannot be imported ({error})".split())))
    text = ", ".join(f"{name} {number}" for name, number in found.items() if number)
    parts = [text, *(reason for _, reason in broken), f"not installed: {', '.join(absent)}" if absent else ""]
    text = "; ".join(filter(None, parts))
    if broken:
        advice = f"pip install --force-reinstall --no-cache-dir {' '.join(name for name, _ in broken)}"
        return Finding("", Status.WRONG, text, found, advice)
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
