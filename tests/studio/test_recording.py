"""What is played becomes a take; a take is played to a MIDI output."""

import math
import random
import threading

import numpy as np
import pytest
from mido import Message
from support.music import on_grid, random_notes
from support.studio import Recorder
from support.studio_models import make_work

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.live.clock import VirtualClock
from dsmr_mlx.live.instrument import PANIC, Voice, is_note_off, is_note_on
from dsmr_mlx.live.options import LiveOptions
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.studio.duet import Duet
from dsmr_mlx.studio.playback import Playback
from dsmr_mlx.studio.recording import MAX_PAUSE, WRITE_SECONDS, TakeRecorder
from dsmr_mlx.studio.session import Session


@pytest.fixture
def session(tmp_path):
    """An empty session."""
    session = Session(tmp_path / "a.studio", Recorder())
    yield session
    session.close()


def press(pitch: int, velocity: int = 60) -> Message:
    """Press a key."""
    return Message("note_on", note=pitch, velocity=velocity)


def release(pitch: int) -> Message:
    """Release a key."""
    return Message("note_off", note=pitch)


def pedal(value: int) -> Message:
    """Move the pedal."""
    return Message("control_change", control=64, value=value)


def record(session: Session, timed: list[tuple], kind: str = "played", **fields) -> TakeRecorder:
    """Record messages (time, message), or (time, voice, message); written at random times."""
    heard = []
    recorder = TakeRecorder(session, kind, tell=lambda *key: heard.append(key), **fields)
    recorder.heard = heard
    for time, *voice, message in timed:
        recorder.add(voice[0] if voice else Voice.HUMAN, time, message)
        if random.Random(time).random() < 0.5:
            recorder.act(time + 0.001)
    recorder.close()
    return recorder


def test_nothing_played_is_no_take(session):
    assert record(session, [(1.0, pedal(127)), (2.0, release(60))]).take is None
    assert not session.tree.takes


def test_notes_begin_at_the_first_key(session):
    take = record(session, [(10.0, press(60)), (10.5, press(64, 70)), (11.0, release(60)), (11.25, release(64))]).take
    made = session.get(take)
    assert made.rows == [(0.0, 1.0, 60, 60), (0.5, 1.25, 64, 70)]
    assert (made.kind, made.end, made.growing, made.parent) == ("played", 1.25, False, None)


def test_the_pedal_lengthens_notes(session):
    timed = [(0, press(60)), (0.2, pedal(127)), (0.5, release(60)), (0.7, press(62)), (1.5, pedal(0)), (2, release(62))]
    made = session.get(record(session, timed).take)
    assert made.rows == [(0.0, 1.5, 60, 60), (0.7, 2.0, 62, 60)]
    assert made.pedal == [(0.2, 127), (1.5, 0)]


def test_a_recording_without_a_last_time_keeps_what_has_sounded(session):
    """The keys are up, the pedal holds the last chord, and the duet is stopped."""
    recorder = TakeRecorder(session, "played")
    recorder.add(Voice.HUMAN, 1.0, pedal(100))
    recorder.add(Voice.HUMAN, 1.0, press(60))
    recorder.add(Voice.HUMAN, 2.0, release(60))
    recorder.act(3.0)
    recorder.close()
    assert session.get(1).rows == [(0.0, 2.0, 60, 60)]


def test_a_moving_pedal_is_sent_once_and_written_ten_times_a_second(session):
    """A pedal sends up to a hundred messages a second, also while a key is held."""
    recorder, moves = TakeRecorder(session, "played"), 500
    recorder.add(Voice.HUMAN, 1.0, press(60))
    for i in range(moves):
        now = 1.0 + i / 100
        recorder.add(Voice.HUMAN, now, pedal(i % 128))
        recorder.act(now)
    recorder.close(now)
    sent = session.publish.of("notes")
    known = []
    for message in sent:
        if message["pedal"] is None:
            assert message["pedal_from"] is None
        else:
            known[message["pedal_from"] :] = message["pedal"]
    assert [tuple(move) for move in known] == session.get(1).pedal
    assert len(known) == moves + 1
    assert sum(len(message["pedal"] or ()) for message in sent) == len(known)
    assert len(sent) <= 5.0 / WRITE_SECONDS + 3
    assert session.store.load()[0].takes[1].pedal == session.get(1).pedal


