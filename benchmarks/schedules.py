"""The paper's main comparison: cost and quality of a two-scale memory against full memory and six other schedules.

    python benchmarks/schedules.py --data CORPUS --runs FILE.jsonl [--json FILE] [--plot FILE] [SCHEDULE ...]

Every schedule trains the same model from the same weights on the same tokens in the same order. There are two parts:
quality, a run per schedule and seed, validated on whole streamed pieces; and cost, short measurements in which each
schedule takes turns with the first. Finished runs are kept in the file and not repeated, so the quality part can be
stopped and continued at any time. `--size base` is for a GPU or a Mac. SCHEDULE is a name in the table or a spec such
as uniform:512; the first one is the reference.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from outputs import add_outputs, run_main, write_outputs
from rich.console import Console
from rich.table import Table
from schedule_cost import measure
from schedule_picture import draw_schedules, signed
from schedule_quality import Runs, train_all
from schedule_setting import HEADLINE, REFERENCE, SIZES, Setting

from dsmr_mlx.common.formatting import format_bytes, format_number
from dsmr_mlx.data.corpus import Corpus

# Of two-scale against full: the paper reports -0.3 % perplexity, 59 % less memory, 36 % more throughput.
TARGETS = {
    "perplexity": ("at most", 1.005),
    "recurrent state": ("at most", 0.41),
    "peak training memory": ("at most", 0.55),
    "training throughput": ("at least", 1.6),
}


def quality(runs: Runs, spec: str, reference: str, seeds: Sequence[int]) -> dict[str, Any] | None:
    """The perplexities of a schedule's finished runs and their differences from the reference with the same seed.

    difference: of perplexity, as a fraction of the reference's; None if no seed has both.
    """
    found = {seed: run for seed in seeds if (run := runs.find(spec, seed))}
    if not found:
        return None
    pairs = [(run, other) for seed, run in found.items() if (other := runs.find(reference, seed))]
    differences = [run["perplexity"] / other["perplexity"] - 1 for run, other in pairs]
    return {
        "seeds": list(found),
        "perplexity": mean_and_range([run["perplexity"] for run in found.values()]),
        "difference": mean_and_range(differences) if differences else None,
    }


def mean_and_range(values: Sequence[float]) -> dict[str, Any]:
    """Mean, minimum, maximum and all values."""
    return {"mean": statistics.fmean(values), "low": min(values), "high": max(values), "each": list(values)}


def make_rows(
    setting: Setting, runs: Runs | None, costs: dict[str, dict[str, Any]], seeds: Sequence[int]
) -> list[dict]:
    """Everything known about each schedule; None if not measured."""
    specs = setting.specs
    reference = next(iter(specs.values()))
    rows = []
    for name, spec in specs.items():
        schedule = setting.config(spec).schedule
        rows.append(
            {
                "schedule": name,
                "spec": spec,
                "horizons": schedule.horizons,
                "budget": schedule.budget,
                "quality": runs and quality(runs, spec, reference, seeds),
                "cost": costs.get(name),
            }
        )
    return rows


def judged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target with the measured ratio of two-scale to full, None if unknown; empty without these two schedules."""
    first, own = rows[0], next((row for row in rows[1:] if row["schedule"] == HEADLINE), None)
    if own is None or first["schedule"] != REFERENCE:
        return []
    found: dict[str, float | None] = dict.fromkeys(TARGETS)
    if own["quality"] and own["quality"]["difference"]:
        found["perplexity"] = 1 + own["quality"]["difference"]["mean"]
    if own["cost"]:
        ours, theirs = own["cost"]["training"], first["cost"]["training"]
        found["recurrent state"] = ours["state_bytes"] / theirs["state_bytes"]
        found["peak training memory"] = ours["peak_bytes"] / theirs["peak_bytes"]
        found["training throughput"] = ours["ratio"]["median"]
    verdicts = []
    for name, (bound, wanted) in TARGETS.items():
        ratio = found[name]
        met = None if ratio is None else (ratio <= wanted if bound == "at most" else ratio >= wanted)
        verdicts.append({"target": name, "bound": bound, "wanted": wanted, "found": ratio, "met": met})
    return verdicts


