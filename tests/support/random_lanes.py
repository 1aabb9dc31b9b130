"""Lanes of random music under processors, and a plain Python model of each lane."""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from dsmr_mlx.generation.grammar import GrammarWalk, Limits
from dsmr_mlx.generation.sampling import Sampler, Sampling
from dsmr_mlx.generation.steering import (
    Density,
    Dynamics,
    EndWithin,
    LoopPenalty,
    MaxNoteSeconds,
    MaxPolyphony,
    MaxSilenceSeconds,
    PitchChoice,
    PitchClasses,
    PitchRange,
    Tempo,
    VelocityRange,
)
from dsmr_mlx.tokenizers.performance import (
    BOS,
    EOS,
    NOTE_OFF,
    NOTE_ON,
    TIME_SHIFT,
    VELOCITY,
    VOCAB_SIZE,
    PerformanceTokenizer,
)

TOKENIZER = PerformanceTokenizer()
LANES = 8
LONG = Limits(tokens=100_000)
PRESSES = {i for i in range(VOCAB_SIZE) if NOTE_ON <= i < NOTE_OFF}
VELOCITIES = set(range(VELOCITY, VOCAB_SIZE))
EVERY_KIND = [
    PitchRange(40, 80),
    PitchClasses([0, 4, 7]),
    VelocityRange(20, 90),
    MaxPolyphony(5),
    MaxNoteSeconds(3, nudge=1),
    MaxSilenceSeconds(1.5),
    EndWithin(30, 10, True),
    PitchChoice(0.8, 0.4, 50),
    Tempo(-0.5),
    Dynamics(2),
    Density(5, 3, 0.5),
    LoopPenalty(0.5, 32, 3),
]


@dataclass
class ReferenceLane:
    """The music of one lane, updated id by id."""

    clock: int = 0
    sounded: int = 0  # tick at which the last sound ended
    held: dict[int, int] = field(default_factory=dict)  # pitch → tick of its press
    velocity: int | None = None  # MIDI
    presses: list[int] = field(default_factory=list)  # ticks
    ids: list[int] = field(default_factory=list)

    def play(self, token: int) -> None:
        """Update the music with an id."""
        if NOTE_ON <= token < NOTE_OFF:
            self.held[token - NOTE_ON] = self.clock
            self.presses.append(self.clock)
        elif NOTE_OFF <= token < TIME_SHIFT:
            self.held.pop(token - NOTE_OFF, None)
        elif TIME_SHIFT <= token < VELOCITY:
            self.clock += token - TIME_SHIFT + 1
        elif token >= VELOCITY:
            self.velocity = 4 * (token - VELOCITY) + 2
        if self.held or NOTE_OFF <= token < TIME_SHIFT:
            self.sounded = self.clock
        if token != BOS:
            self.ids.append(token)


def side_by_side(trees: list) -> object:
    """Concatenate trees of arrays along the lanes."""
    return tree_map(lambda *arrays: mx.concatenate(arrays), *trees)


def random_preferences(rng: np.random.Generator, lanes: int) -> np.ndarray:
    """Logits `(lanes, V)`: each lane prefers some kinds of events, and half of the lanes avoid long pauses."""
    kinds = np.searchsorted([NOTE_ON, NOTE_OFF, TIME_SHIFT, VELOCITY], np.arange(VOCAB_SIZE), side="right")
    logits = rng.uniform(-8, 0, (lanes, 5))[:, kinds]
    logits[: lanes // 2, TIME_SHIFT + 9 : VELOCITY] -= 8
    return logits


class Lanes:
    """Lanes that draw at random from what is possible, each with its own `ReferenceLane`."""

    def __init__(self, processors: list, limits: Limits = LONG, seed: int = 0, prefixes: list | None = None):
        self.walk = GrammarWalk(TOKENIZER)
        self.sampler = Sampler(self.walk, Sampling(), processors)
        prefixes = prefixes or [[BOS]] * LANES
        self.music = side_by_side([self.walk.begin(np.array(ids)) for ids in prefixes])
        self.bounds = self.walk.bounds(limits, self.music)
        self.state = side_by_side([self.sampler.begin(np.array(ids)) for ids in prefixes])
        self.references = [ReferenceLane() for _ in prefixes]
        for reference, ids in zip(self.references, prefixes, strict=True):
            for token in ids:
                reference.play(int(token))
            reference.held = {pitch: tick - reference.clock for pitch, tick in reference.held.items()}
            reference.presses = [tick - reference.clock for tick in reference.presses]
            reference.sounded -= reference.clock
            reference.clock = 0
        self.rng = np.random.default_rng(seed)
        self.preferences = random_preferences(self.rng, len(prefixes))
        self.ended = np.zeros(len(prefixes), bool)

    def look(self) -> tuple[np.ndarray, np.ndarray]:
        """The logits `(B, V)` after the grammar, and after the processors."""
        logits = self.preferences + self.rng.normal(0, 2, self.preferences.shape)
        possible = mx.where(self.walk.allowed(self.music, self.bounds), mx.array(logits.astype(np.float32)), -mx.inf)
        left = self.sampler.process(possible, self.music, self.state)
        return np.array(possible), np.array(left)

    def step(self, left: np.ndarray) -> np.ndarray:
        """Draw a token for each lane from the logits `left` `(B, V)`."""
        weights = np.exp(left - left.max(axis=1, keepdims=True)).cumsum(axis=1)
        tokens = (weights <= self.rng.random((len(left), 1)) * weights[:, -1:]).sum(axis=1)
        token = mx.array(tokens.astype(np.int32))
        self.music = self.walk.advance(self.music, token)
        self.state = self.sampler.advance(self.state, token, self.music)
        for reference, i, ended in zip(self.references, tokens, self.ended, strict=True):
            if not ended:
                reference.play(int(i))
        self.ended |= tokens == EOS
        return tokens


def some_prefixes(seed: int, n: int = LANES) -> list[list[int]]:
    """Prefixes of music, cut anywhere."""
    lanes = Lanes([], seed=seed)
    for _ in range(60):
        lanes.step(lanes.look()[1])
    rng = np.random.default_rng(seed)
    return [[BOS, *lanes.references[i % LANES].ids[: rng.integers(0, 61)]] for i in range(n)]
