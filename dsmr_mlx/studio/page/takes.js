// The alternative takes as cards with a small picture, and the tree of all takes.
import { byId, clock, setAttribute, setText } from "/shared/music.js";
import { fitCanvas } from "/shared/piano_roll.js";
import { pictured } from "./session.js";

const MAX_CARDS = 9; // as many as there are digits
const KINDS = {
  file: "File",
  played: "Played",
  continue: "Continued",
  replace: "Replaced",
  insert: "Inserted",
  lead: "Transition",
  duet: "Duet",
};

export function describe(take) {
  if (take.kind === "empty") return "A piece begins here";
  const where = take.parent === null ? clock(take.end) : `${clock(take.begin)}–${clock(take.end)}`;
  const how = [take.model, take.seed === null ? null : `seed ${take.seed}`].filter((part) => part);
  return [KINDS[take.kind] || take.kind, where, ...how].join(", ");
}

function make(tag, className, ...content) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...content);
  return node;
}

function button(text, className, label) {
  const node = make("button", className, text);
  node.type = "button";
  node.setAttribute("aria-label", label);
  return node;
}

// Reuses one element for each take, in order, so that focus and scroll positions stay.
function keepElements(parent, known, takes, create) {
  const ids = new Set(takes.map(({ id }) => id));
  for (const [id, node] of known) {
    if (ids.has(id)) continue;
    node.remove();
    known.delete(id);
  }
  takes.forEach((take, i) => {
    if (!known.has(take.id)) known.set(take.id, create(take));
    const node = known.get(take.id);
    if (parent.children[i] !== node) parent.insertBefore(node, parent.children[i] || null);
  });
}

function drawMiniature(canvas, music, take, colours) {
  const pen = fitCanvas(canvas),
    { clientWidth: width, clientHeight: height } = canvas;
  const [from, until] = pictured(take);
  let [low, high] = [127, 0];
  const shown = [...music.between(from, until)];
  for (const i of shown) [low, high] = [Math.min(low, music.pitch[i]), Math.max(high, music.pitch[i])];
  const row = height / Math.max(high - low + 3, 24),
    scale = width / (until - from),
    middle = (low + high) / 2;
  for (const i of shown) {
    pen.fillStyle = music.voice[i] ? colours.validation : colours.train;
    pen.globalAlpha = 0.35 + (0.65 * music.velocity[i]) / 127;
    const top = height / 2 - (music.pitch[i] - middle + 0.5) * row;
    pen.fillRect(
      (music.onset[i] - from) * scale,
      top,
      Math.max((music.end[i] - music.onset[i]) * scale, 1),
      Math.max(row, 1.5),
    );
  }
  pen.globalAlpha = 1;
}

export class Cards {
  // hear(take), keep(take, kept)
  constructor({ hear, keep }) {
    Object.assign(this, { hear, keep, list: byId("takes"), nodes: new Map(), drawn: new Map(), shown: [] });
  }

  // The music of the other takes of a growing group, drawn behind the selected one.
  ghosts(session) {
    const { take } = session;
    if (!take || take.group === null || !session.growing().length) return [];
    return this.shown
      .filter((other) => other.group === take.group && other.id !== take.id && other.kept !== false)
      .map((other) => session.ownMusic(other.id));
  }

  create(take) {
    const name = make("b"),
      note = make("span", "remark"),
      picture = make("canvas"),
      number = make("kbd");
    const hear = button("", "hear", "");
    hear.append(number, name, note, picture);
    const keep = button("✓", "keep", "Keep"),
      discard = button("✕", "discard", "Discard");
    hear.addEventListener("click", () => this.hear(take.id));
    keep.addEventListener("click", () => this.keep(take.id, true));
    discard.addEventListener("click", () => this.keep(take.id, false));
    return Object.assign(make("li", "card", hear, keep, discard), {
      parts: { hear, number, name, note, picture, keep, discard },
    });
  }

  render(session, colours) {
    this.shown = session.alternatives(session.take).slice(-MAX_CARDS);
    this.list.hidden = this.shown.length === 0;
    for (const id of this.drawn.keys()) if (!this.nodes.has(id)) this.drawn.delete(id);
    keepElements(this.list, this.nodes, this.shown, (take) => this.create(take));
    this.shown.forEach((take, i) => {
      const { parts } = this.nodes.get(take.id),
        node = this.nodes.get(take.id),
        chosen = take.id === session.selected;
      node.className = [
        "card",
        chosen && "chosen",
        take.kept && "kept",
        take.kept === false && "discarded",
        take.growing && "growing",
      ]
        .filter(Boolean)
        .join(" ");
      setText(parts.number, String(i + 1));
      setText(parts.name, take.name);
      setText(parts.note, take.growing ? `${clock(take.end - take.begin)} so far` : clock(take.end - take.begin));
      setAttribute(parts.hear, "aria-label", `Hear take ${i + 1}: ${take.name}, ${describe(take)}`);
      setAttribute(parts.hear, "aria-pressed", String(chosen));
      setAttribute(parts.keep, "aria-pressed", String(take.kept === true));
      setAttribute(parts.discard, "aria-pressed", String(take.kept === false));
      setAttribute(parts.keep, "title", `Keep${chosen ? " (K)" : ""}`);
      setAttribute(parts.discard, "title", `Discard${chosen ? " (X)" : ""}`);
      const music = session.picturedMusic(take.id),
        { clientWidth } = parts.picture,
        before = this.drawn.get(take.id);
      if (before && before.music === music && before.colours === colours && before.clientWidth === clientWidth) return;
      drawMiniature(parts.picture, music, take, colours);
      this.drawn.set(take.id, { music, colours, clientWidth });
    });
  }
}

