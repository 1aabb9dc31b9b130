"""Steer the music with a logits processor of your own: a bias that changes with time, and a constraint with a memory.

    python examples/logits_processor.py

`dsmr_mlx.generation.sampling.Processor` says what a processor may do; all of it is MLX arrays, lanes first, for the methods run
inside the compiled step. A function (logits, played) → logits is a processor, too.
"""

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np

import dsmr_mlx
from dsmr_mlx.generation.steering import MaxNoteSeconds, at_key, at_token, per_lane, tilt
from dsmr_mlx.music.piano_roll import roll_svg
from dsmr_mlx.music.summary import summarize


def pitches(tables) -> mx.array:
    """`[1, V]`: the key that each token strikes, −1 for those that strike none."""
    return per_lane(np.where(tables.notes > 0, tables.strikes.argmax(axis=1), -1))


class Arch:
    """Keys near a centre are likelier, and the centre rises from `low` to `high` and comes back in so many seconds."""

    def __init__(self, low: int, high: int, seconds: float, width: float = 5.0):
        self.low, self.high, self.seconds, self.width = low, high, seconds, width

    def begin(self, tables, ids):
        """The state of one lane that has read a prompt."""
        return {"pitch": pitches(tables), "tick": per_lane(tables.grammar.seconds_per_tick)}

    def __call__(self, logits, played, state):
        """New logits `[n, V]`. `tilt` leaves alone how often any key is struck, and changes only which."""
        done = played.new_ticks * state["tick"] / self.seconds
        centre = self.low + (self.high - self.low) * mx.sin(np.pi * done) ** 2
        distance = (state["pitch"] - centre[:, None]) / self.width
        return tilt(logits, state["pitch"] >= 0, -0.5 * distance**2)

    def advance(self, state, token, played):
        """The state after a token `[n]`, which `played` includes."""
        return state


class NotAgain:
    """A key is not struck again within so many seconds."""

    stage = "constraint"  # before all biases, and without exception

    def __init__(self, seconds: float):
        self.seconds = seconds

    def begin(self, tables, ids):
        wait = round(self.seconds / tables.grammar.seconds_per_tick)
        return {"pitch": pitches(tables), "wait": per_lane(wait), "last": mx.full((1, 128), -wait)}

    def __call__(self, logits, played, state):
        too_soon = played.ticks[:, None] - state["last"] < state["wait"][:, None]  # (n, 128)
        return mx.where(at_key(too_soon, state["pitch"]), -mx.inf, logits)

    def advance(self, state, token, played):
        struck = at_token(state["pitch"], token)[:, None] == mx.arange(128)
        return state | {"last": mx.where(struck, played.ticks[:, None], state["last"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--model", help="a checkpoint or a run, instead of the one that comes with the program")
    parser.add_argument("--out", type=Path, default=Path("example-output/steered"), help="a folder")
    a = parser.parse_args()
    model, tokenizer = dsmr_mlx.load(a.model)
    a.out.mkdir(parents=True, exist_ok=True)
    for name, mine in (("plain", []), ("arch", [Arch(40, 88, a.seconds), NotAgain(0.5)])):
        processors = [*mine, MaxNoteSeconds(3)]  # with those that come with the program, in any order
        stream = dsmr_mlx.generate(model, tokenizer, seconds=a.seconds, processors=processors, seed=3, as_notes=True)
        notes = dsmr_mlx.Notes.of(stream)
        path = a.out / f"{name}.mid"
        dsmr_mlx.write_notes(notes, path)
        path.with_suffix(".svg").write_text(roll_svg(notes, title=path.stem, systems=1))
        print(f"{path}: {summarize(notes)}")


if __name__ == "__main__":
    main()
