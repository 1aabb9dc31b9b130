"""Which lengths to give to notes whose keys are still down when the model takes over, in Aria's vocabularies.

    python benchmarks/take_over.py CHECKPOINT --data CORPUS [--samples 80] [--json FILE]

Validation pieces are stopped just before a random note. The notes that sound there keep their true lengths, are cut
with the pedal up or down, or get the model's likeliest lengths not below the cut. The table shows how likely the true
following notes are then, without their pedal, in nats per note; differences are paired, with standard errors.
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from outputs import add_outputs, run_main, write_outputs
from rich.console import Console
from rich.table import Table

from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.tokenizers.aria.encoding import TimedMusic, encode_events, parse_events
from dsmr_mlx.tokenizers.aria.vocabulary import BOS, DURATIONS, SEGMENT_MS, AriaVocabulary

BEFORE_MS, FOLLOWING, FIRST = 9000, 20, 4  # milliseconds before the stop; notes after it, and those that count as first
WAYS = ("cut, pedal up", "cut", "likeliest, pedal up", "likeliest", "true")


class Stop(NamedTuple):
    """Music in milliseconds that stops at `time`: its notes and pedal before, and the notes that follow."""

    music: TimedMusic
    time: int
    before: np.ndarray
    after: np.ndarray
    pedal: np.ndarray

    def ids(self, lengths: np.ndarray, pedal_up: bool, vocabulary: AriaVocabulary) -> np.ndarray:
        """The ids `(T,)` if the notes before the stop have these lengths."""
        m, notes = self.music, np.append(self.before, self.after)
        start = int(m.onset[self.before[0]]) // SEGMENT_MS * SEGMENT_MS
        time, down = m.pedal_time[self.pedal], m.pedal_down[self.pedal]
        if pedal_up and len(down) and down[-1]:
            time, down = np.append(time, self.time), np.append(down, False)
        lengths = np.append(lengths, m.duration[self.after])
        columns = (m.pitch[notes], m.velocity[notes], np.zeros(len(notes), np.int64))
        music = TimedMusic(m.onset[notes] - start, lengths, *columns, np.maximum(time - start, 0), down)
        return np.concatenate([[6, BOS], encode_events(music, vocabulary)]).astype(np.int64)


def stops(corpus: Corpus, seed: int) -> Iterator[Stop]:
    """Random places at which notes sound."""
    rng, vocabulary, pieces = np.random.default_rng(seed), corpus.tokenizer.vocabulary, corpus.pieces("validation")
    while True:
        m, _ = parse_events(corpus.tokens(pieces[rng.integers(len(pieces))]), vocabulary)
        if len(m.onset) <= 3 * FOLLOWING:
            continue
        time = int(m.onset[rng.integers(FOLLOWING, len(m.onset) - FOLLOWING)]) - 1
        before = np.flatnonzero((m.onset > time - BEFORE_MS) & (m.onset <= time))
        after = np.flatnonzero(m.onset > time)[:FOLLOWING]
        pedal = np.flatnonzero((m.pedal_time > time - BEFORE_MS) & (m.pedal_time <= time))
        if len(before) and (m.onset + m.duration)[before].max() > time:
            yield Stop(m, time, before, after, pedal)


def log_probabilities(model: DSMR, ids: np.ndarray) -> np.ndarray:
    """`(T, V)`, after each of ids `(T,)`."""
    logits, _ = model(mx.array(ids[None]))
    return np.array(logits[0] - mx.logsumexp(logits[0], axis=-1, keepdims=True))


def likeliest(model: DSMR, stop: Stop, cut: np.ndarray, vocabulary: AriaVocabulary) -> np.ndarray:
    """The lengths `(N,)` with the likeliest ones for notes that sound at the stop, one after the other."""
    lengths = cut.copy()
    ends = stop.music.onset[stop.before] + stop.music.duration[stop.before]
    for i in np.flatnonzero(ends > stop.time):
        ids = stop.ids(lengths, False, vocabulary)
        place = np.flatnonzero(vocabulary.note_fields(ids)[0] >= 0)[i] + 2
        least = min(round(cut[i] / 10), DURATIONS - 1)
        last = log_probabilities(model, ids[:place])[-1]
        lengths[i] = 10 * (least + int(last[vocabulary.durations + least : vocabulary.durations + DURATIONS].argmax()))
    return lengths


def nats(model: DSMR, ids: np.ndarray, n: int, vocabulary: AriaVocabulary) -> np.ndarray:
    """Nats per note for pitch, onset and length of the last n notes, and of the first of them: `(6,)`."""
    lost = -log_probabilities(model, ids[:-1])[np.arange(len(ids) - 1), ids[1:]]
    places = np.flatnonzero(vocabulary.note_fields(ids[1:])[0] >= 0)[-n:]
    each = np.stack([lost[places + i] for i in range(3)])  # (3, n)
    return np.concatenate([each.mean(axis=1), each[:, :FIRST].mean(axis=1)])


def measure(model: DSMR, stop: Stop, vocabulary: AriaVocabulary) -> np.ndarray:
    """`nats` of each of `WAYS`: `(5, 6)`."""
    onset, true = stop.music.onset[stop.before], stop.music.duration[stop.before]
    cut = np.where(onset + true > stop.time, np.maximum(stop.time - onset, 10), true)
    likely = likeliest(model, stop, cut, vocabulary)
    ways = ((cut, True), (cut, False), (likely, True), (likely, False), (true, False))
    return np.stack([nats(model, stop.ids(*way, vocabulary), len(stop.after), vocabulary) for way in ways])


def main() -> None:
    """Measure, show, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--data", required=True, metavar="CORPUS")
    parser.add_argument("--samples", type=int, default=80, metavar="N", help="(default 80)")
    add_outputs(parser, plot=False)
    a = parser.parse_args()
    (model, tokenizer), corpus = checkpoint.load(a.checkpoint), Corpus.load(a.data)
    places = stops(corpus, 0)
    found = np.stack([measure(model, next(places), tokenizer.vocabulary) for _ in range(a.samples)])  # (N, 5, 6)
    names = [f"{what}, {n}" for n in (FOLLOWING, FIRST) for what in ("pitch", "onset", "length")]
    table, rows = Table("lengths", *names, box=None), {}
    for way, values in zip(WAYS, found.swapaxes(0, 1), strict=True):
        apart = values - found[:, 0]
        rows[way] = {
            name: {"nats": mean, "difference": d, "error": e}
            for name, mean, d, e in zip(
                names,
                values.mean(axis=0).tolist(),
                apart.mean(axis=0).tolist(),
                (apart.std(axis=0) / np.sqrt(len(apart))).tolist(),
                strict=True,
            )
        }
        cells = (f"{r['nats']:.3f} ({r['difference']:+.3f} ± {r['error']:.3f})" for r in rows[way].values())
        table.add_row(way, *cells)
    Console(width=180).print(table)
    write_outputs(a, {"samples": a.samples, "rows": rows})


if __name__ == "__main__":
    run_main(main)