export class Tree {
  // select(take), rename(take, name)
  constructor({ select, rename }) {
    Object.assign(this, {
      select,
      rename,
      list: byId("tree"),
      nodes: new Map(),
      order: [],
      focus: null,
      selected: null,
    });
    this.list.addEventListener("keydown", (event) => this.onKey(event));
  }

  create(take) {
    const mark = make("span", "mark"),
      name = make("b"),
      note = make("span", "remark"),
      node = make("li", "", mark, name, note);
    node.setAttribute("role", "treeitem");
    node.title = "Double-click or F2 to rename";
    node.addEventListener("click", () => name.isContentEditable || this.choose(take.id));
    node.addEventListener("dblclick", () => this.edit(take.id));
    node.addEventListener("focus", () => (this.focus = take.id));
    return Object.assign(node, { parts: { mark, name, note } });
  }

  render(session) {
    this.order = [];
    this.session = session;
    const walk = (parent, level) => {
      for (const take of session.children(parent)) {
        if (take.kind === "empty" && !session.children(take.id).length) continue;
        this.order.push({ id: take.id, level, parent, take });
        walk(take.id, level + 1);
      }
    };
    walk(null, 1);
    byId("no-takes").hidden = this.order.length > 0;
    const moved = session.selected !== this.selected;
    this.selected = session.selected;
    keepElements(
      this.list,
      this.nodes,
      this.order.map(({ take }) => take),
      (take) => this.create(take),
    );
    if (moved) this.reveal(this.nodes.get(this.selected));
    if (moved && !this.list.contains(document.activeElement)) this.focus = this.selected;
    const focused = this.order.some(({ id }) => id === this.focus) ? this.focus : this.order[0]?.id;
    for (const { id, level, take } of this.order) {
      const node = this.nodes.get(id),
        chosen = id === session.selected;
      node.className = [take.kept === false && "discarded", take.kept && "kept", take.growing && "growing"]
        .filter(Boolean)
        .join(" ");
      node.style.setProperty("--level", Math.min(level - 1, 8));
      setAttribute(node, "aria-level", String(level));
      setAttribute(node, "aria-selected", String(chosen));
      node.tabIndex = id === focused ? 0 : -1;
      setText(node.parts.mark, take.growing ? "…" : take.kept ? "✓" : take.kept === false ? "✕" : "");
      if (!node.parts.name.isContentEditable) setText(node.parts.name, take.name);
      setText(node.parts.note, describe(take));
    }
  }

  // Scrolls the list only, never the page.
  reveal(node) {
    const box = this.list.parentElement;
    if (!node || box.scrollHeight <= box.clientHeight) return;
    const top = node.offsetTop - box.offsetTop,
      bottom = top + node.offsetHeight;
    if (top < box.scrollTop) box.scrollTop = top - 40;
    else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight + 16;
  }

  choose(id) {
    this.focus = id;
    this.nodes.get(id)?.focus();
    if (id !== this.session.selected) this.select(id);
  }

  // Rename in place: Enter keeps the new name, Escape the old one.
  edit(id) {
    const node = this.nodes.get(id),
      { name } = node.parts,
      before = name.textContent;
    name.contentEditable = "true";
    name.setAttribute("role", "textbox");
    name.setAttribute("aria-label", "Name");
    name.focus();
    getSelection().selectAllChildren(name);
    const finish = (keep) => {
      name.contentEditable = "false";
      name.removeAttribute("role");
      name.removeAttribute("aria-label");
      name.onkeydown = name.onblur = null;
      const text = name.textContent.replace(/\s+/g, " ").trim();
      if (keep && text && text !== before) this.rename(id, text.slice(0, 200));
      else name.textContent = before;
      node.focus();
    };
    name.onblur = () => finish(true);
    name.onkeydown = (event) => {
      event.stopPropagation();
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      finish(event.key === "Enter");
    };
  }

  onKey(event) {
    const at = this.order.findIndex(({ id }) => id === this.focus),
      here = this.order[at];
    if (!here || event.ctrlKey || event.metaKey || event.altKey) return;
    const child = this.order.find(({ parent }) => parent === here.id);
    const moves = {
      ArrowDown: this.order[at + 1]?.id,
      ArrowUp: this.order[at - 1]?.id,
      ArrowLeft: here.parent,
      ArrowRight: child?.id,
      Home: this.order[0].id,
      End: this.order[this.order.length - 1].id,
    };
    if (event.key in moves) this.nodes.get(moves[event.key])?.focus();
    else if (event.key === "Enter") this.choose(here.id);
    else if (event.key === "F2") this.edit(here.id);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
