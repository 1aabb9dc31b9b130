"""Choose the default options of a model: samples with several options, compared with real music.

    python benchmarks/sampling.py MODEL --data CORPUS --runs FILE.jsonl [--samples 100] ["temperature=0.9 min_p=0.02" …]

Each row is a set of options on top of those that the model recommends; `name=none` leaves one out, and an empty text
changes nothing. Its samples, without a prompt, all with the same seed, are compared with excerpts of the validation
pieces by `assess`. With `best_of=K` each sample is the best of K candidates, as `generate` ranks them, else none is
ranked. Rows in the file are not made again, so the work can be stopped and continued at any time. Rows of
another model, corpus, number or length of samples, or seed stay in the file and are not shown.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from finished import append_lines, read_lines
from rich.console import Console
from rich.table import Table

from dsmr_mlx.cli.common import finite
from dsmr_mlx.common.files import sha256
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.evaluation.music.assess import MAX_SILENCE, Assessment, assess
from dsmr_mlx.generation.generate import generate_variations, make_limits
from dsmr_mlx.generation.options import make_processors, make_sampling, recommended_options
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.ranking import best, score
from dsmr_mlx.model.checkpoint import load, resolve
from dsmr_mlx.music.midi import write_notes

VARIANTS = (  # the rows in docs/results.md, on top of what `maestro-small` recommends
    "pitch_temperature=none tonality=none tempo=0.1",
    "pitch_temperature=none tonality=0.2 tempo=0.15",
    "tonality=none tempo=0.1",
    "tonality=none tempo=0.12",
    "pitch_temperature=0.85 tonality=none tempo=0.15",
    "",
    "tonality=0.3 tempo=0.13",
)
LANES = 64  # samples that are made at once
HELD_SECONDS = 10.0  # longer notes count as stuck


def options_of(text: str, recommended: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a row: those that are recommended, changed by `name=value` or `name=none`."""
    options = dict(recommended)
    for part in text.split():
        name, _, value = part.partition("=")
        try:
            options[name] = None if value == "none" else float(value)
        except ValueError:
            options[name] = value  # such as key=C-major, or a temperature that changes
    return {name: value for name, value in options.items() if value is not None}


def write_samples(a: argparse.Namespace, options: dict[str, Any], folder: Path) -> float:
    """Write the samples of one row as MIDI files. Return the tokens made per second."""
    model, tokenizer = load(a.model)
    candidates = int(options.get("best_of", 1))
    total, variations = candidates * a.samples, []
    tokens, started = 0, time.perf_counter()
    for first in range(0, total, LANES):
        report = generate_variations(
            model,
            tokenizer,
            min(LANES, total - first),
            seconds=a.seconds,
            seed=a.seed + first,
            sampling=make_sampling(options),
            processors=make_processors(options, a.seconds),
        )
        tokens += report.tokens
        variations += report.variations
    speed = tokens / (time.perf_counter() - started)
    player, limits = Player(model, tokenizer), make_limits(tokenizer, a.seconds, None, False)
    for i in range(a.samples):
        group = variations[candidates * i : candidates * (i + 1)]
        if candidates > 1:
            group = [group[k] for k in best([score(player, variation.ids, limits) for variation in group], 1)]
        write_notes(group[0].notes, folder / f"{i:03}.mid")
    return speed


