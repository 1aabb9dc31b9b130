"""Measure a checkpoint and write its model card: `card.json` and `README.md` beside the weights.

    dsmr-mlx convert model.pt maestro-small --dtype bfloat16 --verify
    python benchmarks/model_card.py maestro-small --data maestro --run model.pt.last
    python benchmarks/model_card.py maestro-small --text-only

Every figure comes from a command that is run here with --json; the card names it. Results are kept
in --work, so an interrupted program continues where it stopped. Facts that no command measures (data set, licence,
limits) are in --about. `generation.json` in the checkpoint has the options that the model is played with.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measuring import machine
from outputs import run_main

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import read_json, sha256, write_atomically
from dsmr_mlx.common.formatting import format_bytes, format_time
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.evaluation.corpora import HASH_DIGITS
from dsmr_mlx.evaluation.gaps import KINDS
from dsmr_mlx.evaluation.music.discriminator import Discrimination
from dsmr_mlx.evaluation.music.shared_runs import READINGS
from dsmr_mlx.model import checkpoint
from dsmr_mlx.model.bundled import CARD
from dsmr_mlx.model.checkpoint_folder import generation_options
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.model.horizons import HorizonSchedule

ROOT = Path(__file__).parents[1]
ABOUT, TEMPLATE = Path(__file__).with_name("maestro.json"), Path(__file__).with_name("model_card.md")
SHOWN_SAMPLES = 10
PROGRESS = ("step", "tokens", "seconds")


def commands(name: str, a: argparse.Namespace, knows_gaps: bool) -> dict[str, list[str]]:
    """The commands that measure the model, in order, by the part of the card that they fill: words after `dsmr-mlx`, or
    after `python` if the first one is a script.
    """
    limit = [] if a.max_tokens is None else ["--max-tokens", str(a.max_tokens)]
    length = ["--seconds", f"{a.seconds:g}", "--seed", "0"]
    sample = ["evaluate", name, "--data", "corpus", "--max-tokens", str(a.curve_tokens)]
    return {
        "evaluation": ["evaluate", name, "--data", "corpus", *limit],
        "context": [*sample, "--context-curve"],
        **({"gaps": [*sample, "--gaps"]} if knows_gaps else {}),
        "samples": ["generate", name, "-n", str(a.samples), *length, "--out", "samples", "--force"],
        "music": ["assess", "samples", "--reference", "corpus", "--excerpts", "200", "--training", "corpus"],
        "latency": ["benchmarks/studio.py", "latency", "--model", name],
    }


def measure(folder: Path, part: str, words: list[str], inputs: dict[str, Any]) -> dict[str, Any]:
    """Run a command in `folder`, or return the stored result of the same command on the same `inputs`.

    Returns its `command`, the `seconds` it took, the `machine`, and `found`, its JSON (None for `generate`).
    Raises `CalledProcessError` if the command fails.
    """
    file, command = folder / f"{part}.json", " ".join(["python" if is_script(words) else "dsmr-mlx", *words])
    key = {"command": command, "inputs": inputs}
    if file.is_file() and (stored := read_json(file, "a measurement"))["key"] == key:
        return stored
    print(f"{part}: {command}", flush=True)
    has_json = words[0] != "generate"
    file.unlink(missing_ok=True)
    if not has_json:
        shutil.rmtree(folder / part, ignore_errors=True)  # there may be more samples, of other options
    started = time.perf_counter()
    output = run([*words, *["--json"] * has_json], folder)
    found = json.loads(output) if has_json else None
    seconds = time.perf_counter() - started
    result = {"key": key, "command": command, "seconds": seconds, "machine": machine(), "found": found}
    write_atomically(file, json.dumps(result) + "\n")
    return result


def is_script(words: list[str]) -> bool:
    """Whether a command is a script instead of `dsmr-mlx`."""
    return words[0].endswith(".py")


def run(words: list[str], folder: Path) -> str:
    """Run a command in a folder and return its output. Raises `CalledProcessError` if it fails."""
    program = [str(ROOT / words[0])] if is_script(words) else ["-m", "dsmr_mlx", words[0]]
    return subprocess.run(
        [sys.executable, *program, *words[1:]], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def training_facts(run: Path, corpus: Corpus) -> dict[str, Any]:
    """Settings of a run, and steps, tokens and seconds up to its end.

    run: `MODEL.pt.last` of examples/train_pytorch.py, or a checkpoint of `dsmr-mlx train`

    Raises `UserError` if it was trained on another corpus.
    """
    if run.is_dir():
        by, saved = "dsmr-mlx train", read_json(run / "training.json", "training progress")
        settings = read_json(run / "training_config.json", "training settings")
    else:
        import torch

        by, saved = "python examples/train_pytorch.py", torch.load(run, weights_only=True, mmap=True)
        settings = saved["settings"]
    if saved["corpus"] != corpus.fingerprint:
        trained_on, given = saved["corpus"][:12], corpus.fingerprint[:12]
        raise UserError(f"--data: corpus {given}, the run {run} was trained on {trained_on}")
    progress = {name: saved["progress"][name] for name in PROGRESS}
    return {"by": by, "settings": settings} | with_earlier_runs(progress, settings["init"])


def with_earlier_runs(progress: dict[str, float], init: str | None) -> dict[str, Any]:
    """The progress of a run, together with that of the runs before it if it started from a checkpoint with a card.

    Raises `UserError` if it started from a checkpoint without one.
    """
    if init is None:
        return progress
    folder = checkpoint.resolve(init)
    card = read_json(folder / CARD, f"the model card of {init}, from which the run started")
    before = card["training"]
    last = {name: before[name] - sum(run[name] for run in before.get("earlier", [])) for name in PROGRESS}
    earlier = [*before.get("earlier", []), last | {"sha256": card["sha256"], "settings": before["settings"]}]
    return {name: progress[name] + before[name] for name in PROGRESS} | {"earlier": earlier}


def data_facts(corpus: Corpus) -> dict[str, Any]:
    """Counts of a corpus, split by split, and the short hashes of the pieces that train, for `leak_remark`."""
    splits = {
        split: {
            "pieces": len(pieces),
            "works": len({piece.work for piece in pieces}),
            "tokens": sum(piece.length for piece in pieces),
            "notes": sum(piece.notes for piece in pieces),
            "hours": sum(piece.duration for piece in pieces) / 3600,
        }
        for split in corpus.splits
        for pieces in [corpus.pieces(split)]
    }
    splits["train"]["sha256"] = sorted(piece.sha256[:HASH_DIGITS] for piece in corpus.pieces("train"))
    return {"splits": splits, "fingerprint": corpus.fingerprint, "tokenizer": corpus.tokenizer.label}


def music_facts(music: dict[str, Any]) -> dict[str, Any]:
    """The card's figures of the samples, from the JSON of `dsmr-mlx assess`."""
    files = sorted(music["files"], key=lambda file: int(Path(file["name"]).stem))
    for reading in music["training"]["readings"]:
        for runs in ("generated", "reference"):
            reading[f"longest_{runs}"] = max(reading.pop(runs), key=lambda run: run["length"], default=None)
    return {
        "samples": len(files),
        "seconds": sum(file["seconds"] for file in files),
        "looping": sum(file["loops"] for file in files),
        "longest_silence": max(file["longest_silence"] for file in files),
        "longest_note": max(file["longest_note"] for file in files),
        "features": music["features"],
        "discriminator": music["discriminator"],
        "reference": without(music["reference"], "skipped"),
        "shown": [without(file, "figures") for file in files[:SHOWN_SAMPLES]],
        "training": without(music["training"], "skipped"),
    }


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """A copy of a dictionary without some keys."""
    return {name: value for name, value in values.items() if name not in names}