def test_held_notes_end_with_the_recording(session):
    recorder = TakeRecorder(session, "played")
    recorder.add(Voice.HUMAN, 1.0, press(60))
    recorder.add(Voice.HUMAN, 1.0, pedal(100))
    recorder.act(1.5)
    assert session.get(1).rows == [(0.0, 0.5, 60, 60)]
    assert session.get(1).growing
    assert recorder.due() == 1.75  # a note that is held grows
    recorder.act(2.0)
    assert session.get(1).end == 1.0
    recorder.close(4.0)
    assert session.get(1).rows == [(0.0, 3.0, 60, 60)]
    assert session.get(1).pedal == [(0.0, 100), (3.0, 0)]
    recorder.add(Voice.HUMAN, 5.0, press(62))
    assert len(session.get(1).rows) == 1


def test_a_pedal_in_a_long_pause_does_not_lengthen_it(session):
    timed = [
        (0, press(60)),
        (0.5, release(60)),
        (60, pedal(127)),
        (119, pedal(0)),
        (120, press(62)),
        (121, release(62)),
    ]
    made = session.get(record(session, timed).take)
    assert made.rows == [(0.0, 0.5, 60, 60), (0.5 + MAX_PAUSE, 1.5 + MAX_PAUSE, 62, 60)]
    assert made.pedal == [(0.5 + MAX_PAUSE, 127), (0.5 + MAX_PAUSE, 0)]


def test_a_full_disk_is_told_once_and_tried_again_later(session, monkeypatch):
    told, tried = [], []

    def full(*arguments, **fields):
        tried.append(1)
        raise UserError("disk is full")

    recorder = TakeRecorder(session, "played", failed=told.append)
    with monkeypatch.context() as patch:
        patch.setattr(session, "add", full)
        for i in range(200):  # ten seconds
            recorder.add(Voice.HUMAN, i / 20, press(60) if i % 2 == 0 else release(60))
            recorder.act(i / 20)
    assert told == ["disk is full"]
    assert len(tried) <= 6
    recorder.add(Voice.HUMAN, 12.0, press(64))
    recorder.act(12.0)
    assert len(session.get(1).rows) == 101
    with monkeypatch.context() as patch:
        patch.setattr(session, "extend", full)
        recorder.add(Voice.HUMAN, 20.0, release(64))
        recorder.act(20.0)
    assert len(told) == 2
    recorder.close()


def test_a_recording_that_could_not_be_kept_can_be_ended_again(session, monkeypatch):
    def full(*arguments, **fields):
        raise UserError("disk is full")

    recorder = TakeRecorder(session, "played", failed=lambda reason: None)
    recorder.add(Voice.HUMAN, 0.0, press(60))
    with monkeypatch.context() as patch:
        patch.setattr(session, "add", full)
        for _ in range(2):
            with pytest.raises(UserError, match="full"):
                recorder.close(2.0)
    recorder.close(9.0)
    assert session.get(recorder.take).rows == [(0.0, 2.0, 60, 60)]


def test_a_held_key_does_not_write_all_later_notes_again_each_time(session):
    recorder, written, pitches = TakeRecorder(session, "played"), [], range(60, 64)
    recorder.add(Voice.HUMAN, 0.0, press(40))
    session.store.save_notes = lambda take, first, rows, voice=None: written.append(len(rows))
    for i in range(600):
        now = 0.1 * i
        recorder.add(Voice.HUMAN, now, press(pitches[i % 4]))
        recorder.add(Voice.HUMAN, now + 0.05, release(pitches[i % 4]))
        recorder.act(now + 0.09)
    assert sum(written) < 9000, "all of them each time would be 180,000"
    recorder.close(60.0)
    (held,) = [row for row in session.get(recorder.take).rows if row[2] == 40]
    assert held[:2] == (0.0, 60.0)


