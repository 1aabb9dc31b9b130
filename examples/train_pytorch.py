"""Train the PyTorch reference on a prepared corpus, on CUDA or a CPU, and write a checkpoint that converts to MLX.

    python examples/train_pytorch.py --data corpus --out model.pt --preset small --set max_minutes=10
    dsmr-mlx convert model.pt model --verify

Settings are those of `dsmr-mlx train` except `UNSUPPORTED`, and the lanes read the same pieces in the same order. No
samples are played, and `keep_last` has no effect: there is one last state.
`model.pt` is the best model by validation; `model.pt.last` is what `--resume` continues from. Ctrl-C, SIGTERM, SIGHUP
and SIGQUIT write it and stop, if necessary after a validation; a second one stops at once. With `lr_schedule=wsd`,
`model.pt.before-cooldown` is the run before the learning rate falls: `--resume` with a higher limit continues from
there. `--resume` with longer `horizons` continues with a longer memory: short horizons train faster, and long ones help
only late. A run with `init` starts from the weights of a checkpoint and keeps its licence.
"""

import argparse
import copy
import math
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from pytorch_muon import Optimizer
from torch.nn import functional as F

from dsmr_mlx.common.allocator import keep_freed_memory
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.signals import stop_requests
from dsmr_mlx.convert import reference, tokenizer_files
from dsmr_mlx.convert.reference import DSMR, LayerState
from dsmr_mlx.data.corpus import Corpus
from dsmr_mlx.data.lanes import Batch, Lanes
from dsmr_mlx.data.training_pieces import check_training, training_ids
from dsmr_mlx.evaluation.losses import sample_pieces
from dsmr_mlx.model.config import Architecture
from dsmr_mlx.training.config import TrainConfig
from dsmr_mlx.training.optimizer import in_cooldown, rate_factor
from dsmr_mlx.training.settings import build_config

UNSUPPORTED = (
    *("lora_rank", "accumulate", "patience", "not_finite", "gradient_checkpointing"),
    *("memory_limit_mb", "cache_limit_mb", "wired_limit_mb"),
)
# What a resumed run cannot change: the shapes of the weights, the lanes, and what the optimizer state depends on.
FIXED = (
    *(f.name for f in fields(Architecture) if f.name != "dropout"),
    *("seed", "batch_size", "augment_transpose", "augment_stretch", "augment_velocity", "fill"),
    *("optimizer", "weight_decay", "beta1", "beta2"),
)


def segment_loss(
    model: DSMR, batch: dict[str, torch.Tensor], layers: list[LayerState], position: torch.Tensor
) -> tuple[torch.Tensor, list[LayerState]]:
    """Return the summed loss of one segment of every lane, (), in nats, and the layers with S more slots."""
    hidden, layers = model.hidden(batch["inputs"], layers, position)
    losses = F.cross_entropy(model.logits(hidden).flatten(0, 1), batch["targets"].flatten(), reduction="none")
    return (losses * batch["weights"].flatten()).sum(), layers


