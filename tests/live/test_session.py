"""Sessions in virtual time: turns, what the player has read, and that no key stays down."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mido import Message
from support.live_stand_ins import (
    PHRASE,
    FailingWire,
    Performance,
    RandomPlayer,
    SubwordPlayer,
    control,
    off,
    on,
    sounding,
)

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live.instrument import Voice
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.live.transcript import EventIds
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.performance import BOS, PerformanceTokenizer, encode_notes


def again(start: float) -> list[tuple[float, Message]]:
    """Return `PHRASE` from a time on."""
    return [(start + time, message) for time, message in PHRASE]


def by_pitch(stream: list[tuple[float, int, int]]) -> dict[int, list[tuple[float, int]]]:
    """Return the times at which each pitch is pressed and released."""
    found: dict[int, list[tuple[float, int]]] = {}
    for time, pitch, velocity in stream:
        found.setdefault(pitch, []).append((time, velocity > 0))
    return found


def check_stream(performance: Performance, late: float = 0.0) -> None:
    """Check that the player has read exactly what sounded, key by key, to a tick or two."""
    expected, found = by_pitch(performance.log.of(*Voice)), by_pitch(performance.stream())
    assert found.keys() == expected.keys()
    for pitch, events in expected.items():
        assert [down for _, down in found[pitch]] == [down for _, down in events], pitch
        for (time, _), (tick, _) in zip(events, found[pitch], strict=True):
            assert -0.026 < tick - time < 0.026 + late, (pitch, time, tick)


def test_the_model_answers_a_pause_after_its_head_start():
    """The pause ends at 1.9 s, and the first note sounds exactly 50 ms later."""
    p = Performance(PHRASE, pause=1.0)
    assert p.reason == "the music is over"
    assert (p.turns[0].voice, p.turns[0].notes) == (Voice.HUMAN, 2)
    assert p.how == ["the model took over", "done"]
    assert p.model[0][0] == pytest.approx(1.95)
    assert list(p.statistics.first_sent.last) == [pytest.approx(0.05)]
    assert p.turns[1].notes == sum(velocity > 0 for _, _, velocity in p.model)
    assert 2.0 <= p.turns[1].seconds <= 5.1
    check_stream(p)


class Early:
    """An endpoint with messages from before the session."""

    is_input = True

    def __init__(self, script: list[tuple[float, Message]]):
        self.script = script

    def start(self, session) -> None:
        """See `ports.Endpoint`."""
        session.begin(self.script[0][0])
        for time, message in self.script:
            session.receive(message, time)
        session.finish()


@pytest.mark.parametrize("before", [[], encode_notes(Notes.of([(0.0, 1.0, 50, 64)]))])
def test_messages_from_before_the_session_keep_their_times(before):
    """What is read and recorded is the same, and nothing sounds again."""
    read, kept = [], []
    for early in (False, True):
        player = RandomPlayer()
        player.read(before)
        script = again(-20.0) if early else PHRASE
        p = Performance([] if early else script, player, take_over="enter", devices=[Early(script)] if early else [])
        p.session.settle()
        read.append(player.ids)
        kept.append([(time - script[0][0], message) for _, time, message in p.log.kept])
        assert p.turns[0].notes == 2
    assert read[1][: len(read[0])] == read[0]
    assert read[1][len(read[0]) :] == [EventIds(PerformanceTokenizer()).waits(100)[0]] * 10  # the pause since then
    assert [row[1] for row in kept[0]] == [row[1] for row in kept[1]]
    assert [row[0] for row in kept[0]] == pytest.approx([row[0] for row in kept[1]])


def test_the_answer_stops_when_the_human_plays_again():
    """The model's keys go up before the human's note, and the planned notes are rewound."""
    p = Performance([*PHRASE, *again(3.0)], pause=1.0, max_turn=None, calls=[(4.5, "stop", "enough")], thru=True)
    assert p.how == ["the model took over", "interrupted", "the session ended"]
    times = [time for time, _, _ in p.model]
    assert max(times) == 3.0
    at_once = [sounding(m) for time, m in p.wire.sent if time == 3.0]
    assert at_once[-1] > 0
    assert not any(at_once[:-1])
    assert p.statistics.rewound > 10
    check_stream(p)


@pytest.mark.parametrize(
    ("options", "script", "calls", "taken", "handed"),
    [
        ({"take_over": "pedal"}, [(1.0, control(64, 99)), (1.1, control(64, 0)), (2.0, control(64, 64))], [], 1.0, 2.0),
        ({"take_over": "controller:67"}, [(1.5, control(67, 127)), (3.0, control(67, 0))], [], 1.5, None),
        ({"take_over": "enter"}, [], [(1.2, "pass_turn"), (2.4, "pass_turn"), (4, "stop", "enough")], 1.2, 2.4),
        ({"take_over": "pause", "pause": 0.25}, [], [], 1.15, None),
    ],
)
def test_each_take_over_option_passes_the_turn(options, script, calls, taken, handed):
    """All but the pause also end the model's turn; a controller that passes turns is neither sent on nor recorded."""
    p = Performance([*PHRASE, *script], calls=calls, thru=True, **options)
    assert p.how[:2] == ["the model took over", "handed back" if handed else "done"]
    assert p.model[0][0] == pytest.approx(taken + 0.05)
    assert p.turns[1].seconds == pytest.approx(handed - taken if handed else 2, abs=0.001 if handed else 3.1)
    assert not [m for _, _, m in p.log.kept if m.type == "control_change"]
    check_stream(p)


