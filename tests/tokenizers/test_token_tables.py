"""Grammars of every kind: streams obey their own, and the tables of tokens agree with a walk through their events."""

from itertools import pairwise

import numpy as np
import pytest
from support import performance_reference
from support.music import on_grid, random_notes
from support.reference_grammar import (
    after,
    after_token,
    all_after,
    all_may_follow,
    first_violation,
    may_follow,
    tokens_that_may_follow,
)

from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers import performance
from dsmr_mlx.tokenizers.event_grammar import EventGrammar, beginning
from dsmr_mlx.tokenizers.keyboard import Keyboard, notes_played
from dsmr_mlx.tokenizers.performance import VOCAB_SIZE, PerformanceTokenizer
from dsmr_mlx.tokenizers.registry import make_tokenizer
from dsmr_mlx.tokenizers.token_tables import TokenTables, compose, token_tables

NAMES = ["performance", "miditok:MIDILike", "miditok:TSD", "miditok:REMI", "miditok:PerTok"]


def stream(name: str, seed: int) -> tuple[EventGrammar, np.ndarray]:
    """Return a grammar and the events of a random piece without BOS."""
    tokenizer = make_tokenizer(name)
    return tokenizer.event_grammar(), tokenizer.encode_notes(on_grid(random_notes(seed, 40)))[1:].astype(int)


def singles(grammar: EventGrammar) -> TokenTables:
    """Return tables in which each event is a token."""
    return compose(grammar, [(event,) for event in range(len(grammar.ticks))])


def some_tokens(grammar: EventGrammar, events: np.ndarray, seed: int) -> list[list[int]]:
    """Return parts of a stream, parts with one event changed, random and single events, and no events."""
    rng = np.random.default_rng(seed)
    tokens: list[list[int]] = [[]]
    for _ in range(150):
        start, length = rng.integers(len(events)), rng.integers(1, 7)
        token = events[start : start + length].tolist()
        changed = list(token)
        changed[rng.integers(len(changed))] = int(rng.choice(events))
        tokens += [token, changed, rng.choice(events, rng.integers(1, 4)).tolist()]
    return tokens + [[int(event)] for event in rng.integers(0, len(grammar.ticks), 50)]


def equal(a, b) -> bool:
    """Return whether two moments are equal."""
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_tables_agree_with_a_walk_through_the_events(name):
    """Which tokens may come at 40 moments of a piece, and the moment after each."""
    grammar, events = stream(name, seed=1)
    tokens = some_tokens(grammar, events, seed=2)
    tables = compose(grammar, tokens)
    moment, admissible = beginning(grammar), 0
    for event in events[:40]:
        found = tokens_that_may_follow(tables, moment)
        assert found.tolist() == [all_may_follow(grammar, moment, token) for token in tokens]
        for i in np.flatnonzero(found):
            assert equal(after_token(tables, moment, i), all_after(grammar, moment, tokens[i]))
        admissible += found.sum()
        moment = after(grammar, moment, event)
    assert admissible > 100
    assert not found[0]


