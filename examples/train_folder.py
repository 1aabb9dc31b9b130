"""Train a model on your own folder of MIDI files and generate music with it.

    python examples/train_folder.py    # the melodies of these examples, two minutes
    python examples/train_folder.py my-midi --out my-model --minutes 60 --preset small
    python examples/train_folder.py my-midi --out my-tuned-model --init maestro-small    # start from other weights

Ctrl-C saves and stops; the same command resumes. `dsmr-mlx prepare`, `train` and `generate` do the same from the
command line.
"""

import argparse
import sys
from pathlib import Path

from melodies import write_melodies

import dsmr_mlx
from dsmr_mlx import MaxNoteSeconds, build_config, prepare
from dsmr_mlx.music.summary import summarize
from dsmr_mlx.training import Callback, train


class Lines(Callback):
    """Prints a line now and then; training itself prints nothing."""

    def on_step(self, run, record):
        """Print the loss and the speed every 20 steps."""
        if record.step % 20 == 0:
            print(f"step {record.step:,}  loss {record.loss:.3f}  {record.tokens_per_second:,.0f} tokens/s", flush=True)

    def on_validation(self, run, evaluation, is_best):
        """Print the perplexity."""
        print(f"validation: perplexity {evaluation.perplexity:.3f}{', the best so far' if is_best else ''}")

    def on_end(self, run, reason):
        """Print why the run ended."""
        print(f"{run.out}: {reason}")


def main() -> None:
    """Prepare, train and generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("midi", nargs="?", type=Path, metavar="FOLDER", help="a folder of MIDI files")
    parser.add_argument("--preset", default="tiny", help="tiny (1 M parameters), small (5 M) or base (40 M)")
    parser.add_argument("--init", metavar="CHECKPOINT", help="the model to start from, instead of random weights")
    parser.add_argument("--minutes", type=float, default=2.0, help="length of the training")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the music at the end")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting")
    parser.add_argument("--out", type=Path, default=Path("example-output/training"), help="output folder")
    a = parser.parse_args()

    midi = a.midi or write_melodies(a.out / "midi", takes=8)
    corpus = prepare(midi, a.out / "corpus")  # does nothing if the corpus exists and its files are unchanged
    print(f"{corpus.out}: {corpus.pieces}, {corpus.tokens:,} tokens, {corpus.seconds / 60:.0f} minutes of music")
    for skipped in corpus.skipped:
        print(f"skipped {skipped.source}: {skipped.reason}")

    options = {"max_minutes": a.minutes, **({"init": a.init} if a.init else {})}
    # Pieces in other keys, tempi and dynamics. This helps most if there is little music.
    defaults = [
        "augment_transpose=3",
        "augment_stretch=0.05",
        "augment_velocity=8",
        "eval_every=100",
        "warmup_steps=20",
    ]
    config = build_config(a.preset, settings=[*defaults, *a.set], **options)
    run = train(config, corpus.out, a.out / "run", resume=True, callback=Lines())

    model, tokenizer = dsmr_mlx.load(run.out)  # the best checkpoint by validation
    stream = dsmr_mlx.generate(
        model, tokenizer, seconds=a.seconds, processors=[MaxNoteSeconds(4)], seed=1, as_notes=True
    )
    notes = dsmr_mlx.Notes.of(stream)
    dsmr_mlx.write_notes(notes, a.out / "music.mid")
    print(f"{a.out / 'music.mid'}: {summarize(notes)}")


if __name__ == "__main__":
    try:
        main()
    except dsmr_mlx.UserError as error:
        sys.exit(f"train_folder: error: {error}")
