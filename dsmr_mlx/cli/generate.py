"""`dsmr-mlx generate`: a model → music."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmr_mlx.cli.common import add_checkpoint, add_command, check_positive, load_checkpoint, name_of
from dsmr_mlx.cli.console import progress
from dsmr_mlx.cli.models import show_licence, show_listening
from dsmr_mlx.cli.show import show_pianoroll
from dsmr_mlx.cli.steering_options import (
    DRAWN,
    STEERED,
    add_sampling,
    add_steering,
    processors_of,
    recommend,
    refuse_beside_state,
    sampling_of,
)
from dsmr_mlx.common.errors import UserError

if TYPE_CHECKING:
    from threading import Event

    import numpy as np

    from dsmr_mlx.generation.grammar import Limits
    from dsmr_mlx.generation.player import Player
from collections.abc import Sequence

from dsmr_mlx.cli.console import out, table
from dsmr_mlx.common.formatting import size

SECONDS = 60.0  # of music, where no length is asked for
PROMPTED = ("prompt", "prompt_start", "prompt_seconds")


def add(commands) -> None:
    p = add_command(
        commands,
        "generate",
        run,
        "dsmr-mlx generate\n"
        '  dsmr-mlx generate --key "A minor" --tempo 0.5 --seconds 30 --out slow.mid\n'
        "  dsmr-mlx generate runs/first --prompt song.mid --prompt-seconds 20 -n 4",
    )
    add_checkpoint(p)
    add_prompt(p)
    length = p.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds",
        type=float,
        help="of new music (default 60, and then a bundled model ends the piece in its own time)",
    )
    length.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="events of new music, instead of seconds; what still sounds is released after them",
    )
    p.add_argument("--may-end", action="store_true", help="let the model end the piece earlier")
    p.add_argument("-n", type=int, metavar="N", help="variations (default 1, or as many as the state has)")
    p.add_argument(
        "--best-of",
        type=int,
        metavar="K",
        help="make K candidates, keep the -n that the model itself finds likeliest, note by note, and that do not "
        "loop; after Ctrl-C of what has been made",
    )
    add_sampling(p)
    p.add_argument(
        "--seed",
        type=int,
        help="same seed, same bytes (default 0, or what the state would play; without --out one more each time)",
    )
    p.add_argument(
        "--out",
        metavar="FILE.mid|DIR",
        help="default NAME-SEED.mid, with -n NAME-SEED/1.mid and so on, where NAME is the prompt's, the state's or the "
        "model's; the files grow while the music is made, and Ctrl-C ends them in good order",
    )
    p.add_argument("--force", action="store_true", help="overwrite files")
    p.add_argument("--show", action="store_true", help="draw what was made as piano rolls, as `dsmr-mlx show` does")
    add_pauses(p)
    add_steering(p)


def add_prompt(p: argparse.ArgumentParser) -> None:
    """The options for the music to go on from."""
    p.add_argument("--prompt", metavar="FILE.mid", help="continue this music")
    p.add_argument("--prompt-start", type=float, metavar="X", help="only its notes from X seconds on")
    p.add_argument("--prompt-seconds", type=float, metavar="X", help="only X seconds of it")
    shown = p.add_mutually_exclusive_group()
    shown.add_argument("--continuation-only", action="store_true", help="leave the prompt out of the output")
    shown.add_argument(
        "--include-prompt", action="store_false", dest="continuation_only", help="begin with the prompt (the default)"
    )
    p.set_defaults(continuation_only=None)


def add_pauses(p: argparse.ArgumentParser) -> None:
    """The options for a piece that is played in parts."""
    p.add_argument(
        "--save-state",
        metavar="FILE.safetensors",
        help="do not end the piece, pause it: keys that sound in the last moment are released in the output alone; of "
        "several variations all go on until the slowest has come so far",
    )
    p.add_argument(
        "--from-state",
        metavar="FILE.safetensors",
        help="go on where the piece was paused, drawn and steered as before, as if it had not been; the output has "
        "what is new",
    )


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx.cli import outputs
    from dsmr_mlx.generation.generate import GenerationReport, make_limits

    seconds = SECONDS if a.seconds is None and a.tokens is None else a.seconds
    named = a.out is not None
    choose_name(a)
    check_options(a)
    recommend(a)
    sampling, processors = sampling_of(a), processors_of(a, seconds)
    model, tokenizer, checkpoint = load_checkpoint(a.checkpoint)
    if tokenizer.no_notes is not None:
        raise UserError(f"{a.checkpoint}: {tokenizer.no_notes}")
    until, may_end = (seconds, a.may_end) if a.end_within is None else (seconds + a.end_within, True)
    limits, report = make_limits(tokenizer, until, a.tokens, may_end), GenerationReport()
    if a.from_state is not None:
        player, prompt = resumed(a, model, tokenizer), None
        limits = replace(limits, since=player.asked)
    else:
        player, prompt = begun(a, model, tokenizer, sampling, processors, limits, report)
    n = player.lanes if a.best_of is None else a.n or 1
    show_licence(checkpoint)
    paths = outputs.output_paths(a.out, n, a.force)
    made_by = outputs.provenance(checkpoint, stored_options(a, player, n) | {"seconds": seconds})
    before = {"moments": player.moments[:n], "recent": player.recent[:n]}
    before["prompt"] = None if a.continuation_only else prompt
    recordings = partial(outputs.Recordings, paths, tokenizer, made_by, **before)
    if a.best_of is not None:
        record_best(a, player, limits, until, report, recordings, n)
    elif a.save_state is not None:
        record_part(a, player, limits, until, report, recordings())
    else:
        record(a, player, limits, until, report, recordings())
    if not named:
        show_listening(paths)


def choose_name(a: argparse.Namespace) -> None:
    """Without --out: files that are not there yet, called by the seed, which is then the first that is free. A saved
    state goes on with its own.
    """
    from dsmr_mlx.cli.outputs import free_name

    if a.out is not None:
        return
    source, checkpoint = a.prompt or a.from_state, Path(name_of(a.checkpoint))
    named = checkpoint if checkpoint.name not in ("", "..") else checkpoint.resolve()
    a.out, number = free_name(Path(source).stem if source else named.name, a.n or 1, a.seed)
    if a.from_state is None:
        a.seed = number


def check_options(a: argparse.Namespace) -> None:
    """Raise `UserError` for options that exclude each other, before anything that takes time."""
    from dsmr_mlx.cli.outputs import output_paths
    from dsmr_mlx.common.files import check_output

    n = 1 if a.n is None else a.n
    if n < 1:
        raise UserError(f"-n {n}: expected at least 1")
    check_positive(a, "seconds", "tokens")
    if a.best_of is not None and a.best_of < n:
        raise UserError(f"--best-of {a.best_of}: expected at least the {n} to keep, -n")
    if a.from_state is not None:
        refuse_beside_state(a, *PROMPTED)
        if a.continuation_only is False:
            raise UserError("--include-prompt: not with --from-state, whose output has what is new")
    else:
        output_paths(a.out, n, a.force)
    if a.save_state is not None:
        for name in ("best_of", "end_within"):
            if getattr(a, name) is not None:
                raise UserError(f"--{name.replace('_', '-')}: not with --save-state, which does not end the piece")
        check_output("--save-state", a.save_state, (".safetensors",), a.force)


def begun(a, model, tokenizer, sampling, processors, limits: "Limits", report) -> "tuple[Player, np.ndarray]":
    """A player that has read the prompt, and the prompt's ids."""
    import time

    from dsmr_mlx.cli import outputs
    from dsmr_mlx.generation.generate import read_prompt
    from dsmr_mlx.generation.player import Player

    prompt = outputs.read_prompt(tokenizer, a.prompt, a.prompt_start, a.prompt_seconds)
    n = a.best_of or (1 if a.n is None else a.n)
    player = Player(model, tokenizer, n=n, sampling=sampling, processors=processors, seed=a.seed or 0)
    started = time.perf_counter()
    with progress("reading the prompt", "events") as update:
        ids = read_prompt(player, prompt, limits, update)
    report.prompt_tokens, report.prefill_seconds = len(ids), time.perf_counter() - started
    return player, ids


