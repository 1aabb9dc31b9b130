"""For the tests of `dsmr_mlx.live`: a player that draws at random what its grammar allows, and a clock that can be held
up; sessions of scripted humans in virtual time.
"""

import math
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from mido import Message
from support.performance_reference import first_violation
from support.reference_grammar import tokens_that_may_follow

from dsmr_mlx.generation.grammar import Limits
from dsmr_mlx.live.clock import VirtualClock
from dsmr_mlx.live.instrument import Voice
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.live.session import Session
from dsmr_mlx.live.sources import FilePlayer, TimedMessage
from dsmr_mlx.tokenizers.event_grammar import Moment
from dsmr_mlx.tokenizers.performance import BOS, EOS, PerformanceTokenizer, performance_grammar
from dsmr_mlx.tokenizers.subwords import SubwordTokenizer, learn_subwords
from dsmr_mlx.tokenizers.token_tables import TokenTables, token_tables

TABLES = performance_grammar()


class SlowClock(VirtualClock):
    """Virtual time that also passes while somebody computes."""

    def compute(self, seconds: float) -> None:
        end = self._now + seconds
        while self.step(end):
            pass
        self._now = max(self._now, end)


class Lane:
    """What the grammar knows of a stream of events, of so many tokens."""

    def __init__(self) -> None:
        self.state, self.velocity, self.ticks, self.tokens = TABLES.start, -1, 0, 0
        self.keys: set[int] = set()

    def add(self, token: int) -> None:
        self.state = int(TABLES.next_state[token]) if token != BOS else TABLES.start
        self.ticks += int(TABLES.ticks[token])
        if TABLES.velocity[token] >= 0:
            self.velocity = int(TABLES.velocity[token])
        if TABLES.press[token] >= 0:
            self.keys.add(int(TABLES.press[token]))
        self.keys.discard(int(TABLES.release[token]))

    def allowed(self) -> list[int]:
        may = TABLES.allowed[self.state] & ((TABLES.velocity < 0) | (TABLES.velocity != self.velocity))
        down = np.isin(np.arange(128), list(self.keys))
        may &= (TABLES.press < 0) | ~down[TABLES.press]
        may &= (TABLES.release < 0) | down[TABLES.release]
        return [token for token in np.flatnonzero(may).tolist() if token != EOS]