class Training:
    """A run: model, optimizer, lanes and their recurrent state.

    average: with `ema_decay`, a second model with the average of the weights, else the model itself
    """

    def __init__(self, config: TrainConfig, corpus: Corpus, device: str):
        torch.manual_seed(config.seed)
        self.config = config = config.for_corpus(corpus)
        self.corpus, self.device = corpus, device
        self.model = DSMR(config.model_config(corpus.tokenizer)).to(device)
        self.segment_loss = torch.compile(segment_loss) if config.compile else segment_loss
        self.average = copy.deepcopy(self.model).requires_grad_(False) if config.ema_decay else self.model
        self.optimizer = Optimizer(self.model, config)
        self.dtype = getattr(torch, config.dtype)
        self.state = self.model.new_state(config.batch_size, self.dtype)
        pieces = corpus.pieces("train")

        def load(epoch: int, index: int) -> np.ndarray:
            ids = corpus.tokens(pieces[index])
            return training_ids(corpus.tokenizer, ids, config.augmentation, config.fill, config.seed, epoch, index)

        check_training(corpus, config.augmentation, config.fill, config.max_positions)
        shown = corpus.tokenizer.shown_mask if config.fill else None
        lanes, S = config.batch_size, config.segment_length
        self.lanes = Lanes(load, len(pieces), lanes, S, seed=config.seed, shown=shown)
        self.step, self.tokens, self.seconds, self.best = 0, 0, 0.0, math.inf
        self.validated = 0  # the step of the last validation
        self.before_cooldown: int | None = None  # the step at which the state before the cool-down was saved
        self.licence: dict[str, str] = {}  # of the initial weights, as an entry of the files

    def start_from(self, init: str) -> None:
        """Take the weights of a checkpoint of `dsmr-mlx`. Raises `UserError` if the run cannot start from it."""
        from dsmr_mlx.convert.exporting import licence_entry, to_torch  # only this needs MLX
        from dsmr_mlx.model import checkpoint
        from dsmr_mlx.training import warm_start

        folder = warm_start.check(self.config, self.corpus)
        self.licence = licence_entry(folder)
        arrays = checkpoint.load_arrays(folder / "model.safetensors")
        for model in (self.model, self.average):
            model.load_state_dict({name: to_torch(array) for name, array in arrays.items()})

    @property
    def done(self) -> float:
        """The fraction of the run that is over."""
        return fraction_done(self.config, self.step, self.tokens, self.seconds)

    def train_step(self) -> float:
        """Update once, from the next segment of every lane that has targets. Returns the mean loss in nats."""
        started = time.perf_counter()
        loss, n_tokens = self.read_segment()
        while not n_tokens:  # with `fill`, all of a segment may be shown
            loss, n_tokens = self.read_segment()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm, error_if_nonfinite=True)
        self.optimizer.step(rate_factor(self.config, self.step, self.done))
        if self.average is not self.model:
            self.update_average()
        self.step, self.tokens = self.step + 1, self.tokens + n_tokens
        value = loss.item()
        self.seconds += time.perf_counter() - started
        return value

    def read_segment(self) -> tuple[torch.Tensor, int]:
        """Read the next segment of every lane. Return its mean loss, (), in nats, and the number of its targets."""
        batch = next(self.lanes)
        self.state.reset(batch.fresh)
        with torch.autocast(self.device.split(":")[0], self.dtype, enabled=self.dtype != torch.float32):
            arrays = self.on_device(batch)
            loss, layers = self.segment_loss(self.model, arrays, self.state.arrays, self.state.position)
            loss = loss / max(batch.n_tokens, 1)
        self.state = self.model.advanced(self.state, layers, self.config.segment_length)
        return loss, batch.n_tokens

    def on_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the arrays of a batch that `segment_loss` needs."""
        arrays = {"inputs": batch.inputs.astype(np.int64), "targets": batch.targets.astype(np.int64)}
        return {k: torch.tensor(v, device=self.device) for k, v in (arrays | {"weights": batch.weights}).items()}

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the weights."""
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        for average, weight in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)

    @torch.no_grad()
    def validate(self) -> float:
        """Return the nats per token of about `eval_tokens` tokens of the validation split, streamed, in float32."""
        model = self.average.eval()
        sample = sample_pieces(self.corpus.pieces("validation"), self.config.eval_tokens)
        pieces = sorted(sample, key=lambda piece: -piece.length)
        B = min(self.config.batch_size, len(pieces))
        lanes = Lanes(lambda _, i: self.corpus.tokens(pieces[i]), len(pieces), B, self.config.segment_length, epochs=1)
        state, total, tokens = model.new_state(B), 0.0, 0
        for batch in lanes:
            state.reset(batch.fresh)
            loss, layers = segment_loss(model, self.on_device(batch), state.arrays, state.position)
            state = model.advanced(state, layers, self.config.segment_length)
            total += loss.item()
            tokens += batch.n_tokens
        self.model.train()
        return total / tokens

    def save(self, path: Path) -> None:
        """Write everything that `resume` needs."""
        names = ("step", "tokens", "seconds", "best", "validated", "before_cooldown")
        progress = {name: getattr(self, name) for name in names}
        tokenizer = tokenizer_files.pack(self.corpus.path / "tokenizer")
        reference.save(
            path, self.model, tokenizer, average=self.average.state_dict(), optimizer=self.optimizer.state_dict(),
            progress=progress,
            lanes=self.lanes.cursor(), layers=contiguous(self.state.arrays), position=self.state.position,
            settings=asdict(self.config), corpus=self.corpus.fingerprint, random=self.random_state(),
            **self.licence,
        )  # fmt: skip

    def resume(self, path: Path) -> None:
        """Continue from a saved run; with other horizons the memory starts empty, and the rest continues.

        Exits with a message if corpus or fixed settings differ.
        """
        saved = torch.load(path, map_location=self.device, weights_only=True)
        if saved["corpus"] != self.corpus.fingerprint:
            raise SystemExit(
                f"{path}: was trained on corpus {saved['corpus'][:12]}, not {self.corpus.fingerprint[:12]}"
            )
        for name in FIXED:
            now, before = getattr(self.config, name), saved["settings"][name]
            if now != before:
                raise SystemExit(f"{name} = {now!r}: {path} has {name} = {before!r}, which is fixed")
        self.model.load_state_dict(saved["state_dict"])
        if self.average is not self.model:
            self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["settings"]["horizons"] == self.config.horizons:
            layers = [tuple(slots.to(self.dtype) for slots in layer) for layer in saved["layers"]]
            self.state = self.model.state_of(layers, saved["position"])
        self.lanes.seek(saved["lanes"])
        vars(self).update(saved["progress"])
        self.licence = {name: saved[name] for name in ("licence",) if name in saved}
        for device, state in saved.get("random", {}).items():  # on another device, dropout differs
            if device == "cpu":
                torch.set_rng_state(state.cpu())
            elif device == self.device:
                torch.cuda.set_rng_state(state.cpu(), device)

    def random_state(self) -> dict[str, torch.Tensor]:
        """The states of the random generators that dropout uses."""
        on_gpu = {self.device: torch.cuda.get_rng_state(self.device)} if self.device.startswith("cuda") else {}
        return {"cpu": torch.get_rng_state(), **on_gpu}


