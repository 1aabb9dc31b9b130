"""The page's copy of a session and a recording, in a browser without the program: the music, and what changes cost."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.browser import Tab

import dsmr_mlx
from dsmr_mlx.studio.takes import Take, Tree

pytestmark = pytest.mark.slow
FOLDERS = {"shared": "music/page", "page": "studio/page"}
BEGIN = """async (takes) => {
  const { Session } = await import("/page/session.js");
  window.session = new Session();
  const others = { selected: null, hidden: [], settings: {}, models: [], ports: {}, exports: [] };
  window.begun = (takes) => ({ name: "", takes, ...others });
  session.reset(begun(takes));
}"""
ROWS = "[...session.takes.keys()].map((id) => session.rowsOf(id))"


@pytest.fixture
def tab(browser):
    """Open an empty page at an address that has the modules of the studio's page."""

    def serve(route: Any) -> None:
        folder, name = route.request.url.split("/")[-2:]
        known = folder in FOLDERS
        path = Path(dsmr_mlx.__file__).parent / FOLDERS.get(folder, "") / name
        body = path.read_text(encoding="utf-8") if known else "<!DOCTYPE html><title>Modules</title>"
        route.fulfill(body=body, content_type="text/javascript" if known else "text/html")

    tab = Tab(browser)
    tab.page.route("http://modules.test/**", serve)
    yield tab.open("http://modules.test/")
    assert tab.problems == []
    tab.close()


def take(number: int, parent: int | None = None, **fields: Any) -> dict[str, Any]:
    """Return a take as the page gets it."""
    kind = "file" if parent is None else "continue"
    whole = {"notes": fields.pop("rows", []), "voice": None, "pedal": fields.pop("pedal", [])}
    return Take(number, parent, kind, "", **fields).to_dict() | whole


def random_tree(rng: np.random.Generator, size: int) -> Tree:
    """Return takes of all kinds with random times, to the millisecond."""
    tree = Tree()
    for number in range(1, size + 1):
        parent = int(rng.integers(1, number)) if number > 1 and rng.random() < 0.85 else None
        begin = 0.0 if parent is None else round(float(rng.uniform(0, 6)), 3)
        length = round(float(rng.uniform(0.5, 3)), 3)
        resume = round(begin + float(rng.uniform(0, 3)), 3) if parent and rng.random() < 0.5 else None
        after = None if resume is None else round(begin + length - resume, 3)
        music = tree.music(parent) if parent else None
        rows = [
            (round(begin + float(t), 3), round(begin + float(t) + 0.2, 3), int(p), 60)
            for t, p in zip(rng.uniform(0, length, 8), rng.permutation(40)[:8] + 40, strict=True)
        ]
        if music is not None:
            rows += [(a, round(begin + 0.1, 3), p, v) for a, b, p, v in music.rows if a < begin < b]
        take = Take(
            number,
            parent,
            "file" if parent is None else "continue",
            "",
            begin,
            round(begin + length, 3),
            after,
            resume,
            rows=rows,
        )
        tree.add([take])
    return tree


def check_columns(tab: Tab) -> None:
    """The music of each take, put together from parts, equals one made of all rows at once."""
    assert (
        tab.run("""(async () => {
      const { Music } = await import("/shared/music.js"), plain = (music) => JSON.stringify({ ...music });
      return [...session.takes.values()].filter(({ id, growing, end }) => {
        const options = { made: growing ? end : Infinity, pedal: session.pedalOf(id) };
        return plain(session.music(id)) !== plain(new Music(session.rowsOf(id), options));
      });
    })()""")
        == []
    )


def test_the_page_puts_music_together_as_the_program_does(tab):
    for seed in range(4):
        tree = random_tree(np.random.default_rng(seed), 9)
        takes = [take.to_dict() | {"notes": take.rows, "voice": None, "pedal": []} for take in tree.takes.values()]
        tab.page.evaluate(BEGIN, takes)
        check_columns(tab)
        for number, rows in zip(tree.takes, tab.page.evaluate(ROWS), strict=True):
            notes = tree.music(number)
            found = sorted((round(a, 3), p) for a, _, p, *_ in rows)
            assert found == sorted((round(float(a), 3), int(p)) for a, p in zip(notes.onset, notes.pitch, strict=True))