@pytest.mark.parametrize("name", NAMES)
def test_effects_of_a_token_on_the_way(name):
    grammar, events = stream(name, seed=3)
    tokens = [token for token in some_tokens(grammar, events, seed=4) if token]
    tables = compose(grammar, tokens)
    presses = [[int(p) for p in grammar.press[token] if p >= 0] for token in tokens]
    assert tables.notes.tolist() == [len(p) for p in presses]
    assert [np.flatnonzero(row).tolist() for row in tables.presses] == [sorted(set(p)) for p in presses]
    assert tables.fades.tolist() == [
        not p and (grammar.velocity[token] < 0).all() for p, token in zip(presses, tokens, strict=True)
    ]
    assert [row[row >= 0].tolist() for row in tables.events] == tokens
    assert tables.flat(np.arange(len(tokens))).tolist() == [event for token in tokens for event in token]
    assert tables.contains(grammar.release >= 0).tolist() == [(grammar.release[token] >= 0).any() for token in tokens]
    for token, more, peak in zip(tokens, tables.net_presses, tables.peak, strict=True):
        sounding, most = 0, -128
        for event in token if grammar.held else ():
            sounding += int(grammar.press[event] >= 0) - int(grammar.release[event] >= 0)
            most = max(most, sounding) if grammar.press[event] >= 0 else most
        assert (more, peak) == (sounding, most) or not grammar.held


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_streams_obey_their_grammar_and_clock(name):
    for seed in range(5):
        grammar, events = stream(name, seed)
        assert first_violation(grammar, events) is None
        elapsed = grammar.elapsed(events)
        moment, ticks = beginning(grammar), []
        for event in events:
            moment = after(grammar, moment, event)
            ticks.append(moment.ticks)
        assert elapsed.tolist() == ticks
        onsets = elapsed[grammar.press[events] >= 0] * grammar.seconds_per_tick
        grid = 1 / 32 if name == "miditok:PerTok" else 1e-9  # PerTok's microtiming is not part of the clock
        assert np.abs(onsets - on_grid(random_notes(seed, 40)).onset).max() <= grid


@pytest.mark.slow
@pytest.mark.parametrize("name", ["performance", "miditok:MIDILike", "miditok:TSD", "miditok:REMI"])
def test_the_keyboard_plays_the_decoded_notes(name):
    """Events played one at a time give the decoded notes, from the beginning and from the middle."""
    tokenizer = make_tokenizer(name)
    for seed in range(4):
        grammar, events = stream(name, seed)
        found = played(Keyboard(grammar), events, grammar.seconds_per_tick)
        expected = tokenizer.decode(events)
        assert notes_played(grammar, events) == found
        assert len(found) == len(expected)
        assert np.allclose(found.onset, expected.onset)
        assert np.allclose(found.offset, expected.offset)
        assert np.array_equal(found.pitch, expected.pitch)
        assert np.array_equal(found.velocity, expected.velocity)
        may_wait = grammar.allowed[:, (grammar.ticks > 0) | grammar.bar].any(axis=1)
        half = len(events) // 2
        while not may_wait[grammar.next_state[0, events[half - 1]]]:
            half += 1
        before = all_after(grammar, beginning(grammar), events[:half])
        later = played(Keyboard(grammar, before), events[half:], grammar.seconds_per_tick)
        start = before.ticks * grammar.seconds_per_tick
        rest = expected.take(expected.onset >= start - 1e-9)
        assert len(rest) - (rest.onset < start + 1e-9).sum() <= len(later) <= len(rest)
        assert np.allclose(later.onset + start, rest.onset[len(rest) - len(later) :])
        assert np.array_equal(later.velocity, rest.velocity[len(rest) - len(later) :])


@pytest.mark.parametrize("name", NAMES)
def test_moments_at_once_equal_moments_one_by_one(name):
    """Before each token and after the last; from the beginning, from the middle, and without tokens."""
    grammar, events = stream(name, seed=6)
    tokens = [token for token in some_tokens(grammar, events, seed=7) if token]
    for tables, ids in ((singles(grammar), events), (compose(grammar, tokens), walk(grammar, tokens, seed=8))):
        expected = [beginning(grammar)]
        for token in ids:
            expected.append(after_token(tables, expected[-1], token))
        middle = len(ids) // 2
        found = zip(*tables.moments(expected[0], ids), strict=True)
        assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
        found = zip(*tables.moments(expected[middle], ids[middle:]), strict=True)
        assert all(equal(a, b) for a, b in zip(found, expected[middle:], strict=True))
        assert equal(next(zip(*tables.moments(expected[middle], []), strict=True)), expected[middle])
        assert equal(tables.after_all(expected[0], ids), expected[-1])
        assert equal(tables.after_all(expected[middle], ids[middle:]), expected[-1])
        assert equal(tables.after_all(expected[middle], []), expected[middle])