def resumed(a: argparse.Namespace, model, tokenizer) -> "Player":
    """The player of a saved state, or branches of it. Raises `UserError` for a number of lanes that it cannot have, and
    where nothing can follow.
    """
    from dsmr_mlx.generation.player import Player

    player = Player.load(a.from_state, model, tokenizer)
    if all(player.ended):
        raise UserError(f"{a.from_state}: the piece has ended there, expected one that can go on")
    if player.logits is None and player.position:
        table = model.config.max_positions
        raise UserError(f"{a.from_state}: the model's {table} learned positions are used up, nothing can follow")
    changed = {"--best-of": a.best_of, "-n": None if a.n == player.lanes else a.n, "--seed": a.seed}
    changed = {option: value for option, value in changed.items() if value is not None}
    if not changed:
        return player
    if player.lanes > 1:
        option, value = next(iter(changed.items()))
        raise UserError(f"{option} {value}: {a.from_state} has {player.lanes} lanes, which go on as they are")
    return player.branch(a.best_of or a.n or 1, a.seed or 0)


def record(a, player: "Player", limits: "Limits", until: float | None, report, recordings) -> None:
    """Play into files until the end; Ctrl-C ends it in good order."""
    from dsmr_mlx.common.signals import stop_requests
    from dsmr_mlx.generation.generate import timed

    with stop_requests() as stop, meter_of(a, until) as meter, recordings:
        for step in timed(player, player.play(limits), report, meter, limits.since):
            recordings.play(step)
            if stop.is_set():
                break
    show_made(a, report, recordings)
    if stop.is_set():
        raise KeyboardInterrupt


