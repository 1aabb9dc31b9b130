"""The cost of tokenizing MIDI files: `dsmr-mlx prepare` against symusic, which only parses, and MidiTok.

Each side has its own process and works through all files per turn. They do different amounts of work: symusic only
parses. MidiTok parses and tokenizes at the same resolution (MIDI-like, 50 steps per beat, which is 10 ms at 120 BPM,
time shifts up to 2 beats, 32 velocities) but ignores the pedal. `prepare` reads the files twice, folds the pedal into
the notes, tokenizes, decodes again to count what can be recovered, and writes the corpus.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measuring import Worker, in_turn, ratios, spread

from dsmr_mlx.common.errors import UserError

Turn = Callable[[], dict[str, Any]]  # returns the number of tokens, None if there are none, and of skipped files


def preparing(files: Sequence[Path]) -> Turn:
    """`dsmr-mlx prepare` in one process."""
    from dsmr_mlx.data.prepare import prepare

    folder = TemporaryDirectory()
    for i, path in enumerate(files):
        (Path(folder.name) / f"{i}{path.suffix}").symlink_to(path.resolve())

    def turn() -> dict[str, Any]:
        with TemporaryDirectory() as out:
            report = prepare(folder.name, Path(out) / "corpus", workers=1)
        return {"tokens": report.tokens, "left_out": len(report.skipped)}

    return turn


def reading(files: Sequence[Path]) -> Turn:
    """Read notes as `prepare` does, with the pedal folded in."""
    from dsmr_mlx.music.midi import CORPUS_LIMITS, read_bytes, read_notes

    return over(files, lambda path: read_notes(read_bytes(path, CORPUS_LIMITS), limits=CORPUS_LIMITS), UserError)


def parsing(files: Sequence[Path]) -> Turn:
    """symusic's `Score` of each file."""
    from symusic import Score

    return over(files, Score, Exception)


def miditok(files: Sequence[Path]) -> Turn:
    """MidiTok's tokens of each file."""
    from miditok import MIDILike, TokenizerConfig
    from symusic import Score

    tokenizer = MIDILike(TokenizerConfig(num_velocities=32, beat_res={(0, 2): 50}))
    return over(files, lambda path: sum(map(len, tokenizer(Score(path)))), Exception)


def over(files: Sequence[Path], read: Callable[[Path], Any], failure: type[Exception]) -> Turn:
    """A turn that reads every file; numbers returned by `read` are tokens, a `failure` skips a file."""

    def turn() -> dict[str, Any]:
        tokens = left_out = 0
        for path in files:
            try:
                made = read(path)
            except failure:
                left_out += 1
                continue
            tokens += made if isinstance(made, int) else 0
        return {"tokens": tokens or None, "left_out": left_out}

    return turn


SIDES = {
    "prepare": ("dsmr-mlx prepare", preparing),
    "miditok": ("MidiTok, parse and tokenize", miditok),
    "read": ("dsmr-mlx, read and fold the pedal", reading),
    "symusic": ("symusic, parse", parsing),
}
AGAINST = {"prepare": "miditok", "read": "symusic"}


def chosen_files(folder: str | Path, max_files: int) -> list[Path]:
    """At most `max_files` files, evenly spaced in the sorted folder. Raises `UserError` if it has none."""
    from dsmr_mlx.common.paths import MIDI_SUFFIXES
    from dsmr_mlx.data.midi_folder import find_files

    found = find_files(Path(folder), MIDI_SUFFIXES)
    if not found:
        raise UserError(f"--midi {folder}: no MIDI file ({', '.join(MIDI_SUFFIXES)}), expected at least one")
    count = min(max_files, len(found))
    return [Path(folder) / found[i * len(found) // count] for i in range(count)]


def measure(files: Sequence[Path], rounds: int) -> dict[str, Any]:
    """For each side the `spread` of files/s and MB/s, tokens and skipped files, and the time ratio to its peer."""
    workers = {name: Worker(build, files) for name, (_, build) in SIDES.items()}
    outcomes = {name: worker() for name, worker in workers.items()}
    times = dict(zip(SIDES, in_turn(list(workers.values()), rounds, warmup=0), strict=True))
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    for worker in workers.values():
        worker.close()
    sides = {}
    for name, (title, _) in SIDES.items():
        sides[name] = {
            "title": title,
            "files_per_second": spread([len(files) / each for each in times[name]]),
            "megabytes_per_second": spread([megabytes / each for each in times[name]]),
            **outcomes[name],
        }
        if other := AGAINST.get(name):
            sides[name] |= {"against": other, "time_ratio": ratios(times[name], times[other])}
    return {"files": len(files), "megabytes": megabytes, "sides": sides}