def test_long_pauses_are_shortened(session):
    timed = [(0, press(60)), (1, release(60)), (500, press(62)), (501, release(62))]
    made = session.get(record(session, timed).take)
    assert made.rows == [(0.0, 1.0, 60, 60), (1 + MAX_PAUSE, 2 + MAX_PAUSE, 62, 60)]


@pytest.mark.parametrize(
    "other",
    [
        Message("aftertouch", value=5),
        Message("program_change", program=5),
        Message("control_change", control=1, value=5),
        release(99),
    ],
    ids=str,
)
def test_what_changes_nothing_disturbs_no_recording(session, other):
    """It is not written, begins no take, and does not lengthen a pause."""
    writes, extend = [], session.extend

    def counting(*arguments, **options):
        writes.append(arguments[:4])
        extend(*arguments, **options)

    session.extend = counting

    def recorded(others: bool) -> tuple:
        del writes[:]
        recorder = TakeRecorder(session, "played")
        for time in range(200):
            if others:
                recorder.add(Voice.HUMAN, time, other)
            for note, onset in ((60, 5), (62, 150)):
                if time in (onset, onset + 1):
                    recorder.add(Voice.HUMAN, time, press(note) if time == onset else release(note))
            recorder.act(time + 0.5)
        recorder.close(200.0)
        made = session.get(recorder.take)
        return made.rows, made.pedal, made.end, [write[1:] for write in writes]

    assert recorded(True) == recorded(False)


def test_two_voices_share_the_keyboard(session):
    human, model = Voice.HUMAN, Voice.MODEL
    timed = [
        (0, human, press(60)),
        (1, model, press(60, 50)),
        (2, human, release(60)),  # has no effect on the model's note
        (3, model, release(60)),
    ]
    recorder = record(session, timed, "duet", begin=5.0)
    made = session.get(recorder.take)
    assert made.rows == [(5.0, 6.0, 60, 60), (6.0, 8.0, 60, 50)]
    assert made.voice == [0, 1]
    assert recorder.heard == [(60, 60, 0, 5.0), (60, 50, 1, 6.0), (60, 0, 0, 7.0), (60, 0, 1, 8.0)]


@pytest.mark.parametrize("seed", range(5))
def test_any_keys_give_notes_without_overlaps(session, seed):
    choose = random.Random(seed)
    time, timed = 0.0, []
    for _ in range(200):
        time += choose.choice([0, 0, 0.01, 0.2, 1])
        kind = choose.choice([press, release, pedal])
        message = kind(choose.randrange(60, 66)) if kind is not pedal else pedal(choose.choice([0, 127]))
        timed.append((time, choose.choice(list(Voice)), message))
    made = session.get(record(session, timed, "duet").take)
    assert len(made.voice) == len(made.rows) > 10
    for pitch in range(60, 66):
        own = made.own.take(made.own.pitch == pitch)
        assert (own.onset[1:] >= own.offset[:-1] - 0.0011).all()  # a note lasts at least a millisecond
    assert session.store.load()[0].takes[made.id].rows == made.rows


@pytest.mark.parametrize("step", ["add", "extend"])
def test_a_recording_may_end_while_it_is_written(session, step, monkeypatch):
    """The clock's thread is in the middle of writing."""
    writing, ended = threading.Event(), threading.Event()
    original = getattr(session, step)

    def slow(*arguments, **options):
        if threading.current_thread() is not threading.main_thread():
            writing.set()
            ended.wait(0.1)
        return original(*arguments, **options)

    monkeypatch.setattr(session, step, slow)
    recorder = TakeRecorder(session, "played")
    recorder.add(Voice.HUMAN, 1.0, press(60))
    clock = threading.Thread(target=recorder.act, args=(1.5,))
    clock.start()
    assert writing.wait(10)
    recorder.close(2.0)
    ended.set()
    clock.join()
    recorder.act(9.0)
    (take,) = session.tree.takes.values()
    assert (take.rows, take.growing) == ([(0.0, 1.0, 60, 60)], False)