def test_a_pause_begins_when_the_last_key_goes_up_whatever_the_pedal():
    p = Performance([(0, on(60)), (0.1, control(64, 127)), (3.0, off(60)), (8.0, control(64, 0))], pause=1.0)
    assert p.model[0][0] == pytest.approx(4.05)


def test_the_model_can_begin_without_any_music_before():
    p = Performance([], take_over="enter", calls=[(1.0, "pass_turn"), (3.5, "stop", "enough")])
    assert p.player.ids[0] == BOS
    assert p.model[0][0] == pytest.approx(1.05)
    assert p.how[0] == "done"


def test_a_held_chord_stays_in_the_stream_until_it_is_released():
    """The human passes the turn by pedal with a chord down, and releases it while the model plays."""
    chord = [(0.0, on(pitch)) for pitch in (40, 44, 47)]
    releases = [(1.5 + i / 50, off(pitch)) for i, pitch in enumerate((40, 44, 47))]
    script = [*chord, (1.0, control(64, 127)), *releases, (1.8, control(64, 0))]
    p = Performance(script, RandomPlayer(3, pitches=range(50, 70)), take_over="pedal")
    assert p.statistics.rewound > 5
    assert p.how == ["the model took over", "done"]
    check_stream(p, late=0.05)


@pytest.mark.slow
def test_a_key_is_released_before_the_other_voice_presses_it():
    """With `thru` both voices share a channel; `Performance` checks all keys sent."""
    script = [(0.0, on(60)), (1.0, control(64, 127)), (1.3, on(60)), (1.4, off(60)), (1.5, control(64, 0))]
    script += [(time, message) for i in range(20) for time, message in ((2 + i / 5, on(59 + i % 3)),)]
    for seed in range(4):
        for take_over in ("pedal", "pause"):
            Performance(script, RandomPlayer(seed, pitches=(59, 60, 61)), take_over=take_over, thru=True, pause=0.05)


def test_late_notes_are_sent_at_once_and_later_ones_dropped():
    """A model that needs 30 ms per token and plays faster than that does not drift."""
    slow = Performance(PHRASE, RandomPlayer(2, pauses=2), seconds=0.03, pause=0.5, max_behind=100.0)
    late = slow.statistics.lateness
    assert slow.statistics.dropped > 5
    assert late.largest <= LiveOptions().max_late
    quick = Performance(PHRASE, RandomPlayer(2, pauses=2), seconds=0.0, pause=0.5)
    assert quick.statistics.dropped == 0
    assert quick.statistics.lateness.largest == 0.0
    presses, due = ([note for note in after_human(p) if note[2]] for p in (slow, quick))
    assert len(presses) == late.n
    # The same model plays the same notes: those sent are on time or up to 0.1 s late.
    expected = iter(due)
    for time, *note in presses:
        assert next(t for t, *other in expected if other == note and -1e-9 <= time - t <= 0.1 + 1e-9)


