"""Continue a MIDI file in several ways; writes MIDI files and a piano roll of each.

python examples/continue_midi.py                     # the opening of a prelude by Bach
python examples/continue_midi.py my.mid --from 15    # the first 15 seconds of your file
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from melodies import MELODIES, perform

import dsmr_mlx
from dsmr_mlx import LoopPenalty, MaxNoteSeconds
from dsmr_mlx.music.piano_roll import roll_picture
from dsmr_mlx.music.summary import summarize


def main() -> None:
    """Write the continuations and their piano rolls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="a MIDI file")
    parser.add_argument("--from", dest="start", type=float, default=20.0, metavar="X", help="continue after X seconds")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the new music")
    parser.add_argument("-n", type=int, default=3, help="number of continuations")
    parser.add_argument("--model", help="a checkpoint or a run (default: the bundled model)")
    parser.add_argument("--out", type=Path, default=Path("example-output/continued"), help="output folder")
    a = parser.parse_args()

    model, tokenizer = dsmr_mlx.load(a.model)
    music = (dsmr_mlx.read_notes(a.file) if a.file else perform(MELODIES["bach"])).from_first_onset()
    start = min(a.start, music.duration)
    prompt = tokenizer.first_seconds(tokenizer.encode_notes(music), start)  # keys that are down stay down

    made = dsmr_mlx.generate_variations(
        model,
        tokenizer,
        a.n,
        prompt=prompt,
        seconds=a.seconds,
        sampling=dsmr_mlx.Sampling(temperature=0.95, top_p=0.95),
        processors=[MaxNoteSeconds(4), LoopPenalty(1)],
        seed=1,
    )
    print(f"{made.prompt_tokens} tokens read, {made.tokens:,} generated, {made.tokens_per_second:.0f} per second")

    a.out.mkdir(parents=True, exist_ok=True)
    for i, variation in enumerate(made.variations, start=1):
        piece = tokenizer.decode(np.append(tokenizer.prompt(prompt), variation.ids))
        path = a.out / f"{i}.mid"
        dsmr_mlx.write_notes(piece, path, text=f"continued after {start:g} s")
        path.with_suffix(".svg").write_bytes(roll_picture(piece, "svg", title=f"{path.name}: new after {start:g} s"))
        print(f"{path}: {summarize(variation.notes)}")


if __name__ == "__main__":
    try:
        main()
    except dsmr_mlx.UserError as error:
        sys.exit(f"continue_midi: error: {error}")
