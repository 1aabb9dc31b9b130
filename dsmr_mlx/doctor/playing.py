"""Whether playing can be paused and rewound exactly, keeps its memory, and how fast it is."""

import statistics
import time
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from dsmr_mlx.common.formatting import format_bytes
from dsmr_mlx.doctor.allocated import allocated
from dsmr_mlx.doctor.finding import Finding, Status, judged
from dsmr_mlx.doctor.numbers import ADVICE, new_model
from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.generation.options import recommended
from dsmr_mlx.generation.player import Player
from dsmr_mlx.model.checkpoint import load
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer

if TYPE_CHECKING:
    from dsmr_mlx.live.sources import TimedMessage

BEFORE, REWOUND = 150, 40  # tokens: more than a segment, less than one
MAX_GROWTH = 1.15  # of memory, the last tenth against the second
NOISE = 1 << 20  # bytes that may come and go
SLOWER = 0.95  # of the best speed, which the defaults should reach
ANSWER_SECONDS = 0.05  # in which `live` should answer: its head start
TURN_SECONDS = 4.0  # of the model
READ_LENGTH, TIMED = 1024, 100  # tokens


def played(player: Player, n: int) -> list[list[int]]:
    """The next n tokens of each lane."""
    return [step.tolist() for step in islice(player.play(Limits()), n)]


def check_rewind() -> Finding:
    """Rewinding gives the same tokens again, and so does a player that was saved and loaded."""
    model, tokenizer = new_model("tiny"), PerformanceTokenizer()
    player = Player(model, tokenizer, n=2)
    played(player, BEFORE)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "player.safetensors"
        player.save(path)
        expected = played(player, REWOUND)
        loaded = played(Player.load(path, model, tokenizer), REWOUND)
    player.rewind(REWOUND)
    rewound = played(player, REWOUND)
    same = {"rewound": rewound == expected, "loaded": loaded == expected}
    wrong = [name for name, equal in same.items() if not equal]
    text = "the same tokens again" if not wrong else f"a player that was {' and '.join(wrong)} plays other tokens"
    return judged(not wrong, text, same, ADVICE)


