"""MIDI ports in the studio, with devices that are plugged in and out."""

import time
from types import SimpleNamespace

import mido
import pytest
from mido import Message
from support import fake_midi_backend
from support.studio import Recorder
from support.studio_models import tiny_models
from support.studio_server import Running

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.studio.devices import VIRTUAL, Devices
from dsmr_mlx.studio.messages import check
from dsmr_mlx.studio.studio import Studio


@pytest.fixture
def plugged():
    """The devices; a piano is plugged in."""
    before = mido.backend
    mido.set_backend("support.fake_midi_backend")
    fake_midi_backend.DEVICES.clear()
    fake_midi_backend.DEVICES.update({"Piano": "both", "Synth": "out"})
    yield fake_midi_backend.DEVICES
    fake_midi_backend.DEVICES.clear()
    mido.set_backend(before.name if hasattr(before, "name") else "mido.backends.rtmidi")


@pytest.fixture
def devices(plugged):
    """Devices that note what comes in, what is lost, and the ports after each change."""
    received, lost, changed = [], [], []
    devices = Devices(received.append, lost.append, lambda: changed.append(devices.message()))
    devices.noted = SimpleNamespace(received=received, lost=lost, changed=changed)
    yield devices
    devices.close()


def wait(condition) -> None:
    """Wait until something is true."""
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def port(name: str):
    """The open port of a name."""
    return next(port for port in fake_midi_backend.OPEN if port.name == name)


def test_ports_are_listed_and_chosen(devices):
    assert devices.message() == {
        "input": None,
        "output": None,
        "inputs": ["Piano"],
        "outputs": ["Piano", "Synth"],
        "virtual": True,
        "problem": None,
    }
    devices.choose("Piano", "Synth")
    assert (devices.message()["input"], devices.message()["output"]) == ("Piano", "Synth")
    port("Piano").callback(Message("note_on", note=60))
    assert devices.noted.received == [Message("note_on", note=60)]
    assert devices.send(Message("note_on", note=61))
    assert port("Synth").sent == [Message("note_on", note=61)]
    devices.choose(None, VIRTUAL)
    assert devices.message()["output"] == VIRTUAL
    assert [p.name for p in fake_midi_backend.OPEN] == ["dsmr-mlx studio"]
    devices.choose(None, None)
    assert not fake_midi_backend.OPEN


def test_unknown_ports_are_named(devices):
    with pytest.raises(UserError, match="no such port, expected one of 'Piano'"):
        devices.choose("Organ", None)
    assert devices.message()["input"] is None


def test_an_unplugged_device_is_closed_and_told(devices, plugged):
    devices.choose("Piano", "Synth")
    devices.look()
    assert not devices.noted.lost
    del plugged["Synth"]
    devices.look()
    assert devices.noted.lost[0] == "Synth: the device was unplugged"
    assert devices.output is None
    assert devices.input is not None
    assert devices.send(Message("note_on", note=61))  # to nobody
    assert devices.noted.changed == [devices.message()]
    assert devices.message()["outputs"] == ["Piano"]


def test_a_device_that_is_lost_twice_is_told_once(devices, plugged):
    """The piano is input and output."""
    devices.choose("Piano", "Piano")
    del plugged["Piano"]
    devices.look()
    assert devices.noted.lost == ["Piano: the device was unplugged"]
    assert (devices.input, devices.output, fake_midi_backend.OPEN) == (None, None, [])


def test_an_output_that_fails_is_closed_and_told(devices, monkeypatch):
    def fail(message):
        raise OSError("broken")

    for name in ("Synth", VIRTUAL):
        devices.choose(None, name)
        (synth,) = fake_midi_backend.OPEN
        monkeypatch.setattr(synth, "_send", fail)
        assert not devices.send(Message("note_on", note=61))
        assert (devices.output, fake_midi_backend.OPEN) == (None, [])
        assert devices.send(Message("note_on", note=61))
    assert len(devices.noted.lost) == len(devices.noted.changed) == 2


def test_changes_of_the_ports_are_told_once(devices, plugged):
    devices.look()
    assert devices.noted.changed == []
    plugged["Organ"] = "in"
    devices.look()
    devices.look()
    del plugged["Piano"]
    devices.look()
    assert [message["inputs"] for message in devices.noted.changed] == [["Organ", "Piano"], ["Organ"]]


