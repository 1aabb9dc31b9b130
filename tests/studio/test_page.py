"""The studio's page in a browser, with the program and a tiny model behind it."""

import numpy as np
import pytest
from support.browser import Tab
from support.studio_page import DRAWN, READY, drop, names

pytestmark = pytest.mark.slow
STATUS = "document.getElementById('status-text').textContent"
IDLE = f"studio.session.status.activity === 'idle' && !studio.session.growing().length && !studio.making && {DRAWN}"
RENDER = """async () => {
  const { Piano, samples } = await import("/shared/piano.js"), { music } = studio, from = studio.session.take.begin - 1;
  const context = new OfflineAudioContext(2, 5 * 44100, 44100), piano = new Piano(context);
  const played = [...music.between(from, from + 4)].filter((i) => music.onset[i] >= from);
  samples.compute(played.map((i) => music.pitch[i]));
  for (const i of played) piano.play(music.pitch[i], music.velocity[i], music.onset[i] - from, music.end[i] - from);
  const sound = (await context.startRendering()).getChannelData(0), levels = [];
  for (let at = 0; at + 441 <= sound.length; at += 441) {
    let power = 0;
    for (let i = at; i < at + 441; i++) power += sound[i] ** 2;
    levels.push(Math.sqrt(power / 441));
  }
  return [played.map((i) => music.onset[i] - from), played.map((i) => music.end[i] - from), levels];
}"""
HEARD = """() => {
  const { piano } = studio.transport, analyser = new AnalyserNode(piano.context, { fftSize: 8192 });
  piano.volume.connect(analyser);
  const samples = new Float32Array(8192);
  return new Promise((resolve) => setTimeout(() => {
    analyser.getFloatTimeDomainData(samples);
    resolve(samples.reduce((most, x) => Math.max(most, Math.abs(x)), 0));
  }, 300));
}"""


def choose(tab: Tab, seconds: str = "2", count: int = 1) -> None:
    """Choose how much is made, also less than the page offers."""
    tab.page.eval_on_selector("#seconds", "(list, seconds) => list.add(new Option(seconds, seconds))", seconds)
    tab.page.select_option("#seconds", seconds)
    tab.page.check(f"input[name=count][value='{count}']", force=True)


def finish(tab: Tab) -> None:
    """Wait until everything is made, and pause: drawing music that plays takes all of a core."""
    tab.wait(IDLE)
    tab.run("studio.transport.pause()")


def visible(tab: Tab) -> list[list]:
    """Return the kind and the selection of each visible take."""
    return tab.run("studio.session.visible.map((take) => [take.kind, take.id === studio.session.selected])")


def test_drop_a_file_continue_and_listen(page, tmp_path):
    tab = page()
    assert tab.page.locator("#start").is_visible()
    drop(tab, tmp_path)
    assert tab.page.locator("#start").is_hidden()
    choose(tab, seconds="4", count=2)
    tab.press("c")
    tab.wait("studio.transport.playing")
    tab.wait("studio.session.visible.length === 3 && studio.music.voice.includes(1)")
    assert tab.page.evaluate(HEARD) > 1e-3
    tab.wait(IDLE)
    assert visible(tab) == [["file", False], ["continue", True], ["continue", False]]
    assert tab.page.locator("#takes li").count() == 2
    onset, end, levels = tab.page.evaluate(RENDER)
    assert len(onset) > 5
    levels = np.array(levels)
    for begin in onset:
        assert levels[int(begin * 100) + 1 : int(begin * 100) + 12].max() > 2e-3
    silent = [
        i
        for i in range(20, len(levels))
        if not any(a - 0.05 < i / 100 < b + 1.2 for a, b in zip(onset, end, strict=True))
    ]
    assert levels[silent].max(initial=0) < 1e-2
    tab.press("2")
    tab.wait("studio.session.take.id === studio.cards.shown[1].id && studio.transport.playing")
    tab.press("k")
    tab.wait("studio.session.take.kept === true")
    tab.press("1")
    tab.press("x")
    tab.wait("studio.cards.shown[0].kept === false")
    # while new music is awaited, its beginning is shown; who hears another take does not wait for it
    tab.run("studio.making = { came: false }, studio.preroll(studio.session.visible[0].id, 1)")
    assert tab.run("studio.music.growing")
    tab.press("1")
    tab.wait("studio.music === studio.session.music(studio.session.selected) && !studio.music.growing")


def drag_a_passage(tab: Tab) -> None:
    """Mark the music from 1 to 3 s with the mouse."""
    box = tab.page.locator("#roll").bounding_box()
    x = tab.run("(() => { const f = studio.stage.roll.frame(0); return [f.x(1), f.x(3)]; })()")
    tab.page.mouse.move(box["x"] + x[0], box["y"] + 80)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + x[1], box["y"] + 90, steps=3)
    tab.page.mouse.up()
    tab.wait("studio.stage.passage && Math.abs(studio.stage.passage[0] - 1) < 0.1")


