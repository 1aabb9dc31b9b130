"""The way from trained weights to the folder that is shipped: cast, measured, and described in a model card.

    python benchmarks/model_card.py model.pt --run model.pt.last --data corpus --out dsmr_mlx/models/asap-small
    python benchmarks/model_card.py --data corpus --out dsmr_mlx/models/asap-small --parts samples,music

The second form measures what is shipped already; what it does not measure, the card goes on to say.

Every figure of a card is what a `dsmr-mlx` command prints. Those commands are run here, with --json, in the folder
--work and under the names that the card gives them, so that it cannot say anything else than they do. What is known of
the same weights by the same command is not measured again: an interrupted run goes on where it stopped.

LICENSE and generation.json stay as they are in --out, all else there is written anew. What is not measured but known
of the data, their licence and the limits is in --about.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

from measuring import machine
from model_card_text import readme
from sample_descriptions import described

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import read_json, sha256, write_atomically
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.model.bundled import CARD, generation_options
from dsmr_mlx.model.checkpoint import resolve
from dsmr_mlx.model.checkpoint_folder import CHECKSUMS, COMPANIONS, GENERATION, write_folder
from dsmr_mlx.model.config import ModelConfig
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.settings import build_config

ROOT = Path(__file__).parents[1]
PLAYED = ("samples", "music")  # what depends on how the model is played
UNSHIPPED = ("precision",)  # what takes the trained weights
SHOWN_SAMPLES = 10
# What a run may do differently from its recipe without becoming another one.
INCIDENTAL = {
    *("compile", "gradient_checkpointing", "cache_limit_mb", "memory_limit_mb", "wired_limit_mb", "rank_timeout"),
    *("eval_every", "eval_tokens", "checkpoint_every", "keep_last", "sample_seconds", "not_finite", "max_skips"),
}


def parts_of(name: str, a: argparse.Namespace) -> dict[str, list[str]]:
    """What is measured, in order, and by which command."""
    sample = [] if a.max_tokens is None else ["--max-tokens", str(a.max_tokens)]
    return {
        "evaluation": ["evaluate", name, "--data", "corpus", *sample],
        "context": ["evaluate", name, "--data", "corpus", "--max-tokens", str(a.curve_tokens), "--context-curve"],
        "precision": [
            *("compare", f"{name}-float32", name, f"{name}-8bit"),
            *("--data", "corpus", "--max-tokens", str(a.precision_tokens)),
        ],
        "samples": [
            *("generate", name, "-n", str(a.samples), "--seconds", f"{a.seconds:g}", "--seed", "0", "--out", "samples")
        ],
        "music": ["assess", "samples", "--reference", "corpus", "--excerpts", "200", "--training", "corpus"],
    }


def conversions_of(source: str, name: str) -> dict[str, list[str]]:
    """The folders that are made of the trained weights, and by which command."""
    begin = ["convert", source]
    return {
        name: [*begin, name, "--dtype", "bfloat16", "--verify"],
        f"{name}-float32": [*begin, f"{name}-float32", "--dtype", "float32"],
        f"{name}-8bit": [*begin, f"{name}-8bit", "--dtype", "bfloat16", "--quantize", "8"],
    }


class Work:
    """A folder in which commands run, and what they have found so far.

    source: trained weights, which are converted; or None, and the checkpoint `shipped` is measured as it is
    """

    def __init__(self, folder: Path, source: Path | None, data: Path, shipped: Path, kept: dict[str, bytes]):
        self.folder, self.name = folder, shipped.resolve().name
        folder.mkdir(parents=True, exist_ok=True)
        self._link("corpus", data)
        if source is None:
            copy_checkpoint(shipped, folder / self.name)
        else:
            self._link(source.name, source)
            for model, words in conversions_of(source.name, self.name).items():
                self._convert(source, model, words)
        for file, content in kept.items():
            (folder / self.name / file).write_bytes(content)
        self.weights = sha256(folder / self.name / "model.safetensors")
        self.options = generation_options(folder / self.name)

    def _link(self, name: str, target: Path) -> None:
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / name).symlink_to(target.resolve())

    def _convert(self, source: Path, model: str, words: list[str]) -> None:
        """Make a checkpoint of the source, unless it has been made of the same one."""
        record = self.folder / model / "conversion.json"
        known = read_json(record, "a record")["sha256"] if record.is_file() else None
        trained = resolve(source) / "model.safetensors" if source.is_dir() else source
        if known is None or list(known.values()) != [sha256(trained)]:
            self.run(words + ["--force"] * record.is_file())

    def run(self, words: list[str]) -> str:
        """What a command prints; what it says of its progress is shown. Raises `CalledProcessError` if it fails."""
        command = [sys.executable, "-m", "dsmr_mlx.cli", *words]
        return subprocess.run(command, cwd=self.folder, stdout=subprocess.PIPE, text=True, check=True).stdout

    def measure(self, part: str, words: list[str], wanted: bool) -> dict[str, Any] | None:
        """What a command finds: `key`, the command and what it was about; `seconds` that it took; the `machine`;
        `found`, its JSON.

        None for what is neither known nor wanted.
        """
        file, command = self.folder / f"{part}.json", " ".join(["dsmr-mlx", *words])
        key = {"command": command, "weights": self.weights, "options": self.options if part in PLAYED else None}
        if file.is_file() and (known := read_json(file, "a measurement"))["key"] == key:
            return known
        if not wanted:
            return None
        print(f"{part}: {command}", flush=True)
        if part == "samples":
            shutil.rmtree(self.folder / "samples", ignore_errors=True)
            (self.folder / "music.json").unlink(missing_ok=True)
        started = time.perf_counter()
        text = self.run(words if part == "samples" else [*words, "--json"])
        found = None if part == "samples" else json.loads(text)
        seconds = time.perf_counter() - started
        measured = {"key": key, "seconds": seconds, "machine": machine(), "found": found}
        write_atomically(file, json.dumps(measured) + "\n")
        return read_json(file, "a measurement")


def training_facts(run: Path, recipe: Path, data: Path) -> dict[str, Any]:
    """Settings, steps, tokens and seconds of a run: of `MODEL.pt.last` as examples/train_pytorch.py writes it, or of a
    checkpoint in a run of `dsmr-mlx train`. Raises `UserError` if it is not the run that the recipe describes, or was
    trained on another corpus.
    """
    if run.is_dir():
        saved = read_json(run / "training.json", "progress")
        settings = read_json(run / "training_config.json", "settings")
    else:
        import torch

        saved = torch.load(run, map_location="cpu", weights_only=True, mmap=True)
        settings = saved["settings"]
    progress, corpus = saved["progress"], Corpus.load(data).fingerprint
    if saved["corpus"] != corpus:
        raise UserError(f"--data {data}: fingerprint {corpus[:12]}, {run} was trained on {saved['corpus'][:12]}")
    expected = build_config(toml=recipe)
    actual = TrainConfig.from_dict(settings, str(run))
    for field in fields(TrainConfig):
        wanted, had = getattr(expected, field.name), getattr(actual, field.name)
        if wanted != had and field.name not in INCIDENTAL:
            raise UserError(f"{recipe}: {field.name} = {wanted!r}, the run in {run} had {had!r}")
    by = "dsmr_mlx.train" if run.is_dir() else "examples/train_pytorch.py"
    numbers = {name: progress[name] for name in ("step", "tokens", "seconds")}
    return {"by": by, "recipe": shown_path(recipe), "settings": settings, **numbers}


def shown_path(path: Path) -> str:
    """As a card names a file: seen from the repository, and nothing but its name where it is elsewhere."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def data_facts(path: Path) -> dict[str, Any]:
    """What a corpus holds."""
    corpus = Corpus.load(path)
    splits, works = {}, Counter()
    for split in corpus.splits:
        pieces = corpus.pieces(split)
        works.update({piece.work for piece in pieces})
        splits[split] = {
            "pieces": len(pieces),
            "works": len({piece.work for piece in pieces}),
            "tokens": sum(piece.length for piece in pieces),
            "notes": sum(piece.notes for piece in pieces),
            "hours": sum(piece.duration for piece in pieces) / 3600,
        }
    facts = {"splits": splits, "works_in_two_splits": sum(count > 1 for count in works.values())}
    return facts | {"fingerprint": corpus.fingerprint, "tokenizer": corpus.tokenizer.label}