def make_card(a: argparse.Namespace) -> dict[str, Any]:
    """Measure everything and return the card as JSON values."""
    folder, name = a.work, a.checkpoint.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    for link, target in ((name, a.checkpoint), ("corpus", a.data)):
        (folder / link).unlink(missing_ok=True)
        (folder / link).symlink_to(target.resolve())
    weights, options = sha256(a.checkpoint / "model.safetensors"), generation_options(a.checkpoint)
    corpus = Corpus.load(a.data)
    if a.run is not None:
        training = training_facts(a.run, corpus)
    else:
        card = read_json(a.checkpoint / CARD, "a model card; or --run with the run that made the weights")
        for what, found, known in (
            ("weights", weights, card["sha256"]),
            ("corpus", corpus.fingerprint, card["data"]["fingerprint"]),
        ):
            if found != known:
                raise UserError(f"{a.checkpoint / CARD}: {what} {known[:12]}, found {found[:12]}; give --run")
        training = card["training"]
    config = ModelConfig.load(a.checkpoint / "config.json")
    results, parts = {}, commands(name, a, knows_gaps=config.fill > 0)
    inputs = {"weights": weights, "config": config.to_dict(), "corpus": corpus.fingerprint}
    played, samples = {"options": without(options, "best_of")}, {"samples": parts["samples"]}
    also = {
        "samples": played | samples,
        "music": played | samples,
        "latency": played,
    }  # what generated music depends on
    for part, words in parts.items():
        results[part] = measure(folder, part, words, inputs | also.get(part, {}))
    evaluation, context = results["evaluation"]["found"], results["context"]["found"]
    about = read_json(a.about, "facts about the data")
    return {
        "name": name,
        "sha256": weights,
        "data": about["data"] | data_facts(corpus),
        "licence": about["licence"],
        "limits": about["limits"],
        "parameters": evaluation["weights"]["parameters"],
        "model": config.to_dict(),
        "training": training | {"recipe": about["recipe"]},
        "generation": options,
        "evaluation": without(evaluation, "by_piece", "checkpoint"),
        "context": {key: context[key] for key in ("context", "motifs")},
        "gaps": results["gaps"]["found"]["gaps"] if "gaps" in results else None,
        "music": music_facts(results["music"]["found"]),
        "latency": results["latency"]["found"],
        "commands": {part: without(result, "found", "key") for part, result in results.items()},
    }


