"""The studio without a server: what messages do while something else is being done."""

import threading
from argparse import Namespace

import pytest
from support.music import on_grid, random_notes
from support.studio import Recorder

from dsmr_mlx.cli.studio import open_studio
from dsmr_mlx.studio.messages import check
from dsmr_mlx.studio.studio import Studio
from dsmr_mlx.studio.takes import rows_of

TIMEOUT = 30.0


@pytest.fixture
def studio(tmp_path, models):
    """A studio with a file of 6 s, and a client."""
    published = Recorder()
    studio = Studio(tmp_path / "First.studio", tmp_path, models, published, pytest.fail)
    studio.client, studio.published = Recorder(), published
    rows = rows_of(on_grid(random_notes(1, 40, lengths=(20, 120))))
    studio.session.add("file", name="tune", rows=rows, end=max(row[1] for row in rows))
    yield studio
    studio.close()


def send(studio: Studio, type: str, **fields) -> None:
    """Handle a message of the client."""
    studio.handle(studio.client, check({"type": type} | fields))


def wait_for(studio: Studio, request: int) -> dict:
    """Wait for the answer to a request."""
    studio.client.wait(lambda messages: any(m["request"] == request for m in messages))
    (answer,) = (m for m in studio.client.messages if m["request"] == request)
    return answer


MAKING = {
    "continue": {"take": 1},
    "nothing": {"take": None},
    "replace": {"take": 1, "start": 2.0, "end": 4.0},
    "duet": {"on": True, "take": 1},
}


@pytest.mark.parametrize("name", MAKING)
def test_undo_of_what_is_prepared_undoes_nothing_else(studio, name, monkeypatch):
    """The job has loaded its model, and has not added its takes."""
    begun, undone = threading.Event(), threading.Event()
    load = studio.work.load

    def waiting(model):
        loaded = load(model)
        if studio.engine.job is not None:
            begun.set()
            assert undone.wait(TIMEOUT)
        return loaded

    monkeypatch.setattr(studio.work, "load", waiting)
    send(studio, "continue" if name == "nothing" else name, request=1, **MAKING[name])
    assert begun.wait(TIMEOUT)
    send(studio, "undo")
    undone.set()
    assert wait_for(studio, 1) == {"type": "done", "request": 1, "take": None}
    tree = studio.session.tree
    assert (set(tree.takes), tree.hidden, tree.selected, tree.can_redo) == ({1}, set(), 1, False)
    send(studio, "undo")
    assert tree.hidden == {1}


def test_undo_of_candidates_that_are_ranked_keeps_none(studio):
    studio.session.set({"best_of": 4})

    def then(message: dict) -> None:
        if message["type"] == "status" and message["activity"] == "ranking" and not studio.engine.job.stop.is_set():
            send(studio, "undo")

    studio.published.then = then
    send(studio, "replace", request=1, take=1, start=2.0, end=4.0)
    assert wait_for(studio, 1)["take"] is None
    assert set(studio.session.tree.takes) == {1}


def test_undo_of_a_duet_before_its_first_note_ends_it(studio):
    send(studio, "duet", request=1, on=True, take=1)
    studio.published.wait(lambda messages: any(m.get("activity") == "duet" for m in messages))
    send(studio, "undo")
    assert wait_for(studio, 1)["take"] is None
    assert (set(studio.session.tree.takes), studio.session.tree.hidden) == ({1}, set())


def test_the_status_shows_the_recording_whatever_the_engine_does(studio, monkeypatch):
    """`listen` is switched on and off while a file is read, on again, and the reading ends."""
    reading, read = threading.Event(), threading.Event()
    player_at = studio.work.states.player_at

    def waiting(*arguments, **options):
        studio.work.show("reading", "reading the music ahead", progress=0.1)
        reading.set()
        assert read.wait(TIMEOUT)
        return player_at(*arguments, **options)

    def told(activity: str, recording: bool) -> bool:
        last = studio.published.of("status")[-1]
        return (last["activity"], last["recording"]) == (activity, recording)

    studio.engine.drain()
    monkeypatch.setattr(studio.work.states, "player_at", waiting)
    send(studio, "select", take=1)
    assert reading.wait(TIMEOUT)
    try:
        assert told("reading", recording=False)
        for on in (True, False, True):
            send(studio, "listen", on=on)
            assert told("reading", recording=on)
        studio.work.show("loading")
        assert told("loading", recording=True)
        assert studio.welcome()["status"]["recording"]
    finally:
        read.set()
    studio.published.wait(lambda messages: told("listening", recording=True))
    send(studio, "listen", on=False)
    assert told("idle", recording=False)


def test_sessions_that_are_not_opened_are_named(studio, models, capsys):
    (studio.home / "Broken.studio").write_text("no")
    hub = Namespace(publish=Recorder())
    other = open_studio(Namespace(session=None), studio.home, models, hub)
    assert other.session.name == "Session"
    other.close()
    told = "".join(capsys.readouterr().err.split("\n"))
    assert "not opened: " in told
    assert "Broken.studio: not a session of the studio" in told
    assert "First.studio: open in another studio" in told