def test_a_turn_counts_the_notes_that_were_sent():
    slow = Performance(PHRASE, RandomPlayer(2, pauses=2), seconds=0.03, pause=0.5, max_behind=100.0)
    assert slow.statistics.dropped
    sent = sum(velocity > 0 for _, _, velocity in slow.model)
    assert sum(turn.notes for turn in slow.turns if turn.voice is Voice.MODEL) == sent


def after_human(p: Performance) -> list[tuple[float, int, int]]:
    """Return what the model played, with times counted from the human's last key."""
    end = max(time for time, _, _ in p.log.of(Voice.HUMAN))
    return [(time - end, pitch, velocity) for time, pitch, velocity in p.model]


def test_a_model_far_behind_skips_to_the_present():
    p = Performance(PHRASE, RandomPlayer(2, pauses=2), seconds=0.03, pause=0.5, max_turn=6.0)
    assert p.statistics.behind > 2
    assert p.statistics.lateness.largest <= LiveOptions().max_late
    presses = [time for time, _, velocity in p.model if velocity]
    assert max(b - a for a, b in pairwise(presses)) < 1.5


def test_notes_are_sent_early_for_an_instrument_with_latency():
    p = Performance([*PHRASE, *again(4.0)], pause=1.0, latency=0.2)
    first = next(time for time, m in p.wire.sent if sounding(m))
    assert first == pytest.approx(1.95)
    assert p.model[0][0] == pytest.approx(2.15)
    assert p.statistics.dropped == 0
    check_stream(p, late=0.2)


def test_a_recording_has_the_times_at_which_an_instrument_with_latency_sounds():
    """Also of keys that are released because the human plays again."""
    p = Performance([*PHRASE, *again(2.5)], RandomPlayer(2, pauses=2), pause=0.5, latency=0.2)
    assert "interrupted" in p.how
    recorded = [(time, message) for voice, time, message in p.log.kept if voice is Voice.MODEL]
    sent = [(pytest.approx(time + 0.2), message) for time, message in p.wire.sent]
    assert recorded == sent[: len(recorded)]


@pytest.mark.slow
def test_the_plan_never_exceeds_what_can_be_rewound():
    """Checked with a segment of 8 tokens and many interruptions; `RandomPlayer.rewind` asserts it."""
    script = [event for i in range(12) for event in ((i * 0.7, on(60)), (i * 0.7 + 0.1, off(60)))]
    for seed in range(3):
        p = Performance(script, RandomPlayer(seed, segment_length=8), pause=0.2, seconds=0.001, max_behind=9.0)
        assert p.how.count("interrupted") == 11


def test_drums_and_the_clock_are_sent_on_but_not_read():
    script = [*PHRASE, (0.6, on(36, channel=9)), (0.65, off(36, channel=9)), (0.7, Message("clock"))]
    p = Performance(script, thru=True)
    kinds = {(m.type, getattr(m, "channel", None)) for _, m in p.wire.sent}
    assert {("note_on", 9), ("note_off", 9), ("clock", None)} <= kinds
    assert 36 not in {pitch for _, pitch, _ in p.log.of(Voice.HUMAN)}
    check_stream(p)


@pytest.mark.parametrize("after", [0, 5])
def test_a_lost_output_ends_the_session(after):
    """Nothing is sent after that; the recording has the notes until then."""
    p = Performance(PHRASE, RandomPlayer(1), wire=FailingWire(range(after, 10**9)))
    assert p.reason == "wire: broken"
    assert len(p.wire.sent) == after
    assert p.how == ["the model took over", "the session ended"]
    assert p.model