def readme(card: dict[str, Any]) -> str:
    """The card as Markdown: `model_card.md` with the figures and tables filled in."""
    model, weights = card["model"], card["evaluation"]["weights"]
    config, horizons = ModelConfig.from_dict(model), HorizonSchedule.custom(model["horizons"])
    machines = {
        f"{m['cores']} cores ({m['name']}, {m['system']}, MLX {m['mlx']}), {m['date']}"
        for m in (result["machine"] for result in card["commands"].values())
    }
    values = {
        "licence_id": card["licence"]["id"].lower(),
        "options": " ".join(f"--{key.replace('_', '-')} {value}" for key, value in card["generation"].items())
        or "none",
        "weights_size": format_bytes(weights["bytes"]),
        "horizons": horizons.summary,
        "budget": horizons.budget,
        "state": format_bytes(horizons.state_bytes(config.n_kv_heads, config.head_dim, canon_size=config.canon_size)),
        "citations": bullets(card["data"]["citations"]),
        "epochs": card["training"]["tokens"] / card["data"]["splits"]["train"]["tokens"],
        "training_time": format_time(card["training"]["seconds"]),
        "earlier": earlier_text(card["training"].get("earlier", [])),
        "minutes": card["music"]["seconds"] / 60,
        "limit_list": bullets(card["limits"]),
        "machines": "; ".join(sorted(machines)),
    }
    return TEMPLATE.read_text(encoding="utf-8").format_map(card | values | tables(card))