def contiguous(layers: list[LayerState]) -> list[LayerState]:
    """Return copies, because saving a view saves the whole array."""
    return [tuple(slots.clone(memory_format=torch.contiguous_format) for slots in layer) for layer in layers]


def run(training: Training, out: Path, tokenizer: dict[str, str]) -> None:
    """Train until a limit or a signal. Every validation keeps the best model."""
    with stop_requests() as stop:
        if validation_due(training):  # a kill has ended it
            keep_best(training, out, tokenizer)
        loss, started, tokens = [], time.perf_counter(), training.tokens
        while training.done < 1 and not stop.is_set():
            mark_cooldown(training, out)
            loss.append(training.train_step())
            if training.step % 50 == 0:
                speed = (training.tokens - tokens) / (time.perf_counter() - started)
                print(f"step {training.step:,}  tokens {training.tokens:,}  loss {np.mean(loss):.4f}  "
                      f"{speed:,.0f} tokens/s  {training.done:.1%}", flush=True)  # fmt: skip
                loss, started, tokens = [], time.perf_counter(), training.tokens
            if validation_due(training) and not stop.is_set():
                keep_best(training, out, tokenizer)
                started = time.perf_counter()
            if training.step % training.config.checkpoint_every == 0:
                training.save(beside(out, "last"))
        training.save(beside(out, "last"))