def remarks(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Whether the runs are long enough for memory to help, judged by the schedule without memory."""
    first = rows[0]
    without = next((row for row in rows[1:] if not row["budget"]), None)
    if without is None or not (without["quality"] and without["quality"]["difference"]):
        return []
    if (difference := without["quality"]["difference"]["mean"]) > 0:
        return []
    prefix = f"{without['schedule']} is at {signed(difference)} to {first['schedule']}: "
    lowest = without["quality"]["perplexity"]["low"]
    ahead = [row for row in rows if row["budget"] and row["quality"] and row["quality"]["perplexity"]["high"] < lowest]
    if not ahead:
        return [
            f"{prefix}these runs are too short for memory to help; they show how fast each schedule starts to learn"
        ]
    return [
        f"{prefix}these runs are too short for the memory of {first['schedule']} to help, but not for "
        f"{', '.join(row['schedule'] for row in ahead)}, whose worst seed is better than the best without memory"
    ]


def show(result: dict[str, Any], title: str) -> None:
    """Print the table, the targets and the remarks."""
    table = Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
    table.add_column("schedule")
    headings = ("Σ M", "perplexity", "seeds", "to first", "seeds", "peak", "", "state", "", "train tok/s", "×")
    for heading in (*headings, "decode tok/s", "×"):
        table.add_column(heading, justify="right")
    for row in result["schedules"]:
        table.add_row(row["schedule"], f"{row['budget']:,}", *quality_cells(row), *cost_cells(row, result["schedules"]))
    console = Console(width=170)
    console.print(table)
    for verdict in result["targets"]:
        ratio = "not measured" if verdict["found"] is None else f"{verdict['found']:.3f}"
        word = {None: "open", True: "met", False: "missed"}[verdict["met"]]
        console.print(
            f"{HEADLINE} to full, {verdict['target']}: {ratio}, target {verdict['bound']} {verdict['wanted']}: {word}"
        )
    for remark in result["remarks"]:
        console.print(remark)


def quality_cells(row: dict[str, Any]) -> list[str]:
    """The quality columns of a row."""
    if not row["quality"]:
        return ["–"] * 4
    values, difference = row["quality"]["perplexity"], row["quality"]["difference"]
    cells = [f"{values['mean']:.3f}", f"{values['low']:.3f} – {values['high']:.3f}"]
    if difference is None:
        return [*cells, "–", "–"]
    return [*cells, signed(difference["mean"]), f"{signed(difference['low'])} to {signed(difference['high'])}"]


def cost_cells(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """The cost columns of a row."""
    if not row["cost"]:
        return ["–"] * 8
    own, first = row["cost"]["training"], rows[0]["cost"]["training"]
    cells = []
    for key in ("peak_bytes", "state_bytes"):
        cells += [format_bytes(own[key]), f"{own[key] / first[key]:.0%}"]
    for each in (own, row["cost"]["decoding"]):
        rate, ratio = each["tokens_per_second"], each["ratio"]
        cells += [format_number(rate["median"]), f"{ratio['median']:.2f} ({ratio['low']:.2f} – {ratio['high']:.2f})"]
    return cells


def say(message: str) -> None:
    """Print a line of progress with the time."""
    print(time.strftime("%H:%M:%S"), message, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("schedules", nargs="*", metavar="SCHEDULE", help="a name or a spec (default: all eight)")
    parser.add_argument("--data", required=True, metavar="CORPUS")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="size of the model and the runs (default cpu)")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--cap", type=int, metavar="M", help="tokens that full and the long layers carry")
    parser.add_argument("--long", type=int, metavar="N", help="number of long layers")
    parser.add_argument("--short", type=int, metavar="M", help="tokens that the other layers carry")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens of a run")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1], metavar="N", help="seeds of the runs (default 0 1)"
    )
    parser.add_argument("--runs", metavar="FILE", help="finished runs, JSON lines; required for the quality part")
    parser.add_argument("--only", choices=("quality", "cost"), help="only one part; cost shows the finished runs, too")
    parser.add_argument("--rounds", type=int, default=12, metavar="N", help="turns of each side (default 12)")
    parser.add_argument("--decoded", type=int, default=40, metavar="N", help="tokens in a turn (default 40)")
    add_outputs(parser)
    a = parser.parse_args()
    if a.runs is None and a.only != "cost":
        parser.error("--runs FILE is required unless --only cost is given")
    return a


def main() -> None:
    """Run the requested parts and show everything known."""
    a = parse_arguments()
    changes = {"cap": a.cap, "long": a.long, "short": a.short, "tokens": a.tokens}
    setting = Setting.of(a.size, a.settings, a.schedules, **changes)
    corpus = Corpus.load(a.data)
    runs = Runs(a.runs, setting, corpus) if a.runs else None
    if a.only != "cost":
        train_all(setting, corpus, a.seeds, runs, say)
    costs = measure(setting, a.data, a.rounds, a.decoded, say) if a.only != "quality" else {}
    rows = make_rows(setting, runs, costs, a.seeds)
    result = {"settings": setting.config(rows[0]["spec"]).to_dict(), "schedules": rows}
    result |= {"targets": judged(rows), "remarks": remarks(rows)}
    title = f"{' '.join(['size', a.size, *a.settings])}, runs of {setting.tokens:,} tokens, {os.cpu_count()} cores"
    show(result, title)
    write_outputs(a, result, lambda path: draw_schedules(path, rows, title))


if __name__ == "__main__":
    run_main(main)