def record_part(a, player: "Player", limits: "Limits", until: float | None, report, recordings) -> None:
    """Play into files until the pause, and save the state, which Ctrl-C does earlier.

    Music stops at the end of the token that reaches the moment asked for, and goes on counting from this moment.
    """
    from dsmr_mlx.common.signals import stop_requests
    from dsmr_mlx.generation.generate import timed
    from dsmr_mlx.generation.grammar import NEVER, Limits

    begun, failure = player.ticks if limits.since is None else limits.since, None
    with stop_requests() as stop:
        with meter_of(a, until) as meter, recordings:
            for step in timed(player, player.play(Limits(may_end=a.may_end)), report, meter, limits.since):
                recordings.play(step)
                if stop.is_set() or meter.full:
                    break
        reached = meter.full and limits.ticks < NEVER
        try:
            player.save(a.save_state, [ticks + limits.ticks for ticks in begun] if reached else None)
        except UserError as error:
            failure = error
    show_made(a, report, recordings)
    if failure:
        raise failure
    if stop.is_set():
        raise KeyboardInterrupt


def record_best(
    a, player: "Player", limits: "Limits", until: float | None, report, recordings: Callable, n: int
) -> None:
    """Play candidates, and write the best of them into files; after Ctrl-C the best of what has been made."""
    import numpy as np

    from dsmr_mlx.common.signals import stop_requests
    from dsmr_mlx.generation.generate import timed

    judge, steps = player.branch(1), []
    with stop_requests() as stop, meter_of(a, until) as meter:
        for step in timed(player, player.play(limits), report, meter, limits.since):
            steps.append(step)
            if stop.is_set():
                break
    candidates = np.stack(steps, axis=1)
    with stop_requests() as hurry:
        scores, kept, details = judged(judge, candidates, limits, n, hurry)
        with recordings(details=details) as files:
            for step in candidates[kept].T:
                files.play(step)
    show_scores(scores, dict(zip(kept, (lane.path for lane in files.lanes), strict=True)))
    show_made(a, report, files)
    if stop.is_set() or hurry.is_set():
        raise KeyboardInterrupt


def show_made(a: argparse.Namespace, report, recordings) -> None:
    """The figures, and with --show the music itself."""
    from dsmr_mlx.music.midi import read_notes

    show_generation(report, recordings.lanes)
    for lane in recordings.lanes if a.show else ():
        show_pianoroll(read_notes(lane.path, may_be_empty=True), title=str(lane.path))


