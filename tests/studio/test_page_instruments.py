"""Keyboards, MIDI ports and recording on the studio's page, in a browser with the program behind it."""

import pytest
from support.studio_page import drop

pytestmark = pytest.mark.slow
STATUS = "document.getElementById('status-text').textContent"


def test_playing_on_the_page_is_recorded_and_answered(page):
    tab = page()
    tab.click("[data-do=record] >> nth=1")
    tab.wait("studio.live.kind === 'listen'")
    for key in "asd":
        tab.page.keyboard.down(key)
        tab.page.wait_for_timeout(80)
        tab.page.keyboard.up(key)
    tab.wait("studio.stage.roll.music.count === 3")
    key = tab.page.locator("#keys [data-pitch='72']").bounding_box()
    tab.page.mouse.move(key["x"] + 5, key["y"] + key["height"] - 5)
    tab.page.mouse.down()
    tab.wait("document.querySelector('#keys [data-pitch=\"72\"]').classList.contains('person')")
    tab.page.mouse.up()
    tab.press("Enter")
    tab.wait("studio.session.take && studio.session.take.kind === 'played' && studio.music.count === 4")
    assert tab.run("[...studio.music.pitch]") == [60, 62, 64, 72]
    tab.click("#duet")
    tab.wait("studio.live.kind === 'duet' && !document.getElementById('turn').hidden")
    tab.page.keyboard.down("g")  # held: no pause passes the turn
    tab.click("#turn button")
    tab.wait("studio.session.status.turn === 'model'")
    tab.page.keyboard.up("g")
    tab.click("#duet")
    tab.wait("!studio.live.on && studio.session.take.kind === 'duet'")


def test_the_page_keeps_time_with_a_midi_output(page, tmp_path):
    tab = page()
    drop(tab, tmp_path)
    tab.run("""(() => {
      window.sent = [];
      studio.socket.send = (message) => sent.push(message);
      studio.receive({ type: "midi", inputs: [], outputs: ["Synth"], input: null, output: "Synth", virtual: false });
      studio.seek(0.5);
      studio.togglePlay();
    })()""")
    assert tab.run("sent.filter((message) => message.type === 'play').map((message) => message.at)") == [0.5]
    assert tab.run("studio.transport.remote && studio.transport.playing")
    assert not tab.run("studio.transport.piano?.voices.length")
    assert tab.run("""(() => {
      studio.receive({ type: "playing", take: studio.session.selected, at: 1.25 });
      return Math.abs(studio.position() - 1.25) < 0.2;
    })()""")
    tab.run("studio.receive({ type: 'playing', take: null, at: null })")
    assert not tab.run("studio.transport.playing")
    tab.run("studio.receive({ type: 'playing', take: studio.session.selected, at: 0.75 })")  # another page plays
    assert tab.run("studio.transport.playing && Math.abs(studio.position() - 0.75) < 0.2")
    tab.run("studio.togglePlay()")
    assert tab.run("[studio.transport.playing, sent.at(-1).type]") == [False, "stop_playing"]
    tab.run("delete studio.socket.send")


def test_the_output_plays_on_where_it_is(page, tmp_path):
    """If new music comes, and after the program was restarted, when the page makes the sound."""
    tab = page()
    drop(tab, tmp_path)
    tab.run("""(() => {
      window.sent = [];
      studio.socket.send = (message) => sent.push(message);
      studio.receive({ type: "midi", ...studio.session.ports, output: "Synth" });
      studio.seek(0.25);
      studio.togglePlay();
      studio.transport.anchor -= 0.5;
      studio.playOnOutput();
    })()""")
    assert tab.run("sent.at(-1).at") == pytest.approx(0.75, abs=0.2)
    tab.run("studio.lost()")
    assert tab.run("[studio.output, studio.transport.remote, studio.transport.playing]") == [None, False, False]
    message = "{ ...studio.session, takes: [...studio.session.takes.values()], type: 'session', hidden: [] }"
    tab.run(f"studio.receive({{ ...{message}, ports: {{ ...studio.session.ports, output: 'Synth' }} }})")
    tab.run("studio.togglePlay()")
    assert tab.run("[studio.transport.remote, studio.transport.playing]") == [True, True]
    tab.run(f"studio.receive({{ ...{message}, ports: {{ ...studio.session.ports, output: null }} }})")
    assert tab.run("[studio.transport.remote, studio.transport.playing]") == [False, False]
    tab.run("studio.receive({ type: 'models', models: [{ name: 'new', gaps: false }] })")
    assert tab.run("studio.session.models") == [{"name": "new", "gaps": False}]
    tab.run("delete studio.socket.send")