def trained_facts(work: Work, a: argparse.Namespace) -> dict[str, Any]:
    """What is known of newly trained weights before anything is measured."""
    folder = work.folder / work.name
    about = read_json(a.about, "what is known of the data")
    conversion = {"command": " ".join(["dsmr-mlx", *conversions_of(a.source.name, work.name)[work.name]])}
    card_itself = {"command": " ".join(["python", "benchmarks/model_card.py", *words_of(a)])}
    return {
        "name": work.name,
        "sha256": work.weights,
        "data": about["data"] | data_facts(a.data),
        "licence": about["licence"],
        "limits": about["limits"],
        "model": ModelConfig.load(folder / "config.json").to_dict(),
        "training": training_facts(a.run, a.recipe, a.data) | {"out": a.source.name},
        "verification": read_json(folder / "conversion.json", "a record")["verification"],
        "commands": {"conversion": conversion, "card": card_itself},
    }


def shipped_facts(out: Path, data: Path) -> dict[str, Any]:
    """What the card of a shipped model says. Raises `UserError` for weights that it is not about, another corpus than
    that which it names, and where there is none.
    """
    card, weights = read_json(out / CARD, "a model card"), sha256(resolve(out) / "model.safetensors")
    corpus = Corpus.load(data).fingerprint
    for what, found, wanted in (
        (f"{out}/model.safetensors: sha256", weights, card["sha256"]),
        (f"--data {data}: fingerprint", corpus, card["data"]["fingerprint"]),
    ):
        if found != wanted:
            raise UserError(f"{what} {found[:12]}, {out / CARD} is about {wanted[:12]}")
    return card