def test_what_is_played_before_a_duet_is_ready_keeps_its_times(tmp_path):
    work, _ = make_work(tmp_path)
    sent, told = [], []
    options = LiveOptions(pause=100.0, thru=True)
    job = Duet(None, options, 1, lambda message: sent.append(message) or True, lambda *key: told.append(key))
    now, real = job.clock.now() - 10, job.clock.now
    for time, message in [(0, press(60)), (0.5, press(64)), (0.75, release(60)), (2, release(64)), (3, press(67))]:
        job.clock.now = lambda time=time: now + time
        job.receive(message)
    job.clock.now = real

    def stop(message: dict) -> None:
        if message.get("activity") == "duet":
            job.receive(release(67))
            job.stop.set()

    work.publish = stop
    made = work.session.get(job.run(work))
    assert made.rows[:2] == [(0.0, 0.75, 60, 60), (0.5, 2.0, 64, 60)]
    assert made.rows[2][::2] == (3.0, 67)
    assert made.rows[2][1] >= 10.0
    assert [message for message in sent if is_note_on(message)] == []  # it is over
    assert [key[:3] for key in told] == [(67, 0, 0)]
    assert job.live.transcript.origin == now
    work.session.close()


def test_what_cannot_be_written_is_written_later(session, monkeypatch):
    problems = []
    recorder = TakeRecorder(session, "played", failed=problems.append)
    original = session.add
    monkeypatch.setattr(session, "add", lambda *a, **k: session.get(77))
    recorder.add(Voice.HUMAN, 1.0, press(60))
    recorder.add(Voice.HUMAN, 1.0, pedal(100))
    recorder.act(1.5)
    assert problems == ["`take` 77: no such take"]
    monkeypatch.setattr(session, "add", original)
    recorder.close(2.0)
    assert session.get(1).rows == [(0.0, 1.0, 60, 60)]
    assert session.get(1).pedal == [(0.0, 100), (1.0, 0)]


class Sent(list):
    """Messages and their times; fails from the n-th on."""

    def __init__(self, clock: VirtualClock, fails_at: int | None = None):
        self.clock, self.fails_at = clock, fails_at

    def __call__(self, message: Message) -> bool:
        self.append((self.clock.now(), message))
        return self.fails_at is None or len(self) < self.fails_at

    def notes(self) -> list[tuple]:
        """The notes as rows, by matching presses and releases."""
        down, rows = {}, []
        for time, message in self:
            if is_note_on(message):
                assert message.note not in down
                down[message.note] = time, message.velocity
            elif is_note_off(message):
                onset, velocity = down.pop(message.note)
                rows.append((round(onset, 6), round(time, 6), message.note, velocity))
        assert not down
        return sorted(rows)


def play(notes: Notes, at: float = 0.0, fails_at: int | None = None) -> tuple[Sent, list]:
    """Play a piece in virtual time."""
    clock, ended = VirtualClock(), []
    sent = Sent(clock, fails_at)
    playback = Playback(lambda: (notes, math.inf), at, clock.now(), sent, lambda: ended.append(clock.now()))
    clock.schedule(playback)
    while clock.step(1e6):
        pass
    return sent, ended


@pytest.mark.parametrize("seed", range(3))
def test_a_take_is_played_at_its_times(seed):
    notes = on_grid(random_notes(seed, 60))
    sent, ended = play(notes)
    assert sent.notes() == sorted((round(on, 6), round(off, 6), p, v) for on, off, p, v in notes.rows)
    assert len(ended) == 1
    assert {m.control for _, m in sent if m.type == "control_change"} == set(PANIC)


def test_it_begins_anywhere():
    notes = on_grid(random_notes(0, 60))
    sent, _ = play(notes, at=3.0)
    later = [(round(on - 3, 6), round(off - 3, 6), p, v) for on, off, p, v in notes.rows if on >= 3]
    assert sent.notes() == sorted(later)


def test_all_keys_are_up_if_the_port_fails():
    sent, ended = play(on_grid(random_notes(0, 60, lengths=(100, 200))), fails_at=20)
    assert len(ended) == 1
    on = [m.note for _, m in sent if is_note_on(m)]
    assert set(on) <= {m.note for _, m in sent if is_note_off(m)}


def test_nothing_is_played_of_an_empty_take():
    sent, ended = play(Notes.empty())
    assert len(ended) == 1
    assert not sent.notes()