def test_the_tree_of_many_takes_is_arranged_once(tab):
    rng, size = np.random.default_rng(0), 1000
    parents = {n: int(rng.integers(1, n)) if n > 1 and rng.random() < 0.9 else None for n in range(1, size + 1)}
    tab.page.evaluate(BEGIN, [take(n, parents[n]) for n in reversed(parents)])
    walk = """(() => {
      let looked = 0;
      const { has } = session.hidden;
      session.hidden.has = (id) => (looked++, has.call(session.hidden, id));
      const found = {}, walk = (id) => {
        found[id] = session.children(id).map((take) => take.id);
        found[id].forEach(walk);
      };
      walk(null);
      return [found, looked];
    })()"""

    def check(parents: dict[int, int | None]) -> None:
        found, looked = tab.run(walk)
        expected = {str(n): [m for m in parents if parents[m] == n] for n in parents}
        assert found == expected | {"null": [m for m in parents if parents[m] is None]}
        assert looked <= size + 10

    check(parents)
    leaf = next(n for n in reversed(parents) if n not in parents.values())
    tab.page.evaluate("(takes) => takes.forEach((take) => session.setTake(take))", [take(size + 1, 3), take(leaf, 2)])
    changed = parents | {leaf: 2, size + 1: 3}
    check(changed)
    tab.run(f"session.select({{ selected: 1, hidden: [{size + 1}] }})")
    check({n: parent for n, parent in changed.items() if n <= size})
    assert tab.run("session.visible.length") == size
    tab.page.evaluate("(takes) => session.reset(begun(takes))", [take(1), take(2, 1)])
    check({1: None, 2: 1})


def test_a_choice_stands_until_the_studio_has_answered(tab):
    """Selections of earlier actions arrive meanwhile; the latest one counts as soon as the answer is there."""
    tab.page.evaluate(BEGIN, [take(1), take(2, 1), take(3, 1)])
    select = "session.select({{ selected: {} }}), session.selected"
    tab.run("void (window.settle = session.choose(2))")
    assert tab.run(select.format(1)) == 2
    assert tab.run("(window.next = session.choose(3)), settle(true), session.selected") == 3
    assert tab.run(select.format(3)) == 3
    assert tab.run("next(true), session.selected") == 3
    assert tab.run(select.format(1)) == 1
    tab.run("void (window.settle = session.choose(2))")  # the studio refuses
    assert tab.run("settle(true), session.selected") == 1
    tab.run("void (window.settle = session.choose(2))")  # the connection is lost
    assert tab.run("settle(false), session.selected") == 2


def test_new_notes_of_a_take_do_not_join_the_music_of_its_parent_again(tab):
    size = 3000
    rows = [(i / 8, i / 8 + 0.3, 40 + i % 40, 60) for i in range(size)]
    begin, own = 100.1, [(100.0, 100.5, 40, 60)]  # a note that sounds across the beginning, and a long way to go
    parent = take(1, rows=rows, end=rows[-1][1], pedal=[(99.0, 100), (300.0, 0)])
    fields = {"begin": begin, "end": begin, "rows": own, "growing": True, "group": 1}
    takes = [parent, take(2, 1, **fields), take(3, 1, **fields, after=1.0, resume=101.0), take(4, 1, **fields)]
    tab.page.evaluate(BEGIN, takes)
    tab.run("""(async () => {
      window.sorted = 0;
      const { sort } = Array.prototype;
      Array.prototype.sort = function (...order) {
        window.sorted += this.length;
        return sort.apply(this, order);
      };
    })()""")
    once = """([id, from, notes, end, pedal]) => {
      window.sorted = 0;
      session.setNotes({ take: id, from, notes, end, voice: null, pedal, pedal_from: pedal && 0 });
      const music = session.music(id), picture = session.picturedMusic(id), own = session.ownMusic(id);
      return [window.sorted, music.count, picture.count, own.count];
    }"""
    for id in (2, 3, 4):
        tab.run(f"session.music({id})")
        for i in range(5):
            new = (begin + i / 4, begin + i / 4 + 0.3, 60 + i, 60)
            pedal = [[begin, 100]] if i == 2 else None
            cost, count, near, own = tab.page.evaluate(once, [id, i + 1, [new], new[1], pedal])
            assert cost < 200
            assert own == i + 1
            assert count == sum(row[1] <= begin for row in rows) + i + 2 + (id == 3) * sum(
                row[0] >= 101 for row in rows
            )
            assert near < 120
        check_columns(tab)
    tab.page.evaluate(once, [2, 2, [], begin, None])  # new settings apply from an earlier time
    check_columns(tab)
    for i in range(0, 450, 3):  # three new notes, of which two may change
        new = [(begin + (i + j) / 50, begin + (i + j) / 50 + 1, 60 + j, 60) for j in range(3)]
        tab.page.evaluate(once, [2, 2 + i, new, new[-1][1], None])
        if i % 90 == 0:
            tab.page.evaluate(once, [2, 2 + i + 1, new[1:], new[-1][1], None])
            check_columns(tab)
    tab.page.evaluate(once, [2, 40, new, new[-1][1], None])  # what was settled has changed
    check_columns(tab)
    picture = "[...session.picturedMusic(3).onset].map((onset) => Math.round(onset * 1000) / 1000)"
    assert tab.run(picture)[:2] == [97.875, 98.0]
    assert max(tab.run(picture)) == 106.0  # eight seconds are shown: these are its parent's, a second later