def test_ports_are_listed_in_the_main_thread_only(studio, monkeypatch):
    """macOS reports changes of devices only to that thread; `new` runs in another."""
    do(studio, "midi", input=None, output="Synth")
    monkeypatch.setattr("dsmr_mlx.studio.devices.port_names", lambda: pytest.fail("listed"))
    do(studio, "new", name="Second")
    assert studio.published.of("session")[-1]["ports"]["outputs"] == ["Piano", "Synth"]


def test_without_midi_there_is_a_reason(monkeypatch):
    def fail():
        raise UserError("MIDI ports: rtmidi cannot be imported, install it with x; `socket` and others work")

    monkeypatch.setattr("dsmr_mlx.studio.devices.port_names", fail)
    devices = Devices(lambda message: None, lambda reason: None, lambda: None)
    message = devices.message()
    assert message["problem"] == "MIDI ports: rtmidi cannot be imported, install it with x"
    assert (message["inputs"], message["virtual"]) == ([], False)
    with pytest.raises(UserError, match="rtmidi cannot be imported"):
        devices.choose("Piano", None)
    monkeypatch.setattr("dsmr_mlx.studio.devices.port_names", lambda: (["Piano"], []))
    devices.look()  # does not try again: each attempt may print errors
    assert devices.message()["inputs"] == []
    devices.look(retry=True)
    assert (devices.message()["inputs"], devices.message()["problem"]) == (["Piano"], None)
    monkeypatch.setattr("dsmr_mlx.studio.devices.port_names", fail)
    devices.look()
    assert (devices.message()["inputs"], devices.message()["problem"]) == (["Piano"], None)


@pytest.fixture
def studio(tmp_path, plugged):
    """A studio, and what it publishes."""
    published, unexpected = Recorder(), []
    studio = Studio(tmp_path / "a.studio", tmp_path, tiny_models(tmp_path), published, unexpected.append)
    studio.published = published
    yield studio
    studio.close()
    assert unexpected == []
    assert not fake_midi_backend.OPEN


def do(studio: Studio, type: str, **fields) -> None:
    """Handle a message of a client."""
    studio.handle(studio.published, check({"type": type} | fields))


def balanced(messages: list[Message]) -> bool:
    """Whether every key and pedal that was pressed is up."""
    down, pedal = set(), 0
    for message in messages:
        if message.type == "note_on" and message.velocity:
            down.add(message.note)
        elif message.type in ("note_on", "note_off"):
            down.discard(message.note)
        elif message.is_cc(64):
            pedal = message.value
    return not (down or pedal)


def test_a_midi_keyboard_is_recorded(studio):
    do(studio, "midi", input="Piano", output=None)
    do(studio, "listen", on=True)
    piano = port("Piano")
    piano.callback(Message("note_on", note=60, velocity=50))
    piano.callback(Message("note_off", note=60))
    do(studio, "listen", on=False)
    assert [row[2:] for row in studio.session.get(1).rows] == [(60, 50)]
    keys = [(m["pitch"], m["velocity"]) for m in studio.published.of("key")]
    assert keys == [(60, 50), (60, 0)]


@pytest.mark.parametrize("how", ["released", "stopped", "unplugged"])
def test_the_pedal_of_a_midi_keyboard_is_heard(studio, plugged, how):
    """It is up at the end."""
    do(studio, "midi", input="Piano", output=None)
    do(studio, "listen", on=True)
    press("Piano", 60)
    assert [m["value"] for m in studio.published.of("pedal")] == [127]
    if how == "released":
        port("Piano").callback(Message("control_change", control=64, value=0))
    elif how == "unplugged":
        del plugged["Piano"]
        studio.devices.look()
    do(studio, "listen", on=False)
    assert [m["value"] for m in studio.published.of("pedal")] == [127, 0]


def test_the_pedal_is_heard_in_a_duet(studio):
    do(studio, "midi", input="Piano", output=None)
    start_duet(studio)
    press("Piano", 60)
    do(studio, "duet", on=False)
    wait(lambda: studio.engine.job is None)
    assert [m["value"] for m in studio.published.of("pedal")] == [127, 0]


def press(name: str, *pitches: int) -> None:
    """Press the pedal and keys of a device."""
    port(name).callback(Message("control_change", control=64, value=127))
    for pitch in pitches:
        port(name).callback(Message("note_on", note=pitch, velocity=50))


