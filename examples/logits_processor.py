"""Steer generation with your own logits processors: a bias that changes over time, and a constraint with state.

    python examples/logits_processor.py

`dsmr_mlx.generation.sampling.Processor` documents the interface. The methods run inside the compiled step, so their
state is MLX arrays with the lanes first. A function `(logits, music) → logits` is a processor, too.
"""

import argparse
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

import dsmr_mlx
from dsmr_mlx import MaxNoteSeconds
from dsmr_mlx.generation.steering import at_key, at_token, per_lane, tilt
from dsmr_mlx.music.piano_roll import roll_picture
from dsmr_mlx.music.summary import summarize


def pitches(tables) -> mx.array:
    """The key that each token presses, −1 if none: `(1, V)`."""
    return per_lane(np.where(tables.notes > 0, tables.presses.argmax(axis=1), -1))


class Arch:
    """Makes keys near a centre more likely; the centre rises from `low` to `high` and returns within `seconds`."""

    def __init__(self, low: int, high: int, seconds: float, width: float = 5.0):
        self.low, self.high, self.seconds, self.width = low, high, seconds, width

    def begin(self, tables, ids):
        """The state of one lane after the prompt."""
        return {"pitch": pitches(tables), "tick": per_lane(tables.grammar.seconds_per_tick)}

    def __call__(self, logits, music, state):
        """New logits `(B, V)`. `tilt` changes which keys are pressed, not how often one is."""
        done = music.new_ticks * state["tick"] / self.seconds
        centre = self.low + (self.high - self.low) * mx.sin(np.pi * done) ** 2
        distance = (state["pitch"] - centre[:, None]) / self.width
        return tilt(logits, state["pitch"] >= 0, -0.5 * distance**2)

    def advance(self, state, token, music):
        """The state after the tokens `(B,)`, which `music` includes."""
        return state


class NotAgain:
    """Forbids pressing the same key again within `seconds`."""

    stage = "constraint"  # runs before all biases; forbidden tokens stay forbidden

    def __init__(self, seconds: float):
        self.seconds = seconds

    def begin(self, tables, ids):
        """The state of one lane: when each key was last pressed, in ticks."""
        wait = round(self.seconds / tables.grammar.seconds_per_tick)
        return {"pitch": pitches(tables), "wait": per_lane(wait), "last": mx.full((1, 128), -wait)}

    def __call__(self, logits, music, state):
        """The logits, −∞ for keys that were pressed too recently."""
        too_soon = music.ticks[:, None] - state["last"] < state["wait"][:, None]  # (n, 128)
        return mx.where(at_key(too_soon, state["pitch"]), -mx.inf, logits)

    def advance(self, state, token, music):
        """The state with the time of a new key press."""
        pressed = at_token(state["pitch"], token)[:, None] == mx.arange(128)
        return state | {"last": mx.where(pressed, music.ticks[:, None], state["last"])}


def main() -> None:
    """Generate without and with the processors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--model", help="a checkpoint or a run (default: the bundled model)")
    parser.add_argument("--out", type=Path, default=Path("example-output/steered"), help="output folder")
    a = parser.parse_args()
    model, tokenizer = dsmr_mlx.load(a.model)
    a.out.mkdir(parents=True, exist_ok=True)
    for name, mine in (("plain", []), ("arch", [Arch(40, 88, a.seconds), NotAgain(0.5)])):
        processors = [*mine, MaxNoteSeconds(3)]  # your own and built-in ones, in any order
        stream = dsmr_mlx.generate(model, tokenizer, seconds=a.seconds, processors=processors, seed=3, as_notes=True)
        notes = dsmr_mlx.Notes.of(stream)
        path = a.out / f"{name}.mid"
        dsmr_mlx.write_notes(notes, path)
        path.with_suffix(".svg").write_bytes(roll_picture(notes, "svg", title=path.stem, systems=1))
        print(f"{path}: {summarize(notes)}")


if __name__ == "__main__":
    try:
        main()
    except dsmr_mlx.UserError as error:
        sys.exit(f"logits_processor: error: {error}")