def earlier_text(runs: list[dict[str, Any]]) -> str:
    """What the card says about the runs before the last one; empty if there are none."""
    parts = " and ".join(f"{run['tokens']:,}" for run in runs)
    return f";\n{parts} of them in earlier runs, each run from the weights of the one before" if runs else ""


def tables(card: dict[str, Any]) -> dict[str, str]:
    """The tables of the card, as Markdown."""
    latency = table(
        "seconds|median|most",
        [[row["name"], *(f"{row[key]:.3f}" for key in ("median", "most"))] for row in card["latency"]],
    )
    return model_tables(card) | music_tables(card["music"]) | {"gaps": gap_text(card), "latency_table": latency}


def model_tables(card: dict[str, Any]) -> dict[str, str]:
    """The tables of the data, the losses and the value of memory."""
    data = [
        [
            *(split, *(f"{s[key]:,}" for key in ("pieces", "works"))),
            *(f"{s['hours']:.1f}", f"{s['notes']:,}", f"{s['tokens']:,}"),
        ]
        for split, s in card["data"]["splits"].items()
    ]
    positions = [
        [f"from {row['start']:,}", f"{row['tokens']:,}", f"{nats:.4f}", f"{math.exp(nats):.3f}"]
        for row in card["evaluation"]["by_position"]
        for nats in [row["nats_per_token"]]
    ]
    memory = [
        ["" if i else curve["label"], f"{point['visible']:,}", f"{point['nats_per_token']:.4f}", mean(point["gain"])]
        for curve in card["context"]["context"]["curves"]
        for i, point in enumerate(curve["points"])
    ]
    return {
        "data_table": table("split|performances|works|hours|notes|tokens", data),
        "position_table": table("position in the piece|tokens|nats per token|perplexity", positions),
        "memory_table": table("truncated|tokens carried|nats per token|gain over none", memory),
        "motifs": motif_table(card["context"]["motifs"]),
    }


def music_tables(music: dict[str, Any]) -> dict[str, str]:
    """The tables of the samples: their features, figures of some, and runs shared with training data."""
    features = [
        [
            *(feature["title"], centre(feature["generated"]), centre(feature["reference"])),
            *(number(feature[key]) for key in ("overlap", "real_overlap", "kl", "oa", "real_oa")),
        ]
        for feature in music["features"]
    ]
    samples = [
        [
            *(s["name"], f"{s['notes_per_second']:.1f}", f"{s['mean_polyphony']:.1f} / {s['max_polyphony']}"),
            *(f"{s['longest_silence']:.1f} s", f"{s['loop']['copies']} × {s['loop']['length']}" if s["loop"] else "–"),
        ]
        for s in music["shown"]
    ]
    runs = [f"{of}_summary" for of in ("generated", "reference")]
    copies = [
        [READINGS[reading["reading"]], *(whole(reading[run][key]) for run in runs for key in ("median", "longest"))]
        for reading in music["training"]["readings"]
    ]
    return {
        "feature_table": table("median / mean|generated|reference|overlap|real|KL|OA|real", features),
        "sample_table": table("sample|notes/s|polyphony mean / max|longest silence|loop", samples),
        "told_apart": told_apart(music["discriminator"]),
        "copy_table": table("|generated: median|longest|validation: median|longest", copies),
    }


def motif_table(motifs: dict[str, Any] | None) -> str:
    """The gain when a motif returns; empty if the corpus was too small to measure it."""
    if motifs is None:
        return ""
    rows = [
        [f"{r['tokens']:,.0f}", *(f"{r[key]['nats']:.3f}" for key in ("first", "repeat", "control")), mean(r["gain"])]
        for r in motifs["distances"]
    ]
    return (
        f"{motifs['probes']} motifs of {motifs['motif_tokens']:.0f} tokens that return after music of other pieces; "
        f"the control has another motif first:\n\n{table('returns after|first time|repeat|control|gain', rows)}"
    )


