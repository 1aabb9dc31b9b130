"""States that depend on the state before an event, in grammars and in tokens of several events."""

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference_grammar import all_after, all_may_follow, tokens_that_may_follow

from dsmr_mlx.tokenizers.event_grammar import EventGrammar, beginning, states_after
from dsmr_mlx.tokenizers.token_tables import compose

STATES, EVENTS = 4, 6
tables = st.lists(st.integers(0, STATES - 1), min_size=STATES * EVENTS, max_size=STATES * EVENTS)
masks = st.lists(st.booleans(), min_size=STATES * EVENTS, max_size=STATES * EVENTS)


def grammar_of(next_state: list[int], allowed: list[bool]) -> EventGrammar:
    """A grammar of events without a meaning."""
    blank = EventGrammar.permissive(EVENTS, np.empty(0), np.empty(0))
    values = {name: getattr(blank, name) for name in blank.__dataclass_fields__} | {
        "allowed": np.array(allowed).reshape(STATES, EVENTS),
        "next_state": np.array(next_state, np.int32).reshape(STATES, EVENTS),
        "states": tuple("abcd"),
    }
    return EventGrammar(**values)


@given(tables, st.integers(0, STATES - 1), st.lists(st.integers(0, EVENTS - 1), max_size=30))
def test_states_after_events(next_state, state, events):
    table = np.array(next_state, np.int32).reshape(STATES, EVENTS)
    expected = [state]
    for event in events:
        expected.append(int(table[expected[-1], event]))
    assert states_after(table, state, np.array(events, np.int64)).tolist() == expected


@settings(deadline=None)
@given(tables, masks, st.lists(st.lists(st.integers(0, EVENTS - 1), max_size=3), min_size=1, max_size=8))
def test_tokens_of_several_events_in_every_state(next_state, allowed, tokens):
    grammar = grammar_of(next_state, allowed)
    composed = compose(grammar, tokens)
    for state, (i, token) in product(range(STATES), enumerate(tokens)):
        moment = beginning(grammar)._replace(state=state)
        ends_quietly = all_may_follow(grammar, moment, token)
        assert tokens_that_may_follow(composed, moment)[i] == ends_quietly
        if token:
            assert composed.next_state[state, i] == all_after(grammar, moment, token).state
            assert composed.after_all(moment, np.array([i])).state == all_after(grammar, moment, token).state