def make_card(work: Work, measured: dict[str, dict], known: dict[str, Any]) -> dict[str, Any]:
    """All that is known of the model, JSON values: what was `known` before, and what was measured."""
    found = {part: result["found"] for part, result in measured.items()}
    card = known | {"generation": work.options}
    if evaluation := found.get("evaluation"):
        card["parameters"] = evaluation["weights"]["parameters"]
        best, worst = evaluation["by_piece"][:3], evaluation["by_piece"][-3:]
        card["evaluation"] = without(evaluation, "by_piece", "checkpoint") | {"best": best, "worst": worst}
    if context := found.get("context"):
        card["context"] = {name: context[name] for name in ("context", "motifs", "no_motifs")}
    if precision := found.get("precision"):
        card["precision"] = [without(row, "by_piece", "by_position") for row in precision["checkpoints"]]
    if music := found.get("music"):
        card["music"] = music_facts(work, music)
    commands = {
        part: {"command": result["key"]["command"], "seconds": result["seconds"], "machine": result["machine"]}
        for part, result in measured.items()
    }
    return card | {"commands": known["commands"] | commands}


def words_of(a: argparse.Namespace) -> list[str]:
    """The arguments, as far as the card depends on them."""
    beside = a.source.parent
    run = a.run.relative_to(beside) if a.run.is_relative_to(beside) else a.run.name
    words = [a.source.name, "--run", str(run), "--data", "corpus", "--out", a.name]
    for name in a.changed:
        value = getattr(a, name)
        words += [f"--{name.replace('_', '-')}", shown_path(value) if isinstance(value, Path) else str(value)]
    return words


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def music_facts(work: Work, music: dict[str, Any]) -> dict[str, Any]:
    """The samples as a whole, each of the first ones, and what they share with the training pieces."""
    files = sorted(music["files"], key=lambda file: int(Path(file["name"]).stem))
    training = music["training"]
    loops = [file["loop"] for file in files if file["loop"]]
    longest = {
        "silence": max(file["longest_silence"] for file in files),
        "note": max(file["longest_note"] for file in files),
        "loop": max(loops, key=lambda loop: loop["copies"], default=None),
    }
    for reading in training["readings"]:
        for runs in ("generated", "reference"):
            reading[f"longest_{runs}"] = max(reading.pop(runs), key=lambda run: run["length"], default=None)
    shown = [
        without(file, "figures", "name") | {"name": file["name"], **described(work.folder / file["name"])}
        for file in files[:SHOWN_SAMPLES]
    ]
    return {
        "samples": len(files),
        "seconds": sum(file["seconds"] for file in files),
        "looping": sum(file["loops"] for file in files),
        "longest": longest,
        "warnings": sum(len(file["warnings"]) for file in files),
        "features": music["features"],
        "reference": without(music["reference"], "skipped"),
        "shown": shown,
        "training": training,
    }


def publish(work: Work, out: Path, card: dict[str, Any]) -> None:
    """Put the checkpoint and its card where they are shipped from. The checksums are those of the checkpoint alone, so
    that a card can be corrected by hand.
    """
    copy_checkpoint(work.folder / work.name, out)
    write_atomically(out / CARD, json.dumps(card, indent=1, allow_nan=False) + "\n")
    write_atomically(out / "README.md", readme(card))