def walk(grammar: EventGrammar, tokens: list[list[int]], seed: int) -> list[int]:
    """Return up to 60 tokens that may follow one another."""
    rng, moment, tables, ids = np.random.default_rng(seed), beginning(grammar), compose(grammar, tokens), []
    while len(ids) < 60 and (possible := np.flatnonzero(tokens_that_may_follow(tables, moment))).size:
        ids.append(int(rng.choice(possible)))
        moment = after_token(tables, moment, ids[-1])
    return ids


def played(keyboard, events, seconds_per_tick) -> Notes:
    """Return the notes of a keyboard after checking the order of time and that each key goes down and up in turn."""
    happened = [happening for event in events for happening in keyboard.play(event)]
    happened += keyboard.release_all()
    assert not keyboard.down
    assert all(a.tick <= b.tick for a, b in pairwise(happened))
    down, rows = {}, []
    for tick, pitch, velocity in happened:
        if velocity:
            assert pitch not in down
            down[pitch] = (tick, velocity)
        else:
            begun, loud = down.pop(pitch)
            rows.append((begun, tick, pitch, loud))
    onset, offset, pitch, velocity = np.array(rows).T
    per_second = 1 / seconds_per_tick
    return Notes.sorted(onset / per_second, offset / per_second, pitch.astype(np.uint8), velocity.astype(np.uint8))


def test_single_events_are_tokens_too():
    tokenizer = PerformanceTokenizer()
    grammar, tables = tokenizer.event_grammar(), token_tables(tokenizer)
    moment = beginning(grammar)
    for event in tokenizer.encode_notes(random_notes(0, 30))[1:]:
        expected = [may_follow(grammar, moment, event) for event in range(VOCAB_SIZE)]
        assert tokens_that_may_follow(tables, moment).tolist() == expected
        moment = after(grammar, moment, event)


def test_the_walk_agrees_with_the_performance_reference():
    """The first violation in streams with an event changed, removed or doubled."""
    rng, tokenizer = np.random.default_rng(0), PerformanceTokenizer()
    grammar, violations = tokenizer.event_grammar(), 0
    for seed in range(60):
        events = tokenizer.encode_notes(random_notes(seed, 20))[1:-1].astype(int)
        i = rng.integers(len(events))
        change = rng.integers(3)
        events = np.delete(events, i) if change == 0 else np.insert(events, i, events[i])
        if change == 2:
            events[i] = rng.integers(3, VOCAB_SIZE)
        expected = performance_reference.first_violation(events, complete=False)
        assert first_violation(grammar, events) == (expected and expected[0])
        violations += expected is not None
    assert violations > 30


def test_all_keys_are_up_at_the_end_and_nothing_follows():
    grammar = PerformanceTokenizer().event_grammar()
    names = performance.token_names()
    ids = [names.index(name) for name in ("VELOCITY_9", "NOTE_ON_60", "NOTE_ON_64", "TIME_SHIFT_7", "NOTE_OFF_60")]
    held = all_after(grammar, beginning(grammar), ids)
    assert not may_follow(grammar, held, performance.EOS)
    off = names.index("NOTE_OFF_64")
    assert all_may_follow(grammar, held, [off, performance.EOS])
    assert not all_may_follow(grammar, held, [off, performance.EOS, names.index("VELOCITY_3")])
    tables = compose(grammar, [[performance.EOS], [off, performance.EOS], [off]])
    assert tokens_that_may_follow(tables, held).tolist() == [False, True, True]


def test_without_a_grammar_any_id_but_bos_may_follow():
    from dsmr_mlx.tokenizers.ids import IdTokenizer

    tokenizer = IdTokenizer(9, "aria", bos_id=0)
    assert tokenizer.event_grammar() is None
    may = tokens_that_may_follow(token_tables(tokenizer), beginning(token_tables(tokenizer).grammar))
    assert may.tolist() == [False, *[True] * 8]
    assert tokenizer.to_events([1, 10, -1, 2]).tolist() == [1, 2]