def test_mark_replace_undo_branch_and_steer(page, tmp_path):
    tab = page()
    drop(tab, tmp_path)
    choose(tab)
    tab.press("r")
    tab.wait("document.getElementById('problem').textContent.includes('Mark a passage first')")
    drag_a_passage(tab)
    before = tab.run("[...studio.music.onset].filter((onset) => onset < 0.95)")
    tab.press("r")
    tab.wait("studio.session.visible.length === 2")
    finish(tab)
    take = tab.run("studio.session.take")
    assert (take["kind"], take["parent"]) == ("replace", tab.run("studio.session.visible[0].id"))
    assert [o for o in tab.run("[...studio.music.onset]") if o < 0.95] == before
    tab.press("z")
    tab.wait("studio.session.visible.length === 1 && studio.music.count === 40")
    tab.press("Shift+Z")
    tab.wait("studio.session.visible.length === 2 && document.querySelectorAll('#tree li').length === 2")
    # what the studio selects does not move the keyboard's place in the tree
    tab.press("t")
    tab.press("ArrowUp")
    tab.press("z")
    tab.wait("document.querySelectorAll('#tree li').length === 1")
    tab.press("Shift+Z")
    tab.wait("document.querySelectorAll('#tree li').length === 2")
    tab.wait("document.querySelector('#tree li:last-child').getAttribute('aria-selected') === 'true'")
    tab.press("Enter")
    tab.wait("studio.session.take.kind === 'file'")
    tab.run("studio.select(studio.session.visible[1].id)")
    tab.wait("studio.session.take.kind === 'replace'")
    # a branch from the middle of the first take, chosen in the tree with the keyboard
    tab.press("t")
    tab.press("ArrowUp")
    tab.press("Enter")
    tab.wait("studio.session.take.kind === 'file'")
    tab.run("studio.seek(2)")
    tab.wait("document.getElementById('continue').textContent === 'Continue from 0:02'")
    choose(tab, seconds="")
    tab.run("document.activeElement.blur()")
    tab.press("c")
    tab.wait("studio.session.take.kind === 'continue' && studio.session.take.growing")
    tab.run("document.getElementById('set-temperature').value = 0.5")
    tab.page.locator("#set-temperature").dispatch_event("input")
    tab.wait("studio.session.settings.temperature === 0.5")
    tab.run("document.activeElement.blur()")
    tab.press("Escape")
    finish(tab)
    begin = tab.run("[studio.session.take.begin, studio.session.take.parent]")
    assert begin == [2, tab.run("studio.session.visible[0].id")]


def test_insert_and_lead_to_another_take(page, tmp_path):
    """What is outside stays as it is; the rest is moved by the length of the new passage."""
    tab = page()
    drop(tab, tmp_path, notes=30)
    before = tab.run("[...studio.music.onset]")
    choose(tab)
    tab.run("studio.seek(2)")
    tab.wait("document.getElementById('insert').textContent === 'Insert at 0:02'")
    tab.run("document.activeElement.blur()")
    tab.press("i")
    tab.wait("studio.session.take.kind === 'insert'")
    finish(tab)
    after = tab.run("[...studio.music.onset]")
    moved = [onset + 2 if onset >= 2 else onset for onset in before]
    assert set(np.round(moved, 3)) <= set(np.round(after, 3))
    first = tab.run("studio.session.visible[0].id")
    drop(tab, tmp_path, seed=1, notes=20)
    choose(tab)
    tab.press("l")
    tab.page.get_by_role("dialog").get_by_role("button", name="Tune").first.click()
    tab.wait("studio.session.take.kind === 'lead'")
    finish(tab)
    led = tab.run("[...studio.music.onset]")
    end = tab.run("studio.session.take.begin")
    assert set(np.round(np.array(before) + end + 2, 3)) <= set(np.round(led, 3))
    assert tab.run("studio.session.take.parent") != first


def test_reload_two_tabs_and_a_killed_program(page, program, tmp_path):
    tab = page()
    drop(tab, tmp_path, notes=150)  # they are played until the program is there again
    choose(tab)
    tab.press("c")
    tab.wait("studio.session.visible.length === 2")
    finish(tab)
    music = "[studio.session.selected, studio.music.count, Math.round(studio.music.duration * 1000)]"
    made = tab.run(music)
    second = page()
    same = f"JSON.stringify({music}) === '{str(made).replace(' ', '')}'"
    second.wait(same)
    second.run("studio.send({ type: 'rename', take: studio.session.selected, name: 'Evening' })")
    tab.wait("[...document.querySelectorAll('#tree b')].some((name) => name.textContent === 'Evening')")
    program.kill()
    tab.wait(f"{STATUS}.includes('does not answer')")
    tab.press("Home")
    tab.press("Space")
    tab.wait("studio.transport.playing && studio.transport.shown() > 0.2")  # what was made can still be heard
    program.start()
    tab.wait(READY)
    tab.wait(same)
    assert tab.run("studio.transport.playing")
    tab.page.reload()
    tab.wait(READY)
    tab.wait(same)
    with tab.page.expect_download() as download:
        tab.press("e")
        tab.page.locator(".choice").first.click()
    assert download.value.suggested_filename == "Evening.mid"


