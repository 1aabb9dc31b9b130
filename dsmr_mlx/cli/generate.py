"""`dsmr-mlx generate`: make new music with a model."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmr_mlx.cli import fill, steering_options
from dsmr_mlx.cli.common import add_checkpoint, add_command, load_checkpoint
from dsmr_mlx.cli.console import err, progress, show_file
from dsmr_mlx.cli.generation_results import show_generation, show_rolls, show_scores
from dsmr_mlx.cli.models import show_licence, show_listening
from dsmr_mlx.cli.naming import check_numbers, choose_name, stored_options
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.options import PREFIX_OPTIONS, RANKED_SECONDS

if TYPE_CHECKING:
    from threading import Event

    import numpy as np

    from dsmr_mlx.cli.outputs import Recordings
    from dsmr_mlx.generation.generate import GenerationReport
    from dsmr_mlx.generation.grammar import Limits
    from dsmr_mlx.generation.player import Player
    from dsmr_mlx.generation.ranking import Score
    from dsmr_mlx.model.dsmr import DSMR
    from dsmr_mlx.tokenizers.base import Tokenizer

DEFAULT_SECONDS = 60.0  # of music, without --seconds and --tokens
PROMPT_OPTIONS = ("prompt", "prompt_start", "prompt_seconds")


def add(commands) -> None:
    """Add the parser of the command."""
    p = add_command(
        commands,
        "generate",
        run,
        "dsmr-mlx generate",
        'dsmr-mlx generate --key "A minor" --tempo 0.5 --seconds 30 --out slow.mid',
        "dsmr-mlx generate runs/first --prompt song.mid --prompt-seconds 20 -n 4",
        "dsmr-mlx generate runs/first --prompt song.mid --replace 12.5-20 --best-of 8",
    )
    add_checkpoint(p)
    add_prompt(p)
    add_length(p)
    p.add_argument("-n", type=int, metavar="N", help="number of variations (default 1, or the number in the state)")
    p.add_argument(
        "--best-of",
        type=int,
        metavar="K",
        help="make K candidates and keep the -n best: the highest likelihood per note, loops last; Ctrl-C ends all "
        "candidates early and ranks them (default for one piece of at most a minute: what the model recommends)",
    )
    steering_options.add_sampling(p)
    add_output(p)
    fill.add(p)
    add_pauses(p)
    add_labels(p)
    steering_options.add_steering(p)


def add_length(p: argparse.ArgumentParser) -> None:
    """Add the options of the length of the new music."""
    length = p.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds",
        type=float,
        help="length of the new music (default 60, after which a bundled model ends the piece)",
    )
    length.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="length in tokens instead of seconds; keys that are still down are then released",
    )
    p.add_argument("--may-end", action="store_true", help="let the model end the piece earlier")


def add_output(p: argparse.ArgumentParser) -> None:
    """Add the options of the files that are written."""
    p.add_argument(
        "--seed",
        type=int,
        help="random seed; the same seed gives the same bytes (default 0, or the seed of the state; without --out the "
        "first seed from 1 on whose files do not exist)",
    )
    p.add_argument(
        "--out",
        metavar="FILE.mid|DIR",
        help="default NAME-SEED.mid, with -n NAME-SEED/1.mid and so on; NAME is the name of the prompt, the state "
        "or the model; the files grow during generation, except with --best-of, and are complete after Ctrl-C",
    )
    p.add_argument("--force", action="store_true", help="overwrite files")
    p.add_argument("--show", action="store_true", help="show the music as piano rolls, as `dsmr-mlx show` does")


def add_prompt(p: argparse.ArgumentParser) -> None:
    """Add the options of the prompt."""
    p.add_argument("--prompt", metavar="FILE.mid", help="continue this music")
    p.add_argument(
        "--prompt-start", type=float, metavar="X", help="only notes of the prompt that start at X seconds or later"
    )
    p.add_argument("--prompt-seconds", type=float, metavar="X", help="only X seconds of the prompt")
    output = p.add_mutually_exclusive_group()
    output.add_argument("--continuation-only", action="store_true", help="leave the prompt out of the output")
    output.add_argument(
        "--include-prompt", action="store_false", dest="continuation_only", help="begin with the prompt (the default)"
    )
    p.set_defaults(continuation_only=None)


def add_labels(p: argparse.ArgumentParser) -> None:
    """Add the options that say what the music is, for vocabularies with such labels."""
    labels = p.add_argument_group("labels", "labels of the music for the model, if its vocabulary has them")
    labels.add_argument("--composer", metavar="NAME", help="chopin, bach, debussy and others")
    labels.add_argument("--form", metavar="NAME", help="sonata, nocturne, waltz and others")
    labels.add_argument("--genre", metavar="NAME", help="jazz or classical")


def add_pauses(p: argparse.ArgumentParser) -> None:
    """Add the options that pause a piece and resume it."""
    p.add_argument(
        "--save-state",
        metavar="FILE.safetensors",
        help="pause the piece instead of ending it; keys that are down are released in the MIDI file only; all "
        "variations go on until the slowest has reached the length",
    )
    p.add_argument(
        "--from-state",
        metavar="FILE.safetensors",
        help="resume a paused piece with its sampling and steering options; the output is the new music only",
    )


def run(a: argparse.Namespace) -> None:
    """Make music and write it into MIDI files."""
    from dsmr_mlx.cli import outputs
    from dsmr_mlx.generation.generate import GenerationReport, make_limits

    if fill.is_wanted(a):
        fill.run(a)
        return
    seconds = DEFAULT_SECONDS if a.seconds is None and a.tokens is None else a.seconds
    out_given = a.out is not None
    if a.from_state is None:
        choose_name(a, a.n or 1)
    check_options(a)
    whole = a.n is None and a.save_state is None
    steering_options.fill_recommended(a, whole and seconds is not None and seconds <= RANKED_SECONDS)
    playing = steering_options.playing_options(a, seconds)
    model, tokenizer, checkpoint = load_checkpoint(a.checkpoint)
    if not tokenizer.decodes:
        raise UserError(f"{a.checkpoint}: {tokenizer.why_not}")
    tokenizer = tokenizer.with_prefixes(**{name: getattr(a, name) for name in PREFIX_OPTIONS})
    until, may_end = (seconds, a.may_end) if a.end_within is None else (seconds + a.end_within, True)
    limits, report = make_limits(tokenizer, until, a.tokens, may_end), GenerationReport()
    if a.from_state is not None:
        player, prompt = resumed_player(a, model, tokenizer), None
        limits = replace(limits, since=player.pause_ticks)
    else:
        player, prompt = new_player(a, model, tokenizer, playing, limits, report)
    n = player.lanes if a.best_of is None else a.n or 1
    show_licence(checkpoint)
    choose_name(a, n)
    paths = outputs.output_paths(a.out, n, a.force)
    made_by = outputs.provenance(
        checkpoint, stored_options(a, player.sampling, player.processors, n) | {"seconds": seconds}
    )
    before = {"moments": player.moments[:n], "recent": player.recent[:n]}
    before["prompt"] = None if a.continuation_only else prompt
    recordings = partial(outputs.Recordings, paths, tokenizer, made_by, **before)
    generation = Generation(a, player, limits, until, report)
    ended = player.ended if a.best_of is None else [False] * n
    if a.best_of is not None:
        record_best(generation, recordings, n)
    else:
        record(generation, recordings(ended=ended))
    if not out_given and not all(ended):
        show_listening([path for path, over in zip(paths, ended, strict=True) if not over])


def check_options(a: argparse.Namespace) -> None:
    """Raise `UserError` for invalid options and combinations, before anything that takes time."""
    from dsmr_mlx.cli.outputs import output_paths
    from dsmr_mlx.common.files import check_output

    n = check_numbers(a)
    if a.from_state is not None:
        steering_options.refuse_with_state(a, *PROMPT_OPTIONS, *PREFIX_OPTIONS)
        if a.continuation_only is False:
            raise UserError("--include-prompt: not with --from-state, whose output is the new music only")
    else:
        output_paths(a.out, n, a.force)
    if a.save_state is not None:
        for name in ("best_of", "end_within"):
            if getattr(a, name) is not None:
                raise UserError(f"`{name}`: not with --save-state, which does not end the piece")
        check_output("--save-state", a.save_state, (".safetensors",), a.force)


def new_player(
    a: argparse.Namespace,
    model: "DSMR",
    tokenizer: "Tokenizer",
    playing: dict[str, Any],
    limits: "Limits",
    report: "GenerationReport",
) -> "tuple[Player, np.ndarray]":
    """Return a player that has read the prompt, and the ids of the prompt `(T,)`."""
    import time

    from dsmr_mlx.cli.outputs import encode_prompt
    from dsmr_mlx.generation.generate import prefill
    from dsmr_mlx.generation.player import Player

    prompt = encode_prompt(tokenizer, a.prompt, a.prompt_start, a.prompt_seconds)
    n = a.best_of or (1 if a.n is None else a.n)
    player = Player(model, tokenizer, n=n, **playing, seed=a.seed or 0)
    started = time.perf_counter()
    with progress("reading the prompt", "tokens") as update:
        ids = prefill(player, prompt, limits, update)
    report.prompt_tokens, report.prefill_seconds = len(ids), time.perf_counter() - started
    return player, ids


def resumed_player(a: argparse.Namespace, model: "DSMR", tokenizer: "Tokenizer") -> "Player":
    """Return the player of a saved state, or branches of it.

    Raises `UserError` if no token can follow the state, and for -n, --best-of and --seed with a state of several lanes.
    """
    from dsmr_mlx.generation.player import Player

    player = Player.load(a.from_state, model, tokenizer)
    if all(player.ended):
        raise UserError(f"{a.from_state}: the piece has ended and cannot be resumed")
    if over := [f"{i}" for i, ended in enumerate(player.ended, start=1) if ended]:
        err.print(f"note: {a.from_state}: of {player.lanes} variations {', '.join(over)} ended; the others continue")
    if player.logits is None and player.position:
        table = model.config.max_positions
        raise UserError(f"{a.from_state}: the model's {table} learned positions are used up, no token can follow")
    given = {"best_of": a.best_of, "n": None if a.n == player.lanes else a.n, "seed": a.seed}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return player
    if player.lanes > 1:
        name, value = next(iter(given.items()))
        raise UserError(
            f"`{name}` {value}: {a.from_state} has {player.lanes} lanes, which can only be resumed as saved"
        )
    return player.branch(a.best_of or a.n or 1, a.seed or 0)


@dataclass(frozen=True)
class Generation:
    """A player that is ready to play, and the length to play: --tokens, or `until` seconds of new music."""

    options: argparse.Namespace
    player: "Player"
    limits: "Limits"
    until: float | None
    report: "GenerationReport"

    def play(self, write: Callable[["np.ndarray"], None], stop: "Event") -> bool:
        """Play until the limits, the pause for --save-state, or `stop`. Return whether the length was reached.

        `write` gets the tokens of each step `(B,)`. A piece to be paused is played without limits and stops with the
        token that reaches the length.
        """
        from dsmr_mlx.generation.generate import timed
        from dsmr_mlx.generation.grammar import Limits

        a, reached = self.options, False
        length, unit = (a.tokens, "tokens") if a.tokens else (self.until - (a.end_within or 0), "seconds")
        with progress("playing", unit) as show:

            def update(tokens: int, seconds: float) -> None:
                nonlocal reached
                done = tokens if a.tokens else seconds
                reached = done >= length
                show(min(done, length), length)

            pausing = a.save_state is not None
            steps = self.player.play(Limits(may_end=a.may_end) if pausing else self.limits)
            for count, step in enumerate(timed(self.player, steps, self.report, update, self.limits.since), 1):
                write(step)
                if stop.is_set() or (pausing and (reached or count >= self.limits.tokens)):
                    break
        return reached


def record(generation: Generation, recordings: "Recordings") -> None:
    """Play into files, and save the state with --save-state. After Ctrl-C the files and the state are complete, too.

    The saved pause time is the requested one, not the end of the last token; the resumed piece continues from there.
    """
    from dsmr_mlx.common.signals import stop_requests
    from dsmr_mlx.tokenizers.token_tables import NEVER

    a, player, limits = generation.options, generation.player, generation.limits
    begin, failure = player.ticks if limits.since is None else limits.since, None
    with stop_requests() as stop:
        with recordings:
            reached = generation.play(recordings.play, stop)
        if a.save_state is not None:
            pause = [ticks + limits.ticks for ticks in begin] if reached and limits.ticks < NEVER else None
            try:
                player.save(a.save_state, pause)
            except UserError as error:
                failure = error
    show_generation(generation.report, recordings.written)
    show_rolls(a, [lane.path for lane in recordings.written])
    if failure:
        raise failure
    if a.save_state is not None:
        show_file(Path(a.save_state))
    if stop.is_set():
        raise KeyboardInterrupt


def record_best(generation: Generation, recordings: Callable[..., "Recordings"], n: int) -> None:
    """Play the candidates and write the n best into files; after Ctrl-C, the best of the candidates so far."""
    import numpy as np

    from dsmr_mlx.common.signals import stop_requests

    scorer, steps = generation.player.branch(1), []
    with stop_requests() as stop:
        generation.play(steps.append, stop)
    candidates = np.stack(steps, axis=1)
    with stop_requests() as stop_scoring:
        scores, kept, details = score_candidates(scorer, candidates, generation.limits, n, stop_scoring)
        with recordings(details=details) as files:
            for step in candidates[kept].T:
                files.play(step)
    show_scores(scores, dict(zip(kept, (lane.path for lane in files.lanes), strict=True)))
    show_generation(generation.report, files.lanes)
    show_rolls(generation.options, [lane.path for lane in files.lanes])
    if stop.is_set() or stop_scoring.is_set():
        raise KeyboardInterrupt


def score_candidates(
    player: "Player", candidates: "np.ndarray", limits: "Limits", n: int, stop: "Event"
) -> "tuple[list[Score], list[int], list[dict[str, Any]]]":
    """Return the scores of the candidates `(K, T)`, the indices of the n best, and what to store in their files.

    The player is at the start of the candidates. When `stop` is set, scoring ends as soon as n have been scored.
    """
    from dsmr_mlx.generation.generate import finish
    from dsmr_mlx.generation.ranking import best, score

    scores = []
    with progress("scoring", "candidates") as update:
        for candidate in candidates:
            scores.append(score(player, finish(player.walk, candidate), limits))
            update(len(scores), len(candidates))
            if stop.is_set() and len(scores) >= n:
                break
    kept = best(scores, n)
    return scores, kept, [{"candidate": i + 1, "score": scores[i].to_dict()} for i in kept]