@pytest.mark.parametrize("how", ["unplugged", "another", "none"])
def test_keys_of_an_input_that_goes_are_released(studio, plugged, how):
    """The recorded notes end there, and later ones without the pedal end with their keys."""
    plugged["Organ"] = "in"
    do(studio, "midi", input="Piano", output=None)
    do(studio, "listen", on=True)
    press("Piano", 60, 64)
    time.sleep(0.05)
    if how == "unplugged":
        del plugged["Piano"]
        studio.devices.look()
    else:
        do(studio, "midi", input="Organ" if how == "another" else None, output=None)
    plugged["Piano"] = "both"
    do(studio, "midi", input="Piano", output=None)
    time.sleep(0.2)
    port("Piano").callback(Message("note_on", note=62, velocity=50))
    port("Piano").callback(Message("note_off", note=62))
    time.sleep(0.2)
    do(studio, "listen", on=False)
    take = studio.session.get(1)
    assert [row[2] for row in take.rows] == [60, 64, 62]
    for onset, end, *_ in take.rows:
        assert end - onset < 0.2
    assert [value for _, value in take.pedal] == [0]
    assert [(m["pitch"], m["velocity"]) for m in studio.published.of("key")][2:4] == [(60, 0), (64, 0)]


def test_an_input_that_goes_lets_a_pause_pass_the_turn(studio, plugged):
    do(studio, "midi", input="Piano", output=None)
    start_duet(studio, pause=0.1)
    press("Piano", 60)
    wait(lambda: studio.engine.job.live.hands.down)
    del plugged["Piano"]
    studio.devices.look()
    wait(lambda: any(m["turn"] == "model" for m in studio.published.of("status")))


def test_keys_of_a_client_that_goes_are_released(studio):
    do(studio, "midi", input=None, output="Synth")
    do(studio, "listen", on=True)
    sent, other = port("Synth").sent, Recorder()
    studio.handle(other, check({"type": "key", "pitch": 48, "velocity": 50}))
    do(studio, "pedal", value=127)
    do(studio, "key", pitch=60, velocity=50)
    time.sleep(0.05)
    studio.leave(studio.published)
    studio.leave(studio.published)
    assert studio.through.pressed.keys() == {(0, 48)}  # the other's
    assert sent[-1].is_cc(64)
    assert sent[-1].value == 0
    studio.leave(other)
    assert balanced(sent)
    time.sleep(0.2)
    do(studio, "listen", on=False)
    assert all(end - onset < 0.2 for onset, end, *_ in studio.session.get(1).rows)


def start_duet(studio: Studio, pause: float = 10) -> None:
    """Begin a duet, and wait until it hears the keys."""
    do(studio, "duet", on=True, pause=pause)
    wait(lambda: getattr(studio.engine.job, "live", None) is not None)


def test_another_output_during_a_duet_leaves_no_key_down(studio, plugged):
    plugged["Organ"] = "out"
    do(studio, "midi", input=None, output="Synth")
    synth = port("Synth").sent
    do(studio, "key", pitch=48, velocity=50)
    start_duet(studio)
    do(studio, "pedal", value=127)
    do(studio, "key", pitch=60, velocity=50)
    do(studio, "midi", input=None, output="Organ")
    assert {m.note for m in synth if m.type == "note_on"} == {48, 60}
    assert balanced(synth)
    organ = port("Organ").sent
    do(studio, "key", pitch=60, velocity=0)
    do(studio, "key", pitch=64, velocity=50)
    do(studio, "duet", on=False)
    wait(lambda: studio.engine.job is None)
    assert {m.note for m in organ if m.type == "note_on"} == {64}
    assert balanced(organ)


def test_a_key_that_is_down_when_a_duet_begins_is_released(studio):
    do(studio, "midi", input=None, output="Synth")
    do(studio, "key", pitch=48, velocity=50)
    start_duet(studio)
    do(studio, "key", pitch=48, velocity=0)
    assert balanced(port("Synth").sent)


def test_nothing_is_sent_to_a_closed_output(devices):
    """A thread may still have it."""
    devices.choose(None, "Synth")
    synth, output = port("Synth").sent, devices.output
    devices.choose(None, "Piano")
    output.send(Message("note_on", note=60))
    assert balanced(synth)


def test_keys_of_the_page_go_to_the_output(studio):
    do(studio, "midi", input=None, output="Synth")
    do(studio, "key", pitch=60, velocity=50)
    do(studio, "key", pitch=62, velocity=50)
    do(studio, "key", pitch=60, velocity=0)
    sent = port("Synth").sent
    assert [m.note for m in sent] == [60, 62, 60]
    do(studio, "midi", input=None, output=None)  # keys that are down are released first
    assert balanced(sent)