def copy_checkpoint(source: Path, out: Path) -> None:
    """The files of a checkpoint, and those beside them, as another folder, whole or not at all; what stands there is
    replaced.
    """
    beside = [name for name in COMPANIONS if (source / name).is_file()]

    def write(folder: Path) -> None:
        for name in (*read_json(source / CHECKSUMS, "checksums"), *beside):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)

    write_folder(out, write)


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "source", type=Path, nargs="?", metavar="MODEL.pt", help="the trained weights, or a checkpoint (default: --out)"
    )
    p.add_argument("--run", type=Path, metavar="MODEL.pt.last", help="what the run of MODEL.pt saved to go on from")
    p.add_argument("--data", type=Path, required=True, metavar="CORPUS")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of the model, named like it")
    p.add_argument("--recipe", type=Path, metavar="FILE.toml", help="default examples/NAME.toml")
    p.add_argument(
        "--about", type=Path, metavar="FILE.json", help="data, licence, limits (default benchmarks/asap.json)"
    )
    p.add_argument("--work", type=Path, metavar="DIR", help="where commands run (default runs/card-NAME)")
    p.add_argument(
        "--parts", metavar="PART,PART", help="evaluation, context, precision, samples, music: if not known (all)"
    )
    p.add_argument("--samples", type=int, default=50, metavar="N", help="pieces that are made (default 50)")
    p.add_argument("--seconds", type=float, default=120.0, metavar="X", help="of each (default 120)")
    p.add_argument("--max-tokens", type=int, metavar="N", help="of the evaluation (default: the whole split)")
    p.add_argument("--curve-tokens", type=int, default=100_000, metavar="N", help="of the context curve (100,000)")
    p.add_argument("--precision-tokens", type=int, default=20_000, metavar="N", help="of the comparison (20,000)")
    a = p.parse_args()
    a.name = a.out.resolve().name
    counts = ("samples", "seconds", "max_tokens", "curve_tokens", "precision_tokens")
    a.changed = [name for name in ("recipe", "about", *counts) if getattr(a, name) != p.get_default(name)]
    a.recipe = a.recipe or ROOT / "examples" / f"{a.name}.toml"
    a.about = a.about or ROOT / "benchmarks" / "asap.json"
    a.work = a.work or Path("runs") / f"card-{a.name}"
    return a


def wanted_parts(a: argparse.Namespace, parts: dict[str, list[str]]) -> list[str]:
    """The names of the parts to be measured. Raises `UserError` for those that there are not."""
    possible = [part for part in parts if a.source or part not in UNSHIPPED]
    if a.parts is None:
        return possible
    if unknown := sorted(set(a.parts.split(",")) - set(possible)):
        why = " without MODEL.pt" if set(unknown) <= set(parts) else ""
        raise UserError(f"--parts {a.parts}: unknown part {', '.join(unknown)}{why}, expected {', '.join(possible)}")
    if len(played := [part for part in PLAYED if part in a.parts.split(",")]) == 1:
        raise UserError(f"--parts {played[0]}: expected {' and '.join(PLAYED)} together")
    return a.parts.split(",")


def check_played(work: Work, wanted: list[str], known: dict[str, Any], out: Path) -> None:
    """Raise `UserError` where the card would go on to tell of music that is played in another way now."""
    if "music" in known and known["generation"] != work.options and not set(PLAYED) & set(wanted):
        played = json.dumps(known["generation"])
        raise UserError(f"{out / GENERATION}: its card is about {played}, expected {','.join(PLAYED)} among --parts")


def main() -> None:
    a = arguments()
    kept = {name: (a.out / name).read_bytes() for name in COMPANIONS if (a.out / name).is_file()}
    parts = parts_of(a.name, a)
    wanted = wanted_parts(a, parts)
    if a.source is None:
        known = shipped_facts(a.out, a.data)
    elif a.run is None:
        raise UserError(f"{a.source}: --run MODEL.pt.last is missing, the run that it comes from")
    else:
        training_facts(a.run, a.recipe, a.data)  # a run of another recipe is refused before anything takes time
    work = Work(a.work, a.source, a.data, a.out, kept)
    if a.source is not None:
        known = trained_facts(work, a)
    check_played(work, wanted, known, a.out)
    measured = {part: work.measure(part, words, part in wanted) for part, words in parts.items()}
    measured = {part: result for part, result in measured.items() if result}
    if not set(PLAYED) <= set(measured):
        measured = {part: result for part, result in measured.items() if part not in PLAYED}
    card = make_card(work, measured, known)
    if "evaluation" not in card:
        raise UserError(f"--parts {a.parts}: the evaluation is not known yet, expected it among them")
    publish(work, a.out, card)
    print(f"{a.out}: {sum(result['seconds'] for result in measured.values()):.0f} s of measuring")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"model_card: error: {error}")
