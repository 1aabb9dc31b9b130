"""Stand-ins for the tests of `dsmr_mlx.live`: random players, an output, a recorder, a clock that runs while a model
computes, and whole sessions with a scripted human in virtual time.
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
from dsmr_mlx.live.ports import PortLost
from dsmr_mlx.live.session import Session
from dsmr_mlx.live.sources import FilePlayer, TimedMessage
from dsmr_mlx.tokenizers.event_grammar import Moment
from dsmr_mlx.tokenizers.performance import BOS, EOS, PerformanceTokenizer, performance_grammar
from dsmr_mlx.tokenizers.subwords import SubwordTokenizer, learn_subwords
from dsmr_mlx.tokenizers.token_tables import TokenTables, token_tables

TABLES = performance_grammar()


class SlowClock(VirtualClock):
    """A virtual clock that can also run while a model computes."""

    def compute(self, seconds: float) -> None:
        """Let some time pass, with everything that is due in it."""
        end = self._now + seconds
        while self.step(end):
            pass
        self._now = max(self._now, end)


class Lane:
    """Grammar state of a stream of events. tokens: the number of ids read into it."""

    def __init__(self) -> None:
        self.state, self.velocity, self.ticks, self.tokens = TABLES.start, -1, 0, 0
        self.keys: set[int] = set()

    def add(self, token: int) -> None:
        """Read an event."""
        self.state = int(TABLES.next_state[self.state, token]) if token != BOS else TABLES.start
        self.ticks += int(TABLES.ticks[token])
        if TABLES.velocity[token] >= 0:
            self.velocity = int(TABLES.velocity[token])
        if TABLES.press[token] >= 0:
            self.keys.add(int(TABLES.press[token]))
        self.keys.discard(int(TABLES.release[token]))

    def allowed(self) -> np.ndarray:
        """Return which events may follow, without EOS."""
        may = TABLES.allowed[self.state] & ((TABLES.velocity < 0) | (TABLES.velocity != self.velocity))
        down = np.isin(np.arange(128), list(self.keys))
        may &= (TABLES.press < 0) | ~down[TABLES.press]
        may &= (TABLES.release < 0) | down[TABLES.release]
        may[EOS] = False
        return may


class RandomPlayer:
    """The interface of `Player` without a model. It checks and keeps all ids.

    It draws events that the grammar allows: presses and releases of `pitches`, waits of at most `pauses` ticks, and
    rarely of a second.
    """

    def __init__(self, seed: int = 0, segment_length: int = 64, pauses: int = 12, pitches: Sequence[int] = range(128)):
        self.tokenizer = PerformanceTokenizer()
        self.model = SimpleNamespace(config=SimpleNamespace(segment_length=segment_length))
        self.random, self.pitches = random.Random(seed), set(pitches)
        self.of_kind = {
            "press": np.isin(TABLES.press, list(pitches)),
            "release": np.isin(TABLES.release, list(pitches)),
            "wait": (TABLES.ticks > 0) & (TABLES.ticks <= pauses) | (TABLES.ticks == 100),
            "velocity": TABLES.velocity >= 0,
        }
        self.compute: Callable[[], None] = lambda: None
        self.ids: list[int] = []
        self.farthest = 0
        self._lane = Lane()

    position = property(lambda self: len(self.ids))
    held = property(lambda self: [sorted(self.lane.keys)])

    @property
    def lane(self) -> Lane:
        """The state after all ids."""
        if self._lane.tokens > len(self.ids):
            self._lane = Lane()
        for event in self.events_of(self.ids[self._lane.tokens :]):
            self._lane.add(event)
        self._lane.tokens = len(self.ids)
        return self._lane

    def events_of(self, ids: list[int]) -> list[int]:
        """Return the events of ids, BOS included."""
        return ids

    @property
    def moments(self) -> list[Moment]:
        """See `Player.moments`."""
        lane = self.lane
        sounding = np.isin(np.arange(128), list(lane.keys))
        return [Moment(lane.state, sounding, lane.velocity, -1, lane.ticks, lane.ticks)]

    @property
    def rewindable(self) -> int:
        """See `Player.rewindable`."""
        earliest = max(self.farthest - self.model.config.segment_length, 0)
        return len(self.ids) - earliest

    def warm_up(self) -> None:
        """See `Player.warm_up`: read, play and rewind."""
        if not self.position:
            self.read(np.empty(0, np.int64))
        before, steps = self.position, self.play()
        for _ in zip(range(4), steps, strict=False):
            pass
        steps.close()
        self.rewind(self.position - before)

    def read(self, ids: np.ndarray) -> None:
        """See `Player.read`."""
        self.ids += [] if self.ids else [BOS]
        self.ids += np.asarray(ids).tolist()
        self.farthest = max(self.farthest, len(self.ids))
        self.check()

    def check(self) -> None:
        """Assert that the ids are a valid stream."""
        violation = first_violation(self.events_of(self.ids), complete=False)
        assert violation is None, violation

    def play(self, limits: Limits | None = None) -> Iterator[np.ndarray]:
        """See `Player.play`."""
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
        """Return the events that may follow, by kind."""
        allowed = lane.allowed()
        kinds = {kind: np.flatnonzero(allowed & tokens).tolist() for kind, tokens in self.of_kind.items()}
        if not self.pitches - lane.keys:
            kinds["velocity"] = []
        return {kind: tokens for kind, tokens in kinds.items() if tokens}

    def ending(self, lane: Lane) -> int:
        """Return the next id of an ending: all keys up, then EOS."""
        if not lane.keys & self.pitches:
            return EOS
        kinds = self.kinds(lane)
        return next(kinds[kind][0] for kind in ("release", "wait", "press") if kind in kinds)

    def draw(self, lane: Lane) -> int:
        """Draw an id; each kind is equally likely."""
        kinds = self.kinds(lane)
        if not kinds:  # after a wait with only keys of others down
            return int(np.flatnonzero(lane.allowed())[0])
        if len(kinds.get("wait", ())) > 1 and self.random.random() < 0.97:
            kinds["wait"].pop()
        return self.random.choice(kinds[self.random.choice(sorted(kinds))])

    def rewind(self, k: int) -> None:
        """See `Player.rewind`."""
        assert 0 <= k <= self.rewindable, (k, self.rewindable)
        self.ids, self._lane = self.ids[: len(self.ids) - k], Lane()


@cache
def subwords() -> tuple[SubwordTokenizer, TokenTables]:
    """Return a subword tokenizer learned from what `RandomPlayer`s play on six keys, and its tables."""
    music = []
    for seed in range(8):
        player = RandomPlayer(seed, pitches=range(58, 64))
        player.read(np.array([], int))
        music.append(np.array([int(ids[0]) for ids in islice(player.play(), 500)]))
    tokenizer = learn_subwords(PerformanceTokenizer(), music, "bpe", 800)
    return tokenizer, token_tables(tokenizer)


class SubwordPlayer(RandomPlayer):
    """A `RandomPlayer` with a subword vocabulary that prefers tokens of several events."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.tokenizer, self.tables = subwords()
        self.single = {events[0]: i for i, events in enumerate(self.tokenizer.token_events) if len(events) == 1}
        t, mine = self.tables, np.isin(np.arange(128), list(self.pitches))
        self.long = ~(t.presses | t.sounding)[:, ~mine].any(axis=1) & ((t.events >= 0).sum(axis=1) > 1)

    def events_of(self, ids: list[int]) -> list[int]:
        """See `RandomPlayer`."""
        return self.tokenizer.to_events(ids).tolist()

    def ending(self, lane: Lane) -> int:
        """See `RandomPlayer`."""
        return self.single[super().ending(lane)]

    def draw(self, lane: Lane) -> int:
        """See `RandomPlayer`."""
        may = np.flatnonzero(tokens_that_may_follow(self.tables, self.moments[0]) & self.long)
        if len(may) and self.random.random() < 0.8:
            return int(self.random.choice(may.tolist()))
        return self.single[super().draw(lane)]


