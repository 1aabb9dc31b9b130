"""The `EventGrammar` of a MidiTok tokenizer: the meanings of its tokens and its graph of types.

MidiTok names a token by its type and a value, `Pitch_60`, and a graph of types states which may follow which. If it is
empty (PerTok), any type may follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dsmr_mlx.tokenizers.event_grammar import EventGrammar
from dsmr_mlx.tokenizers.miditok.vocabulary import QUARTERS_PER_BAR, QUARTERS_PER_SECOND

if TYPE_CHECKING:
    from miditok import MusicTokenizer

    from dsmr_mlx.tokenizers.miditok.vocabulary import MidiTokVocabulary

# How a tokenizer encodes the time: pauses that add up; bars with positions, with or without a token for the first bar;
# or beats.
PAUSES, BARS, BARS_BUT_THE_FIRST, BEATS = range(4)
CLOCKS = {
    **{"TSD": PAUSES, "MIDILike": PAUSES, "Structured": PAUSES, "REMI": BARS},
    **{"PerTok": BARS_BUT_THE_FIRST, "BEAT": BEATS},
}
TIME_TYPES = {"TimeShift", "Bar", "Position", "Rest", "Beat"}
GLOBAL_TYPES = {"TimeSig", "Tempo", "KeySig"}
NOTE_TYPES = {"Pitch", "PitchDrum", "PitchIntervalTime", "PitchIntervalChord", "NoteOn", "DrumOn"}
RELEASE_TYPES = {"NoteOff", "DrumOff"}
START, END = "START", "END"


def successors(tokenizer: MusicTokenizer) -> dict[str, set[str]]:
    """Return the types that may follow each type, including START and END; empty if MidiTok has no graph."""
    graph = {key: set(types) for key, types in tokenizer.tokens_types_graph.items()}
    special = {token.split("_")[0] for token in tokenizer.config.special_tokens}
    types = graph.keys() - special
    if not types:
        return {}
    follows = {key: graph[key] & types for key in types}
    ends = {key for key in types if _completes_note(key, follows)}
    if tokenizer.config.additional_params.get("add_trailing_bars"):
        ends.add("Bar")
    first = {"Bar"} & types or _beginnings(follows)
    if tokenizer.config.use_rests:
        first |= {"Rest"} & types
    for key in ends:
        follows[key].add(END)
    return {START: first, **follows}


def _completes_note(key: str, follows: Mapping[str, set[str]]) -> bool:
    """Return whether a note may be complete after a type, so that time may pass and the piece may end."""
    if RELEASE_TYPES & follows.keys():
        return key in RELEASE_TYPES
    if not follows[key] & TIME_TYPES:
        return False
    return key in {"Duration", "Velocity", "Pattern", *NOTE_TYPES} or (key == "Rest" and "Beat" in follows)


def _beginnings(follows: Mapping[str, set[str]]) -> set[str]:
    """Return the types that may begin a piece without bars: those after a pause, and those of the whole piece."""
    waits = follows.keys() & {"TimeShift", "Rest"}
    return set().union(waits, GLOBAL_TYPES & follows.keys(), *(follows[key] for key in waits))


def event_grammar(vocabulary: MidiTokVocabulary, eos_id: int) -> EventGrammar:
    """Return the grammar of a vocabulary. Special ids except EOS, and ids that are not events, may never come."""
    tokenizer, names = vocabulary.miditok, vocabulary.names
    keys = [name.partition("_")[0] if name else None for name in names]
    follows = successors(tokenizer)
    if not follows:
        known = {key for key in keys if key}
        follows = {START: known, **{key: known | {END} for key in known}}
    keys[eos_id] = END
    states = (START, *sorted(follows.keys() - {START}), END)
    number = {state: i for i, state in enumerate(states)}
    possible = np.array([_possible(tokenizer, name) or i == eos_id for i, name in enumerate(names)])
    allowed = np.stack([np.array([key in follows.get(state, ()) for key in keys]) & possible for state in states])
    return EventGrammar(
        allowed=allowed,
        next_state=np.broadcast_to(
            np.array([number.get(key, number[END]) for key in keys], np.int32), (len(states), len(keys))
        ),
        start=number[START],
        states=states,
        **_meanings(vocabulary),
    )


def _possible(tokenizer: MusicTokenizer, token: str | None) -> bool:
    """Return whether a token can occur in music in 4/4 at 120 quarters per minute; false for special tokens."""
    if token is None or token in tokenizer.config.special_tokens:
        return False
    kind, _, value = token.partition("_")
    if kind == "TimeSig":
        return value in ("4/4", "None")
    return kind != "Tempo" or value == "None" or float(value) == round(float(tokenizer.default_tempo), 2)


def _meanings(vocabulary: MidiTokVocabulary) -> dict:
    """Return the tables of an `EventGrammar` that define the meanings of events."""
    tokenizer, tokens = vocabulary.miditok, vocabulary.names
    config, quarter = tokenizer.config, getattr(tokenizer, "tpq", None) or tokenizer.time_division
    clock = None if config.use_rests else CLOCKS.get(type(tokenizer).__name__)
    velocities = [int(velocity) for velocity in tokenizer.velocities]
    relative = type(tokenizer).__name__ == "BEAT"  # its pitches are intervals, its lengths part of patterns
    press, release, duration, velocity, position = np.full((5, len(tokens)), -1, np.int32)
    ticks, bar = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), bool)
    for i, token in enumerate(tokens):
        kind, _, value = (token or "").partition("_")
        if value in ("", "None") and not (kind in ("Bar", "Beat") and clock is not None):
            continue
        if kind in ("Pitch", "NoteOn") and not relative:
            press[i] = int(value)
        elif kind == "NoteOff":
            release[i] = int(value)
        elif kind == "Velocity":
            velocity[i] = velocities.index(int(value))
        elif kind == "Duration":
            duration[i] = _time_ticks(value, quarter)
        elif kind == "TimeShift" and clock is not None:
            ticks[i] = _time_ticks(value, quarter)
        elif token == "Beat_None" and clock == BEATS:
            ticks[i] = quarter
        elif token == "Bar_None" and clock in (BARS, BARS_BUT_THE_FIRST):
            bar[i] = True
        elif kind == "Position" and clock in (BARS, BARS_BUT_THE_FIRST):
            position[i] = int(value) * (1 if hasattr(tokenizer, "tpq") else quarter // config.max_num_pos_per_beat)
    if not (duration >= 0).any() and not (release >= 0).any() and not relative:
        last = velocity >= 0 if config.use_velocities else press >= 0
        duration[last] = int(config.default_note_duration * quarter)
    has_bars = bool(bar.any())
    one_piano = not config.use_programs and not config.use_pitch_intervals and not relative
    return {
        **{"press": press, "release": release, "duration": duration, "velocity": velocity, "ticks": ticks},
        **{"bar": bar, "position": position, "velocities": np.array(velocities, np.uint8)},
        "seconds_per_tick": 1 / (QUARTERS_PER_SECOND * quarter),
        # With programs or intervals, a pitch alone does not identify a key.
        "held": bool((release >= 0).any()) and one_piano,
        "running_velocity": False,
        "bar_ticks": QUARTERS_PER_BAR * quarter if has_bars else 0,
        "first_phase": QUARTERS_PER_BAR * quarter if has_bars and clock == BARS else 0,
        "plays_keys": one_piano
        and clock is not None
        and not any(token and token.startswith("MicroTiming_") for token in tokens),
    }


def _time_ticks(value: str, quarter: int) -> int:
    """Convert a time `beats.positions.resolution` to ticks."""
    beats, positions, per_beat = map(int, value.split("."))
    return (beats * per_beat + positions) * quarter // per_beat