class Device:
    """An output of the computer that is unplugged at a time."""

    is_input = False

    def __init__(self, until: float):
        self.until = until

    def start(self, listener) -> None:
        """See `ports.Endpoint`."""
        self.clock = listener.clock

    def lost(self) -> str | None:
        """See `ports.Endpoint`."""
        return "device: unplugged" if self.clock.now() >= self.until else None


@pytest.mark.parametrize("until", [0.0, 1.3])
def test_an_unplugged_device_ends_the_session(until):
    """Within two seconds, in the middle of a turn."""
    p = Performance(PHRASE, RandomPlayer(1), devices=[Device(until)], max_turn=20)
    assert p.reason == "device: unplugged"
    assert until <= p.clock.now() < until + 2.1
    check_stream(p)


@pytest.mark.parametrize("seconds", [0.0, 0.004])
def test_a_failing_model_leaves_no_key_down(seconds):
    """The state can still be saved."""
    player = RandomPlayer(1)
    failing = iter([0] * 60)

    def draw(lane, original=player.draw):
        if next(failing, None) is None:
            raise UserError("model: its prediction is not a number")
        return original(lane)

    player.draw = draw
    p = Performance(PHRASE, player, seconds=seconds, fails=True)
    assert isinstance(p.error, UserError)
    assert p.model
    check_stream(p)


KEYS = st.integers(58, 63)
EVENT = st.one_of(
    st.builds(on, KEYS, st.integers(1, 127), st.sampled_from([0, 0, 1])),
    st.builds(on, KEYS, st.just(0)),
    st.builds(off, KEYS, st.sampled_from([0, 0, 1])),
    st.builds(control, st.sampled_from([64, 64, 67, 1, 123]), st.sampled_from([0, 20, 64, 127])),
    st.just(Message("clock")),
)
SCRIPT = st.lists(st.tuples(st.sampled_from([0.0, 0.003, 0.02, 0.1, 0.4, 1.5]), EVENT), max_size=30)
OPTIONS = st.fixed_dictionaries(
    {
        "take_over": st.sampled_from(["pause", "pedal", "controller:67"]),
        "pause": st.sampled_from([0.03, 0.3]),
        "max_turn": st.sampled_from([0.2, 1.0]),
        "thru": st.booleans(),
        "latency": st.sampled_from([0.0, 0.12]),
        "seconds": st.sampled_from([0.0, 0.002, 0.02, 0.15]),
        "calls": st.lists(st.tuples(st.floats(0, 4), st.sampled_from(["pass_turn", "finish"])), max_size=3),
    }
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [RandomPlayer, SubwordPlayer])
@settings(max_examples=100, deadline=None)
@given(script=SCRIPT, options=OPTIONS, seed=st.integers(0, 999), segment_length=st.sampled_from([8, 24, 64]))
def test_all_keys_go_up_and_the_stream_is_valid_in_any_session(kind, script, options, seed, segment_length):
    """Any interleaving, any speed of the model. `Performance` checks the keys sent, the player its stream."""
    time, timed = 0.0, []
    for wait, message in script:
        time += wait
        timed.append((time, message))
    p = Performance(timed, kind(seed, segment_length, pitches=range(58, 64)), **options)
    p.stream()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [RandomPlayer, SubwordPlayer])
@settings(max_examples=20, deadline=None)
@given(
    notes=st.lists(st.tuples(st.integers(2, 60), st.integers(2, 30), st.integers(40, 90)), min_size=1, max_size=7),
    seed=st.integers(0, 999),
    seconds=st.sampled_from([0.0, 0.001]),
    thru=st.booleans(),
)
def test_the_player_reads_what_sounds(kind, notes, seed, seconds, thru):
    """The human plays single notes and the model in between; stream and sound agree key by key."""
    time, script = 0.0, []
    for wait, length, pitch in notes:
        script += [(time, on(pitch)), (time + length / 50, off(pitch))]
        time += (length + wait) / 50
    p = Performance(script, kind(seed), pause=0.25, seconds=seconds, max_turn=0.5, thru=thru, max_behind=99.0)
    if not p.statistics.dropped:
        check_stream(p, late=0.06)