def mark_cooldown(training: Training, out: Path) -> None:
    """Save the run as `before-cooldown` if the cool-down begins here."""
    if not in_cooldown(training.config, training.done):
        training.before_cooldown = None
    elif training.before_cooldown is None:
        training.save(beside(out, "before-cooldown"))
        training.before_cooldown = training.step


def validation_due(training: Training) -> bool:
    """Return whether the run must validate after this step and has not yet."""
    due = training.step % training.config.eval_every == 0 or training.done >= 1
    return due and training.validated < training.step


def keep_best(training: Training, out: Path, tokenizer: dict[str, str]) -> None:
    """Validate, and write the model if it is the best so far; without validation pieces it is written each time."""
    is_best = True
    if "validation" in training.corpus.splits:
        training.save(beside(out, "last"))  # a validation may take so long that a kill ends it
        value = training.validate()
        print(f"validation after {training.tokens:,} tokens: perplexity {math.exp(value):.4f}", flush=True)
        is_best = value < training.best
        training.best = value if is_best else training.best
    training.validated = training.step
    if is_best:
        reference.save(out, training.average, tokenizer, **training.licence)


def beside(out: Path, name: str) -> Path:
    """Return the path of a state of the run whose model is `out`."""
    return out.with_name(f"{out.name}.{name}")


def start_of(config: TrainConfig, out: Path) -> Path:
    """Return the state to resume from: the last, or that before the cool-down if that now begins later."""
    last, before = beside(out, "last"), beside(out, "before-cooldown")
    p = torch.load(last, weights_only=True, mmap=True)["progress"]
    cools = in_cooldown(config, fraction_done(config, p["step"], p["tokens"], p["seconds"]))
    if cools or config.lr_schedule != "wsd" or p["before_cooldown"] is None or not before.exists():
        return last
    print(f"continues from step {p['before_cooldown']:,}, before the cool-down", flush=True)
    return before


def fraction_done(config: TrainConfig, step: int, tokens: int, seconds: float) -> float:
    """Return the fraction of a run that is over: the largest of its limits' fractions."""
    limits = ((step, config.max_steps), (tokens, config.max_tokens), (seconds / 60, config.max_minutes))
    return max(value / limit for value, limit in limits if limit is not None)


def settings_of(a: argparse.Namespace) -> TrainConfig:
    """The settings from preset, file and options. Exits with a message for unsupported ones."""
    config, default = build_config(a.preset, a.config, a.settings), TrainConfig()
    for name in UNSUPPORTED:
        if getattr(config, name) != getattr(default, name):
            found, expected = getattr(config, name), getattr(default, name)
            raise SystemExit(f"{name} = {found!r}: not supported here, must be {expected!r}")
    return config


def main() -> None:
    """Parse the options and train."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, metavar="CORPUS", help="a corpus made by `dsmr-mlx prepare`")
    p.add_argument("--out", required=True, type=Path, metavar="MODEL.pt")
    p.add_argument("--preset", help="tiny, small or base")
    p.add_argument("--config", metavar="FILE.toml")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--resume", action="store_true", help="continue from MODEL.pt.last, if it exists")
    a = p.parse_args()
    keep_freed_memory()
    corpus = Corpus.load(a.data)
    training = Training(settings_of(a), corpus, a.device)
    last = beside(a.out, "last")
    if a.resume and last.exists():
        training.resume(start_of(training.config, a.out))
        best = torch.load(last, weights_only=True, mmap=True)["progress"]["best"]
        training.best = min(training.best, best)  # of the cooled run, if this continues from before the cool-down
    elif a.out.exists() or last.exists():
        found = "; --resume continues it" if last.exists() else f", and there is no {last.name} to resume"
        raise SystemExit(f"{a.out}: already exists{found}")
    elif training.config.init is not None:
        training.start_from(training.config.init)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    run(training, a.out, tokenizer_files.pack(corpus.path / "tokenizer"))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"train_pytorch: error: {error}")
