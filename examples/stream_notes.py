"""Show notes while the model generates them: a piano roll that scrolls in the terminal, in real time.

    python examples/stream_notes.py
    python examples/stream_notes.py --seconds 600 --seed 7

Each line is a note that has just ended. To hear the model on an instrument, use `dsmr-mlx live`.
"""

import argparse
import sys
import time

import dsmr_mlx
from dsmr_mlx import Density, MaxNoteSeconds, PitchRange
from dsmr_mlx.music.summary import pitch_name

LOW, HIGH = 33, 96  # A1 to C7, one column per key
LOUDNESS = "▁▂▃▄▅▆▇█"


def draw(note: dsmr_mlx.Note) -> str:
    """A note as a line: end, pitch, key and velocity, duration."""
    keys = ["·" if key % 12 == 0 else " " for key in range(LOW, HIGH + 1)]
    keys[note.pitch - LOW] = LOUDNESS[note.velocity // 16]
    lasting = "─" * round(8 * (note.offset - note.onset))
    return f"{note.offset:7.2f} s {pitch_name(note.pitch):>4} {''.join(keys)} {lasting}"


def main() -> None:
    """Print notes as they are generated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the music")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", action="store_true", help="as fast as the model computes")
    parser.add_argument("--model", help="a checkpoint or a run (default: the bundled model)")
    a = parser.parse_args()

    model, tokenizer = dsmr_mlx.load(a.model)
    began, computing, count = time.perf_counter(), 0.0, 0
    stream = dsmr_mlx.generate(
        model,
        tokenizer,
        seconds=a.seconds,
        sampling=dsmr_mlx.Sampling(top_p=0.95),
        processors=[PitchRange(LOW, HIGH), MaxNoteSeconds(3), Density(8)],
        seed=a.seed,
        as_notes=True,
    )
    waiting_since = time.perf_counter()
    for note in stream:
        computing += time.perf_counter() - waiting_since  # the model computes while `next` waits
        if not a.at_once:
            time.sleep(max(0.0, began + note.offset - time.perf_counter()))
        print(draw(note), flush=True)
        count, waiting_since = count + 1, time.perf_counter()
    print(f"{count} notes; {note.offset:.1f} s of music took {computing:.1f} s to make")


if __name__ == "__main__":
    try:
        main()
    except dsmr_mlx.UserError as error:
        sys.exit(f"stream_notes: error: {error}")
