"""What the tokens of a MidiTok tokenizer mean and what may follow what: its graph of types, as an `EventGrammar`.

MidiTok names a token by its type and a value, `Pitch_60`. Which type may follow which it knows as a graph; where it has
none (PerTok) anything may follow. Tokenizers with several vocabularies (CPWord, Octuple, MuMIDI) give one row of fields
for each event, and there the next field follows, see `dsmr_mlx.tokenizers.miditok.tokenizer`.
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

# How a tokenizer tells the time: pauses that add up, or bars with positions in them, of which the first is announced or
# not, or beats. Octuple (numbers its bars) and MMM (one track after the other) have no clock that only goes on.
PAUSES, BARS, BARS_BUT_THE_FIRST, BEATS = range(4)
CLOCKS = {
    **{"TSD": PAUSES, "MIDILike": PAUSES, "Structured": PAUSES, "PerTok": BARS_BUT_THE_FIRST, "BEAT": BEATS},
    **{"REMI": BARS, "CPWord": BARS, "MuMIDI": BARS},
}
TIME_TYPES = {"TimeShift", "Bar", "Position", "Rest", "Beat"}
GLOBAL_TYPES = {"TimeSig", "Tempo", "KeySig"}
NOTE_TYPES = {"Pitch", "PitchDrum", "PitchIntervalTime", "PitchIntervalChord", "NoteOn", "DrumOn"}
RELEASE_TYPES = {"NoteOff", "DrumOff"}
START, END = "START", "END"


def successors(tokenizer: MusicTokenizer) -> dict[str, set[str]]:
    """The types that may follow a type, START and END among them; of MMM's tracks, Track_Start and Track_End are two.

    Empty where MidiTok has no graph.
    """
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
    if "Track" in special:
        for key in ends | (TIME_TYPES & types):
            follows[key].add("Track_End")
        follows["Program"] |= TIME_TYPES & types
        return {START: {"Track_Start"}, "Track_Start": {"Program"}, "Track_End": {"Track_Start", END}, **follows}
    for key in ends:
        follows[key].add(END)
    return {START: first, **follows}


def _completes_note(key: str, follows: Mapping[str, set[str]]) -> bool:
    """Whether a note may be complete after a type, so that time may pass and the piece may end."""
    if RELEASE_TYPES & follows.keys():
        return key in RELEASE_TYPES
    if not follows[key] & TIME_TYPES:
        return False
    return key in {"Duration", "Velocity", "Pattern", *NOTE_TYPES} or (key == "Rest" and "Beat" in follows)


def _beginnings(follows: Mapping[str, set[str]]) -> set[str]:
    """What may come at the beginning of a piece without bars: what may follow a pause, or tell of all that follows."""
    waits = follows.keys() & {"TimeShift", "Rest"}
    return set().union(waits, GLOBAL_TYPES & follows.keys(), *(follows[key] for key in waits))


def type_of(token: str) -> str:
    """The type of a token in `successors`."""
    return token if token in ("Track_Start", "Track_End") else token.partition("_")[0]


def event_grammar(vocabulary: MidiTokVocabulary, eos_id: int) -> EventGrammar:
    """The grammar of a vocabulary; special ids but EOS, and ids that are no event, never come."""
    tokenizer, names = vocabulary.miditok, vocabulary.names
    if vocabulary.fields is None:
        keys = [type_of(name) if name else None for name in names]
        follows = successors(tokenizer)
        if not follows:
            known = {key for key in keys if key}
            follows = {START: known, **{key: known | {END} for key in known}}
    else:
        places = vocabulary.places()
        keys = [str(place) for place in places]
        known = set(places) - {None}
        follows = {str(place): {str(n) for n in known if vocabulary.may_be_next(place, n)} for place in known}
        for place in known:
            follows[str(place)] |= {END} if vocabulary.may_be_next(place, None) else set()
        follows[START] = {str(place) for place in known if place.field == 0}
    keys[eos_id] = END
    states = (START, *sorted(follows.keys() - {START}), END)
    number = {state: i for i, state in enumerate(states)}
    possible = np.array([_possible(tokenizer, name) or i == eos_id for i, name in enumerate(names)])
    allowed = np.stack([np.array([key in follows.get(state, ()) for key in keys]) & possible for state in states])
    return EventGrammar(
        allowed=allowed,
        next_state=np.array([number.get(key, number[END]) for key in keys], np.int32),
        start=number[START],
        states=states,
        **_meanings(vocabulary),
    )


def _possible(tokenizer: MusicTokenizer, token: str | None) -> bool:
    """Whether a token can occur in music that was brought to 4/4 and 120 quarters a minute; no to special tokens."""
    if token is None or (token in tokenizer.config.special_tokens and not token.startswith("Track_")):
        return False
    kind, _, value = token.partition("_")
    if kind == "TimeSig":
        return value in ("4/4", "None")
    return kind != "Tempo" or value == "None" or float(value) == round(float(tokenizer.default_tempo), 2)


def _meanings(vocabulary: MidiTokVocabulary) -> dict:
    """The tables of an `EventGrammar` that say what the events mean."""
    tokenizer, tokens = vocabulary.miditok, vocabulary.names
    config, quarter = tokenizer.config, getattr(tokenizer, "tpq", None) or tokenizer.time_division
    clock = None if config.use_rests else CLOCKS.get(type(tokenizer).__name__)
    velocities = [int(velocity) for velocity in tokenizer.velocities]
    relative = type(tokenizer).__name__ == "BEAT"  # its pitches are intervals, its lengths are in patterns
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
        # A key of several programs, or one that an interval names, cannot be followed by its pitch.
        "held": bool((release >= 0).any()) and one_piano,
        "running_velocity": False,
        "bar_ticks": QUARTERS_PER_BAR * quarter if has_bars else 0,
        "first_phase": QUARTERS_PER_BAR * quarter if has_bars and clock == BARS else 0,
        "closing": tokens.index("Track_End") if "Track_End" in tokens else -1,
        "plays_keys": one_piano
        and clock is not None
        and "MicroTiming" not in {type_of(token or "") for token in tokens},
    }


def _time_ticks(value: str, quarter: int) -> int:
    """`beats.positions.resolution` in ticks."""
    beats, positions, per_beat = map(int, value.split("."))
    return (beats * per_beat + positions) * quarter // per_beat