def test_a_take_is_played_and_stopped(studio):
    rows = [(0.0, 0.05, 60, 60), (0.05, 30.0, 64, 60), (10.0, 11.0, 62, 60)]
    studio.session.add("file", rows=rows, end=30.0)
    do(studio, "midi", input=None, output="Synth")
    do(studio, "play", take=1, at=0.0)
    sent = port("Synth").sent
    wait(lambda: any(m.type == "note_on" and m.note == 64 for m in sent))
    do(studio, "stop_playing")
    assert balanced(sent)
    playing = [m["take"] for m in studio.published.of("playing")]
    assert playing == [1, None]
    do(studio, "play", take=1, at=29.9)
    wait(lambda: studio.published.of("playing")[-1]["take"] is None)  # it ends by itself


def test_another_place_is_played_without_a_stop(studio):
    studio.session.add("file", rows=[(i / 10, i / 10 + 0.05, 60, 60) for i in range(300)], end=30.0)
    do(studio, "midi", input=None, output="Synth")
    assert studio.playing() == {"type": "playing", "take": None, "at": None}
    do(studio, "play", take=1, at=1.0)
    do(studio, "play", take=1, at=20.0)
    assert [m["at"] for m in studio.published.of("playing")] == [1.0, 20.0]
    now = studio.playing()
    assert now["take"] == 1
    assert 20.0 <= now["at"] < 25.0
    do(studio, "stop_playing")
    assert studio.published.of("playing")[-1] == studio.playing() == {"type": "playing", "take": None, "at": None}
    assert balanced(port("Synth").sent)


def test_a_page_that_connects_is_told_what_is_played(tmp_path, plugged):
    running = Running(tmp_path, tiny_models(tmp_path))
    running.studio.session.add("file", rows=[(i / 10, i / 10 + 0.05, 60, 60) for i in range(300)], end=30.0)
    with running.http, running.client() as client:
        assert client.next("playing")["at"] is None
        client.do("midi", output="Synth")
        client.do("play", take=1, at=20.0)
        with running.client() as other:
            now = other.receive()
        assert (now["type"], now["take"]) == ("playing", 1)
        assert 20.0 <= now["at"] < 25.0
    assert not running.unexpected


def test_a_lost_output_ends_the_playback(studio, plugged):
    studio.session.add("file", rows=[(0.0, 30.0, 60, 60), (0.3, 30.0, 61, 60)], end=30.0)
    do(studio, "midi", input=None, output="Synth")
    do(studio, "play", take=1)
    del plugged["Synth"]
    wait(lambda: studio.published.of("error"))
    ports = studio.published.of("midi")[-1]
    assert (ports["output"], ports["inputs"], ports["virtual"], ports["problem"]) == (None, ["Piano"], True, None)


def test_a_device_that_is_plugged_in_again_can_be_chosen(studio, plugged):
    do(studio, "midi", input="Piano", output="Synth")
    del plugged["Piano"]
    studio.devices.look()
    ports = studio.published.of("midi")[-1]
    assert (ports["input"], ports["output"], ports["inputs"], ports["outputs"]) == (None, "Synth", [], ["Synth"])
    plugged.update({"Piano": "both", "Organ": "in"})
    studio.devices.look()
    ports = studio.published.of("midi")[-1]
    assert (ports["input"], ports["inputs"], ports["outputs"]) == (None, ["Organ", "Piano"], ["Piano", "Synth"])
    assert ports["virtual"]
    do(studio, "midi", input="Piano", output="Synth")
    assert studio.published.of("midi")[-1]["input"] == "Piano"


def test_all_keys_are_up_at_the_end(studio, plugged):
    studio.session.add("file", rows=[(0.0, 30.0, 60, 60)], end=30.0)
    do(studio, "midi", input=None, output="Synth")
    do(studio, "play", take=1)
    do(studio, "key", pitch=70, velocity=50)
    sent = port("Synth").sent
    wait(lambda: any(m.type == "note_on" and m.note == 60 for m in sent))
    studio.devices._close, close = lambda which: None, studio.devices._close
    studio.close()
    assert balanced(sent)
    studio.devices._close = close
    studio.close = lambda: studio.devices.close()
