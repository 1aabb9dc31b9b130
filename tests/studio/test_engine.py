"""The engine: one job at a time, a new one stops the old one, the background makes way, errors do not end it."""

import threading

import pytest
from support.studio import Recorder

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.studio.engine import Engine
from dsmr_mlx.studio.states import Interrupted
from dsmr_mlx.studio.work import IDLE, Stop, Work

TIMEOUT = 10.0


class Waits:
    """A job that runs until it is stopped or let go; it notes its thread."""

    def __init__(self, take: int | None = None, error: Exception | None = None):
        self.stop, self.take, self.error = Stop(), take, error
        self.begun, self.go, self.threads = threading.Event(), threading.Event(), []

    def run(self, work: Work) -> int | None:
        """See `Job`."""
        self.threads.append(threading.current_thread().name)
        work.show("making", "something")
        self.begun.set()
        while not self.go.wait(0.005):
            self.stop.check()
        if self.error:
            raise self.error
        return self.take


class Answers(list):
    """What `finished` was called with."""

    def __init__(self) -> None:
        self.come = threading.Event()

    def __call__(self, take: int | None, error: str | None) -> None:
        self.append((take, error))
        self.come.set()

    def one(self) -> tuple:
        """The only answer."""
        assert self.come.wait(TIMEOUT)
        (answer,) = self
        return answer


@pytest.fixture
def engine():
    """An engine without a session."""
    unexpected, published = [], Recorder()
    engine = Engine(Work(None, None, None, published), unexpected.append)
    engine.unexpected_errors, engine.published = unexpected, published
    yield engine
    engine.close()


def submit(engine: Engine, job: Waits) -> Answers:
    """Submit a job."""
    answers = Answers()
    engine.submit(job, answers)
    return answers


def test_a_job_is_done_and_answered(engine):
    job = Waits(take=7)
    answers = submit(engine, job)
    assert job.begun.wait(TIMEOUT)
    assert engine.job is job
    job.go.set()
    assert answers.one() == (7, None)
    engine.drain()
    assert engine.job is None
    assert job.threads == ["engine"]
    assert engine.work.status is IDLE
    assert [m["activity"] for m in engine.published.of("status")] == ["making", "idle"]


def test_a_new_job_stops_the_one_before_and_those_that_wait(engine):
    first, second, third = Waits(), Waits(), Waits(take=3)
    first_answers = submit(engine, first)
    assert first.begun.wait(TIMEOUT)
    second_answers, third_answers = submit(engine, second), submit(engine, third)
    third.go.set()
    assert first_answers.one() == (None, None)
    assert second_answers.one() == (None, None)
    assert third_answers.one() == (3, None)
    assert not (second.begun.is_set() and not second.stop.is_set())


@pytest.mark.parametrize(
    ("error", "answer", "unexpected"),
    [
        (UserError("`take` 3: no such take"), (None, "`take` 3: no such take"), 0),
        (Interrupted(), (None, None), 0),
        (RuntimeError("[metal::malloc] out\n of memory"), (None, "RuntimeError: [metal::malloc] out of memory"), 1),
    ],
)
def test_errors_are_answered_and_the_engine_goes_on(engine, error, answer, unexpected):
    job = Waits(error=error)
    job.go.set()
    assert submit(engine, job).one() == answer
    assert len(engine.unexpected_errors) == unexpected
    after = Waits(take=1)
    after.go.set()
    assert submit(engine, after).one() == (1, None)


def test_the_background_makes_way_and_is_no_job(engine):
    background, other, job = Waits(), Waits(), Waits(take=2)
    engine.prepare(background)
    assert background.begun.wait(TIMEOUT)
    assert engine.job is None
    engine.prepare(other)  # replaces it
    assert other.begun.wait(TIMEOUT)
    assert background.stop.is_set()
    answers = submit(engine, job)
    assert job.begun.wait(TIMEOUT)
    assert other.stop.is_set()
    later = Waits()
    engine.prepare(later)
    assert not job.stop.is_set()  # it waits until the job is done
    job.go.set()
    assert answers.one() == (2, None)
    assert later.begun.wait(TIMEOUT)


def test_what_was_interrupted_in_the_background_is_done_again(engine):
    """The last one first, once each; what the engine is drained of is not."""
    backgrounds, job = [Waits() for _ in range(4)], Waits(take=2)
    for background in backgrounds:
        engine.prepare(background)
        assert background.begun.wait(TIMEOUT)
        background.begun.clear()
    answers = submit(engine, job)
    job.go.set()
    assert answers.one() == (2, None)
    for background in backgrounds[3], backgrounds[2]:
        assert background.begun.wait(TIMEOUT)
        assert not background.stop.is_set()
        background.go.set()
    submit(engine, done := Waits(take=3))
    done.go.set()
    engine.drain()
    assert [len(background.threads) for background in backgrounds] == [1, 1, 2, 2]
    engine.prepare(last := Waits())
    assert last.begun.wait(TIMEOUT)
    engine.drain()
    assert not engine.job
    assert len(last.threads) == 1


def test_draining_waits_until_nothing_is_done(engine):
    job = Waits()
    answers = submit(engine, job)
    assert job.begun.wait(TIMEOUT)
    engine.drain()
    assert answers == [(None, None)]
    engine.drain()
    engine.stop()


@pytest.mark.parametrize("end", ["drain", "close"])
def test_draining_begins_nothing(engine, end):
    """A job that ends wants its take to be read ahead."""
    job, background = Waits(), Waits()
    engine.submit(job, lambda take, error: engine.prepare(background))
    assert job.begun.wait(TIMEOUT)
    getattr(engine, end)()
    assert not background.begun.wait(0.05)
    after = Waits()
    engine.prepare(after)
    assert after.begun.wait(TIMEOUT if end == "drain" else 0.05) is (end == "drain")


def test_what_has_not_begun_is_cancelled(engine):
    assert not engine.cancel()
    first, second = Waits(), Waits()
    first.stop.check = lambda: None  # it looks only after a while
    first_answers = submit(engine, first)
    assert first.begun.wait(TIMEOUT)
    answers = first_answers, submit(engine, second)
    assert engine.cancel()
    first.go.set()
    assert [each.one() for each in answers] == [(None, None)] * 2
    for job in (first, second):
        with pytest.raises(Interrupted):
            job.stop.begin()
    begun, background = Waits(take=1), Waits()
    answer = submit(engine, begun)
    begun.stop.begin()
    engine.prepare(background)
    assert not engine.cancel()
    begun.go.set()
    assert answer.one() == (1, None)
    assert background.begun.wait(TIMEOUT)
    assert not engine.cancel()


def test_many_requests_from_many_threads_are_each_answered_once(engine):
    answers = []

    def ask() -> None:
        for i in range(30):
            job = Waits(take=i)
            job.go.set()
            answers.append(submit(engine, job))
            if i % 7 == 0:
                engine.stop()

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.drain()
    assert len(answers) == 120
    assert all(len(each) == 1 for each in answers)