def check_memory(length: int) -> Finding:
    """The memory that playing so many tokens takes beside the weights, without and with a token ahead."""
    model, tokenizer = load(None)
    values, grown, more = {}, 0.0, 0
    for ahead in (False, True):
        player = Player(model, tokenizer, ahead=ahead)
        mx.eval(model.parameters(), player.state.arrays)
        before, peaks = allocated(), []  # with the weights and the state
        played(player, length // 10)  # not counted: buffers are allocated
        for _ in range(9):
            allocated()
            played(player, length // 10)
            peaks.append(mx.get_peak_memory() - before + player.nbytes)
        growth = peaks[-1] / max(peaks[0], 1)
        grown, more = max(grown, growth), max(more, peaks[-1] - peaks[0])
        values["ahead" if ahead else "plain"] = {"state": player.nbytes, "peak": peaks[-1], "growth": growth}
    peak = max(value["peak"] for value in values.values())
    change = f"{100 * (grown - 1):+.1f} % from the second to the last tenth"
    text = f"{length:,} tokens: {format_bytes(peak)} at most, {change}"
    return judged(grown <= MAX_GROWTH or more < NOISE, text, values, "memory should not grow: report it")


def tokens_per_second(player: Player, n: int) -> float:
    """The speed of the next n tokens."""
    started = time.perf_counter()
    n = len(played(player, n))
    return n / (time.perf_counter() - started)


def measure_playing(full: bool) -> Finding:
    """The speed of the bundled model as `generate` plays it."""
    model, tokenizer = load(None)
    player = Player(model, tokenizer, **recommended())
    played(player, 1)
    values = {"tokens_per_second": statistics.median(tokens_per_second(player, TIMED) for _ in range(9 if full else 5))}
    seconds = tokenizer.event_grammar().seconds_per_tick * player.ticks[0]
    values["seconds_of_music_per_second"] = values["tokens_per_second"] * seconds / player.position
    text = (
        f"{values['tokens_per_second']:,.0f} tokens a second, {values['seconds_of_music_per_second']:.1f} × real time"
    )
    if values["seconds_of_music_per_second"] < 1:
        return Finding("", Status.NOTE, text, values, "slower than the music: `live` will fall behind")
    return Finding("", Status.OK, text, values)


def measure_reading() -> Finding:
    """The speed at which the bundled model reads a prompt."""
    model, tokenizer = load(None)
    ids = np.random.default_rng(0).integers(3, tokenizer.vocab_size, READ_LENGTH)
    ids = ids[~tokenizer.shown_mask(ids)]
    times = []
    for _ in range(3):
        state, started = model.new_state(1), time.perf_counter()
        logits, state = model(mx.array(ids[None], mx.int32), state)
        mx.eval(logits, state.arrays)
        times.append(len(ids) / (time.perf_counter() - started))
    values = {"tokens_per_second": max(times)}
    return Finding("", Status.OK, f"{max(times):,.0f} tokens a second", values)


def check_answer() -> Finding:
    """A session of `live` in virtual time: the time from the end of a pause to the model's first note."""
    from dsmr_mlx.live.clock import VirtualClock  # needs mido
    from dsmr_mlx.live.options import LiveOptions
    from dsmr_mlx.live.session import Session
    from dsmr_mlx.live.sources import FilePlayer

    model, tokenizer = load(None)
    turns = []
    options = LiveOptions(pause=0.5, max_turn=TURN_SECONDS)
    session = Session(Player(model, tokenizer, **recommended()), VirtualClock(), options=options, on_turn=turns.append)
    session.run([FilePlayer(phrases())])
    notes = sum(turn.notes for turn in turns if turn.voice == "model")
    n, seconds, _, largest = session.statistics.first_computed.spread
    values = {"seconds": seconds, "largest": largest, "answers": n, "notes": notes}
    if not notes:
        return judged(False, f"no note in {len(turns)} turns", values, ADVICE)
    text = f"{1000 * seconds:.0f} ms to compute the first note, median of {n}; at most {1000 * largest:.0f} ms"
    if seconds > ANSWER_SECONDS:
        advice = f"over {1000 * ANSWER_SECONDS:.0f} ms: use a smaller model in `live`"
        return Finding("", Status.NOTE, text, values, advice)
    return Finding("", Status.OK, text, values)


def phrases() -> "list[TimedMessage]":
    """Five phrases of eight keys, with pauses in which the model answers."""
    from mido import Message

    from dsmr_mlx.live.sources import TimedMessage

    return [
        TimedMessage(phrase * (TURN_SECONDS + 2) + key / 8 + later, Message(kind, note=60 + 2 * key, velocity=64))
        for phrase in range(5)
        for key in range(8)
        for kind, later in (("note_on", 0.0), ("note_off", 0.1))
    ]


def compare_options() -> Finding:
    """The speed of playing with and without compilation, a token ahead and steering: are the defaults the best?"""
    model, tokenizer = load(None)
    speeds = {}
    for compile in (False, True):
        for ahead in (False, True):
            for name, steering in (("plain", {}), ("steered", recommended())):
                player = Player(model, tokenizer, compile=compile, ahead=ahead, **steering)
                played(player, 50)
                key = f"{'compiled' if compile else 'eager'}, {'ahead' if ahead else 'in step'}, {name}"
                speeds[key] = statistics.median(tokens_per_second(player, 60) for _ in range(5))
    default = Player(model, tokenizer, **recommended())
    played(default, 50)
    speed = statistics.median(tokens_per_second(default, 60) for _ in range(5))
    best = max(value for name, value in speeds.items() if name.endswith("steered"))
    values = {"default": speed, "tokens_per_second": speeds}
    text = f"the defaults play {speed:,.0f} tokens a second, the best options {best:,.0f}"
    if speed < SLOWER * best:
        name = max((n for n in speeds if n.endswith("steered")), key=speeds.get)
        return Finding("", Status.NOTE, text, values, f"faster here: {name}; please report it")
    return Finding("", Status.OK, text, values)