class RandomPlayer:
    """The interface of `Player`, and no model: checks what it is told, and remembers everything.

    It plays `pitches`, pauses of at most so many ticks, and seldom a second; of other keys it releases none.
    """

    def __init__(self, seed: int = 0, segment_length: int = 64, pauses: int = 12, pitches: Sequence[int] = range(128)):
        self.tokenizer = PerformanceTokenizer()
        self.model = SimpleNamespace(config=SimpleNamespace(segment_length=segment_length))
        self.random, self.pauses, self.pitches = random.Random(seed), pauses, set(pitches)
        self.compute: Callable[[], None] = lambda: None
        self.ids: list[int] = []
        self.farthest = 0
        self._lane = Lane()

    position = property(lambda self: len(self.ids))
    held = property(lambda self: [sorted(self.lane.keys)])

    @property
    def lane(self) -> Lane:
        if self._lane.tokens > len(self.ids):
            self._lane = Lane()
        for event in self.events_of(self.ids[self._lane.tokens :]):
            self._lane.add(event)
        self._lane.tokens = len(self.ids)
        return self._lane

    def events_of(self, ids: list[int]) -> list[int]:
        """The events that ids stand for, BOS among them."""
        return ids

    @property
    def moments(self) -> list[Moment]:
        lane = self.lane
        sounding = np.isin(np.arange(128), list(lane.keys))
        return [Moment(lane.state, sounding, lane.velocity, -1, lane.ticks, lane.ticks)]

    @property
    def rewindable(self) -> int:
        earliest = max(self.farthest - self.model.config.segment_length, 0)
        return len(self.ids) - earliest

    def read(self, ids: np.ndarray) -> None:
        self.ids += [] if self.ids else [BOS]
        self.ids += np.asarray(ids).tolist()
        self.farthest = max(self.farthest, len(self.ids))
        self.check()

    def check(self) -> None:
        violation = first_violation(self.events_of(self.ids), complete=False)
        assert violation is None, violation

    def play(self, limits: Limits | None = None) -> Iterator[np.ndarray]:
        begun = self.lane.ticks
        while True:
            self.compute()
            lane = self.lane
            over = limits is not None and lane.ticks - begun >= limits.ticks
            self.ids.append(self.ending(lane) if over else self.draw(lane))
            self.farthest = max(self.farthest, len(self.ids))
            yield np.array([self.ids[-1]])
            if self.ids[-1] == EOS:
                return

    def kinds(self, lane: Lane) -> dict[str, list[int]]:
        """What may come, by kind."""
        kinds: dict[str, list[int]] = {"press": [], "release": [], "wait": [], "velocity": []}
        for token in lane.allowed():
            if TABLES.press[token] in self.pitches:
                kinds["press"].append(token)
            elif TABLES.release[token] in self.pitches:
                kinds["release"].append(token)
            elif 0 < TABLES.ticks[token] <= self.pauses or TABLES.ticks[token] == 100:
                kinds["wait"].append(token)
            elif TABLES.velocity[token] >= 0 and self.pitches - lane.keys:
                kinds["velocity"].append(token)
        return {kind: tokens for kind, tokens in kinds.items() if tokens}

    def ending(self, lane: Lane) -> int:
        """All keys up, then the end."""
        if not lane.keys & self.pitches:
            return EOS
        kinds = self.kinds(lane)
        return next(kinds[kind][0] for kind in ("release", "wait", "press") if kind in kinds)

    def draw(self, lane: Lane) -> int:
        """Each kind is as likely as the others."""
        kinds = self.kinds(lane)
        if not kinds:  # after a pause with all keys down that are not its own
            return lane.allowed()[0]
        if len(kinds.get("wait", ())) > 1 and self.random.random() < 0.97:
            kinds["wait"].pop()
        return self.random.choice(kinds[self.random.choice(sorted(kinds))])

    def rewind(self, k: int) -> None:
        assert 0 <= k <= self.rewindable, (k, self.rewindable)
        self.ids, self._lane = self.ids[: len(self.ids) - k], Lane()


@cache
def pieces() -> tuple[SubwordTokenizer, TokenTables]:
    """Pieces of the events that a `RandomPlayer` plays on six keys."""
    music = []
    for seed in range(8):
        player = RandomPlayer(seed, pitches=range(58, 64))
        player.read(np.array([], int))
        music.append(np.array([int(ids[0]) for ids in islice(player.play(), 500)]))
    tokenizer = learn_subwords(PerformanceTokenizer(), music, "bpe", 800)
    return tokenizer, token_tables(tokenizer)


class PiecePlayer(RandomPlayer):
    """The same in pieces of several events; where it may, it takes one of those that has many."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.tokenizer, self.tables = pieces()
        self.single = {piece[0]: i for i, piece in enumerate(self.tokenizer.token_events) if len(piece) == 1}
        t, mine = self.tables, np.isin(np.arange(128), list(self.pitches))
        self.long = ~(t.strikes | t.sounding)[:, ~mine].any(axis=1) & ((t.events >= 0).sum(axis=1) > 1)

    def events_of(self, ids: list[int]) -> list[int]:
        return self.tokenizer.to_events(ids).tolist()

    def ending(self, lane: Lane) -> int:
        return self.single[super().ending(lane)]

    def draw(self, lane: Lane) -> int:
        may = np.flatnonzero(tokens_that_may_follow(self.tables, self.moments[0]) & self.long)
        if len(may) and self.random.random() < 0.8:
            return int(self.random.choice(may.tolist()))
        return self.single[super().draw(lane)]


class Wire:
    """An output that writes down what is sent, and when."""

    name = "wire"

    clock: VirtualClock
    broken = False

    def __init__(self) -> None:
        self.sent: list[tuple[float, Message]] = []

    def send(self, message: Message) -> None:
        self.sent.append((self.clock.now(), message))


def check_keys(messages: Sequence[Message]) -> None:
    """Every key goes down when it is up, goes up when it is down, and is up in the end."""
    down: set[tuple[int, int]] = set()
    for message in messages:
        if message.type not in ("note_on", "note_off"):
            continue
        key = message.channel, message.note
        if sounding(message):
            assert key not in down, f"{message} strikes a key that is down"
            down.add(key)
        else:
            assert key in down, f"{message} releases a key that is up"
            down.remove(key)
    assert not down, f"left down: {down}"


def on(pitch: int, velocity: int = 64, channel: int = 0) -> Message:
    return Message("note_on", note=pitch, velocity=velocity, channel=channel)


def off(pitch: int, channel: int = 0) -> Message:
    return Message("note_off", note=pitch, channel=channel)


def control(number: int, value: int, channel: int = 0) -> Message:
    return Message("control_change", control=number, value=value, channel=channel)


class Log:
    """The interface of `Recorder`, in memory."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.kept: list[tuple[Voice, float, Message]] = []

    def add(self, voice: Voice, time: float, message: Message) -> None:
        self.kept.append((voice, time, message))

    def due(self) -> float:
        return math.inf

    def act(self, now: float) -> None: ...

    def close(self) -> None: ...

    def of(self, *voices: Voice) -> list[tuple[float, int, int]]:
        """(time, pitch, velocity) of one of the two, or of both; 0: released."""
        return [(time, m.note, sounding(m)) for v, time, m in self.kept if v in voices and m.type.startswith("note")]