def figures(assessment: Assessment) -> dict[str, Any]:
    """Return the columns of the table from an assessment.

    told_apart: what `discriminator.tell_apart` returns; overlap, oa: how much less than real music, means over the
    features; held, silent, looping: samples with a note of at least `HELD_SECONDS`, with a long silence, with a loop;
    notes_per_second, key_clarity, similarity: medians, beside those of real music
    """
    told, by_key = assessment.discrimination, {c.key: c for c in assessment.compared}

    def missing(found: list[float], real: list[float]) -> float:
        return float(np.nanmean(np.maximum(np.subtract(real, found), 0.0)))

    pair = {key: (by_key[key].generated[0], by_key[key].reference[0]) for key in ("key_clarity", "similarity_near")}
    return {
        "told_apart": None if told is None else told.to_dict(),
        "overlap": missing([c.overlap for c in assessment.compared], [c.real_overlap for c in assessment.compared]),
        "oa": missing([c.oa for c in assessment.compared], [c.real_oa for c in assessment.compared]),
        "held": sum(f.longest_note >= HELD_SECONDS for f in assessment.files),
        "silent": sum(f.longest_silence > MAX_SILENCE for f in assessment.files),
        "looping": sum(f.loops for f in assessment.files),
        "notes_per_second": [by_key["notes_per_second"].generated[0], by_key["notes_per_second"].reference[0]],
        "key_clarity": list(pair["key_clarity"]),
        "similarity": list(pair["similarity_near"]),
    }


def setting_of(a: argparse.Namespace) -> dict[str, Any]:
    """Return what rows have in common that can be compared."""
    folder = resolve(a.model)
    model = {"weights": sha256(folder / "model.safetensors"), "config": sha256(folder / "config.json")}
    samples = {"samples": a.samples, "seconds": a.seconds, "seed": a.seed}
    return model | {"corpus": Corpus.load(a.data).fingerprint} | samples


def rows(a: argparse.Namespace, setting: dict[str, Any], finished: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Make and assess what is left; finished: the rows of this setting."""
    recommended, done = recommended_options(a.model), [run["options"] for run in finished]
    recommended.pop("best_of", None)
    for text in a.variants or VARIANTS:
        options = options_of(text, recommended)
        if options in done:
            continue
        done.append(options)
        with tempfile.TemporaryDirectory() as folder:
            speed = write_samples(a, options, Path(folder))
            found = figures(assess([folder], a.data, excerpts=2 * a.samples))
        yield setting | {"row": text or "recommended", "options": options, "tokens_per_second": speed} | finite(found)


def table(finished: list[dict[str, Any]]) -> Table:
    """Return all rows, the best by the classifier first."""
    out = Table("options", "told apart", "by", "overlap", "OA", "held", "silent", "loops", "notes/s", "key", "similar")
    for run in sorted(finished, key=lambda run: (run["told_apart"] or {"right": 1.0})["right"]):
        told = run["told_apart"]
        out.add_row(
            run["row"],
            "–" if told is None else f"{told['right']:.0%} (± {told['chance']:.0%} by luck)",
            "–" if told is None else ", ".join(by["feature"] for by in told["by"][:2]),
            *(number(run[key], "−{:.3f}") for key in ("overlap", "oa")),
            *(str(run[key]) for key in ("held", "silent", "looping")),
            *(
                f"{number(found)} ({number(real)})"
                for found, real in map(run.get, ("notes_per_second", "key_clarity", "similarity"))
            ),
        )
    return out


def number(value: float | None, form: str = "{:.2f}") -> str:
    """Return a formatted number, or a dash."""
    return "–" if value is None else form.format(value)


def main() -> None:
    """Make what is left and print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--data", required=True, metavar="CORPUS")
    p.add_argument("--runs", required=True, type=Path, metavar="FILE.jsonl")
    p.add_argument("--samples", type=int, default=100)
    p.add_argument("--seconds", type=float, default=120.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("variants", nargs="*", metavar="OPTIONS", help="such as 'temperature=0.9 min_p=0.02'")
    a = p.parse_intermixed_args()
    setting = setting_of(a)
    finished = [run for run in read_lines(a.runs) if {key: run.get(key) for key in setting} == setting]
    for run in rows(a, setting, finished):
        finished.append(run)
        append_lines(a.runs, [run])
        print(f"{run['row']}: {run['told_apart']}", flush=True)
    Console(width=200).print(table(finished))


if __name__ == "__main__":
    main()
