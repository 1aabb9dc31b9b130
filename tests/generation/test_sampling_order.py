"""The order of processors, temperature and filters; none of them leaves a lane without a token."""

import math

import mlx.core as mx
import numpy as np
import pytest
from support.random_lanes import LANES, TOKENIZER, Lanes
from support.stand_ins import PlainTokenizer

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.grammar import GrammarWalk
from dsmr_mlx.generation.sampling import Sampler, Sampling, lane_keys
from dsmr_mlx.generation.steering import LoopPenalty, MaxPolyphony, PitchRange, Tempo
from dsmr_mlx.tokenizers.performance import BOS, NOTE_OFF, NOTE_ON, VELOCITY, VOCAB_SIZE


class Recorded:
    """A processor that records its calls and their arguments."""

    def __init__(self, name: str, stage: str | None, log: list, more: float = 0.0):
        self.name, self.log, self.more = name, log, more
        if stage:
            self.stage = stage

    def begin(self, tables, ids):
        self.log.append((self.name, "begin", ids.tolist()))
        return ()

    def __call__(self, logits, music, state):
        self.log.append((self.name, float(logits[0, 0])))
        return logits + self.more

    def advance(self, state, token, music):
        return state


def plain(*processors, **options) -> Sampler:
    return Sampler(GrammarWalk(PlainTokenizer()), Sampling(**options), processors)


def begun(lanes: int):
    return GrammarWalk(PlainTokenizer()).begin(np.array([8])).take([0] * lanes)


def test_processors_act_by_stage_then_in_the_given_order():
    log = []
    stages = {"r": "repetition", "b1": None, "c1": "constraint", "b2": "bias", "c2": "constraint"}
    more = {"c1": 1.0, "c2": 2.0, "b1": 4.0, "b2": 8.0, "r": 16.0}
    sampler = plain(*(Recorded(name, stage, log, more[name]) for name, stage in stages.items()))
    state = sampler.begin(np.array([8, 3]))
    assert log == [(name, "begin", [8, 3]) for name in ("c1", "c2", "b1", "b2", "r")]
    log.clear()
    left = sampler.process(mx.zeros((1, 10)), begun(1), state)
    assert log == [("c1", 0.0), ("c2", 1.0), ("b1", 3.0), ("b2", 7.0), ("r", 15.0)]
    assert float(left[0, 0]) == 31.0


def test_the_order_of_all_steps():
    """Grammar, constraint, bias, temperature, top-k, top-p, min-p: each sees what the one before left."""
    odds = np.array([0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05, 1e-9, 1e-9, 1e-9])
    possible = mx.where(mx.arange(10) == 0, -mx.inf, mx.array(np.log(odds).astype(np.float32)))  # the grammar

    def forbid(logits, music):
        return mx.where(mx.arange(10) == 1, -mx.inf, logits)

    forbid.stage = "constraint"

    def prefer(logits, music):
        return logits + math.log(2.8) * (mx.arange(10) == 6)

    def drawn(*processors, **options) -> set[int]:
        sampler, n = plain(*processors, **options), 800
        rows = mx.broadcast_to(possible, (n, 10))
        tokens = sampler.sample(rows, begun(n), sampler.begin(np.array([8])), lane_keys(0, n))
        return set(np.array(tokens).tolist())

    # Tokens that can be drawn have a probability of at least 0.1: 800 draws miss one with probability 3e-37.
    assert drawn(top_k=2) == {1, 2}
    assert drawn(forbid, top_k=2) == {2, 3}, "top-k counts what the constraint has left"
    assert drawn(prefer, forbid, top_k=2) == {2, 6}, "after the bias, which makes 0.14 of 0.05"
    assert drawn(prefer, forbid, top_p=0.5) == {2, 3, 6}, "0.15 and 0.14 are less than half of 0.59"
    assert drawn(prefer, forbid, top_k=2, top_p=0.5) == {2}, "but 0.15 is more than half of what top-k leaves"
    assert drawn(forbid, min_p=0.75) == {2, 3}
    assert drawn(forbid, min_p=0.75, temperature=3.0) == {2, 3, 4, 5}, "min-p looks at what is drawn from"


@pytest.mark.parametrize("stage", ["constraint", "bias", "repetition"])
def test_no_step_removes_every_token(stage):
    def nothing(logits, music):
        return mx.where(mx.array([[True], [False]]), -mx.inf, logits - 1)

    nothing.stage = stage
    left = plain(nothing).process(mx.zeros((2, 10)), begun(2), ((),))
    assert np.array(left).tolist() == [[0] * 10, [-1] * 10]


def test_constraints_are_skipped_one_by_one():
    """After a velocity a key must be pressed: one in the range, even if it exceeds the polyphony."""
    prefix = [BOS, VELOCITY + 9, NOTE_ON + 30, VELOCITY + 3]
    for processors in ([PitchRange(60, 72), MaxPolyphony(1)], [MaxPolyphony(1), PitchRange(60, 72)]):
        left = Lanes(processors, prefixes=[prefix]).look()[1][0]
        assert np.flatnonzero(left > -np.inf).tolist() == list(range(NOTE_ON + 60, NOTE_ON + 73))


def test_lanes_are_steered_independently():
    processors = [MaxPolyphony(2), Tempo(1.0), LoopPenalty(2.0)]
    lanes = Lanes(processors, seed=3)
    for _ in range(50):
        lanes.step(lanes.look()[1])
    possible, together = lanes.look()
    for i in range(LANES):
        alone = Lanes(processors, prefixes=[[BOS, *lanes.references[i].ids]])
        left = alone.sampler.process(mx.array(possible[i : i + 1]), alone.music, alone.state)
        np.testing.assert_allclose(np.array(left)[0], together[i], atol=1e-5)


def test_a_custom_processor_has_a_state_per_lane():
    class OncePerKey:
        """Each key is pressed once."""

        stage = "constraint"

        def begin(self, tables, ids):
            return mx.array(np.isin(np.arange(VOCAB_SIZE), ids[tables.notes[ids] > 0]))[None]  # (1, V)

        def __call__(self, logits, music, state):
            return mx.where(state, -mx.inf, logits)

        def advance(self, state, token, music):
            is_press = (token >= NOTE_ON) & (token < NOTE_OFF)
            return state | (is_press[:, None] & (mx.arange(VOCAB_SIZE) == token[:, None]))

    lanes = Lanes([OncePerKey()], seed=5)
    for _ in range(150):
        lanes.step(lanes.look()[1])
    for reference in lanes.references:
        presses = [i for i in reference.ids if NOTE_ON <= i < NOTE_OFF]
        assert len(presses) == len(set(presses)) > 5


@pytest.mark.parametrize("wrong", [3, "loud", PitchRange, None])
def test_other_objects_are_refused_as_processors(wrong):
    with pytest.raises(UserError, match=r"`processors`: .*, expected a Processor or a function \(logits, music\)"):
        Sampler(GrammarWalk(TOKENIZER), Sampling(), [wrong])


def test_an_unknown_stage_is_refused():
    with pytest.raises(UserError, match="has the stage 'late', expected constraint, bias, repetition"):
        plain(Recorded("x", "late", []))