def sounding(message: Message) -> int:
    return message.velocity if message.type == "note_on" else 0


class Performance:
    """A session in virtual time, over: what was sent and recorded, the turns, and what the player has heard.

    script: what the human sends, and when; calls: methods of the session that are called, and when. Every token takes
    the model `seconds`.
    """

    def __init__(
        self,
        script: Sequence[tuple[float, Message]],
        player: RandomPlayer | None = None,
        *,
        seconds: float = 0.0,
        calls: Sequence[tuple[float, str]] = (),
        fails: bool = False,
        wire: Wire | None = None,
        **options,
    ):
        self.clock = SlowClock()
        self.player = player or RandomPlayer()
        if seconds:
            self.player.compute = lambda: self.clock.compute(seconds)
        self.wire, self.log, self.turns = wire or Wire(), Log(), []
        self.wire.clock = self.clock
        options = LiveOptions(**{"max_turn": 2.0} | options)
        self.session = Session(self.player, self.clock, self.wire, options, self.log, self.turns.append)
        self.statistics = self.session.statistics
        human = FilePlayer([TimedMessage(time, message) for time, message in script])
        sources = [human, *(Caller(*call) for call in calls)]
        if fails:
            with pytest.raises(Exception) as found:  # noqa: PT011, the caller looks at it
                self.session.run(sources)
            self.error = found.value
        else:
            self.reason = self.session.run(sources)
        if not self.wire.broken:
            check_keys([message for _, message in self.wire.sent])
        check_keys([message for voice, _, message in self.log.kept if voice is Voice.MODEL])

    @property
    def model(self) -> list[tuple[float, int, int]]:
        """What the model played: (time, pitch, velocity); 0: released."""
        return self.log.of(Voice.MODEL)

    @property
    def how(self) -> list[str]:
        """Why each turn ended."""
        return [turn.reason for turn in self.turns]

    def stream(self) -> list[tuple[float, int, int]]:
        """What the player has heard, once settled: as `model`, times counted from the first key of all."""
        self.session.settle()
        self.player.check()
        assert not self.player.lane.keys
        ticks, velocity, found = 0, -1, []
        for token in self.player.events_of(self.player.ids)[1:]:
            ticks += int(TABLES.ticks[token])
            velocity = int(TABLES.velocity[token]) if TABLES.velocity[token] >= 0 else velocity
            if TABLES.press[token] >= 0:
                found.append((ticks / 100, int(TABLES.press[token]), 4 * velocity + 2))
            elif TABLES.release[token] >= 0:
                found.append((ticks / 100, int(TABLES.release[token]), 0))
        return found


class Caller:
    """Calls a method of the session at a time."""

    def __init__(self, time: float, method: str, *arguments):
        self.time, self.method, self.arguments = time, method, arguments
        self.is_input = method == "stop"  # until then nobody else ends the session
        self.changed = threading.Condition()

    def start(self, session: Session) -> None:
        self.session = session
        session.clock.schedule(self)

    def due(self) -> float:
        return self.time

    def act(self, now: float) -> None:
        self.time = math.inf
        getattr(self.session, self.method)(*self.arguments)


PHRASE = [(0.0, on(60)), (0.3, off(60)), (0.5, on(64, 100)), (0.9, off(64))]