class Wire:
    """An output that logs what is sent and when. broken: whether keys may be left down, because sending fails."""

    name = "wire"
    clock: VirtualClock
    broken = False

    def __init__(self) -> None:
        self.sent: list[tuple[float, Message]] = []

    def send(self, message: Message) -> None:
        """See `session.Output`."""
        self.sent.append((self.clock.now(), message))


class FailingWire(Wire):
    """An output that fails for some messages, counted from 0."""

    broken = True

    def __init__(self, fails: range):
        super().__init__()
        self.fails, self.number = fails, -1

    def send(self, message: Message) -> None:
        """See `session.Output`."""
        self.number += 1
        if self.number in self.fails:
            raise PortLost("wire: broken")
        super().send(message)


def check_keys(messages: Sequence[Message]) -> None:
    """Assert that keys are pressed only when up, released only when down, and all up at the end."""
    down: set[tuple[int, int]] = set()
    for message in messages:
        if message.type not in ("note_on", "note_off"):
            continue
        key = message.channel, message.note
        if sounding(message):
            assert key not in down, f"{message} presses a key that is down"
            down.add(key)
        else:
            assert key in down, f"{message} releases a key that is up"
            down.remove(key)
    assert not down, f"left down: {down}"


def on(pitch: int, velocity: int = 64, channel: int = 0) -> Message:
    """Return a note-on."""
    return Message("note_on", note=pitch, velocity=velocity, channel=channel)