def test_one_keyboard_is_heard_once(page):
    """By way of the browser, or of the studio."""
    tab = page()
    tab.run("""(() => {
      window.piano = { id: "1", name: "Piano" };
      window.sent = [];
      navigator.requestMIDIAccess = async () => ({ inputs: new Map([["1", piano]]) });
      studio.session.ports = { ...studio.session.ports, inputs: ["Piano"], input: "Piano" };
      studio.socket.send = (message) => sent.push(message);
    })()""")
    use = "studio.settings.webMidi()"
    assert tab.run(use) == tab.run(use) == "Listening to Piano"
    assert tab.run("[sent[0].input, piano.onmidimessage !== null]") == [None, True]
    tab.run("studio.receive({ type: 'midi', ...studio.session.ports, input: null })")
    tab.run("sent.length = 0, studio.record(), studio.live.set(null), studio.duet()")
    assert tab.run("sent.map((message) => message.type)") == ["listen", "duet"]
    tab.run("studio.receive({ type: 'midi', ...studio.session.ports, input: 'Piano' })")
    assert tab.run("[piano.onmidimessage, studio.keyboard.webMidi]") == [None, None]
    tab.run("studio.receive({ type: 'midi', ...studio.session.ports, input: null })")
    tab.run("sent.length = 0, studio.record()")
    assert tab.run("sent[0]")["input"] == "Piano"


def test_a_keyboard_that_is_unplugged_holds_nothing(page):
    tab = page()
    tab.run("""(async () => {
      window.inputs = new Map(["1", "2"].map((id) => [id, { id, name: id }]));
      inputs.set("3", { id: "3", name: "dsmr-mlx studio 128:0" }); // what the studio plays
      navigator.requestMIDIAccess = async () => (window.access = { inputs });
      window.sent = [];
      studio.socket.send = (message) => sent.push(message);
      await studio.keyboard.useWebMidi();
      const play = (id, ...data) => inputs.get(id).onmidimessage?.({ data });
      play("3", 0x90, 60, 70);
      play("1", 0xb0, 64, 100);
      play("1", 0x90, 60, 70);
      play("2", 0x90, 64, 70);
      play("2", 0xb0, 64, 80);
      inputs.delete("1");
      access.onstatechange({ port: { id: "1", state: "disconnected" } });
    })()""")
    said = "sent.map(({ pitch, velocity, value }) => value === undefined ? `${pitch} ${velocity}` : `pedal ${value}`)"
    assert tab.run(said) == ["pedal 100", "60 70", "64 70", "pedal 100", "60 0", "pedal 80"]
    tab.run("sent.length = 0, studio.lost()")
    assert tab.run(said) == ["64 0", "pedal 0"]
    assert not tab.run("studio.transport.piano.pedalDown || studio.transport.piano.pressed.size")
    tab.run("sent.length = 0, studio.keyboard.show(true)")
    tab.page.keyboard.down("Shift")
    tab.page.keyboard.down("a")
    tab.run("inputs.get('2').onmidimessage({ data: [0xb0, 64, 127] })")
    tab.page.keyboard.up("Shift")
    tab.run("studio.keyboard.leaveWebMidi()")
    assert tab.run(said)[-4:] == ["pedal 127", "pedal 127", "60 0", "pedal 0"]
    tab.run("delete studio.socket.send")


def test_a_pedal_that_is_heard_leaves_the_own_one_down(page):
    tab = page()
    tab.run("studio.transport.openSound()")
    for value in (127, 0):
        tab.run(f"studio.receive({{ type: 'pedal', value: {value} }})")
        assert tab.run("studio.transport.piano.pedalDown") is bool(value)
    tab.run("studio.pressPedal(127), studio.receive({ type: 'pedal', value: 0 })")
    assert tab.run("studio.transport.piano.pedalDown")
    tab.run("studio.receive({ type: 'pedal', value: 127 }), studio.pressPedal(0)")
    assert tab.run("studio.transport.piano.pedalDown")
    tab.run("studio.lost()")
    assert not tab.run("studio.transport.piano.pedalDown")


def test_a_recording_is_seen_and_ended_while_the_music_is_read(page):
    tab = page()
    tab.run("""(() => {
      window.sent = [];
      studio.socket.send = (message) => sent.push(message);
      studio.record();
      studio.receive({ ...studio.session.status, type: "status", activity: "reading", recording: true });
    })()""")
    tab.wait(f"{STATUS} === 'Ready to record' && document.getElementById('status').className === 'listening'")
    assert tab.run("document.getElementById('record').getAttribute('aria-pressed')") == "true"
    tab.run("studio.press(60, 70), studio.press(60, 0)")
    tab.wait(f"{STATUS} === 'Recording'")
    tab.click("#record")
    assert tab.run("sent.filter(({ type }) => type === 'listen').map(({ on }) => on)") == [True, False]
    tab.run("studio.receive({ ...studio.session.status, type: 'status', recording: false })")
    assert not tab.run("studio.live.on")
    for inputs in ([], ["Organ"]):  # a device is unplugged, and another is plugged in
        tab.run(f"studio.receive({{ ...studio.session.ports, type: 'midi', inputs: {inputs} }})")
        tab.wait(f"document.getElementById('midi-input').disabled === {str(not inputs).lower()}")
    tab.run("delete studio.socket.send")
