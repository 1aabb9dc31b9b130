"""Is everything right on this machine, and how fast is it: `examine` runs the checks one by one.

machine     the facts: device, memory, versions, BLAS
numbers     logits, gradients, quantized weights and fused attention, against a reference
playing     pausing, rewinding, memory, speed
cold        the first token in a new process
training    steps that learn, repeat and resume; speed
parts       what is optional: MIDI ports, FluidSynth, SoundFonts, browsers, packages
"""

from collections.abc import Callable, Iterator
from functools import partial

from dsmr_mlx.doctor.finding import MIDI_PACKAGES, Finding, Status

Check = Callable[[], Finding]


def checks(full: bool) -> list[tuple[str, Check]]:
    """The name and the function of each check, in the order in which they run. full: also those that take minutes."""
    from dsmr_mlx.doctor import cold, machine, numbers, parts, playing, training

    found = [
        ("machine", machine.check_machine),
        ("versions", machine.check_versions),
        ("BLAS", machine.check_blas),
        ("logits", partial(numbers.check_logits, full)),
        ("half precision", numbers.check_half_precision),
        ("quantized weights", partial(numbers.check_quantized, full)),
        ("rotary positions", numbers.check_positions),
        ("gradients", numbers.check_gradients),
        ("fused attention", numbers.check_fused_attention),
        ("pause and rewind", playing.check_rewind),
        ("memory", partial(playing.check_memory, 5000 if full else 1200)),
        ("training", partial(training.check_training, full)),
        ("resuming", training.check_resuming),
        ("speed of playing", partial(playing.measure_playing, full)),
        ("speed of reading", playing.measure_reading),
        ("speed of training", partial(training.measure_training, full)),
    ]
    if full:
        found += [
            ("answer in live", playing.check_answer),
            ("first token", cold.measure_first_token),
            ("options of playing", playing.compare_options),
        ]
    return [*found, *parts.CHECKS.items()]


def examine(full: bool = False, names: list[tuple[str, Check]] | None = None) -> Iterator[Finding]:
    """Yield what each check finds. A check that fails with an exception is wrong, and the next ones run all the same.

    A check that needs a package for MIDI that is not installed is absent.

    names: the checks; None: all of `checks(full)`.
    """
    for name, check in checks(full) if names is None else names:
        try:
            finding = check()
        except ModuleNotFoundError as error:
            optional = error.name in MIDI_PACKAGES
            advice = f"pip install {error.name}" if optional else REPORT
            finding = Finding("", Status.ABSENT if optional else Status.WRONG, f"needs {error.name}", advice=advice)
        except Exception as error:  # whatever is wrong here, the user needs to read it
            text = " ".join(f"{type(error).__name__}: {error}".split())
            finding = Finding("", Status.WRONG, text, advice=REPORT)
        yield finding.named(name)


REPORT = "please report it with the output of `dsmr-mlx doctor --json`"