def test_a_downloaded_session_is_opened(page, tmp_path):
    tab = page()
    drop(tab, tmp_path, notes=7)
    path = tmp_path / f"{next(names)}.studio"
    path.write_bytes(
        bytes(tab.run("fetch('/session').then(async (answer) => [...new Uint8Array(await answer.arrayBuffer())])"))
    )
    tab.page.set_input_files("#session-file", path)
    tab.wait(f"studio.session.name === '{path.stem}' && studio.music.count === 7")
    problem = "document.getElementById('problem').firstChild.textContent"
    (tmp_path / "Broken.studio").write_bytes(b"no session")
    tab.page.set_input_files("#session-file", tmp_path / "Broken.studio")
    tab.wait(f"{problem} !== ''")
    tab.run("studio.complain(''), window.fetch = async () => { throw new TypeError('Failed to fetch'); }, null")
    tab.page.set_input_files("#session-file", path)
    tab.wait(f"{problem}.includes('Failed to fetch')")
    tab.problems[:] = [each for each in tab.problems if "409" not in each]


def test_everything_has_a_name_and_a_key(page, tmp_path):
    tab = page()
    drop(tab, tmp_path)
    tab.press("?")
    tab.wait("document.getElementById('dialog').open")
    assert tab.page.locator(".help kbd").count() > 25
    tab.press("Escape")
    for key, moved in (("ArrowRight", 5), ("ArrowLeft", 0)):
        tab.press(key)
        tab.wait(f"Math.abs(studio.transport.shown() - Math.min({moved}, studio.music.duration)) < 0.01")
    tab.run("studio.seek(1)")
    tab.press("[")
    tab.run("studio.transport.seek(2)")
    tab.press("]")
    tab.wait("JSON.stringify(studio.stage.passage) === '[1,2]'")
    tab.press("Shift+ArrowRight")
    tab.wait("JSON.stringify(studio.stage.passage) === '[1,2.5]'")
    tab.press("Escape")
    tab.wait("studio.stage.passage === null")
    unnamed = tab.run("""[...document.querySelectorAll("button, select, input, canvas, [role]")].filter((node) =>
      !node.hidden && node.id !== "file" && node.id !== "session-file" && !node.getAttribute("aria-label") &&
      !node.getAttribute("aria-labelledby") && !node.textContent.trim() && !(node.labels && node.labels.length) &&
      !["status", "alert", "tree"].includes(node.getAttribute("role"))).map((node) => node.outerHTML)""")
    assert unnamed == []
    tab.run("studio.send({ type: 'rename', take: 10 ** 9, name: 'x' })")
    tab.wait("!document.getElementById('problem').hidden")


def test_settings_apply_from_where_the_growing_take_is_heard(page, tmp_path):
    tab = page()
    drop(tab, tmp_path)
    sent = """(selected, playing) => {
      const sent = [], { session, transport, socket } = studio, known = [session.takes, session.selected];
      const take = { ...session.take, id: 99, parent: session.selected, kind: "continue", begin: 1, growing: true };
      session.takes = new Map([...session.takes, [99, take]]);
      session.selected = selected ? 99 : session.selected;
      [transport.playing, transport.waiting, transport.rest] = [playing, playing, 0.5];
      socket.send = (message) => sent.push(message);
      studio.settings.set({ temperature: 1 });
      delete socket.send;
      [transport.playing, transport.waiting] = [false, false];
      [session.takes, session.selected] = known;
      return sent[0].at;
    }"""
    assert [tab.run(f"({sent})({case})") for case in ("0, 1", "1, 0", "0, 0", "1, 1")] == [None, None, None, 0.5]


def test_lists_keep_the_focus_of_the_keyboard(page):
    tab = page()
    focused, value = "document.activeElement.id === 'seconds'", "document.getElementById('seconds').value"
    tab.page.focus("#seconds")
    before = tab.run(value)
    tab.press("ArrowDown")
    tab.wait(f"{value} !== '{before}'")
    assert tab.run(focused)
    tab.page.locator("#seconds").dispatch_event("pointerdown")
    tab.page.locator("#seconds").dispatch_event("change")
    assert not tab.run(focused)


@pytest.mark.parametrize("width", [360, 800, 2560])
def test_the_page_fits_the_screen(page, tmp_path, width):
    tab = page(width=width, height=740 if width < 600 else 1100)
    for state in ("start", "music"):
        if state == "music":
            drop(tab, tmp_path)
        assert tab.run("document.documentElement.scrollWidth") <= width
        outside = f"""[...document.querySelectorAll("button, select, input")].filter((node) => {{
          const box = node.getBoundingClientRect();
          return box.width && (box.right > {width} + 1 || box.left < -1);
        }}).map((node) => node.outerHTML)"""
        assert tab.run(outside) == []
        if width == 360:
            buttons = "[...document.querySelectorAll('#stage button, nav.bring button')]"
            heights = f"{buttons}.map((node) => node.getBoundingClientRect().height)"
            assert min(height for height in tab.run(heights) if height) >= 36