def test_a_recording_is_put_together_twice_a_second_and_held_keys_are_seen_at_once(tab):
    tab.run("""(async () => {
      const { Live } = await import("/page/live.js"), { Overview, PianoRoll } = await import("/shared/piano_roll.js");
      const { Music } = await import("/shared/music.js");
      const canvases = ["roll", "overview"].map((id) => Object.assign(document.createElement("canvas"), { id }));
      document.body.append(...canvases);
      canvases[0].getContext("2d", { willReadFrequently: true });
      for (const canvas of canvases) canvas.style.cssText = "display: block; width: 600px; height: 200px";
      window.live = new Live();
      window.roll = new PianoRoll(canvases[0], { room: 30 });
      roll.colours = { ...roll.colours, train: "#ff0000", validation: "#0000ff", ink: "#000000" };
      const overview = new Overview(canvases[1], roll), { drawPicture } = overview;
      overview.drawPicture = () => (pictures++, drawPicture.call(overview));
      window.pictures = window.made = window.time = 0;
      live.now = () => 100 + time;
      roll.setMusic(new Music([[0, 9, 60, 60, 0]]));
      overview.draw(0);
      live.set("listen");
      window.frame = () => {
        const { music, fresh, at } = live.frame(null);
        made += music !== roll.music;
        if (music !== roll.music || fresh !== roll.fresh) roll.setMusic(music, fresh);
        roll.draw(at);
        overview.draw(at);
        return at;
      };
      window.colour = (seconds, pitch) => {
        const f = roll.frame(live.frame(null).at), pen = canvases[0].getContext("2d");
        return [...pen.getImageData(f.x(seconds), f.y(pitch), 1, 1).data];
      };
    })()""")
    red = [255, 0, 0, 255]
    tab.run("live.key(100, 80, 0), time = 0.2, frame()")
    assert tab.run("[pictures, roll.music.count, roll.sounding.get(100), ...colour(0.1, 100)]") == [2, 0, 0, *red]
    tab.run("time = 4, frame()")
    assert tab.run("[roll.music.count, ...colour(3.9, 100)]") == [0, *red]  # held for long
    tab.run("live.key(100, 0, 0), frame()")
    assert tab.run("[roll.music.count, live.fresh.length, roll.sounding.size]") == [1, 0, 0]
    tab.run("made = pictures = 0")
    tab.run("""(() => {
      for (let i = 0; i < 300; i++) {  // five seconds, with 50 notes of a tenth of a second
        if (i % 6 === 0) live.key(60 + (i % 12), 70, 0);
        time += 1 / 60;
        frame();
        if (i % 6 === 4) live.key(60 + ((i - 4) % 12), 0, 0);
      }
    })()""")
    made, count, fresh, growing = tab.run("[made, roll.music.count, live.fresh.length, roll.music.growing]")
    assert 8 <= made <= 11
    assert count + fresh == 51 == tab.run("live.rows.length")
    assert growing
    assert fresh <= 6
    assert tab.run("pictures") <= 3  # by the real clock
    expected = tab.run("live.rows.slice(0, roll.music.count).map((row) => row.slice(0, 3))")
    assert (
        tab.run("[...roll.music.onset].map((onset, i) => [onset, roll.music.end[i], roll.music.pitch[i]])") == expected
    )
    assert tab.run("roll.frame(live.frame(null).at).from + roll.frame(time).seconds") > tab.run("time")
