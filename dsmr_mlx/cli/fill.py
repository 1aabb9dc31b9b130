"""`dsmr-mlx generate --replace`, `--insert` and `--lead-to`: new music in the gaps of a piece."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmr_mlx.cli import steering_options
from dsmr_mlx.cli.common import load_checkpoint, name_of
from dsmr_mlx.cli.console import err, progress
from dsmr_mlx.cli.generation_results import show_filled_rolls, show_joins, show_passages
from dsmr_mlx.cli.models import show_licence, show_listening
from dsmr_mlx.cli.naming import GAP_OPTIONS, check_numbers, choose_name, is_given, stored_options
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.options import PREFIX_OPTIONS

if TYPE_CHECKING:
    from dsmr_mlx.generation.filling import Filled
    from dsmr_mlx.music.gapped import GappedMusic
    from dsmr_mlx.music.notes import Notes

LEAD_SECONDS = 10.0  # of --lead-to
TIME = r"(?:(\d+):)?(\d+(?:\.\d*)?|\.\d+)"  # 65, 12.5, 1:05.5


def add(p: argparse.ArgumentParser) -> None:
    """Add the options of gaps."""
    gaps = p.add_argument_group(
        "gaps",
        "new music in a part of --prompt FILE.mid; the rest is written unchanged. Times count from the first note, "
        "in seconds or as 1:05.5. A model that supports gaps is shown what follows",
    )
    gaps.add_argument(
        "--replace",
        action="append",
        metavar="START-END",
        help="replace this part, such as 12.5-20, by a new passage; may be given several times",
    )
    gaps.add_argument("--insert", metavar="TIME", help="open the music there and put --seconds of new music in")
    gaps.add_argument(
        "--lead-to",
        metavar="OTHER.mid",
        help=f"lead from the end of the prompt into another piece, in --seconds (default {LEAD_SECONDS:g})",
    )
    gaps.add_argument(
        "--cut-into-gap",
        action="store_true",
        help="end notes that sound into a gap where it begins; by default they keep their ends",
    )


def is_wanted(a: argparse.Namespace) -> bool:
    """Whether there are gaps to fill. Raises `UserError` for an option that needs one, and for gaps of two kinds."""
    given = [name for name in ("replace", "insert", "lead_to") if getattr(a, name) is not None]
    if len(given) > 1:
        raise UserError(f"`{given[0]}` and `{given[1]}`: expected only one of them")
    if a.cut_into_gap and not given:
        raise UserError("--cut-into-gap: expected --replace, --insert or --lead-to with it")
    return bool(given)


def run(a: argparse.Namespace) -> None:
    """Fill the gaps and write the pieces into MIDI files."""
    from dsmr_mlx.cli import outputs
    from dsmr_mlx.common.files import sha256
    from dsmr_mlx.common.signals import stop_requests
    from dsmr_mlx.generation.filling import FillReport, fill_gaps
    from dsmr_mlx.generation.gap_player import Watch, clock_of

    out_given = a.out is not None
    choose_name(a, a.n or 1)
    n = check_numbers(a)
    check_options(a)
    paths = outputs.output_paths(a.out, n, a.force)
    steering_options.fill_recommended(a)
    a.end_within = None  # a gap has a fixed end
    playing = steering_options.playing_options(a)
    model, tokenizer, checkpoint = load_checkpoint(a.checkpoint)
    if not tokenizer.decodes:
        raise UserError(f"{a.checkpoint}: {tokenizer.why_not}")
    clock_of(tokenizer)
    music = read_music(a, tokenizer.programs)
    show_licence(checkpoint)
    best_of = candidates(a, model, tokenizer, n)
    report = FillReport()
    options = stored_options(a, playing["sampling"], playing["processors"], n) | {"best_of": best_of}
    made_by = outputs.provenance(checkpoint, options)
    if a.lead_to is not None:
        made_by |= {"lead_to": Path(a.lead_to).name, "lead_to_sha256": sha256(Path(a.lead_to))}
    with stop_requests() as stop, progress("filling", "seconds") as update:
        options = {"n": n, "best_of": best_of, "seed": a.seed or 0, "report": report}
        filled = fill_gaps(model, tokenizer, music, **playing, **options, watch=Watch(update, stop.is_set))
    for i, (version, path) in enumerate(zip(filled, paths, strict=True), start=1):
        write_piece(path, version.notes, json.dumps(made_by | {"variation": i} | details(version)))
    if best_of is not None and not report.scores:
        err.print("note: interrupted before the candidates were ranked; the first of them are kept")
    elif best_of is not None:
        show_joins(report.scores, {version.candidate: path for version, path in zip(filled, paths, strict=True)})
    show_passages(filled, paths, report)
    show_filled_rolls(a, filled, paths)
    if not out_given:
        show_listening(paths)
    if stop.is_set():
        raise KeyboardInterrupt


def write_piece(path: Path, notes: "Notes", text: str) -> None:
    """Write a piece into a MIDI file; text: stored in it. Raises `UserError` if it cannot be written."""
    from dsmr_mlx.common.files import write_atomically
    from dsmr_mlx.music.midi import midi_bytes

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, midi_bytes(notes, text))
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror or error})") from None


def check_options(a: argparse.Namespace) -> None:
    """Raise `UserError` for options that do not go with gaps, before anything that takes time."""
    kind = next(name for name in GAP_OPTIONS if getattr(a, name) is not None)
    if a.prompt is None:
        raise UserError(f"`{kind}`: expected the piece as --prompt FILE.mid with it")
    refused = {
        "tokens": "expected seconds",
        "may_end": "the end of the piece does not change",
        "end_within": "the end of the piece does not change",
        "save_state": "the whole piece is written",
        "from_state": "expected --prompt FILE.mid",
        **dict.fromkeys(PREFIX_OPTIONS, "the model reads the piece instead"),
    }
    if a.replace is not None:
        refused["seconds"] = "the passage is as long as the one that it replaces"
    if a.lead_to is None:
        refused |= dict.fromkeys(("prompt_start", "prompt_seconds"), "the whole piece is written")
    for name, reason in refused.items():
        if is_given(getattr(a, name)):
            raise UserError(f"`{name}`: not with `{kind}`, {reason}")
    if a.continuation_only:
        raise UserError(f"--continuation-only: not with `{kind}`, the whole piece is written")
    if a.insert is not None and a.seconds is None:
        raise UserError(f"`insert` {a.insert}: expected --seconds with it, the length of the new music")


def candidates(a: argparse.Namespace, model: Any, tokenizer: Any, n: int) -> int | None:
    """The number of candidates to rank; None: no ranking. Prints a note if the model cannot be shown what follows."""
    from dsmr_mlx.generation.filling import candidates_for
    from dsmr_mlx.generation.foresight import why_no_gaps

    reason = why_no_gaps(model, tokenizer)
    if not reason:
        return a.best_of
    best_of = candidates_for(n) if a.best_of is None else a.best_of
    kept = "the one that joins best is" if n == 1 else f"the {n} that join best are"
    plays = f"it plays {best_of} candidates, and {kept} kept" if best_of > n else "more candidates (--best-of) help"
    err.print(f"note: {name_of(a.checkpoint)}: {reason}; {plays}")
    return best_of


def details(version: "Filled") -> dict[str, Any]:
    """The values to store in the file of a version besides the options."""
    passages = [
        {"start": p.start, "end": p.end, "notes": len(p.notes)} | ({"score": p.score.to_dict()} if p.score else {})
        for p in version.passages
    ]
    return {"passages": passages} | ({"candidate": version.candidate + 1} if version.scores else {})


def read_music(a: argparse.Namespace, programs: bool) -> "GappedMusic":
    """Read the piece, and make its gaps. Raises `UserError` for invalid gaps and files; programs: of the vocabulary."""
    from dsmr_mlx.music.gapped import inserted, led, replaced

    notes = read_instrument(a.prompt, programs)
    if a.replace is not None:
        return replaced(notes, [parse_span(text) for text in a.replace], a.cut_into_gap)
    if a.insert is not None:
        return inserted(notes, parse_time("insert", a.insert), a.seconds, a.cut_into_gap)
    notes, until = choose_part(a, notes), a.prompt_seconds
    other = read_instrument(a.lead_to, programs)
    if not programs and notes.programs != other.programs:
        raise UserError(f"`lead_to` {a.lead_to}: another instrument than that of {a.prompt}, expected the same")
    return led(notes, other, LEAD_SECONDS if a.seconds is None else a.seconds, until, a.cut_into_gap)


def choose_part(a: argparse.Namespace, notes: "Notes") -> "Notes":
    """The notes of the prompt from --prompt-start on. Raises `UserError` if it or --prompt-seconds is invalid."""
    from dsmr_mlx.cli.outputs import notes_from

    start = a.prompt_start or 0.0
    if not start >= 0:
        raise UserError(f"--prompt-start {start:g}: expected 0 or more")
    late = notes_from(notes, start, a.prompt).from_first_onset()
    if a.prompt_seconds is not None and not 0 < a.prompt_seconds <= late.duration:
        found = f"{a.prompt} lasts {late.duration:.2f} s" + (f" from {start:g} s on" if start else "")
        raise UserError(f"--prompt-seconds {a.prompt_seconds:g}: {found}, expected more than 0 and at most that")
    return late


def read_instrument(path: str, programs: bool) -> "Notes":
    """Read a piece for one instrument, with its program unless it is a piano; programs: allow several instruments.

    Raises `UserError` for several instruments otherwise, because all notes outside the gap are written unchanged.
    """
    from dsmr_mlx.music.midi import read_notes
    from dsmr_mlx.music.notes import DRUMS, PIANOS

    notes = read_notes(path, programs=True)
    if programs:
        return notes
    found = notes.programs
    if all(program in PIANOS for program in found):
        return notes.as_piano()
    if len(found) > 1 or found == [DRUMS]:
        names = ", ".join("drums" if program == DRUMS else f"program {program}" for program in found)
        raise UserError(f"{path}: {names}; expected one instrument without drums, as the model has only one")
    return notes


def parse_span(text: str) -> tuple[float, float]:
    """Parse `12.5-20` or `1:05-1:12.5` as seconds. Raises `UserError` for anything else."""
    match = re.fullmatch(rf"\s*{TIME}\s*[-–]\s*{TIME}\s*", text)
    if match is None:
        raise UserError(f"`replace` {text}: expected START-END in seconds, such as 12.5-20, or 1:05-1:12.5")
    return seconds_of(match.groups()[:2]), seconds_of(match.groups()[2:])


def parse_time(name: str, text: str) -> float:
    """Parse `12.5` or `1:05` as seconds. Raises `UserError` that names the option for anything else."""
    match = re.fullmatch(rf"\s*{TIME}\s*", text)
    if match is None:
        raise UserError(f"`{name}` {text}: expected a time in seconds, such as 12.5, or 1:05")
    return seconds_of(match.groups())


def seconds_of(parts: Sequence[str | None]) -> float:
    """Convert strings (minutes or None, seconds) to seconds."""
    minutes, seconds = parts
    return 60 * int(minutes or 0) + float(seconds)