def told_apart(values: dict[str, Any] | None) -> str:
    """How well a classifier tells the samples from real music; nothing if there are too few."""
    if values is None:
        return ""
    told = str(Discrimination.from_dict(values))
    return f"{told[0].upper()}{told[1:]}.\n"


def gap_text(card: dict[str, Any]) -> str:
    """The section on gaps: the gain from seeing what follows; empty if the model was not trained with gaps."""
    if (gaps := card["gaps"]) is None:
        return ""
    rows = [
        [f"{r['start']:g} – {r['end']:g} s", f"{r['gaps']:,}", *(mean(r[key]) for key in ("nothing", "shown", "gain"))]
        for r in [*gaps["by_length"], gaps["everything"]]
    ]
    joins = [[KINDS[r["kind"]], *(mean(r[key]) for key in ("passage", "following"))] for r in gaps["joins"]]
    return "\n\n".join(
        [
            "## Filling gaps",
            f"`{card['commands']['gaps']['command']}`",
            "Nats per note of the true passages, with nothing shown and with what follows shown:",
            table("length|gaps|nothing shown|shown|gain", rows),
            f"How well passages join that are put into {gaps['joined']} gaps of {gaps['seconds']:g} s: nats per note "
            "of the passage, and of the four seconds after it:",
            table("passage|itself|what follows", joins),
            "",
        ]
    )


def table(columns: str, rows: list[list[str]]) -> str:
    """A Markdown table; `columns` separated by |. The first column is text, the others are numbers."""
    names = columns.split("|")
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(lines: list[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def mean(value: dict[str, float | None] | None) -> str:
    """A mean in nats and its standard error, if it has one."""
    if value is None:
        return ""
    return f"{value['nats']:.4f}" + (f" ± {value['error']:.4f}" if value["error"] is not None else "")


def centre(pair: dict[str, float | None]) -> str:
    """Median and mean of a feature, or a dash."""
    return "–" if pair["mean"] is None else f"{pair['median']:.3g} / {pair['mean']:.3g}"


def number(value: float | None) -> str:
    """A number, or a dash."""
    return "–" if value is None else f"{value:.2f}"


def whole(value: float | None) -> str:
    """A number without decimals, or a dash."""
    return "–" if value is None else f"{value:.0f}"


def main() -> None:
    """Parse the options, measure, write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path, help="the checkpoint folder")
    p.add_argument("--data", type=Path, metavar="CORPUS", help="the corpus it was trained on")
    p.add_argument("--run", type=Path, metavar="MODEL.pt.last", help="what the training run saved (default: card.json)")
    p.add_argument("--about", type=Path, default=ABOUT, metavar="FILE.json", help="facts about data and licence")
    p.add_argument("--work", type=Path, metavar="DIR", help="where results are kept (default runs/card-NAME)")
    p.add_argument("--samples", type=int, default=50, metavar="N", help="samples to make (default 50)")
    p.add_argument("--seconds", type=float, default=120.0, metavar="X", help="length of each (default 120)")
    p.add_argument("--max-tokens", type=int, metavar="N", help="of the evaluation (default: the whole split)")
    p.add_argument("--curve-tokens", type=int, default=100_000, metavar="N", help="of context curve and gaps (100,000)")
    p.add_argument("--text-only", action="store_true", help="write README.md again from card.json")
    a = p.parse_args()
    if not a.text_only:
        if a.data is None:
            p.error("--data is required unless --text-only is given")
        a.work = a.work or Path("runs") / f"card-{a.checkpoint.resolve().name}"
        write_atomically(a.checkpoint / CARD, json.dumps(make_card(a), indent=1, allow_nan=False) + "\n")
    write_atomically(a.checkpoint / "README.md", readme(read_json(a.checkpoint / CARD, "a model card")))


if __name__ == "__main__":
    run_main(main)
