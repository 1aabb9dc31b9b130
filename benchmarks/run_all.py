"""Run the benchmarks of docs/results.md and docs/speed.md again, one after another, and keep what they print.

    python benchmarks/run_all.py [--data maestro] [--midi midi] [--out DIR] [--again] [NAME …]

Each writes its table to DIR/NAME.txt, after its command, the machine and the date, and writes the JSON and pictures
that these pages show. A benchmark that has this file is skipped, and one that was stopped continues after its finished
parts; --again removes both, and starts afresh. Without names, all are run: some hours on two cores.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from measuring import machine

from dsmr_mlx.common.files import write_atomically
from dsmr_mlx.common.formatting import format_time

# {data}: a corpus; {midi}: a folder of MIDI files; {out}: where results go
RUNS = {
    "paper-table": "paper_table.py --data {data} --out {out}/paper-table",
    "schedule-cost": "schedule_cost.py --data {data} --rounds 4 --json {out}/schedule-cost.json",
    "whole-piece": "whole_piece.py --set batch_size=2 --rounds 1 --json {out}/whole-piece.json",
    "recipe": "recipe.py --data {data} --runs {out}/recipe.jsonl --size cpu --seeds 0 1",
    "sampling": "sampling.py maestro-small --data {data} --runs {out}/sampling.jsonl --samples 64 --seconds 40",
    "decode": "decode.py --rounds 24 --json {out}/decode.json --plot {out}/decode.png",
    "peers-decode": "peers.py decode --rounds 60 --tokens 10 --seconds 75 --json {out}/peers-decode.json "
    "--plot {out}/peers-decode.png",
    "launches": "launches.py --peers --json {out}/launches.json",
    "peers-prefill-train": "peers.py prefill train --seconds 30 --json {out}/peers-prefill-train.json "
    "--plot {out}/peers-prefill-train.png",
    "aria": "aria.py --layers 4 --rounds 3 --tokens 4 --json {out}/aria.json --plot {out}/aria.png",
    "studio": "studio.py latency",
    "studio-memory": "studio.py memory --rounds 60",
    "scaling": "scaling.py --json {out}/scaling.json --plot {out}/scaling.png",
    "roofline": "roofline.py --preset small --rounds 6 --json {out}/roofline.json --plot {out}/roofline.png",
    "input": "input_pipeline.py --data {data} --midi {midi} --json {out}/input_pipeline.json "
    "--plot {out}/input_pipeline.png",
}

PARTS = ("--runs", "--out")  # options that name the file or folder where a benchmark keeps its finished parts
PLACES = {"data": "maestro", "midi": "midi", "out": "benchmarks/results"}


def command_of(name: str, **places: str) -> str:
    """The command of a benchmark, from the root of the repository; places: others than `PLACES`."""
    return "python benchmarks/" + RUNS[name].format_map({k: shlex.quote(v) for k, v in (PLACES | places).items()})


def remove_results(command: str, path: Path) -> None:
    """Remove what a benchmark has printed, and its finished parts."""
    words = shlex.split(command)
    for result in (path, *(Path(words[words.index(option) + 1]) for option in PARTS if option in words)):
        shutil.rmtree(result) if result.is_dir() else result.unlink(missing_ok=True)


def run(name: str, command: str, path: Path) -> bool:
    """Run one benchmark and write what it prints. Return whether it succeeded; its errors go to the terminal."""
    print(f"{name}: {command}", flush=True)
    started = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    print(f"{name}: {'failed' if done.returncode else 'done'} in {format_time(seconds)}", flush=True)
    if done.returncode == 0:
        write_atomically(path, f"$ {command}\n{json.dumps(machine() | {'seconds': round(seconds)})}\n\n{done.stdout}")
    return done.returncode == 0


def main() -> None:
    """Run what is left; exit with 1 if something failed."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("data", "MAESTRO as a corpus"), ("midi", "a folder of MIDI files")):
        p.add_argument(f"--{name}", default=PLACES[name], metavar="DIR", help=f"{what} (default {PLACES[name]})")
    p.add_argument("--out", default=PLACES["out"], metavar="DIR", help=f"for results (default {PLACES['out']})")
    p.add_argument("--again", action="store_true", help="remove the results of the benchmarks first")
    p.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RUNS))
    a = p.parse_args()
    if unknown := [name for name in a.names if name not in RUNS]:
        p.error(f"{unknown[0]}: expected one of {', '.join(RUNS)}")
    places, failed = {name: getattr(a, name) for name in PLACES}, []
    for name in a.names or RUNS:
        path, command = Path(a.out, f"{name}.txt"), command_of(name, **places)
        if a.again:
            remove_results(command, path)
        if not path.exists() and not run(name, command, path):
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