@dataclass
class Meter:
    """How far the slowest lane has come of what was asked for, which is shown."""

    show: Callable[[float, float], None]
    tokens: int | None
    seconds: float | None
    full: bool = False

    def __call__(self, tokens: int, seconds: float) -> None:
        done, wanted = (tokens, self.tokens) if self.tokens else (seconds, self.seconds)
        self.full = done >= wanted
        self.show(done, wanted)


@contextmanager
def meter_of(a: argparse.Namespace, until: float | None) -> Iterator[Meter]:

    with progress("playing", "events" if a.tokens else "seconds") as show:
        yield Meter(show, a.tokens, until)


def stored_options(a: argparse.Namespace, player: "Player", n: int) -> dict[str, Any]:
    """What the files say of the options: those that steer as the processors that they stand for."""
    from dsmr_mlx.generation.steering import to_dicts

    unstored = ("run", "out", "force", "show", "checkpoint", "save_state", "no_recommended", *DRAWN, *STEERED)
    only_if_given = ("best_of", "from_state", "prompt_start")
    options = {k: v for k, v in vars(a).items() if k not in unstored and (k not in only_if_given or v is not None)}
    options |= player.sampling.to_dict() | {"n": n, "continuation_only": bool(a.continuation_only)}
    if a.from_state is None:
        options["seed"] = a.seed or 0
    if player.processors:
        options["processors"] = to_dicts(player.processors)
    return options


def judged(
    player: "Player", lanes: "np.ndarray", limits: "Limits", n: int, hurry: "Event"
) -> tuple[list, list[int], list[dict[str, Any]]]:
    """The scores of the candidates `[K, T]`, the numbers of the n best, and what their files are to say of them.

    The player is where the candidates begin. In a `hurry` only n are judged, or those that have been.
    """
    from dsmr_mlx.generation.generate import finish
    from dsmr_mlx.generation.ranking import best, score

    scores = []
    with progress("judging", "candidates") as update:
        for lane in lanes:
            scores.append(score(player, finish(player.walk, lane), limits))
            update(len(scores), len(lanes))
            if hurry.is_set() and len(scores) >= n:
                break
    kept = best(scores, n)
    return scores, kept, [{"candidate": i + 1, "score": scores[i].to_dict()} for i in kept]


def show_generation(report: Any, recordings: Sequence[Any]) -> None:
    files = table("file", "notes", "seconds", "notes/s", "pitches", "tokens")
    for made in recordings:
        notes, seconds = made.notes, made.seconds
        pitches = f"{made.lowest}–{made.highest}" if notes else "–"
        rate = notes / seconds if seconds else 0.0
        files.add_row(str(made.path), f"{notes:,}", f"{seconds:.1f}", f"{rate:.1f}", pitches, f"{made.tokens:,}")
    out.print(files)
    prompt = (
        f"prompt of {report.prompt_tokens:,} tokens in {report.prefill_seconds:.2f} s; "
        if report.prompt_tokens > 1
        else ""
    )
    out.print(
        f"{prompt}{report.tokens:,} tokens in {report.decode_seconds:.2f} s, {report.tokens_per_second:,.0f} tokens/s; "
        f"recurrent state {size(report.state_bytes)}"
    )


def show_scores(scores: Sequence[Any], kept: dict[int, Path]) -> None:
    """Of candidates (`scoring.Score`) what the model thinks of each, and where those that are `kept` went."""
    candidates = table("candidate", "nats/note", "notes", "loop", "file")
    candidates.columns[-1].justify = "left"
    for i, score in enumerate(scores):
        loop = f"{score.loop.copies} × {score.loop.length} events" if score.loop else "–"
        candidates.add_row(
            str(i + 1),
            f"{score.nats_per_note:.3f}",
            f"{score.notes:,}",
            f"{loop}, out" if score.loops else loop,
            str(kept.get(i, "")),
        )
    out.print(candidates)
    out.print()