def test_a_growing_take_is_played_as_it_grows():
    clock, ended, whole = VirtualClock(), [], on_grid(random_notes(0, 40))
    sent = Sent(clock)

    def music() -> tuple[Notes, float]:
        made = clock.now() + 0.5  # it is made half a second ahead
        there = whole.take(whole.onset < made)
        there = Notes(there.onset, np.minimum(there.offset, made), there.pitch, there.velocity)
        return there, made if made < whole.duration else math.inf

    playback = Playback(music, 0.0, clock.now(), sent, lambda: ended.append(clock.now()))
    clock.schedule(playback)
    while clock.step(1e4) and not ended:
        pass
    played = sent.notes()
    assert len(played) == len(whole)
    for got, row in zip(played, sorted(whole.rows), strict=True):
        assert got[2:] == row[2:]
        assert abs(got[0] - row[0]) < 0.11
        assert abs(got[1] - row[1]) < 0.22


def test_a_growing_take_is_put_together_ten_times_a_second_at_most():
    clock, looks, fast = VirtualClock(), [], [(i * 0.01, i * 0.01 + 0.05, 40 + i % 40, 64) for i in range(1000)]

    def music() -> tuple[Notes, float]:
        looks.append(clock.now())
        return Notes.of(fast), math.inf if clock.now() > 9 else 60.0

    clock.schedule(Playback(music, 0.0, 0.0, lambda message: True, lambda: None))
    while clock.step(1e4):
        pass
    assert 80 <= len(looks) <= 93


@pytest.mark.parametrize("around", [(), ((9.0, 9.2, 90, 64), (12.0, 12.5, 91, 64))], ids=["at the end", "in a gap"])
def test_playback_waits_for_a_take_that_grows_slowly(around):
    """A passage of 8 s is made at half of the tempo; what follows it is there from the beginning."""
    passage = [(i * 0.25, i * 0.25 + 0.2, 60 + i % 12, 64) for i in range(32)]
    clock, resumed = VirtualClock(), []
    sent = Sent(clock)

    def music() -> tuple[Notes, float]:
        made = 1.0 + 0.5 * clock.now()
        rows = [row for row in passage if row[0] < made]
        return Notes.of([*rows, *around]), made if made < 8.0 else math.inf

    playback = Playback(music, 0.0, 0.0, sent, lambda: None, lambda at: resumed.append((clock.now(), at)))
    clock.schedule(playback)
    times = [0.0]
    while clock.step(1e4):
        times.append(playback.time_at(clock.now()))
        assert times[-1] <= music()[1]
    assert np.diff(times).min() > -1e-9
    played = sent.notes()
    assert [row[2:] for row in played] == [row[2:] for row in (*passage, *around)]
    assert 2 < len(resumed) < 20
    for got, row in zip(played, (*passage, *around), strict=True):
        now, at = max([(0.0, 0.0), *(each for each in resumed if each[1] <= row[0])])
        assert got[0] == pytest.approx(now + row[0] - at, abs=1e-3)
        assert row[0] < 1.0 + 0.5 * got[0] or row in around


def test_playback_does_not_go_back_if_music_is_made_anew():
    clock, sent = VirtualClock(), []
    rows = [(i * 0.25, i * 0.25 + 0.2, 60, 64) for i in range(40)]

    def music() -> tuple[Notes, float]:
        now = clock.now()
        made = 9.0 if now < 3.1 else 1.0 + (now - 3.1)
        return Notes.of(rows), made if now < 20 else math.inf

    clock.schedule(Playback(music, 0.0, 0.0, lambda m: sent.append(m) or True, lambda: None))
    while clock.step(1e4):
        pass
    assert len([m for m in sent if is_note_on(m)]) == len(rows)


def test_closing_releases_all_keys():
    clock = VirtualClock()
    sent = Sent(clock)
    notes = Notes.of([(0.0, 100.0, 60, 60), (0.0, 100.0, 64, 60)])
    playback = Playback(lambda: (notes, math.inf), 0.0, 0.0, sent, lambda: None)
    playback.act(0.0)
    playback.close()
    playback.act(200.0)
    assert len(sent.notes()) == 2