def off(pitch: int, channel: int = 0) -> Message:
    """Return a note-off."""
    return Message("note_off", note=pitch, channel=channel)


def control(number: int, value: int, channel: int = 0) -> Message:
    """Return a control change."""
    return Message("control_change", control=number, value=value, channel=channel)


class Log:
    """The interface of `Recorder`, in memory."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.kept: list[tuple[Voice, float, Message]] = []

    def add(self, voice: Voice, time: float, message: Message) -> None:
        """See `Recorder.add`."""
        self.kept.append((voice, time, message))

    def due(self) -> float:
        """See `clock.TimedTask`."""
        return math.inf

    def act(self, now: float) -> None:
        """See `clock.TimedTask`."""

    def close(self, now: float | None = None) -> None:
        """See `Recorder.close`."""

    def of(self, *voices: Voice) -> list[tuple[float, int, int]]:
        """Return (time, pitch, velocity) of one voice or both; velocity 0 is a release."""
        return [(time, m.note, sounding(m)) for v, time, m in self.kept if v in voices and m.type.startswith("note")]


def sounding(message: Message) -> int:
    """Return the velocity of a note-on, else 0."""
    return message.velocity if message.type == "note_on" else 0


class Performance:
    """Runs a session in virtual time: what was sent and recorded, the turns, and what the player has read.

    script: the human's messages and their times; calls: methods of the session to call and their times. seconds: the
    model's computing time per token. fails: the session raises, see `error`.
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
        devices: Sequence = (),
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
        sources = [human, *(Caller(*call) for call in calls), *devices]
        if fails:
            with pytest.raises(Exception) as found:  # noqa: PT011, the caller checks it
                self.session.run(sources)
            self.error = found.value
        else:
            self.reason = self.session.run(sources)
        if not self.wire.broken:
            check_keys([message for _, message in self.wire.sent])
        check_keys([message for voice, _, message in self.log.kept if voice is Voice.MODEL])

    @property
    def model(self) -> list[tuple[float, int, int]]:
        """The model's notes, see `Log.of`."""
        return self.log.of(Voice.MODEL)

    @property
    def how(self) -> list[str]:
        """The reason why each turn ended."""
        return [turn.reason for turn in self.turns]

    def stream(self) -> list[tuple[float, int, int]]:
        """Settle the session. Return the notes that the player has read, with times counted from the first key."""
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
    """An endpoint that calls a method of the session at a time."""

    def __init__(self, time: float, method: str, *arguments):
        self.time, self.method, self.arguments = time, method, arguments
        self.is_input = method == "stop"  # so that the session does not end before
        self.changed = threading.Condition()

    def start(self, session: Session) -> None:
        """See `ports.Endpoint`."""
        self.session = session
        session.clock.schedule(self)

    def due(self) -> float:
        """See `clock.TimedTask`."""
        return self.time

    def act(self, now: float) -> None:
        """See `clock.TimedTask`."""
        self.time = math.inf
        getattr(self.session, self.method)(*self.arguments)


PHRASE = [(0.0, on(60)), (0.3, off(60)), (0.5, on(64, 100)), (0.9, off(64))]
