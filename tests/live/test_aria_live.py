"""Sessions in Aria's vocabularies: the model reads the file's ids, and its notes are those that sounded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.live_stand_ins import PHRASE, Caller, Log, SlowClock, Wire, check_keys, control, off, on

from dsmr_mlx import DSMR, ModelConfig
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.evaluation.music.syntax import syntax_errors
from dsmr_mlx.generation.player import Player
from dsmr_mlx.generation.steering import PitchRange
from dsmr_mlx.live import note_transcript
from dsmr_mlx.live.hands import Hands
from dsmr_mlx.live.instrument import Voice
from dsmr_mlx.live.note_transcript import NoteIds, NoteTranscript
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.live.session import Session
from dsmr_mlx.live.sources import FilePlayer, TimedMessage
from dsmr_mlx.live.vocabularies import live_ids, transcript_of
from dsmr_mlx.tokenizers.aria.tokenizer import AriaTokenizer
from dsmr_mlx.tokenizers.aria.vocabulary import SIZES, TIME_STEP
from dsmr_mlx.tokenizers.event_grammar import beginning
from dsmr_mlx.tokenizers.registry import make_tokenizer

A, B, C = SIZES
TICK = 0.01001  # seconds


def model_of(size: int, segment_length: int) -> DSMR:
    """Return a small model with random weights, the same for the same arguments."""
    import mlx.core as mx

    mx.random.seed(0)
    shape = {"d_model": 16, "n_heads": 1, "n_layers": 1, "d_ff": 16, "vocab_size": size}
    return DSMR(ModelConfig(**shape, horizons=[segment_length], segment_length=segment_length))


def player_of(size: int, seed: int = 0, segment_length: int = 1024) -> Player:
    """Return a player of random notes above 60, a third of a second apart, some of them with pedal."""
    tokenizer = AriaTokenizer(size)
    v, bias = tokenizer.vocabulary, np.zeros(size, np.float32)
    place = v.index("onsets", np.arange(size))
    step = np.arange(size) == TIME_STEP
    if v.pedal is not None:
        bias[v.pedal : v.pedal + 2] = 4.0

    def move_on(logits, music):
        phase = np.array(music.phase)[:, None]
        late = np.maximum(place - phase, 0)
        return logits + bias - np.where(place >= 0, 0.03 * late, 0).astype(np.float32) + step * (phase > 440) * 12.0

    return Player(model_of(size, segment_length), tokenizer, seed=seed, processors=[move_on, PitchRange(61, 108)])


class LiveSession:
    """A session in virtual time: what was sent and recorded, and what the player has read."""

    def __init__(self, player: Player, script, *, seconds=0.0, calls=(), **options):
        self.player, self.clock, self.wire, self.log, self.turns = player, SlowClock(), Wire(), Log(), []
        self.wire.clock = self.clock
        if seconds:
            play = player.play

            def slow_play(limits=None):
                for token in play(limits):
                    self.clock.compute(seconds)
                    yield token

            player.play = slow_play
        options = LiveOptions(**{"max_turn": 6.0, "pause": 0.5} | options)
        self.session = Session(player, self.clock, self.wire, options, self.log, self.turns.append)
        human = FilePlayer([TimedMessage(time, message) for time, message in script])
        self.reason = self.session.run([human, *(Caller(*call) for call in calls)])
        self.session.settle()
        check_keys([message for _, message in self.wire.sent])

    @property
    def ids(self) -> np.ndarray:
        """All ids of the player, if it keeps that many; they obey the grammar."""
        (ids,) = self.player.recent
        assert len(ids) == self.player.position
        _, where = syntax_errors(np.array(ids), self.player.tokenizer)
        assert where in ("", "at the end")  # time steps may be the last
        return np.array(ids)

    def sounded(self, voice: Voice) -> list[tuple[float, float, int]]:
        """Return (onset, end, pitch) of the notes of a voice, in seconds."""
        down, found = {}, []
        for time, pitch, velocity in self.log.of(voice):
            if velocity:
                down[pitch] = time
            elif time - down[pitch] > TICK:  # a shorter one may have been replaced or stopped at once
                found.append((down[pitch], time, pitch))
        return sorted(found)


def performance(seed: int, pedal: bool = True) -> list[tuple[float, object]]:
    """Return messages at different whole milliseconds, the pedal up at the end. Keys are pressed again under it."""
    rng = np.random.default_rng(seed)
    times = iter(np.sort(rng.choice(15_000, 100, replace=False)).tolist())
    script, down, held = [], set(), False
    for time in times:
        move = rng.random()
        if pedal and move < 0.15:
            held = not held
            script.append((time, control(64, 127 * held)))
        elif down and (move < 0.55 or len(down) == 8):
            pitch = int(rng.choice(sorted(down)))
            down.remove(pitch)
            script.append((time, off(pitch)))
        else:
            pitch = int(rng.choice(sorted(set(range(40, 60)) - down)))
            down.add(pitch)
            script.append((time, on(pitch, int(rng.integers(1, 128)))))
    return [*script, *((16_000 + i, off(pitch)) for i, pitch in enumerate(down)), (16_500, control(64, 0))]


def midi_of(script) -> bytes:
    """Return the messages as a MIDI file with a tick of a millisecond."""
    import io

    import mido

    file, track, before = mido.MidiFile(ticks_per_beat=500), mido.MidiTrack(), 0
    file.tracks.append(track)
    for time, message in script:
        track.append(message.copy(time=time - before))
        before = time
    buffer = io.BytesIO()
    file.save(file=buffer)
    return buffer.getvalue()


def read_live(script, tokenizer: AriaTokenizer) -> list[int]:
    """Return the ids that a transcript gives for messages in milliseconds."""
    hands, transcript, ids = Hands(), NoteTranscript(NoteIds(tokenizer), beginning(tokenizer.event_grammar()), 7.0), []
    for time, message in script:
        now = 7.0 + time / 1000
        while transcript.next_time() <= now:
            due = transcript.next_time()
            before = len(ids)
            ids += transcript.flush(due + 1e-6)
            assert len(ids) > before or transcript.next_time() > due
        for pitch, velocity in hands.update(message):
            if velocity:
                transcript.press(now, pitch, velocity)
            else:
                transcript.release(now, pitch)
        transcript.move_pedal(now, *hands.pedal)
        ids += transcript.flush(now)
    transcript.release_voice(now, Voice.HUMAN)
    return ids + transcript.flush_all()


@given(seed=st.integers(0, 10_000), size=st.sampled_from(SIZES))
@settings(max_examples=40, deadline=None)
def test_music_is_read_as_from_its_file(seed, size):
    """Notes, pedal and time steps. Only notes that are pressed again while the pedal holds them may end later: both
    readings sound alike, because a key that is pressed again ends its note.
    """
    script, tokenizer = performance(seed), AriaTokenizer(size)
    found, expected = read_live(script, tokenizer), tokenizer.encode(midi_of(script))[2:-1].tolist()
    lengths = tokenizer.vocabulary.index("durations", np.array(expected)) >= 0
    assert len(found) == len(expected)
    assert np.array_equal(np.array(found)[~lengths], np.array(expected)[~lengths])
    later = np.array(found)[lengths] - np.array(expected)[lengths]
    assert later.min(initial=0) >= 0
    heard, known = tokenizer.decode(found), tokenizer.decode(expected)
    assert np.allclose(heard.rows, known.rows, atol=0.0101 if size == A else 1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_few_notes_end_later_than_in_the_file(size):
    """Over many pieces: in a single one the share depends on how often a key is pressed again."""
    tokenizer, later = AriaTokenizer(size), []
    for seed in range(40):
        script = performance(seed)
        found, expected = np.array(read_live(script, tokenizer)), tokenizer.encode(midi_of(script))[2:-1]
        lengths = tokenizer.vocabulary.index("durations", np.array(expected)) >= 0
        later += (found[lengths] > expected[lengths]).tolist()
    assert len(later) > 1000
    assert np.mean(later) < 0.06


@pytest.mark.parametrize("size", SIZES)
def test_the_answer_is_what_sounds(size):
    """Also what an interruption cuts: the player rewinds and reads the notes with the lengths that sounded."""
    for seed in range(2):
        again = [(3.3 + seed + time, message) for time, message in PHRASE]
        p = LiveSession(player_of(size, seed), [*PHRASE, *again], max_turn=4.0)
        assert [turn.reason for turn in p.turns[1::2]] == ["interrupted", "done"]
        model, human = p.sounded(Voice.MODEL), p.sounded(Voice.HUMAN)
        assert len(model) > 5
        assert model[0][0] >= 0.9 + 0.5 + 0.05
        assert sum(turn.notes for turn in p.turns[1::2]) >= len(model)
        start = human[0][0]
        read = [row for row in p.player.tokenizer.decode(p.ids).rows if row[1] - row[0] > TICK]
        read = sorted((pitch, begin, end) for begin, end, pitch, _ in read)
        expected = sorted((pitch, begin - start, end - start) for begin, end, pitch in (*model, *human))
        assert [row[0] for row in read] == [row[0] for row in expected]
        assert np.abs(np.array(read) - np.array(expected)).max() < 2.5 * TICK


@pytest.mark.parametrize("size", [A, C])
def test_the_end_of_the_prompt_is_marked_once(size):
    p = LiveSession(player_of(size), [*PHRASE, *((9 + time, message) for time, message in PHRASE)], max_turn=1.0)
    assert len(p.turns) == 4
    mark = p.player.tokenizer.vocabulary.prompt_end
    assert (p.ids == mark).sum() == (mark is not None)
    if mark is not None:
        assert p.ids.tolist().index(mark) == 2 + 2 * 3


def test_the_model_begins_without_any_music_before():
    p = LiveSession(player_of(C), [], take_over="enter", calls=[(7.0, "pass_turn"), (9.0, "stop", "enough")])
    assert p.turns[0].voice is Voice.MODEL
    assert min(note[0] for note in p.sounded(Voice.MODEL)) >= 7.05
    assert C - 1 not in p.ids


def test_keys_that_are_down_get_the_likeliest_lengths():
    """Not shorter than they have been; the pedal stays down, and what the human does with them later is not read."""
    script = [(0.0, on(50)), (0.5, control(64, 127)), (1.0, on(40)), (1.1, off(40)), (5.5, off(50))]
    script.append((5.6, control(64, 0)))
    p = LiveSession(player_of(B), script, take_over="enter", calls=[(2.0, "pass_turn"), (5.0, "stop", "enough")])
    v, names = p.player.tokenizer.vocabulary, [p.player.tokenizer.tokens[i] for i in p.ids]
    assert names[2:4] + names[5:9] == ["piano_50.60", "Onset_0", "Pedal_down", "Onset_500", "piano_40.60", "Onset_1000"]
    expected, least = player_of(B), {4: 200, 9: 100}
    expected.read(np.empty(0, np.int64))
    for place in range(2, 10):
        if place in least:
            likely = np.array(expected.logits)[0, v.durations + least[place] : v.durations + 501]
            assert p.ids[place] == v.durations + least[place] + int(likely.argmax())
        expected.read(p.ids[place : place + 1])
    assert p.ids[10] != v.pedal + 1 or v.index("onsets", p.ids[11]) >= 205
    assert "Pedal_up" in names


def test_a_long_silence_is_shortened():
    p = LiveSession(player_of(A), [*PHRASE, *((300 + time, message) for time, message in PHRASE)], take_over="enter")
    assert (p.ids == TIME_STEP).sum() == 2
    assert p.player.tokenizer.decode(p.ids).onset[2] == pytest.approx(10.5)


@pytest.mark.parametrize("segment_length", [4, 16, 64])
def test_notes_longer_than_what_can_be_rewound(segment_length):
    """They keep the lengths that the model gave them, and the session goes on."""
    again = [(3 + 2 * i + time, message) for i in range(4) for time, message in PHRASE]
    p = LiveSession(player_of(C, 3, segment_length), [*PHRASE, *again], pause=0.2)
    assert p.reason == "the music is over"
    assert len(p.sounded(Voice.MODEL)) > 10


def test_a_slow_model_skips_and_no_key_stays_down():
    p = LiveSession(player_of(A, 1), PHRASE, seconds=0.2, max_turn=8.0)
    assert p.turns[1].behind > 0
    assert p.ids.size
    assert all(end - begin < 5.2 for begin, end, _ in p.sounded(Voice.MODEL))


@pytest.mark.parametrize("size", SIZES)
def test_a_player_that_stopped_within_a_note_goes_on_after_the_last_complete_one(size):
    ids = AriaTokenizer(size).encode(midi_of(performance(2, pedal=False)))[:-1]
    complete = player_of(size, segment_length=512)
    complete.read(np.empty(0, np.int64))
    complete.read(ids[2:-3])
    for cut in (0, 1, 2):
        player = complete.copy()
        player.read(ids[-3 : len(ids) - 3 + cut])
        transcript = transcript_of(live_ids(player.tokenizer), player, 50.0)
        assert player.position == len(ids) - 3
        state = player.moments[0].state
        assert player.walk.grammar.allowed[state, TIME_STEP]
        transcript.release_voice(50.0, Voice.MODEL)
        transcript.press(50.5, 60, 64)
        transcript.release(50.8, 60)
        added = np.array(transcript.flush(50.9))
        player.read(added)
        assert syntax_errors(np.array(player.recent[0]), player.tokenizer) == (0, "")


def test_the_end_of_the_prompt_can_be_rewound_and_saved(tmp_path):
    """<X> is read, and moves nothing."""
    player = player_of(C)
    player.read(np.empty(0, np.int64))
    player.read(player.tokenizer.encode(midi_of(performance(3)))[2:-1])
    before, position = player.moments[0], player.position
    player.read(np.array([C - 1]))
    assert player.position == position + 1
    assert player.moments[0].ticks == before.ticks
    player.read(np.array([TIME_STEP]))
    player.rewind(1)
    assert player.moments[0].ticks == before.ticks
    player.processors = player.processors[1:]
    player.save(tmp_path / "state.safetensors")
    loaded = Player.load(tmp_path / "state.safetensors", player.model, player.tokenizer)
    assert loaded.recent[0][-1] == C - 1
    player.rewind(1)
    assert (player.position, C - 1 in player.recent[0]) == (position, False)


def test_waiting_notes_are_limited(monkeypatch):
    monkeypatch.setattr(note_transcript, "MAX_WAITING", 100)
    transcript = NoteTranscript(NoteIds(AriaTokenizer()), beginning(AriaTokenizer().event_grammar()), 0.0)
    for i in range(200):
        transcript.press(i / 10_000, i % 128, 64)
        transcript.flush(i / 10_000)
        assert len(transcript.waiting) <= 100


def test_other_ids_are_refused():
    with pytest.raises(UserError, match="tokenizer aria:17727: its ids are of several instruments"):
        live_ids(AriaTokenizer(programs=True))
    with pytest.raises(UserError, match=r"a note has a length.*needs 'performance' or 'aria'"):
        live_ids(make_tokenizer("miditok:REMI"))
